"""deform_conv in C++: csrc/kernels/deform_conv.cpp says how."""

from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.deform_conv import operator as eager
from dynaconv.backends.operator import gradient_like, output_like


def _planes(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each as (batch, channels, positions): a view wherever the strides allow it."""
    return [None if t is None else t.flatten(2) for t in tensors]


def _sizes(input: Tensor, offset: Tensor, weight: Tensor, settings: tuple) -> tuple[Any, ...]:
    shapes = [list(t.shape[2:]) for t in (input, offset, weight)]
    return (*shapes, *map(list, settings[:3]), settings[3])


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *settings: Any,
) -> Tensor:
    output = output_like(input, eager.shape(input, offset, weight))
    torch.ops.dynaconv_native.deform_conv(
        *_planes(input, offset, weight.contiguous()),
        None if bias is None else bias.contiguous(),
        *_planes(modulation),
        *_sizes(input, offset, weight, settings),
        output.flatten(2),
    )
    return output


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    *settings, mask = rest
    gx, goffset, gmodulation = (
        gradient_like(t) if wanted and t is not None else None
        for t, wanted in ((input, mask[0]), (offset, mask[1]), (modulation, mask[4]))
    )
    gweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if mask[2] else None
    torch.ops.dynaconv_native.deform_conv_backward(
        *_planes(grad, input, offset, weight.contiguous(), modulation),
        *_sizes(input, offset, weight, tuple(settings)),
        *_planes(gx, goffset, gweight, gmodulation),
    )
    over = (0, *range(2, grad.dim()))
    return [gx, goffset, gweight, grad.sum(over) if mask[3] else None, gmodulation]


operator = eager.twin("native_deform_conv", _forward, _backward)


def deform_conv(*args: Any) -> Tensor:
    *tensors, geometry, groups = args
    return operator(*tensors, *map(list, geometry[1:]), groups)
