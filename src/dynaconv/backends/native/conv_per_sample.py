"""conv_per_sample in C++: reads each sample's kernel once and writes its gradient once.

Library calls lay every kernel out anew before they use it, which costs as much as the convolution
where a kernel serves few positions. Where it serves many, they are as fast (POSITIONS, from
`benchmarks/conv_per_sample.py`); groups and single taps are left to them as well.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.conv_per_sample import operator as eager
from dynaconv.backends.operator import GEOMETRY, Operator, gradient_like, output_like
from dynaconv.shapes import Geometry

# Positions up to which the kernels here are used.
POSITIONS = 512
# stride, padding and dilation as lists, then groups, as the operator gets them.
Settings = Sequence[Any]
kernels = torch.ops.dynaconv_native


def serves(kernel: Sequence[int], positions: int, settings: Settings) -> bool:
    """Whether the C++ kernels compute this; otherwise library calls do."""
    return settings[3] == 1 and prod(kernel) > 1 and 0 < positions <= POSITIONS


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    shape = eager.shape(input, weight, bias, *settings)
    if not input.numel() or not serves(weight.shape[3:], prod(shape[2:]), settings):
        return eager._forward(input, weight, bias, *settings)
    output = output_like(input, shape)
    kernels.conv_per_sample(input, weight.contiguous(), None, bias, output, *settings[:3], False)
    return output


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    *settings, mask = rest
    size = prod(grad.shape[2:])
    if not grad.numel() or not input.numel() or not serves(weight.shape[3:], size, settings):
        return eager._backward(grad, input, weight, bias, *rest)
    gx = gw = None
    if mask[0]:
        gx = gradient_like(input)
        kernels.conv_per_sample(grad, weight.contiguous(), None, None, gx, *settings[:3], True)
    if mask[1]:
        gw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        kernels.conv_per_sample_weight(grad, input, gw, *settings[:3])
    return [gx, gw, grad.flatten(2).sum(2) if mask[2] else None]


operator = Operator(
    "native_conv_per_sample",
    ("input", "weight", "bias?"),
    (),
    f"{GEOMETRY}, int groups",
    _forward,
    _backward,
    eager.reference,
    eager.shape,
    eager.flops,
)


def conv_per_sample(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    return operator(input, weight, bias, *map(list, geometry[1:]), groups)
