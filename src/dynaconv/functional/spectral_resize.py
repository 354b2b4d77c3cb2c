"""Resizing in the Fourier domain: to whole sizes, or to learned sizes through a soft mask."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynaconv.functional._checks import check_device, check_input, check_shape
from dynaconv.shapes import IntOrTuple, ntuple

NAME = "spectral_resize"


def spectral_resize(
    input: Tensor, size: IntOrTuple | Tensor, smoothness: float = 4.0, published: bool = False
) -> Tensor:
    """Spectral pooling (Rippel, NeurIPS 2015), differentiable in the size (Riad, ICLR 2022).

    With X the discrete Fourier transform of the input, f its frequencies from -L/2 to L/2:

        whole size M:     y = the M lowest frequencies of X, zeros where M > L, back at M positions
        learned size s:   t = (L // 2) s / L,   m(f) = clip(1 + (t - |f|) / smoothness, 0, 1)
                          y = the frequencies of m X where m(f) > 0, back at as many positions

    in each dimension. Values keep their scale: constants stay what they are, and a signal without
    frequencies beyond those kept is sampled at the new positions. Where M or L is even, the
    frequencies at plus and minus half of it share one bin: they are added, or split evenly.

    A learned size has its gradient through the mask; which frequencies are kept is not
    differentiated. The output has more than s positions, by the ramp, 2 * smoothness or so, and
    an odd number unless nothing is cut. At s = L the mask is 1 and the output the input.

    With `published` a learned size gives what the authors' code gives, in 2-D, and the same
    arithmetic in 1-D and 3-D. It differs: t = s / 2, and one more in the last dimension; values
    grow by prod(L) / prod(L_out); in the other dimensions the mask of the negative frequencies is
    shifted by one, and for an odd L that of the positive ones too, with which the highest one
    kept is an alias; the last dimension's output is even always, one short for an odd L.

    Args:
        input: (N, C, *L).
        size: an int, or one a dimension; or a floating-point tensor (D,), above 0. Learned sizes
            only shrink: beyond L nothing is cut.
        smoothness: the ramp's length in frequencies, above 0.
        published: follow the authors' code; for learned sizes only.

    Returns:
        (N, C, *L_out) in the input's dtype; half precision is computed in float32.

    Raises:
        ValueError: shapes or values out of range, with what was given and what is needed.
        TypeError: a dtype that is not floating point, sizes that are neither ints nor such.
    """
    rank = check_input(NAME, input)
    if not smoothness > 0:
        raise ValueError(f"{NAME}: smoothness={smoothness} must be above 0")
    if 0 in input.shape[2:]:
        raise ValueError(f"{NAME}: input has shape {tuple(input.shape)}; give at least 1 position")
    shape = tuple(input.shape[2:])
    if isinstance(size, Tensor):
        _check_learned(input, size, rank)
        new = resized_shape(shape, size, smoothness, published)
    elif published:
        raise ValueError(f"{NAME}: published=True is for learned sizes; give size as a tensor")
    else:
        new = ntuple(size, rank, "size")
    if 0 in input.shape[:2]:  # torch.fft refuses it; there is nothing to transform
        return input.sum(tuple(range(2, 2 + rank)), keepdim=True).expand(-1, -1, *new)
    x = input.float() if input.dtype.itemsize < 4 else input
    if published:
        return _published_resize(x, size, smoothness, new).to(input.dtype)  # type: ignore[arg-type]
    spectrum = _transform(x)
    if isinstance(size, Tensor):
        spectrum = _cut_learned(_soft_mask(spectrum, shape, size, smoothness), shape, new)
    else:
        spectrum = _cut(spectrum, shape, new)
    return _inverse(spectrum, new, "forward").to(input.dtype)


def resized_shape(
    shape: Sequence[int], size: Tensor, smoothness: float = 4.0, published: bool = False
) -> tuple[int, ...]:
    """The output's spatial shape for an input of spatial shape `shape` and learned sizes (D,)."""
    lengths: list[Any] = []
    for d, (length, wanted) in enumerate(zip(shape, size.detach(), strict=True)):
        last = d == len(shape) - 1
        if published:
            kept = _published_mask(length, wanted, smoothness, last).count_nonzero()
            kept = (2 * kept - 2).clamp(min=1) if last else kept
        else:
            kept = _mask(length, wanted, smoothness).count_nonzero()
            kept = torch.where(kept > length // 2, length, 2 * kept - 1)
        lengths.append(kept.item())  # not int(): that would ask for the value in an exported graph
        # What torch.compile has to know of a size that it cannot read.
        torch._check(lengths[-1] >= 1)
        torch._check(lengths[-1] <= length)
    return tuple(lengths)


def _check_learned(input: Tensor, size: Tensor, rank: int) -> None:
    check_device(NAME, input, size=size)
    if not size.is_floating_point():
        raise TypeError(
            f"{NAME}: size is a tensor of dtype {size.dtype}; give ints, or a floating-point tensor"
        )
    check_shape(NAME, "size", size, (rank,))
    fine = (size > 0).all() & size.isfinite().all()
    if torch.compiler.is_compiling():
        torch._assert_async(fine, f"{NAME}: size must be above 0 and finite")
    elif not fine:
        raise ValueError(f"{NAME}: size={size.tolist()} must be above 0 and finite")


def _transform(x: Tensor) -> Tensor:
    """The spectrum of x (N, C, *L), half of it in the last dimension, at the scale of x."""
    return torch.fft.rfftn(x, dim=tuple(range(2, x.dim())), norm="forward")


def _inverse(spectrum: Tensor, shape: Sequence[int], norm: str) -> Tensor:
    """The signal (N, C, *shape) of a spectrum, half of it in the last dimension."""
    dims = tuple(range(2, spectrum.dim()))
    if not torch.compiler.is_compiling():
        return torch.fft.irfftn(spectrum, s=tuple(shape), dim=dims, norm=norm)
    # The same by an FFT that asks nothing of a size that a value decides: each bin stands for its
    # mirror image too, but the first and that at half.
    half, bins = spectrum.shape[-1], torch.arange(spectrum.shape[-1], device=spectrum.device)
    alone = (bins == 0) | (2 * bins == shape[-1])
    rest = spectrum.new_zeros(*spectrum.shape[:-1], shape[-1] - half)
    whole = torch.cat([spectrum * (2 - alone.to(spectrum.real.dtype)), rest], -1)
    for d in dims:
        lines = whole.movedim(d, -1).contiguous()
        made = torch.fft.ifft(lines.flatten(0, -2), norm=norm)
        whole = made.unflatten(0, lines.shape[:-1]).movedim(-1, d)
    return whole.real


def _cut(spectrum: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The spectrum of a signal of spatial shape `old`, for one of spatial shape `new`."""
    *others, last = range(len(old))
    for d in others:
        if old[d] != new[d]:
            spectrum = _cut_whole(spectrum, d + 2, old[d], new[d])
    if old[last] == new[last]:
        return spectrum
    kept = min(old[last], new[last])
    spectrum = spectrum[..., : kept // 2 + 1]
    if kept % 2:
        return spectrum
    # The inverse makes 2 Re(X) of a bin and its mirror image, but Re(X) of the bin at half.
    factor = 2.0 if kept == new[last] else 0.5
    return torch.cat([spectrum[..., :-1], factor * spectrum[..., -1:]], -1)


def _cut_whole(spectrum: Tensor, dim: int, old: int, new: int) -> Tensor:
    """`_cut` in a dimension that holds positive and negative frequencies."""
    kept = min(old, new)
    positive, negative = (kept + 1) // 2, (kept - 1) // 2  # below half of `kept`
    low = spectrum.narrow(dim, 0, positive)
    high = spectrum.narrow(dim, old - negative, negative)
    gap = list(spectrum.shape)
    if kept % 2:
        gap[dim] = new - kept
        return torch.cat([low, spectrum.new_zeros(gap), high], dim)
    half = spectrum.narrow(dim, kept // 2, 1)
    if kept == new:
        return torch.cat([low, half + spectrum.narrow(dim, old - kept // 2, 1), high], dim)
    gap[dim] = new - kept - 1
    return torch.cat([low, half / 2, spectrum.new_zeros(gap), half / 2, high], dim)


def _cut_learned(spectrum: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """`_cut` to a size that is odd or `old` itself, where no frequencies share a bin."""
    *others, last = range(len(old))
    for d in others:
        low, high = new[d] // 2 + 1, (new[d] - 1) // 2
        parts = spectrum.narrow(d + 2, 0, low), spectrum.narrow(d + 2, old[d] - high, high)
        spectrum = torch.cat(parts, d + 2)
    return spectrum.narrow(last + 2, 0, new[last] // 2 + 1)


def _soft_mask(spectrum: Tensor, shape: Sequence[int], size: Tensor, smoothness: float) -> Tensor:
    """m X for the spectrum X of a signal of spatial shape `shape`."""
    for d, length in enumerate(shape):
        mask = _mask(length, size[d], smoothness)
        if d < len(shape) - 1:
            bins = torch.arange(length, device=mask.device)
            mask = mask[torch.minimum(bins, length - bins)]
        spectrum = spectrum * _along(mask.to(spectrum.real.dtype), d, len(shape))
    return spectrum


def _mask(length: int, size: Tensor, smoothness: float) -> Tensor:
    """m at the frequencies 0 to L // 2."""
    size = _precise(size)
    frequency = torch.arange(length // 2 + 1, device=size.device, dtype=size.dtype)
    threshold = (length // 2) * (size / max(length, 1))
    # In this order exactly 1 where the two are equal, so that size L is the identity.
    return ((threshold - frequency + smoothness) / smoothness).clamp(0, 1)


def _published_resize(x: Tensor, size: Tensor, smoothness: float, new: tuple[int, ...]) -> Tensor:
    dims, shape = tuple(range(2, x.dim())), x.shape[2:]
    spectrum = torch.fft.rfftn(x, dim=dims)
    for d, length in enumerate(shape):
        last = d == len(shape) - 1
        mask = _published_mask(length, size[d], smoothness, last)
        count = new[d] // 2 + 1 if last else new[d]
        kept = (mask == 0).byte().argsort(stable=True).narrow(0, 0, count)
        spectrum = spectrum.index_select(d + 2, kept)
        spectrum = spectrum * _along(mask[kept].to(x.dtype), d, len(shape))
    return _inverse(spectrum, new, "backward")


def _published_mask(length: int, size: Tensor, smoothness: float, last: bool) -> Tensor:
    """The mask of google-research/diffstride at the bins of a dimension."""
    size = _precise(size)
    bins = torch.arange(length // 2 + 1 if last else length, device=size.device)
    if last:
        position, threshold = bins, size / 2 + 1
    else:
        position = torch.where(bins < length // 2, bins + length % 2, length - 1 - bins)
        threshold = size / 2
    return ((smoothness + threshold - position) / smoothness).clamp(0, 1)


def _precise(size: Tensor) -> Tensor:
    """Half precision cannot hold a size."""
    return size.float() if size.dtype.itemsize < 4 else size


def _along(vector: Tensor, d: int, rank: int) -> Tensor:
    """A vector that broadcasts along spatial dimension d."""
    return vector.reshape(-1, *(1,) * (rank - 1 - d))
