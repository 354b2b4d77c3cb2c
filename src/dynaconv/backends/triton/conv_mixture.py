"""conv_mixture in Triton: kernels are mixed tile by tile where they are multiplied, or beforehand.

Mixed where they are used, E kernels are read for each tile of positions; mixed beforehand, N
kernels are written and read again. The first is cheaper where a sample's positions fill one tile.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.conv_mixture import arguments
from dynaconv.backends.eager.conv_mixture import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.backends.triton.conv_per_sample import (
    channels_before_taps,
    channels_last,
    convolve,
    kernel_gradient,
)
from dynaconv.backends.triton.launch import geometry_of, register, sizes_of

# Positions of a tile, and experts whose reading pays.
TILE, FEW = 64, 8


def fuses(positions: int, coefficients: Tensor) -> bool:
    """Whether kernels are mixed in the tiles that use them."""
    return positions <= TILE and coefficients.shape[1] <= FEW


def mixed(experts: Tensor, coefficients: Tensor) -> Tensor:
    """The kernels (N, C_out, taps, C_in / groups) of all samples, from experts (E, ...)."""
    if coefficients.dim() == 2:
        return (coefficients @ experts.flatten(1)).unflatten(1, experts.shape[1:])
    return torch.einsum("nek,eokj->nokj", coefficients.flatten(2), experts)


def unmixed(each: Tensor, experts: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradients of mixed kernels those of experts and coefficients."""
    if coefficients.dim() == 2:
        flat = each.flatten(1)
        by_expert = (coefficients.t() @ flat).unflatten(1, each.shape[1:])
        return by_expert, flat @ experts.flatten(1).t()
    by_expert = torch.einsum("nek,nokj->eokj", coefficients.flatten(2), each)
    return by_expert, torch.einsum("nokj,eokj->nek", each, experts).reshape(coefficients.shape)


def _convolve(
    out: Tensor, source: Tensor, experts: Tensor, coefficients: Tensor, *rest: Any
) -> None:
    """`conv_per_sample.convolve` with the mixture of each sample."""
    if not out.numel():
        return
    if fuses(prod(out.shape[2:]), coefficients):
        convolve(out, source, experts, coefficients, *rest)
    else:
        convolve(out, source, mixed(experts, coefficients), None, *rest)


def _forward(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    output = output_like(input, eager.shape(input, weight, coefficients, bias, *settings))
    geometry, sizes = geometry_of(weight.shape[3:], settings), sizes_of(input, output)
    experts = channels_last(weight)
    _convolve(output, input, experts, coefficients, bias, sizes, geometry, settings[3])
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
    geometry, sizes = geometry_of(weight.shape[3:], settings), sizes_of(input, grad)
    experts = channels_last(weight)
    gx = gw = gc = None
    if mask[0]:
        gx = gradient_like(input)
        _convolve(gx, grad, experts, coefficients, None, sizes, geometry, settings[3], True)
    if mask[1] or mask[2]:
        each = kernel_gradient(grad, input, sizes, geometry, settings[3])
        gw, gc = unmixed(each, experts, coefficients)
        gw = channels_before_taps(gw, weight.shape)
    return [gx, gw, gc, grad.flatten(2).sum(2) if mask[3] else None]


operator = eager.twin("triton_conv_mixture", _forward, _backward, register)


def conv_mixture(*args: Any) -> Tensor:
    return operator(*arguments(*args))
