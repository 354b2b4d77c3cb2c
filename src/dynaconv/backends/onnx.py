"""Formulations for an ONNX graph: plain operators of ONNX, with a batch of any size.

ONNX has no view of windows and fixes the groups of its convolutions, so that samples cannot be
groups: here a kernel moves tap by tap, over slices of the input. Not registered: in force within
`dynaconv.export_onnx` alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.backends import reference
from dynaconv.backends.reference import mixture
from dynaconv.dispatch import Backend, Problem
from dynaconv.shapes import Geometry, zero_padded

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DEFORM_OPSET = 19  # the first that has DeformConv


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """torch's. A padding that follows a size is written into the input: ONNX's is a number."""
    if any(isinstance(p, torch.SymInt) for p in geometry.padding):
        input = zero_padded(input, geometry)
        geometry = geometry._replace(padding=(0,) * len(geometry.padding))
    return CONVS[len(geometry.kernel)](input, weight, bias, *geometry[1:], groups)


def conv_per_sample(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """A matrix product a tap, summed."""
    kernel = weight.flatten(3).unflatten(1, (groups, -1))
    seen = (t.flatten(2).unflatten(1, (groups, -1)) for t in tap_slices(input, geometry))
    output = reduce(torch.add, (kernel[..., k] @ x for k, x in enumerate(seen))).flatten(1, 2)
    if bias is not None:
        output = output + bias.unsqueeze(-1)
    return output.unflatten(2, geometry.output_size(input.shape[2:]))


def conv_mixture(
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """Mixed kernels, one a sample."""
    return conv_per_sample(input, *mixture(weight, coefficients, bias), geometry, groups)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A product a tap, summed."""
    groups = weight.shape[1]
    kernel = weight.flatten(2, 1 + len(geometry.kernel)).unsqueeze(2)
    seen = (t.unflatten(1, (groups, -1)) for t in tap_slices(input, geometry))
    return reduce(torch.add, (kernel[:, :, :, k] * x for k, x in enumerate(seen))).flatten(1, 2)


def conv_transpose_per_sample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    size: tuple[int, ...],
    groups: int,
) -> Tensor:
    """What every tap adds to its phase of the output, and the phases side by side.

    A phase is every stride-th position from one of the first on.
    """
    rank, stride = len(size), geometry.stride
    kernel = weight.flatten(3).unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2)
    made = kernel.flatten(2, 3) @ input.flatten(2).unflatten(1, (groups, -1))
    made = made.unflatten(2, kernel.shape[2:4]).flatten(1, 2).unflatten(3, input.shape[2:])
    reach = [d * (k - 1) // s for k, s, _, d in zip(*geometry, strict=True)]
    phases: dict[tuple[int, ...], Tensor] = {}
    for k, tap in enumerate(product(*map(range, geometry.kernel))):
        places = [i * d for i, d in zip(tap, geometry.dilation, strict=True)]
        phase = tuple(at % s for at, s in zip(places, stride, strict=True))
        before = [at // s for at, s in zip(places, stride, strict=True)]
        part = F.pad(
            made[:, :, k], _widths(before, [r - b for r, b in zip(reach, before, strict=True)])
        )
        phases[phase] = phases[phase] + part if phase in phases else part
    empty = torch.zeros_like(next(iter(phases.values())))
    whole = [phases.get(phase, empty) for phase in product(*map(range, stride))]
    output = torch.stack(whole, 2).unflatten(2, stride)
    order = [axis for d in range(rank) for axis in (2 + rank + d, 2 + d)]
    output = output.permute(0, 1, *order)
    for d in range(rank):
        output = output.flatten(2 + d, 3 + d)
    ends = [n + p - m for n, p, m in zip(size, geometry.padding, output.shape[2:], strict=True)]
    output = F.pad(output, _widths([-p for p in geometry.padding], ends))
    return output if bias is None else output + bias[(..., *(None,) * rank)]


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """ONNX's DeformConv; a line is an image one position high.

    Its settings are numbers: where they follow a size that is free, the reference serves.
    """
    if any(isinstance(n, torch.SymInt) for n in (groups, *geometry.stride)):
        return reference.deform_conv(input, offset, weight, bias, modulation, geometry, groups)
    if input.dim() == 3:
        shifts = torch.stack([torch.zeros_like(offset), offset], 2).flatten(1, 2)
        tall = Geometry(*((n, *of) for n, of in zip((1, 1, 0, 1), geometry, strict=True)))
        input, shifts, weight = (t.unsqueeze(-2) for t in (input, shifts, weight))
        modulation = None if modulation is None else modulation.unsqueeze(-2)
        return deform_conv(input, shifts, weight, bias, modulation, tall, groups).squeeze(-2)
    attributes: dict[str, Any] = {
        "kernel_shape": list(geometry.kernel),
        "strides": list(geometry.stride),
        "pads": 2 * list(geometry.padding),
        "dilations": list(geometry.dilation),
        "group": groups,
        "offset_group": offset.shape[1] // (2 * prod(geometry.kernel)),
    }
    return torch.onnx.ops.symbolic(
        "DeformConv",
        (input, weight, offset, bias, modulation),
        attributes,
        dtype=input.dtype,
        shape=(input.shape[0], weight.shape[0], *offset.shape[2:]),
        version=DEFORM_OPSET,
    )


def tap_slices(input: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """What each tap sees, (N, C, *L_out), from the first tap to the last."""
    size = geometry.output_size(input.shape[2:])
    return _slices(zero_padded(input, geometry), geometry, size, 0)


def _slices(x: Tensor, geometry: Geometry, size: tuple[int, ...], d: int) -> Iterator[Tensor]:
    """Of x, sliced already in the dimensions before d."""
    if d == len(size):
        yield x
        return
    stride, dilation = geometry.stride[d], geometry.dilation[d]
    for start in range(0, geometry.kernel[d] * dilation, dilation):
        part = x.narrow(2 + d, start, (size[d] - 1) * stride + 1)
        every = (slice(None),) * (2 + d) + (slice(None, None, stride),)
        yield from _slices(part[every] if stride > 1 else part, geometry, size, d + 1)


def _widths(before: list, after: list) -> list:
    """Of F.pad."""
    return [w for pair in zip(before[::-1], after[::-1], strict=True) for w in pair]


def supports(problem: Problem) -> str | None:
    """Everything, where DeformConv can take it."""
    if problem.primitive != "deform_conv":
        return None
    if problem.rank == 3:
        return "ONNX has DeformConv for images and lines"
    if problem.dtype not in (torch.float32, torch.float64):
        return "DeformConv has offsets in the dtype of its data: too coarse"
    return None


FUNCTIONS = (
    *(conv, conv_per_sample, conv_mixture, conv_per_position),
    conv_transpose_per_sample,
)
# The exporter writes an inverse real FFT that onnxruntime refuses.
STANDARD = Backend("onnx", supports, {f.__name__: f for f in FUNCTIONS}, has_fft=False)
WITH_DEFORM = replace(STANDARD, functions=STANDARD.functions | {"deform_conv": deform_conv})
