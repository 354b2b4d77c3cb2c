"""conv_per_position in C++: csrc/kernels/conv_per_position.cpp."""

from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.conv_per_position import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.shapes import Geometry

kernels = torch.ops.dynaconv_native


def _forward(input: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    output = output_like(input, eager.shape(input, weight, *geometry))
    kernels.conv_per_position(output, input, weight, *geometry)
    return output


def _backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> list[Tensor | None]:
    *geometry, mask = rest
    gx = gw = None
    if mask[0]:
        gx = gradient_like(input)
        kernels.conv_per_position_input(gx, grad, weight, *geometry)
    if mask[1]:
        gw = gradient_like(weight)
        kernels.conv_per_position_weight(gw, grad, input, *geometry)
    return [gx, gw]


operator = eager.twin("native_conv_per_position", _forward, _backward)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return operator(input, weight, *map(list, geometry[1:]))
