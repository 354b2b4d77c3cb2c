"""Sizes, strides and paddings of n-d convolution: the arithmetic that every primitive shares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IntOrTuple = int | Sequence[int]
# In an exported graph a size is a symbol.
INTS = (int, torch.SymInt)
Padding = int | Sequence[int] | str
# torch's own convolutions count in 32 bits.
LARGEST = 2**31 - 1
# Longer steps than anybody takes: what they reach is looked at before memory is laid out by them.
FAR = 64


class Geometry(NamedTuple):
    """How a kernel moves over the input; every field has one entry a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for an input of spatial shape `size`."""
        return tuple(
            (length + 2 * p - d * (k - 1) - 1) // s + 1
            for length, k, s, p, d in zip(
                size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def within(self, size: Sequence[int]) -> "Geometry":
        """What gives the same on an input of spatial shape `size`, without steps beyond its end.

        The dilation of a kernel of one tap, and a stride to a second position where one fits.
        """
        if all(step <= FAR for step in (*self.stride, *self.dilation)):
            return self
        dilation = tuple(
            1 if k == 1 else d for k, d in zip(self.kernel, self.dilation, strict=True)
        )
        near = self._replace(dilation=dilation)
        room = near._replace(stride=(1,) * len(dilation)).output_size(size)
        stride = tuple(max(1, min(s, n)) for s, n in zip(self.stride, room, strict=True))
        return near._replace(stride=stride)


def enlarged_size(
    size: Sequence[int], geometry: Geometry, output_padding: Sequence[int]
) -> tuple[int, ...]:
    """Spatial shape of a transposed convolution's output for an input of spatial shape `size`."""
    return tuple(
        (length - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for length, k, s, p, d, extra in zip(size, *geometry, output_padding, strict=True)
    )


def ntuple(value: IntOrTuple, rank: int, name: str, minimum: int = 1) -> tuple[int, ...]:
    """`value` once a dimension: 3 -> (3, 3) at rank 2. ValueError names `name`."""
    many = isinstance(value, Sequence) and not isinstance(value, bytes)
    values: tuple = tuple(value) if many else (value,) * rank  # type: ignore[arg-type]
    if len(values) == 1:
        values = values * rank
    if len(values) != rank:
        raise ValueError(f"{name}={value!r} has {len(values)} entries; give 1 or {rank}")
    if any(isinstance(v, bool) or not isinstance(v, INTS) for v in values):
        raise TypeError(f"{name}={value!r} must be int or a tuple of {rank} ints")
    if any(v < minimum for v in values):
        raise ValueError(f"{name}={value!r} must be at least {minimum}")
    if not torch.compiler.is_compiling() and any(v > LARGEST for v in values):
        raise ValueError(f"{name}={value!r} must be at most {LARGEST}")
    return values


def surely(condition: bool) -> bool:
    """Whether a condition on sizes holds, at whatever size where they are traced.

    A branch on it does not tie a compiled or exported graph to the sizes it was traced at.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_padding(
    kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after each dimension for an output as long as the input."""
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def check_padding(padding: Padding, stride: tuple[int, ...], rank: int) -> tuple[int, ...] | str:
    """`padding` as a tuple, or the words "same" and "valid" as they are."""
    if not isinstance(padding, str):
        return ntuple(padding, rank, "padding", minimum=0)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding={padding!r}; the words are 'same' and 'valid'")
    if padding == "same" and any(s != 1 for s in stride):
        raise ValueError(f"padding='same' needs stride 1, got stride={stride}")
    return padding


def resolve_padding(
    input: Tensor,
    kernel: tuple[int, ...],
    stride: IntOrTuple,
    padding: Padding,
    dilation: IntOrTuple,
) -> tuple[Tensor, Geometry]:
    """Everything as tuples, with padding the same on both sides.

    An even kernel under "same" needs one zero more after than before, as in
    torch.nn.functional.conv2d: that zero is added to the input here.
    """
    rank = len(kernel)
    stride = ntuple(stride, rank, "stride")
    dilation = ntuple(dilation, rank, "dilation")
    resolved = check_padding(padding, stride, rank)
    if resolved == "valid":
        resolved = (0,) * rank
    if resolved == "same":
        before, after = same_padding(kernel, dilation)
        extra = [0, 0] * rank
        extra[1::2] = [b - a for a, b in zip(reversed(before), reversed(after), strict=True)]
        input = F.pad(input, extra) if any(extra) else input
        resolved = before
    geometry = Geometry(kernel, stride, tuple(resolved), dilation)  # type: ignore[arg-type]
    return input, geometry.within(input.shape[2:])


def windows(x: Tensor, geometry: Geometry) -> Tensor:
    """What the kernel sees at every output position: x (N, C, *L) as a view (N, C, *K, *L_out).

    x is padded already.
    """
    rank = len(geometry.kernel)
    spans = [step * (k - 1) + 1 for k, step in zip(geometry.kernel, geometry.dilation, strict=True)]
    if torch.compiler.is_compiling():
        # Side by side, torch would ask whether they leave a rest, and compile for either answer.
        rests = [int(span == s > 1) for span, s in zip(spans, geometry.stride, strict=True)]
        spans = [span + rest for span, rest in zip(spans, rests, strict=True)]
        x = F.pad(x, [p for rest in reversed(rests) for p in (0, rest)]) if any(rests) else x
    for d, (k, s, step) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        x = x.unfold(2 + d, spans[d], s)[..., : step * (k - 1) + 1 : step]
    positions, taps = range(2, 2 + rank), range(2 + rank, 2 + 2 * rank)
    return x.permute(0, 1, *taps, *positions)


def zero_padded(x: Tensor, geometry: Geometry) -> Tensor:
    """x (N, C, *L) with the geometry's zeros around it."""
    return F.pad(x, [p for pad in reversed(geometry.padding) for p in (pad, pad)])


def mixed(weight: Tensor, coefficients: Tensor) -> Tensor:
    """sum_e coefficients[n, e] * weight[e]: coefficients (N, E), or (N, E, *K) for each tap."""
    if coefficients.dim() == 2:
        return torch.einsum("ne,e...->n...", coefficients, weight)
    by_tap = torch.einsum("nek,eock->nock", coefficients.flatten(2), weight.flatten(3))
    return by_tap.unflatten(3, weight.shape[3:])
