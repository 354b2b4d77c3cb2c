"""conv_per_position in Triton: a tile of positions and channels a program, tap after tap.

What moves through memory once is the kernels, the input and the output; the taps' overlapping
windows come from the cache, the channels of a position in one wide read where a group has LINE of
them: they then lie last in memory. A thread has up to four positions of a line side by side, so
that a column which several of them see is read and converted once. The input has its padding around
it, so that no tap asks whether it is inside. All three kernels gather, so that results are the same
every time.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaconv.backends.eager.conv_per_position import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.backends.triton.launch import (
    cdiv,
    constants,
    far,
    framed,
    geometry_of,
    launch,
    register,
    rows_of,
    three,
    tuned,
    wide,
)
from dynaconv.shapes import Geometry

# mypy: disable-error-code="no-untyped-def"
# Channels of a group from which on they lie last.
LINE = 4
# STRIPS of WIDTH positions of a line, of GROUPS groups, which lie side by side in memory: together
# they fill lines of the cache. Where strips x groups are fewer than the threads, Triton reads
# kernels where they are needed; more would pass through shared memory, with a barrier each time.
TILES = [
    {"STRIPS": 32, "WIDTH": 4, "GROUPS": 2, "CHANNELS": 16},
    {"STRIPS": 16, "WIDTH": 4, "GROUPS": 4, "CHANNELS": 16},
    {"STRIPS": 32, "WIDTH": 4, "GROUPS": 1, "CHANNELS": 16, "warps": 2},
    {"STRIPS": 16, "WIDTH": 4, "GROUPS": 1, "CHANNELS": 64},
    {"STRIPS": 32, "WIDTH": 4, "GROUPS": 1, "CHANNELS": 32},
    {"STRIPS": 16, "WIDTH": 4, "GROUPS": 4, "CHANNELS": 8},
    {"STRIPS": 16, "WIDTH": 4, "GROUPS": 4, "CHANNELS": 4},
    {"STRIPS": 32, "WIDTH": 1, "GROUPS": 2, "CHANNELS": 16},
    {"STRIPS": 64, "WIDTH": 1, "GROUPS": 1, "CHANNELS": 16},
    {"STRIPS": 16, "WIDTH": 1, "GROUPS": 1, "CHANNELS": 64},
    {"STRIPS": 64, "WIDTH": 1, "GROUPS": 1, "CHANNELS": 32},
    {"STRIPS": 32, "WIDTH": 1, "GROUPS": 8, "CHANNELS": 8},
    {"STRIPS": 32, "WIDTH": 1, "GROUPS": 8, "CHANNELS": 4},
    {"STRIPS": 128, "WIDTH": 1, "GROUPS": 1, "CHANNELS": 4},
    {"STRIPS": 128, "WIDTH": 4, "GROUPS": 1, "CHANNELS": 1},
    {"STRIPS": 128, "WIDTH": 1, "GROUPS": 1, "CHANNELS": 1},
    {"STRIPS": 512, "WIDTH": 1, "GROUPS": 1, "CHANNELS": 1},
]
BY_TAPS = [
    {"STRIPS": 32, "WIDTH": 4, "TAPS": 1, "GROUPS": 2, "CHANNELS": 16},
    {"STRIPS": 16, "WIDTH": 1, "TAPS": 4, "GROUPS": 4, "CHANNELS": 16},
    {"STRIPS": 16, "WIDTH": 4, "TAPS": 1, "GROUPS": 4, "CHANNELS": 16},
    {"STRIPS": 32, "WIDTH": 1, "TAPS": 2, "GROUPS": 4, "CHANNELS": 16},
    {"STRIPS": 64, "WIDTH": 1, "TAPS": 4, "GROUPS": 1, "CHANNELS": 16},
    {"STRIPS": 16, "WIDTH": 4, "TAPS": 1, "GROUPS": 1, "CHANNELS": 64},
    {"STRIPS": 16, "WIDTH": 1, "TAPS": 4, "GROUPS": 1, "CHANNELS": 64},
    {"STRIPS": 32, "WIDTH": 4, "TAPS": 1, "GROUPS": 1, "CHANNELS": 32},
    {"STRIPS": 32, "WIDTH": 1, "TAPS": 8, "GROUPS": 1, "CHANNELS": 32},
    {"STRIPS": 16, "WIDTH": 4, "TAPS": 1, "GROUPS": 4, "CHANNELS": 8},
    {"STRIPS": 16, "WIDTH": 4, "TAPS": 1, "GROUPS": 4, "CHANNELS": 4},
    {"STRIPS": 16, "WIDTH": 1, "TAPS": 4, "GROUPS": 8, "CHANNELS": 4},
    {"STRIPS": 64, "WIDTH": 1, "TAPS": 4, "GROUPS": 1, "CHANNELS": 4},
    {"STRIPS": 128, "WIDTH": 4, "TAPS": 1, "GROUPS": 1, "CHANNELS": 1},
    {"STRIPS": 128, "WIDTH": 1, "TAPS": 4, "GROUPS": 1, "CHANNELS": 1},
    {"STRIPS": 512, "WIDTH": 1, "TAPS": 1, "GROUPS": 1, "CHANNELS": 1},
]
KEY = ["C", "K2", "SP", "WIDEST"]


def run_of(tile: dict[str, int], channels: int, widest: int) -> int:
    """Positions of a strip: WIDTH, but one on short lines, and of by_weight in parts of a group."""
    whole = "TAPS" not in tile or channels <= tile["CHANNELS"]
    return tile["WIDTH"] if whole and tile["WIDTH"] <= widest else 1


def fitting(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list:
    """Tiles that the groups and a group's channels fill, the channels not by many."""
    channels, groups, widest = arguments["C"], arguments["groups"], constants["WIDEST"]

    def fits(tile: dict[str, int]) -> bool:
        filled = channels >= tile["CHANNELS"] > min(channels, 16) // 4 and groups >= tile["GROUPS"]
        return filled and run_of(tile, channels, widest) == tile["WIDTH"]

    return [config for config in configs if fits(config.kwargs)]


@triton.jit
def tile_at(
    program, parts, groups, lines, length,
    STRIPS: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's sample, its strips' lines and where they start there, groups and channels.

    Strips and groups beyond the last are the last once more, so that reading needs no mask; the
    last value says which are not.
    """
    bundles, cuts = tl.cdiv(groups, GROUPS), tl.cdiv(length, RUN)
    blocks = tl.cdiv(lines * cuts, STRIPS)
    c = (program % parts * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]
    g = (program // parts % bundles * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    s = (program // (parts * bundles) % blocks * STRIPS + tl.arange(0, STRIPS))[:, None, None]
    n = program // (parts * bundles * blocks)
    real = (s < lines * cuts) & (g < groups)
    g, s = tl.minimum(g, groups - 1), tl.minimum(s, lines * cuts - 1)
    return n, s // cuts, tl.minimum(s % cuts * RUN, length - RUN), g, c, real


@triton.jit
def read(pointer, mask, SUM: tl.constexpr):
    """In SUM's precision, zeros where a mask is given and not set."""
    value = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)
    return value.to(SUM)


@triton.jit
def keep(target, total0, total1, total2, total3, mask, STEP, RUN: tl.constexpr):
    """Stores one position, or the four of a strip, STEP apart."""
    kind: tl.constexpr = target.dtype.element_ty
    if RUN == 1:
        tl.store(target, total0.to(kind), mask=mask)
    else:
        four = tl.join(tl.join(total0, total2), tl.join(total1, total3))
        four = four.reshape(total0.shape[0], total0.shape[1], total0.shape[2], 4)
        at = target[:, :, :, None] + tl.arange(0, 4)[None, None, None, :] * STEP
        tl.store(at, four.to(kind), mask=mask[:, :, :, None])


@triton.jit
def along(
    total0, total1, total2, total3, rows, factors, first, used, WK, WP, zero, SP: tl.constexpr,
    COUNT: tl.constexpr, RUN: tl.constexpr, D2: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Adds taps first to first + COUNT of a row to the sums of a strip's positions."""
    for j in tl.static_range(COUNT + RUN - 1):
        k = first + j + zero
        value = read(rows + k * D2 * SP, used, SUM)
        if j < COUNT:
            total0 += tl.load(factors + k * WK).to(SUM) * value
        if RUN == 4:
            if j >= 1 and j < COUNT + 1:
                total1 += tl.load(factors + (k - 1) * WK + WP).to(SUM) * value
            if j >= 2 and j < COUNT + 2:
                total2 += tl.load(factors + (k - 2) * WK + 2 * WP).to(SUM) * value
            if j >= 3:
                total3 += tl.load(factors + (k - 3) * WK + 3 * WP).to(SUM) * value
    return total0, total1, total2, total3


@tuned(TILES, KEY, prune_configs_by={"early_config_prune": fitting})
@triton.jit
def forward(
    out, source, weight, C: tl.constexpr, groups, lines,
    # the input's sizes with its padding, the output's
    L1, L2, O1, O2,
    # steps of out and source along sample, channel and position; of weight: tap too
    ON, OC, OP, SN, SC, SP: tl.constexpr, WN, WG, WK, WP,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    WIDEST: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    STRIPS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[p, g, c] = sum_k weight[k, p, g] source[p * stride + k * dilation, g, c]."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    RUN: tl.constexpr = WIDTH if WIDTH <= WIDEST else 1
    LEFT: tl.constexpr = K2 % COUNT
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    n, line, o2, g, c, real = tile_at(
        program, tl.cdiv(C, CHANNELS), groups, lines, O2, STRIPS, RUN, GROUPS, CHANNELS
    )
    used = None if C % CHANNELS == 0 else c < C
    p, q = line * O2 + o2, (line // O1 * S0 * L1 + line % O1 * S1) * L2 + o2 * S2
    if ALIGNED and RUN == 4:
        p = tl.multiple_of(p, [4, 4, 4])
    channel = g * C + c
    rows = source + n * SN + channel * SC + q * SP
    factors = weight + n * WN + g * WG + p * WP
    t0 = tl.zeros((STRIPS, GROUPS, CHANNELS), SUM)
    t1, t2, t3 = t0, t0, t0
    for k0 in range(K0):
        for k1 in range(K1):
            row = rows + ((k0 * D0 * L1 + k1 * D1) * L2 + zero) * SP
            taps = factors + ((k0 * K1 + k1) * K2 + zero) * WK
            for first in range(0, K2 - LEFT, COUNT):
                t0, t1, t2, t3 = along(
                    t0, t1, t2, t3, row, taps, first, used, WK, WP, zero, SP, COUNT, RUN, D2, SUM
                )
            if LEFT > 0:
                first = K2 - LEFT
                t0, t1, t2, t3 = along(
                    t0, t1, t2, t3, row, taps, first, used, WK, WP, zero, SP, LEFT, RUN, D2, SUM
                )
    keep(out + n * ON + channel * OC + p * OP, t0, t1, t2, t3, real & (c < C), OP, RUN)


@triton.jit
def back_along(
    total0, total1, total2, total3, rows, factors, first, q2, inside, used, O2, WK, WP, zero,
    COUNT: tl.constexpr, RUN: tl.constexpr, SP: tl.constexpr,
    S2: tl.constexpr, P2: tl.constexpr, D2: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Adds taps first to first + COUNT of a row to the sums of a strip's input positions.

    Position q2 + r sees by tap k + r what q2 sees by tap k.
    """
    for j in tl.static_range(COUNT + RUN - 1):
        k = first + (COUNT - 1 - j) + zero
        seen = q2 + P2 - k * D2
        there = inside & (seen >= 0) & (seen % S2 == 0) & (seen // S2 < O2)
        o2 = seen // S2
        value = tl.load(rows + o2 * SP, mask=there if used is None else there & used, other=0)
        value = value.to(SUM)
        factor = factors + o2 * WP + k * WK
        if j < COUNT:
            total0 += tl.load(factor, mask=there, other=0).to(SUM) * value
        if RUN == 4:
            if j >= 1 and j < COUNT + 1:
                total1 += tl.load(factor + WK, mask=there, other=0).to(SUM) * value
            if j >= 2 and j < COUNT + 2:
                total2 += tl.load(factor + 2 * WK, mask=there, other=0).to(SUM) * value
            if j >= 3:
                total3 += tl.load(factor + 3 * WK, mask=there, other=0).to(SUM) * value
    return total0, total1, total2, total3


@tuned(TILES, KEY, prune_configs_by={"early_config_prune": fitting})
@triton.jit
def by_input(
    out, grad, weight, C: tl.constexpr, groups, lines, L1, L2, O0, O1, O2,
    # steps of out and grad along sample, channel and position; of weight: tap too
    ON, OC, OP, SN, SC, SP: tl.constexpr, WN, WG, WK, WP,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    WIDEST: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    STRIPS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[q, g, c] = sum_k weight[k, p, g] grad[p, g, c] over the p that see q by tap k."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    RUN: tl.constexpr = WIDTH if WIDTH <= WIDEST else 1
    LEFT: tl.constexpr = K2 % COUNT
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    n, line, q2, g, c, real = tile_at(
        program, tl.cdiv(C, CHANNELS), groups, lines, L2, STRIPS, RUN, GROUPS, CHANNELS
    )
    used = None if C % CHANNELS == 0 else c < C
    q = line * L2 + q2
    if ALIGNED and RUN == 4:
        q = tl.multiple_of(q, [4, 4, 4])
    channel = g * C + c
    rows = grad + n * SN + channel * SC
    factors = weight + n * WN + g * WG
    t0 = tl.zeros((STRIPS, GROUPS, CHANNELS), SUM)
    t1, t2, t3 = t0, t0, t0
    for k0 in range(K0):
        seen0 = line // L1 + P0 - k0 * D0
        inside0 = (seen0 >= 0) & (seen0 % S0 == 0) & (seen0 // S0 < O0)
        for k1 in range(K1):
            seen1 = line % L1 + P1 - k1 * D1
            inside = inside0 & (seen1 >= 0) & (seen1 % S1 == 0) & (seen1 // S1 < O1)
            o = (seen0 // S0 * O1 + seen1 // S1) * O2
            row = rows + o * SP
            taps = factors + o * WP + ((k0 * K1 + k1) * K2 + zero) * WK
            for first in range(0, K2 - LEFT, COUNT):
                t0, t1, t2, t3 = back_along(
                    t0, t1, t2, t3, row, taps, first, q2, inside, used, O2, WK, WP, zero,
                    COUNT, RUN, SP, S2, P2, D2, SUM,
                )  # fmt: skip
            if LEFT > 0:
                t0, t1, t2, t3 = back_along(
                    t0, t1, t2, t3, row, taps, K2 - LEFT, q2, inside, used, O2, WK, WP, zero,
                    LEFT, RUN, SP, S2, P2, D2, SUM,
                )  # fmt: skip
    keep(out + n * ON + channel * OC + q * OP, t0, t1, t2, t3, real & (c < C), OP, RUN)


@triton.jit
def products(
    target, rows, slope0, slope1, slope2, slope3, first, used, mask, WK, WP, zero,
    SP: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of taps first to first + COUNT of a row, for a strip's positions.

    Column j is tap j of the first position and tap j - 3 of the last: the other sums of that tap
    are those of the three columns before.
    """
    a0 = tl.zeros((slope0.shape[0], slope0.shape[1], 1), SUM)
    b0, c0, a1, b1, a2 = a0, a0, a0, a0, a0
    for j in tl.static_range(COUNT + 3):
        k = first + j + zero
        value = read(rows + k * SP, used, SUM)
        if j >= 3:
            sum3 = tl.sum(slope3 * value, 2, keep_dims=True)
            keep(target + (k - 3) * WK, c0, b1, a2, sum3, mask, WP, 4)
        c0, b0, b1 = b0, a0, a1
        if j < COUNT:
            a0 = tl.sum(slope0 * value, 2, keep_dims=True)
        if j >= 1 and j < COUNT + 1:
            a1 = tl.sum(slope1 * value, 2, keep_dims=True)
        if j >= 2 and j < COUNT + 2:
            a2 = tl.sum(slope2 * value, 2, keep_dims=True)


@tuned(BY_TAPS, KEY, prune_configs_by={"early_config_prune": fitting})
@triton.jit
def by_weight(
    out, grad, source, C: tl.constexpr, groups, lines,
    # the input's sizes with its padding, the output's
    L1, L2, O1, O2,
    # steps of out (a gradient of the weight), of grad and of source
    WN, WG, WK, WP, ON, OC, OP, SN, SC, SP: tl.constexpr,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    WIDEST: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    STRIPS: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[k, p, g] = sum_c grad[p, g, c] source[p * stride + k * dilation, g, c]."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    # A strip has all channels of a group.
    RUN: tl.constexpr = WIDTH if WIDTH <= WIDEST and C <= CHANNELS else 1
    LEFT: tl.constexpr = K2 % COUNT
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    n, line, o2, g, c, real = tile_at(program, 1, groups, lines, O2, STRIPS, RUN, GROUPS, CHANNELS)
    p, q = line * O2 + o2, (line // O1 * S0 * L1 + line % O1 * S1) * L2 + o2 * S2
    if ALIGNED and RUN == 4:
        p = tl.multiple_of(p, [4, 4, 4])
    target = out + n * WN + g * WG + p * WP
    slopes = grad + n * ON + (g * C + c) * OC + p * OP
    rows = source + n * SN + (g * C + c) * SC + q * SP
    if RUN == 4:
        used = None if C == CHANNELS else c < C
        slope0 = read(slopes, used, SUM)
        slope1 = read(slopes + OP, used, SUM)
        slope2 = read(slopes + 2 * OP, used, SUM)
        slope3 = read(slopes + 3 * OP, used, SUM)
        for k0 in range(K0):
            for k1 in range(K1):
                row = rows + ((k0 * D0 * L1 + k1 * D1) * L2 + zero) * SP
                taps = target + ((k0 * K1 + k1) * K2 + zero) * WK
                for first in range(0, K2 - LEFT, COUNT):
                    products(
                        taps, row, slope0, slope1, slope2, slope3, first, used, real,
                        WK, WP, zero, SP, COUNT, SUM,
                    )  # fmt: skip
                if LEFT > 0:
                    products(
                        taps, row, slope0, slope1, slope2, slope3, K2 - LEFT, used, real,
                        WK, WP, zero, SP, LEFT, SUM,
                    )  # fmt: skip
    else:
        for first in range(0, K0 * K1 * K2, TAPS):
            k = (first + tl.arange(0, TAPS))[None, :, None, None]
            asked = k < K0 * K1 * K2
            step = (k // (K1 * K2) * D0 * L1 + k // K2 % K1 * D1) * L2 + k % K2 * D2 + zero
            total = tl.zeros((STRIPS, TAPS, GROUPS, 1), SUM)
            for start in range(0, C, CHANNELS):
                used = c + start < C
                slope = tl.load(slopes + start * OC, mask=used, other=0).to(SUM)
                at = (rows + start * SC)[:, None, :, :] + step * SP
                value = tl.load(at, mask=asked & used[:, None, :, :], other=0).to(SUM)
                total += tl.sum(slope[:, None, :, :] * value, 3, keep_dims=True)
            at = target[:, None, :, :] + (k + zero) * WK
            tl.store(at, total.to(out.dtype.element_ty), mask=asked & real[:, None, :, :])


def _planes(weight: Tensor, rank: int) -> Tensor:
    """(N, G, *K, *L_out) as (N, G, taps, P)."""
    return weight.flatten(2, 1 + rank).flatten(3)


def _lines(tensor: Tensor, channels: int, padding: tuple[int, ...] = ()) -> Tensor:
    """(N, C, *L) as (N, C, P), padded; channels last in memory where `channels` of a group pay."""
    if channels >= LINE:
        return rows_of(tensor, padding).transpose(1, 2)
    return framed(tensor, padding).flatten(2)


def _sizes(tensor: Tensor, padding: tuple[int, ...] = ()) -> list[int]:
    """Three spatial sizes, with the padding."""
    around = three(padding, 0)
    return [n + 2 * p for n, p in zip(three(tensor.shape[2:], 1), around, strict=True)]


def _grid(
    batch: int, groups: int, channels: int, lines: int, length: int, widest: int
) -> Callable[[dict[str, int]], tuple[int]]:
    """Programs of a tile: of by_weight all channels of a group are one's."""

    def grid(tile: dict[str, int]) -> tuple[int]:
        parts = 1 if "TAPS" in tile else cdiv(channels, tile["CHANNELS"])
        strips = lines * cdiv(length, run_of(tile, channels, widest))
        bundles = cdiv(groups, tile["GROUPS"])
        return (batch * bundles * parts * cdiv(strips, tile["STRIPS"]),)

    return grid


def _along(geometry: Geometry, length: int) -> dict[str, Any]:
    """What the kernels' constants say of lines of `length` positions that they go along.

    COUNT taps of a row are written out: all, or some that leave few over.
    """
    taps = int(geometry.kernel[-1])
    count = taps if taps <= 9 else min(range(8, 3, -1), key=lambda n: taps % n)
    side_by_side = geometry.stride[-1] == geometry.dilation[-1] == 1 and length >= 4
    aligned = isinstance(length, int) and length % 4 == 0  # not of a symbol: no guard
    return {"WIDEST": 4 if side_by_side else 1, "COUNT": count, "ALIGNED": aligned}


def _forward(input: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    output = output_like(input, eager.shape(input, weight, *settings))
    if not output.numel():
        return output
    geometry = geometry_of(weight.shape[2 : input.dim()], settings)
    batch, groups = weight.shape[:2]
    channels, (o0, o1, o2) = input.shape[1] // groups, _sizes(output)
    planes, lines = output.flatten(2), _lines(input, channels, geometry.padding)
    factors, how = _planes(weight, len(geometry.kernel)), _along(geometry, o2)
    launch(forward)[_grid(batch, groups, channels, o0 * o1, o2, how["WIDEST"])](
        planes, lines, factors, channels, groups, o0 * o1,
        *_sizes(input, geometry.padding)[1:], o1, o2,
        *planes.stride(), *lines.stride(), *factors.stride(),
        DOUBLE=input.dtype == torch.float64, FAR=far(planes, lines, factors),
        **how, **constants(geometry),
    )  # fmt: skip
    return output


def _backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> list[Tensor | None]:
    *settings, mask = rest
    geometry = geometry_of(weight.shape[2 : input.dim()], settings)
    slopes = _lines(grad, input.shape[1] // weight.shape[1])
    gx = gw = None
    if mask[0]:
        gx = gradient_like(input)
        if gx.numel():
            _of_input(gx, grad, slopes, weight, geometry)
    if mask[1]:
        gw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if gw.numel():
            _of_weight(gw, grad, slopes, input, geometry)
    return [gx, gw]


def _of_input(
    out: Tensor, grad: Tensor, slopes: Tensor, weight: Tensor, geometry: Geometry
) -> None:
    """Launches `by_input`; `out` is written in place."""
    batch, groups = weight.shape[:2]
    planes, factors = out.flatten(2), _planes(weight, len(geometry.kernel))
    channels, (l0, l1, l2) = out.shape[1] // groups, _sizes(out)
    how = _along(geometry, l2)
    launch(by_input)[_grid(batch, groups, channels, l0 * l1, l2, how["WIDEST"])](
        planes, slopes, factors, channels, groups, l0 * l1, l1, l2, *_sizes(grad),
        *planes.stride(), *slopes.stride(), *factors.stride(),
        DOUBLE=out.dtype == torch.float64, FAR=far(planes, slopes, factors),
        **how, **constants(geometry),
    )  # fmt: skip


def _of_weight(
    out: Tensor, grad: Tensor, slopes: Tensor, input: Tensor, geometry: Geometry
) -> None:
    """Launches `by_weight`; `out` is written in place."""
    batch, groups = out.shape[:2]
    channels, (o0, o1, o2) = input.shape[1] // groups, _sizes(grad)
    factors, lines = _planes(out, len(geometry.kernel)), _lines(input, channels, geometry.padding)
    how = _along(geometry, o2)
    launch(by_weight)[_grid(batch, groups, channels, o0 * o1, o2, how["WIDEST"])](
        factors, slopes, lines, channels, groups, o0 * o1,
        *_sizes(input, geometry.padding)[1:], o1, o2,
        *factors.stride(), *slopes.stride(), *lines.stride(),
        DOUBLE=out.dtype == torch.float64, FAR=far(factors, slopes, lines),
        **how, **constants(geometry),
    )  # fmt: skip


operator = eager.twin("triton_conv_per_position", _forward, _backward, register)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return operator(input, weight, *map(list, geometry[1:]))
