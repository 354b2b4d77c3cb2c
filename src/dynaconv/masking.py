"""Padding masks: which positions of a padded batch are real.

A mask is (N, *L) bool, True where real. The real positions of a sample start at index 0 of every
dimension and fill a block: a sentence's length, an image's height and width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.shapes import Geometry


class Padded(NamedTuple):
    """A batch (N, C, *L) of samples of different sizes, zero where the mask (N, *L) is False.

    The mask is None where every position is real.
    """

    data: Tensor
    mask: Tensor | None


def pad_batch(samples: Sequence[Tensor], value: float = 0, multiple: int = 1) -> Padded:
    """Samples (C, *L) of any sizes as one batch, filled up with `value` at the ends.

    The batch's sizes are the largest sample's, rounded up to a `multiple`.

    >>> data, mask = pad_batch([torch.ones(2, 3), torch.ones(2, 1)])
    >>> data.shape, mask.int().tolist()
    (torch.Size([2, 2, 3]), [[1, 1, 1], [1, 0, 0]])
    """
    if not samples:
        raise ValueError("pad_batch: there are no samples")
    first = samples[0]
    if any(s.dim() != first.dim() or s.shape[0] != first.shape[0] for s in samples):
        given = sorted({tuple(s.shape) for s in samples})
        raise ValueError(f"pad_batch: samples differ in more than size: {given}; give (C, *L)")
    sizes = torch.tensor([s.shape[1:] for s in samples], device=first.device)
    shape = [-(-n // multiple) * multiple for n in sizes.amax(0).tolist()]
    filled = torch.stack([fill_up(s, shape, value) for s in samples])
    return Padded(filled, mask_from_sizes(sizes, shape))


def unpad_batch(data: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The samples (C, *L) of a batch, each of its own size: the inverse of `pad_batch`."""
    if mask is None:
        return list(data)
    return [crop(d, n) for d, n in zip(data, sizes_from_mask(mask).tolist(), strict=True)]


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` positions of the last dimensions, one entry a dimension."""
    for d, length in enumerate(size, start=x.dim() - len(size)):
        x = x.narrow(d, 0, length)
    return x


def each_size(function: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor) -> Padded:
    """`function` on x (N, C, *L) as if each sample came alone, at its own size.

    Samples of one size go together, (n, C, *size), so `function` is called once a size; its
    outputs (n, C_out, *size_out) come back as one padded batch. A sample without a real position
    has none in the output; at least one sample must have some.
    """
    if not x.shape[0]:
        data = function(x)
        return Padded(data, mask.new_ones(0, *data.shape[2:]))
    sizes, inverse = sizes_from_mask(mask).unique(dim=0, return_inverse=True)
    groups = [(inverse == i).nonzero().flatten() for i in range(sizes.shape[0])]
    real = [
        function(crop(x[i], n)) if all(n) else None
        for i, n in zip(groups, sizes.tolist(), strict=True)
    ]
    channels = next(o.shape[1] for o in real if o is not None)
    empty = lambda index: x.new_zeros(index.shape[0], channels, *[0] * sizes.shape[1])
    outputs = [empty(i) if o is None else o for i, o in zip(groups, real, strict=True)]
    given = torch.tensor([o.shape[2:] for o in outputs], device=x.device)
    shape = given.amax(0).tolist()
    together = torch.cat([fill_up(o, shape) for o in outputs])
    return Padded(together[torch.cat(groups).argsort()], mask_from_sizes(given[inverse], shape))


def fill_up(x: Tensor, shape: Sequence[int], value: float = 0) -> Tensor:
    """x (..., *L) with `value` after it, up to the spatial shape `shape`."""
    ends = [n - m for n, m in zip(shape, x.shape[-len(shape) :], strict=True)]
    return F.pad(x, [w for end in reversed(ends) for w in (0, end)], value=value)


def mask_from_sizes(sizes: Tensor | Sequence, shape: Sequence[int]) -> Tensor:
    """The mask (N, *shape) of samples with the given sizes: (N,) lengths or (N, D) shapes.

    >>> mask_from_sizes([1, 3], (4,)).int().tolist()
    [[1, 0, 0, 0], [1, 1, 1, 0]]
    """
    sizes = torch.as_tensor(sizes)
    sizes = sizes.unsqueeze(1) if sizes.dim() == 1 else sizes
    if sizes.shape[1] != len(shape):
        raise ValueError(f"sizes have {sizes.shape[1]} dimensions, shape has {len(shape)}")
    mask = torch.ones(sizes.shape[0], *shape, dtype=torch.bool, device=sizes.device)
    for d, length in enumerate(shape):
        along = [-1 if i == d else 1 for i in range(len(shape))]
        index = torch.arange(length, device=sizes.device).reshape(1, *along)
        mask = mask & (index < sizes[:, d].reshape(-1, *[1] * len(shape)))
    return mask


def sizes_from_mask(mask: Tensor) -> Tensor:
    """Each sample's real size, (N, D), from its mask (N, *L)."""
    rank = mask.dim() - 1
    sizes = []
    for d in range(1, rank + 1):
        others = [i for i in range(1, rank + 1) if i != d]
        line = mask.any(others) if others else mask
        sizes.append(line.sum(1))
    return torch.stack(sizes, 1)


def output_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """The mask of a convolution's output: the positions that each sample has when alone.

    Where the output is as large as the input at any size, it is `mask` itself.
    """
    if all(s == 1 and 2 * p == d * (k - 1) for k, s, p, d in zip(*geometry, strict=True)):
        return mask
    sizes = sizes_from_mask(mask)
    columns = geometry.output_size(sizes.unbind(1))  # type: ignore[arg-type]
    shape = geometry.output_size(mask.shape[1:])
    return mask_from_sizes(torch.stack(columns, 1).clamp(min=0), shape)  # type: ignore[arg-type]


def replicate_edges(x: Tensor, mask: Tensor) -> Tensor:
    """x (N, C, *L) with the padding of each sample filled by its nearest real position."""
    for d, size in enumerate(sizes_from_mask(mask).clamp(min=1).unbind(1), start=2):
        nearest = torch.arange(x.shape[d], device=x.device).minimum(size.unsqueeze(1) - 1)
        along = [-1 if i == d else 1 for i in range(1, x.dim())]
        x = x.gather(d, nearest.unflatten(1, along).expand_as(x))
    return x


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real positions: (N, C, *L) -> (N, C). x is zero where the mask is False."""
    if mask is None:
        return x.flatten(2).mean(2)
    count = mask.flatten(1).sum(1, keepdim=True).clamp(min=1)
    return x.flatten(2).sum(2) / count.to(x.dtype)


def masked_detail(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of |x[p + 1] - x[p]| over all dimensions and pairs of real positions: (N, C)."""
    total, count = x.new_zeros(x.shape[:2]), x.new_zeros(x.shape[0], 1)
    for d in range(2, x.dim()):
        step = x.diff(dim=d).abs()
        if mask is not None:
            real = mask.narrow(d - 1, 1, step.shape[d])
            step = step.masked_fill(~real.unsqueeze(1), 0)
            count = count + real.flatten(1).sum(1, keepdim=True)
        else:
            count = count + step[0, 0].numel() if x.shape[0] else count
        total = total + step.flatten(2).sum(2)
    return total / count.clamp(min=1)


def check_mask(mask: Tensor, input: Tensor) -> None:
    """ValueError or TypeError unless `mask` is (N, *L) bool on the device of input (N, C, *L)."""
    wanted = (input.shape[0], *input.shape[2:])
    if mask.shape != wanted:
        raise ValueError(f"padding_mask has shape {tuple(mask.shape)}; give {tuple(wanted)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"padding_mask has dtype {mask.dtype}; give bool, True where real")
    if mask.device != input.device:
        raise ValueError(f"padding_mask is on {mask.device}, input on {input.device}")
