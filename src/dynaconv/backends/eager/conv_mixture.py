"""conv_mixture in ATen: mixes kernels, a few samples at a time, or mixes the experts' outputs.

The cost rule: mixing kernels writes N * C_out * C_in / groups * prod(K) numbers and then convolves
once; mixing outputs convolves E times. Outputs win where a kernel serves few positions. Kernels are
mixed for as many samples as fit into CHUNK numbers, so that neither all N mixed kernels nor their
gradients are ever held: the memory that the usual form needs most.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends import reference
from dynaconv.backends.eager import conv_per_sample as per_sample
from dynaconv.backends.operator import GEOMETRY, Operator, few_at_a_time, output_like
from dynaconv.shapes import Geometry

# Numbers in a chunk of mixed kernels: 16 MB in float32, which a last-level cache holds; but at
# least SHARE samples, so that the experts are not read anew for each.
CHUNK, SHARE = 2**22, 4
# Positions per extra expert below which mixing outputs is cheaper (benchmarks/conv_mixture.py).
FEW_POSITIONS = 8

# stride, padding and dilation as lists, then groups, as the operator gets them.
Settings = Sequence[Any]


def formulation(weight: Tensor, coefficients: Tensor, positions: int, settings: Settings) -> str:
    """Whether to mix "kernels" or "outputs"; where each tap has coefficients, only kernels mix."""
    if coefficients.dim() > 2:
        return "kernels"
    few = (len(weight) - 1) * positions <= FEW_POSITIONS and settings[3] == 1
    return "outputs" if few else "kernels"


def mixed_kernels(weight: Tensor, coefficients: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """W[n] = sum_e coefficients[n, e] weight[e] for a few samples at a time, in one buffer."""
    batch, experts = coefficients.shape[0], weight.flatten(1)
    size = min(batch, max(SHARE, CHUNK // experts.shape[1]))
    buffer = experts.new_empty(size, experts.shape[1])
    for part in few_at_a_time(batch, size):
        if coefficients.dim() > 2:
            kernels = torch.einsum("nek,emk->nmk", *by_tap(coefficients[part], weight))
        else:
            kernels = torch.mm(coefficients[part], experts, out=buffer[: part.stop - part.start])
        yield part, kernels.reshape(-1, *weight.shape[1:])


def by_tap(coefficients: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, E, taps), and kernels as (E, C_out * C_in / groups, taps)."""
    return coefficients.flatten(2), weight.flatten(3).flatten(1, 2)


# Forward and backward ----------------------------------------------------------------------------


def kernels(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, settings: Settings
) -> Tensor:
    """Mixes kernels, chunk by chunk, and convolves."""
    outputs = [
        per_sample.convolve(input[part], kernel, None if bias is None else bias[part], settings)
        for part, kernel in mixed_kernels(weight, coefficients)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def kernels_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    settings: Settings,
    mask: list[bool],
) -> list[Tensor | None]:
    """d coefficients[n, e] = <dW[n], weight[e]>, d weight[e] = sum_n coefficients[n, e] dW[n]."""
    need_kernel = mask[1] or mask[2]
    gx, gw, gc = [], torch.zeros_like(weight).flatten(1), []
    for part, kernel in mixed_kernels(weight, coefficients):
        g = per_sample.convolve_backward(
            grad[part], input[part], kernel, settings, [mask[0], need_kernel]
        )
        gx.append(g[0])
        if coefficients.dim() > 2 and need_kernel:
            by_sample, gradient = by_tap(coefficients[part], g[1])
            gw += torch.einsum("nek,nmk->emk", by_sample, gradient).flatten(1)
            of_each = torch.einsum("nmk,emk->nek", gradient, by_tap(coefficients, weight)[1])
            gc.append(of_each.reshape(-1, *coefficients.shape[1:]))
            continue
        if mask[1]:
            gw.addmm_(coefficients[part].t(), g[1].flatten(1))
        if mask[2]:
            gc.append(g[1].flatten(1) @ weight.flatten(1).t())
    return [torch.cat(gx) if mask[0] else None, gw, torch.cat(gc) if mask[2] else None]


def outputs(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, settings: Settings
) -> Tensor:
    """Convolves with all experts at once and mixes what comes out."""
    each = per_sample.static(input, weight.flatten(0, 1), settings).unflatten(1, weight.shape[:2])
    output = torch.bmm(coefficients.unsqueeze(1), each.flatten(2)).reshape(
        len(input), *each.shape[2:]
    )
    return output if bias is None else output + bias.reshape(*bias.shape, *[1] * (input.dim() - 2))


def outputs_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    settings: Settings,
    mask: list[bool],
) -> list[Tensor | None]:
    """One static convolution's gradients, of E * C_out channels scaled by their coefficients."""
    gx = gw = gc = None
    if mask[2]:
        each = per_sample.static(input, weight.flatten(0, 1), settings)
        each = each.reshape(len(input), len(weight), -1)
        gc = torch.bmm(each, grad.reshape(len(input), -1, 1)).squeeze(2)
    if mask[0] or mask[1]:
        scaled = torch.bmm(coefficients.unsqueeze(2), grad.reshape(len(input), 1, -1))
        scaled = scaled.reshape(len(input), -1, *grad.shape[2:])
        gx, gw = per_sample.static_backward(scaled, input, weight.flatten(0, 1), settings, mask[:2])
    return [gx, gw, gc]


FORMULATIONS = {"kernels": (kernels, kernels_backward), "outputs": (outputs, outputs_backward)}


# The operator ------------------------------------------------------------------------------------


def _shape(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, *settings: Any
) -> tuple:
    geometry = Geometry(tuple(weight.shape[3:]), *map(tuple, settings[:3]))
    return (input.shape[0], weight.shape[1], *geometry.output_size(input.shape[2:]))


def _forward(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    shape = _shape(input, weight, coefficients, bias, *settings)
    if not input.numel():
        return output_like(input, shape).zero_()
    choice = formulation(weight, coefficients, prod(shape[2:]), settings)
    return FORMULATIONS[choice][0](input, weight, coefficients, bias, settings)


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
    if not any(mask[:3]):
        return [None, None, None, gb]
    if not grad.numel() or not input.numel():
        return [torch.zeros_like(t) for t in (input, weight, coefficients)] + [gb]
    choice = formulation(weight, coefficients, prod(grad.shape[2:]), settings)
    backward = FORMULATIONS[choice][1]
    return [*backward(grad, input, weight, coefficients, settings, mask[:3]), gb]


def _reference(
    input: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    geometry = Geometry(tuple(weight.shape[3:]), *map(tuple, settings[:3]))
    output = reference.conv_mixture(input, weight, coefficients, None, geometry, settings[3])
    return output if bias is None else output + bias.reshape(*bias.shape, *[1] * (input.dim() - 2))


def _flops(input: tuple, weight: tuple, coefficients: tuple, *rest: Any) -> int:
    return 2 * (prod(rest[-1]) * prod(weight[2:]) + prod(coefficients[:2]) * prod(weight[1:]))


operator = Operator(
    "conv_mixture",
    ("input", "weight", "coefficients", "bias?"),
    ("weight",),
    f"{GEOMETRY}, SymInt groups",
    _forward,
    _backward,
    _reference,
    _shape,
    _flops,
)


def arguments(
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> tuple:
    """A call as the operator takes it: with the bias of each sample."""
    if bias is not None:
        bias = coefficients @ bias if bias.dim() == 2 else bias.expand(input.shape[0], -1)
    return (input, weight, coefficients, bias, *map(list, geometry[1:]), groups)


def conv_mixture(*args: Any) -> Tensor:
    return operator(*arguments(*args))
