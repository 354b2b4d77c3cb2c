"""conv_per_sample in C++: reads each sample's kernel once and writes its gradient once.

Library calls lay every kernel out anew before they use it, which costs as much as the convolution
where a kernel serves few positions. Where it serves many they are as fast, and the layers there
have few channels, too few for a tile: what has many positions a channel is left to them, and what
has groups (`benchmarks/conv_per_sample.py`).
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.conv_per_sample import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.shapes import Geometry

# Positions a channel up to which the kernels here are used: for more taps than one in float32 and
# float64, and otherwise; library calls multiply bfloat16 twice as fast where the CPU can.
MANY, FEW = 7, 0.5
# stride, padding and dilation as lists, then groups, as the operator gets them.
Settings = Sequence[Any]
kernels = torch.ops.dynaconv_native


def serves(input: Tensor, weight: Tensor, output: Sequence[int], settings: Settings) -> bool:
    """Whether the C++ kernels compute an output of this shape; otherwise library calls do."""
    if settings[3] > 1 or not input.numel() or not weight.numel() or not prod(output):
        return False
    single = prod(weight.shape[3:]) == 1
    limit = FEW if single or input.dtype == torch.bfloat16 else MANY
    return prod(output[2:]) <= limit * min(weight.shape[1:3])


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    shape = eager.shape(input, weight, bias, *settings)
    if not serves(input, weight, shape, settings):
        return eager._forward(input, weight, bias, *settings)
    output = output_like(input, shape)
    kernels.conv_per_sample(input, weight.contiguous(), None, bias, output, *settings[:3], False)
    return output


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    *settings, mask = rest
    if not serves(input, weight, grad.shape, settings):
        return eager._backward(grad, input, weight, bias, *rest)
    gx = gw = None
    if mask[0]:
        gx = gradient_like(input)
        kernels.conv_per_sample(grad, weight.contiguous(), None, None, gx, *settings[:3], True)
    if mask[1]:
        gw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        kernels.conv_per_sample_weight(grad, input, gw, *settings[:3])
    return [gx, gw, grad.flatten(2).sum(2) if mask[2] else None]


operator = eager.twin("native_conv_per_sample", _forward, _backward)


def conv_per_sample(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    return operator(input, weight, bias, *map(list, geometry[1:]), groups)
