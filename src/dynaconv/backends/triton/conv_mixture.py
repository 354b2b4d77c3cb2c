"""conv_mixture in Triton: kernels are mixed tile by tile where they are multiplied, or beforehand,
or outputs are mixed.

Mixed where they are used, E kernels are read for each tile of positions; mixed beforehand, N
kernels are written and read again; and E outputs take E times the operations of one. With few
positions under a kernel the last is cheapest, with few enough for one tile the first.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends.eager.conv_mixture import arguments, outputs, outputs_backward
from dynaconv.backends.eager.conv_mixture import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.backends.triton.conv_per_sample import (
    channels_before_taps,
    channels_last,
    convolve,
    kernel_gradient,
)
from dynaconv.backends.triton.launch import geometry_of, register, rows_of, sizes_of

# Outputs of positions, all experts together, below which mixing outputs pays: what a GPU computes
# while it moves one number.
OUTPUTS = 512
# Positions of a tile, and experts whose reading pays.
TILE, FEW = 64, 8


def formulation(weight: Tensor, coefficients: Tensor, positions: int, groups: int) -> str:
    """What to mix: "outputs", "tiles" of kernels where they are used, or "kernels" beforehand."""
    if coefficients.dim() == 2 and groups == 1 and weight.shape[0] * positions <= OUTPUTS:
        return "outputs"
    return "tiles" if positions <= TILE and coefficients.shape[1] <= FEW else "kernels"


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
    out: Tensor, source: Tensor, experts: Tensor, coefficients: Tensor, choice: str, *rest: Any
) -> None:
    """`conv_per_sample.convolve` with the mixture of each sample."""
    if choice == "tiles":
        convolve(out, source, experts, coefficients, *rest)
    else:
        convolve(out, source, mixed(experts, coefficients), None, *rest)


def _forward(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    shape = eager.shape(input, weight, coefficients, bias, *settings)
    output = output_like(input, shape)
    if not output.numel():
        return output
    choice = formulation(weight, coefficients, prod(shape[2:]), settings[3])
    if choice == "outputs":
        return outputs(input, weight, coefficients, bias, settings)
    geometry, sizes = geometry_of(weight.shape[3:], settings), sizes_of(input, output)
    experts = channels_last(weight)
    _convolve(output, input, experts, coefficients, choice, bias, sizes, geometry, settings[3])
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
    gb = grad.flatten(2).sum(2) if mask[3] else None
    if not grad.numel() or not input.numel():
        return [torch.zeros_like(t) for t in (input, weight, coefficients)] + [gb]
    choice = formulation(weight, coefficients, prod(grad.shape[2:]), settings[3])
    if choice == "outputs":
        gradients = outputs_backward(grad, input, weight, coefficients, settings, mask[:3])
        return [*gradients, gb]
    geometry, sizes = geometry_of(weight.shape[3:], settings), sizes_of(input, grad)
    experts = channels_last(weight)
    slopes = rows_of(grad).transpose(1, 2)
    gx = gw = gc = None
    if mask[0]:
        gx = gradient_like(input)
        rest = (None, sizes, geometry, settings[3], True)
        _convolve(gx, slopes, experts, coefficients, choice, *rest)
    if mask[1] or mask[2]:
        each = kernel_gradient(slopes, input, sizes, geometry, settings[3])
        gw, gc = unmixed(each, experts, coefficients)
        gw = channels_before_taps(gw, weight.shape)
    return [gx, gw, gc, gb]


operator = eager.twin("triton_conv_mixture", _forward, _backward, register)


def conv_mixture(*args: Any) -> Tensor:
    return operator(*arguments(*args))
