"""conv_mixture in Triton: kernels are mixed tile by tile where they are multiplied, or beforehand,
or outputs are mixed.

Mixed where they are used, E kernels are read for each tile of positions; mixed beforehand, N
kernels are written and read again; and E outputs take E times the operations of one. With few
positions under a kernel the last is cheapest, with few enough for one tile the first.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
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
from dynaconv.backends.triton.launch import (
    bound,
    cdiv,
    far,
    fitting,
    geometry_of,
    launch,
    power_of_two,
    register,
    rows_of,
    sizes_of,
    summed,
    tuned,
    wide,
)

# mypy: disable-error-code="no-untyped-def"
# Outputs of positions, all experts together, below which mixing outputs pays: what a GPU computes
# while it moves one number.
OUTPUTS = 512
# Positions of a tile, and experts whose reading pays.
TILE, FEW = 64, 8
# Samples of a tile of mixed kernels; of numbers of a kernel it has SIZE.
SAMPLES = [{"SAMPLES": 64, "warps": 8}, {"SAMPLES": 64}, {"SAMPLES": 32}, {"SAMPLES": 16}]
SIZE = 256


@tuned(SAMPLES, ["experts", "bound"], **fitting(SAMPLES="bound"))
@triton.jit
def mix(
    out, weight, coefficients, batch, experts, length, bound, CN, CE,
    DOUBLE: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """out[n, m] = sum_e coefficients[n, e] weight[e, m]."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    blocks = tl.cdiv(batch, SAMPLES)
    n = program % blocks * SAMPLES + tl.arange(0, SAMPLES)
    m = program // blocks * SIZE + tl.arange(0, SIZE)
    e = tl.arange(0, WIDTH)
    used = (n < batch)[:, None] & (e < experts)[None, :]
    a = tl.load(coefficients + n[:, None] * CN + e[None, :] * CE, mask=used, other=0)
    used = (e < experts)[:, None] & (m < length)[None, :]
    w = tl.load(weight + e[:, None] * length + m[None, :], mask=used, other=0)
    total = tl.dot(a, w, input_precision="ieee", out_dtype=SUM)
    used = (n < batch)[:, None] & (m < length)[None, :]
    tl.store(out + n[:, None] * length + m[None, :], total.to(out.dtype.element_ty), mask=used)


@tuned(SAMPLES, ["experts", "bound"], **fitting(SAMPLES="bound"))
@triton.jit
def unmix(
    out, shares, grad, weight, coefficients, batch, experts, length, bound, CN, CE,
    DOUBLE: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """out[e, m] = sum_n coefficients[n, e] grad[n, m]; sum_m grad[n, m] weight[e, m] as `shares`.

    These are (blocks of SIZE numbers m, N, E) and remain to be summed: grad is read once for both.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    m = program * SIZE + tl.arange(0, SIZE)
    e = tl.arange(0, WIDTH)
    used = (m < length)[:, None] & (e < experts)[None, :]
    w = tl.load(weight + e[None, :] * length + m[:, None], mask=used, other=0)
    total = tl.zeros((WIDTH, SIZE), SUM)
    for first in range(0, batch, SAMPLES):
        n = first + tl.arange(0, SAMPLES)
        there = (n < batch)[:, None] & (m < length)[None, :]
        slope = tl.load(grad + n[:, None] * length + m[None, :], mask=there, other=0)
        given = (e < experts)[:, None] & (n < batch)[None, :]
        a = tl.load(coefficients + n[None, :] * CN + e[:, None] * CE, mask=given, other=0)
        total = tl.dot(a, slope, total, input_precision="ieee", out_dtype=SUM)
        share = tl.dot(slope, w, input_precision="ieee", out_dtype=SUM)
        asked = (n < batch)[:, None] & (e < experts)[None, :]
        tl.store(shares + (program * batch + n)[:, None] * experts + e[None, :], share, mask=asked)
    used = (e < experts)[:, None] & (m < length)[None, :]
    tl.store(out + e[:, None] * length + m[None, :], total.to(out.dtype.element_ty), mask=used)


def formulation(weight: Tensor, coefficients: Tensor, positions: int, groups: int) -> str:
    """What to mix: "outputs", "tiles" of kernels where they are used, or "kernels" beforehand."""
    if coefficients.dim() == 2 and groups == 1 and weight.shape[0] * positions <= OUTPUTS:
        return "outputs"
    return "tiles" if positions <= TILE and coefficients.shape[1] <= FEW else "kernels"


def mixed(experts: Tensor, coefficients: Tensor) -> Tensor:
    """The kernels (N, C_out, taps, C_in / groups) of all samples, from experts (E, ...)."""
    if coefficients.dim() == 2:
        return _mixed(experts.flatten(1), coefficients).unflatten(1, experts.shape[1:])
    return torch.einsum("nek,eokj->nokj", coefficients.flatten(2), experts)


def _mixed(weight: Tensor, coefficients: Tensor) -> Tensor:
    """Launches `mix`."""
    batch, (experts, length) = len(coefficients), weight.shape
    out = weight.new_empty(batch, length)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (cdiv(batch, tile["SAMPLES"]) * cdiv(length, SIZE),)

    launch(mix)[grid](
        out, weight, coefficients, batch, experts, length, bound(batch), *coefficients.stride(),
        **_options(out, weight),
    )  # fmt: skip
    return out


def _unmixed(grad: Tensor, weight: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Launches `unmix`."""
    batch, (experts, length) = len(coefficients), weight.shape
    out, blocks = torch.empty_like(weight), cdiv(length, SIZE)
    shares = weight.new_empty(blocks, batch, experts, dtype=summed(weight))
    launch(unmix)[(blocks,)](
        out, shares, grad, weight, coefficients, batch, experts, length, bound(batch),
        *coefficients.stride(), **_options(grad, weight),
    )  # fmt: skip
    return out, shares.sum(0).to(coefficients.dtype)


def _options(each: Tensor, weight: Tensor) -> dict[str, Any]:
    """What `mix` and `unmix` are compiled for. A product is at least 16 wide."""
    width = max(16, power_of_two(weight.shape[0]))
    double = weight.dtype == torch.float64
    return {"DOUBLE": double, "FAR": far(each, weight), "WIDTH": width, "SIZE": SIZE}


def unmixed(each: Tensor, experts: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradients of mixed kernels those of experts and coefficients."""
    if coefficients.dim() == 2:
        by_expert, shares = _unmixed(each.flatten(1), experts.flatten(1), coefficients)
        return by_expert.unflatten(1, each.shape[1:]), shares
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
