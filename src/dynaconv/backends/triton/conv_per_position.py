"""conv_per_position in Triton: a tile of channels and positions a program, tap after tap.

What moves through memory once is the kernels, the input and the output; the taps' overlapping
windows come from the cache. All three kernels gather, so that results are the same every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaconv.backends.eager.conv_per_position import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.backends.triton.launch import (
    constants,
    far,
    geometry_of,
    launch,
    register,
    seen_at,
    seen_from,
    sizes_of,
    tuned,
    wide,
)
from dynaconv.shapes import Geometry

# mypy: disable-error-code="no-untyped-def"
TILES = [
    {"CHANNELS": 16, "POSITIONS": 64},
    {"CHANNELS": 4, "POSITIONS": 128},
    {"CHANNELS": 8, "POSITIONS": 256, "warps": 8},
    {"CHANNELS": 32, "POSITIONS": 32},
    {"CHANNELS": 64, "POSITIONS": 16},
]
KEY = ["channels", "K2", "SP"]


@tuned(TILES, KEY)
@triton.jit
def by_input(
    out, source, weight, channels, groups,
    # (L0, L1, L2) of the input, (O0, O1, O2) of the output
    L0, L1, L2, O0, O1, O2,
    # steps of `out` and `source` along sample, channel and position; of weight: tap too
    ON, OC, OP, SN, SC, SP, WN, WG, WK, WP,
    TRANSPOSED: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """out[c, p] = sum_k weight[k, p] source[c, seen_at(p, k)].

    TRANSPOSED, the input's gradient: out[c, q] = sum_k weight[k, p] source[c, p] over the p that
    see q by tap k.
    """
    H1, H2 = O1, O2
    total_positions = O0 * O1 * O2
    if TRANSPOSED:
        H1, H2 = L1, L2
        total_positions = L0 * L1 * L2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    blocks, parts = tl.cdiv(total_positions, POSITIONS), tl.cdiv(channels, CHANNELS)
    p = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    c = program // blocks % parts * CHANNELS + tl.arange(0, CHANNELS)
    g = program // (blocks * parts) % groups
    n = program // (blocks * parts * groups)
    h0, h1, h2 = p // (H1 * H2), p // H2 % H1, p % H2
    real, some = p < total_positions, (c < channels)[:, None]
    channel = (g * channels + c)[:, None]
    rows = source + n * SN + channel * SC
    factors = weight + n * WN + g * WG
    total = tl.zeros((CHANNELS, POSITIONS), SUM)
    for k in range(K0 * K1 * K2):
        if TRANSPOSED:
            q, inside = seen_from(
                h0, h1, h2, k, O0, O1, O2, K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2
            )
            at = q
        else:
            q, inside = seen_at(
                h0, h1, h2, k, L0, L1, L2, K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2
            )
            at = p
        inside = inside & real
        shown = real
        if TRANSPOSED:
            shown = inside
        factor = tl.load(factors + (k + zero) * WK + at * WP, mask=shown, other=0)
        value = tl.load(rows + q[None, :] * SP, mask=inside[None, :] & some, other=0)
        total += factor.to(SUM)[None, :] * value.to(SUM)
    target = out + n * ON + channel * OC + p[None, :] * OP
    tl.store(target, total.to(out.dtype.element_ty), mask=real[None, :] & some)


@tuned(TILES, KEY)
@triton.jit
def by_weight(
    out, grad, source, channels, groups,
    L0, L1, L2, O0, O1, O2,
    # steps of out (a gradient of the weight), of grad and of source
    WN, WG, WK, WP, ON, OC, OP, SN, SC, SP,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """out[k, p] = sum_c grad[c, p] source[c, seen_at(p, k)]."""
    positions = O0 * O1 * O2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    blocks = tl.cdiv(positions, POSITIONS)
    p = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    g = program // blocks % groups
    n = program // (blocks * groups)
    o0, o1, o2 = p // (O1 * O2), p // O2 % O1, p % O2
    real, within = p < positions, tl.arange(0, CHANNELS)
    for k in range(K0 * K1 * K2):
        q, inside = seen_at(
            o0, o1, o2, k, L0, L1, L2, K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2
        )
        inside = (inside & real)[None, :]
        total = tl.zeros((POSITIONS,), SUM)
        for first in range(0, channels, CHANNELS):
            some = (first + within < channels)[:, None]
            channel = (g * channels + first + within)[:, None]
            slope = tl.load(
                grad + n * ON + channel * OC + p[None, :] * OP,
                mask=inside & some, other=0,
            )  # fmt: skip
            value = tl.load(
                source + n * SN + channel * SC + q[None, :] * SP,
                mask=inside & some, other=0,
            )  # fmt: skip
            total += tl.sum(slope.to(SUM) * value.to(SUM), 0)
        target = out + n * WN + g * WG + (k + zero) * WK + p * WP
        tl.store(target, total.to(out.dtype.element_ty), mask=real)


def _planes(weight: Tensor, rank: int) -> Tensor:
    """(N, G, *K, *L_out) as (N, G, taps, P)."""
    return weight.flatten(2, 1 + rank).flatten(3)


def _convolve(
    out: Tensor, source: Tensor, weight: Tensor, sizes: list[int], geometry: Geometry, back: bool
) -> None:
    """Launches `by_input`; `out` is written in place."""
    batch, groups = weight.shape[:2]
    planes, rows = out.flatten(2), source.flatten(2)
    factors = _planes(weight, len(geometry.kernel))
    channels, positions = out.shape[1] // groups, planes.shape[2]

    def grid(tile: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(positions, tile["POSITIONS"])
        return (batch * groups * blocks * triton.cdiv(channels, tile["CHANNELS"]),)

    launch(by_input)[grid](
        planes, rows, factors, channels, groups, *sizes,
        *planes.stride(), *rows.stride(), *factors.stride(),
        TRANSPOSED=back, DOUBLE=out.dtype == torch.float64, FAR=far(planes, rows, factors),
        **constants(geometry),
    )  # fmt: skip


def _forward(input: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    output = output_like(input, eager.shape(input, weight, *settings))
    if output.numel():
        geometry = geometry_of(weight.shape[2 : input.dim()], settings)
        _convolve(output, input, weight, sizes_of(input, output), geometry, back=False)
    return output


def _backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> list[Tensor | None]:
    *settings, mask = rest
    geometry = geometry_of(weight.shape[2 : input.dim()], settings)
    sizes = sizes_of(input, grad)
    gx = gw = None
    if mask[0]:
        gx = gradient_like(input)
        if gx.numel():
            _convolve(gx, grad, weight, sizes, geometry, back=True)
    if mask[1]:
        gw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if gw.numel():
            _correlate(gw, grad, input, sizes, geometry)
    return [gx, gw]


def _correlate(
    out: Tensor, grad: Tensor, source: Tensor, sizes: list[int], geometry: Geometry
) -> None:
    """Launches `by_weight`; `out` is written in place."""
    batch, groups = out.shape[:2]
    factors = _planes(out, len(geometry.kernel))
    slopes, rows = grad.flatten(2), source.flatten(2)
    grid = lambda tile: (batch * groups * triton.cdiv(slopes.shape[2], tile["POSITIONS"]),)
    launch(by_weight)[grid](
        factors, slopes, rows, source.shape[1] // groups, groups, *sizes,
        *factors.stride(), *slopes.stride(), *rows.stride(),
        DOUBLE=out.dtype == torch.float64, FAR=far(factors, slopes, rows), **constants(geometry),
    )  # fmt: skip


operator = eager.twin("triton_conv_per_position", _forward, _backward, register)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return operator(input, weight, *map(list, geometry[1:]))
