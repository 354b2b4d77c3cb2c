"""conv_per_position in ATen: one multiply-add over the whole map for each tap.

No unfolded copy: the padded input is shifted, tap by tap, and added up. The backward goes through
the taps in the same way and keeps nothing but input and weight.
"""

from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.backends import reference
from dynaconv.backends.operator import GEOMETRY, Operator, memory_format, output_like
from dynaconv.shapes import Geometry


def _geometry(input: Tensor, weight: Tensor, settings: tuple) -> Geometry:
    rank = input.dim() - 2
    return Geometry(tuple(weight.shape[2 : 2 + rank]), *map(tuple, settings[:3]))


def _pad(input: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """(N, G, C / G, *padded L)."""
    widths = [p for pad in reversed(geometry.padding) for p in (pad, pad)]
    return (F.pad(input, widths) if any(widths) else input).unflatten(1, (groups, -1))


def _taps(geometry: Geometry, size: tuple[int, ...]) -> list[tuple[tuple, tuple]]:
    """For each tap its index in the kernel, and the slices of the padded input that it sees."""
    return [
        (
            tap,
            tuple(
                slice(k * d, k * d + s * (length - 1) + 1, s)
                for k, d, s, length in zip(
                    tap, geometry.dilation, geometry.stride, size, strict=True
                )
            ),
        )
        for tap in product(*map(range, geometry.kernel))
    ]


def _accumulator(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros in the layout of `like`; half types add up in float32."""
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    format = memory_format(like)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=format).zero_()


def _shape(input: Tensor, weight: Tensor, *settings: Any) -> tuple:
    return (*input.shape[:2], *_geometry(input, weight, settings).output_size(input.shape[2:]))


def _forward(input: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    geometry, groups = _geometry(input, weight, settings), weight.shape[1]
    shape = _shape(input, weight, *settings)
    if not input.numel():
        return output_like(input, shape)
    padded, output = _pad(input, geometry, groups), _accumulator(shape, input)
    grouped = output.unflatten(1, (groups, -1))
    for tap, seen in _taps(geometry, shape[2:]):
        grouped.addcmul_(_at(weight, tap), padded[(..., *seen)])
    return output.to(input.dtype)


def _at(weight: Tensor, tap: tuple[int, ...]) -> Tensor:
    """The factor of one tap at every position: (N, G, 1, *L_out)."""
    return weight[(slice(None), slice(None), None, *tap)]


def _backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> list[Tensor | None]:
    *settings, mask = rest
    geometry = _geometry(input, weight, tuple(settings))
    if not input.numel():
        return [torch.zeros_like(input), torch.zeros_like(weight)]
    # One after the other: together, their operands do not fit into the cache.
    gx = _input_gradient(grad, input, weight, geometry) if mask[0] else None
    gw = _weight_gradient(grad, input, weight, geometry) if mask[1] else None
    return [gx, gw]


def _input_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dx[p + k] += weight[k, p] g[p], tap by tap."""
    groups = weight.shape[1]
    size = [n + 2 * p for n, p in zip(input.shape[2:], geometry.padding, strict=True)]
    padded = _accumulator((*input.shape[:2], *size), input)
    grouped, g = padded.unflatten(1, (groups, -1)), grad.unflatten(1, (groups, -1))
    for tap, seen in _taps(geometry, tuple(grad.shape[2:])):
        grouped[(..., *seen)].addcmul_(_at(weight, tap), g)
    inner = [slice(p, p + n) for p, n in zip(geometry.padding, input.shape[2:], strict=True)]
    return padded[(slice(None), slice(None), *inner)].to(input.dtype)


def _weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dweight[k, p] = sum_c g[c, p] x[c, p + k], tap by tap."""
    groups = weight.shape[1]
    padded, g = _pad(input, geometry, groups), grad.unflatten(1, (groups, -1))
    gw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    product_ = torch.empty_like(g)
    for tap, seen in _taps(geometry, tuple(grad.shape[2:])):
        torch.mul(g, padded[(..., *seen)], out=product_)
        torch.sum(product_, 2, out=gw[(slice(None), slice(None), *tap)])
    return gw


def _reference(input: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    return reference.conv_per_position(input, weight, _geometry(input, weight, settings))


def _flops(input: tuple, weight: tuple, *rest: Any) -> int:
    return 2 * prod(rest[-1]) * prod(weight[2 : len(input)])


operator = Operator(
    "conv_per_position",
    ("input", "weight"),
    (),
    GEOMETRY,
    _forward,
    _backward,
    _reference,
    _shape,
    _flops,
)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return operator(input, weight, *map(list, geometry[1:]))
