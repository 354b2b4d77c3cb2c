"""conv_mixture in C++: kernels are mixed in pieces that stay in the cache, where they are used.

Neither mixed kernels nor their gradients go to memory. What library calls do as well is left to
them, by the same rule as for conv_per_sample.
"""

from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.conv_mixture import arguments
from dynaconv.backends.eager.conv_mixture import operator as eager
from dynaconv.backends.native.conv_per_sample import kernels, serves
from dynaconv.backends.operator import gradient_like, output_like


def _forward(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    shape = eager.shape(input, weight, coefficients, bias, *settings)
    if not serves(input, weight, shape, settings):
        return eager._forward(input, weight, coefficients, bias, *settings)
    output = output_like(input, shape)
    mixing = weight.contiguous(), coefficients.contiguous()
    kernels.conv_per_sample(input, *mixing, bias, output, *settings[:3], False)
    return output


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    *settings, mask = rest
    if not serves(input, weight, grad.shape, settings):
        return eager._backward(grad, input, weight, coefficients, bias, *rest)
    gx = gw = gc = None
    mixing = weight.contiguous(), coefficients.contiguous()
    if mask[0]:
        gx = gradient_like(input)
        kernels.conv_per_sample(grad, *mixing, None, gx, *settings[:3], True)
    if mask[1] or mask[2]:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gw = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        count = kernels.conv_mixture_parts(grad, input, weight, *settings[:3])
        parts = torch.empty((count, *coefficients.shape), dtype=dtype, device=weight.device)
        kernels.conv_mixture_weight(grad, input, *mixing, gw, parts, *settings[:3])
        gw, gc = gw.to(weight.dtype), parts.sum(0).to(weight.dtype)
    return [gx, gw, gc, grad.flatten(2).sum(2) if mask[3] else None]


operator = eager.twin("native_conv_mixture", _forward, _backward)


def conv_mixture(*args: Any) -> Tensor:
    return operator(*arguments(*args))
