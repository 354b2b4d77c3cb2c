"""conv_per_sample in Triton: one batched implicit matrix product.

For sample n, out[i, p] = sum_{k, j} W[n, i, k, j] source[p * stride - padding + k * dilation, j];
tiles of the unfolded source are gathered where they are multiplied, and no convolution of N groups
is made. What a position and what a tap add to an address is worked out apart, and positions are
counted up without a division: a step of the loops is to be little beside its product. Source and
kernels lie with the channels they share last, so that a tile is read in whole lines: a contiguous
input is copied so, and kernels (N, C_out, C_in / groups, *K) are of more than one tap. Where the
kernels are what moves, forward reads them as they lie, and backward writes their gradient so and
goes through columns (channel and tap, position), which are smaller.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaconv.backends.eager.conv_per_sample import formulation, matmul, matmul_backward
from dynaconv.backends.eager.conv_per_sample import operator as eager
from dynaconv.backends.operator import gradient_like, output_like
from dynaconv.backends.triton.launch import (
    bound,
    cdiv,
    constants,
    even,
    far,
    fitting,
    framed,
    geometry_of,
    index_of,
    launch,
    precision,
    register,
    rows_of,
    sizes_of,
    three,
    transposed,
    tuned,
    wide,
    within,
)
from dynaconv.shapes import Geometry

# mypy: disable-error-code="no-untyped-def"
TILES = [
    {"ROWS": 64, "POSITIONS": 64, "INNER": 32, "stages": 4},
    {"ROWS": 64, "POSITIONS": 64, "INNER": 64, "stages": 4},
    {"ROWS": 64, "POSITIONS": 128, "INNER": 64, "stages": 3},
    {"ROWS": 64, "POSITIONS": 256, "INNER": 64, "warps": 8, "stages": 3},
    {"ROWS": 64, "POSITIONS": 128, "INNER": 64, "stages": 1},
    {"ROWS": 128, "POSITIONS": 64, "INNER": 64, "stages": 4},
    {"ROWS": 128, "POSITIONS": 128, "INNER": 64, "warps": 8, "stages": 3},
    {"ROWS": 128, "POSITIONS": 256, "INNER": 64, "warps": 8, "stages": 3},
    {"ROWS": 128, "POSITIONS": 256, "INNER": 64, "warps": 8, "stages": 2},
    {"ROWS": 256, "POSITIONS": 64, "INNER": 64, "warps": 8, "stages": 3},
    {"ROWS": 32, "POSITIONS": 128, "INNER": 32, "stages": 4},
]
# AHEAD: what is gathered for the next product is on its way to registers during this one; else for
# several products, to shared memory.
GATHERED = [
    *({**tile, "AHEAD": False} for tile in TILES),
    {"ROWS": 64, "POSITIONS": 128, "INNER": 64, "stages": 3, "AHEAD": True},
    {"ROWS": 128, "POSITIONS": 128, "INNER": 64, "warps": 8, "stages": 3, "AHEAD": True},
    {"ROWS": 128, "POSITIONS": 256, "INNER": 64, "warps": 8, "stages": 3, "AHEAD": True},
    {"ROWS": 256, "POSITIONS": 64, "INNER": 64, "warps": 8, "stages": 3, "AHEAD": True},
]
FLAT = [
    {"ROWS": 256, "POSITIONS": 64, "INNER": 64, "warps": 8, "stages": 3},
    {"ROWS": 128, "POSITIONS": 64, "INNER": 64, "stages": 3},
    {"ROWS": 128, "POSITIONS": 128, "INNER": 32, "warps": 8, "stages": 3},
    {"ROWS": 128, "POSITIONS": 256, "INNER": 32, "warps": 8, "stages": 3},
    {"ROWS": 64, "POSITIONS": 256, "INNER": 64, "warps": 8, "stages": 3},
    {"ROWS": 32, "POSITIONS": 64, "INNER": 64, "stages": 3},
]
# Kernels so many times larger than input and output are read as they lie: to lay them out moves
# them twice more. For the gradient of the input if they are FOLDED times as large as its columns.
LARGE, FOLDED = 4, 1
# A matrix product as a convolution of one tap.
ONE = Geometry((1,), (1,), (0,), (1,))


@triton.jit
def exists(x0, x1, x2, L0, L1, L2, RANK: tl.constexpr):
    """Whether a position lies in the grid. Signs are joined, for less than comparisons take."""
    beyond = x2 | (L2 - 1 - x2)
    if RANK > 1:
        beyond |= x1 | (L1 - 1 - x1)
    if RANK > 2:
        beyond |= x0 | (L0 - 1 - x0)
    return beyond >= 0


@triton.jit
def next_of(k, start, TAPS: tl.constexpr, INNER: tl.constexpr):
    """The tap and first channel of the next step: all taps of some channels, then of the next.

    What neighbouring taps see is found in the first cache.
    """
    last = k == TAPS - 1
    return tl.where(last, 0, k + 1), tl.where(last, start + INNER, start)


@triton.jit
def gather(
    lines, j, k, start, inner, zero, b0, b1, b2, r0, r1, r2, M0, M1, M2, SP,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr, EVEN_INNER: tl.constexpr, INNER: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """The tile (channels from `start` on, positions) that tap k sees.

    `lines` is what tap 0 sees, at b0, b1, b2 (and what is left of them modulo the stride) in a grid
    M0, M1, M2.
    """
    d0, d1, d2 = k // (K1 * K2) * D0, k // K2 % K1 * D1, k % K2 * D2
    e0, e1, e2 = d0, d1, d2
    if TRANSPOSED:
        e0, e1, e2 = -(d0 // S0), -(d1 // S1), -(d2 // S2)
    inside = exists(b0 + e0, b1 + e1, b2 + e2, M0, M1, M2, RANK)
    if TRANSPOSED and S0 * S1 * S2 > 1:
        inside = inside & (r0 == d0 % S0) & (r1 == d1 % S1) & (r2 == d2 % S2)
    step = index_of(e0, e1, e2 + zero, M1, M2, RANK)
    used = inside[None, :] & within(j + start, inner, EVEN_INNER, INNER)[:, None]
    return tl.load(lines + (step * SP + start), mask=used, other=0, cache_modifier=CACHE)


@tuned(
    GATHERED,
    ["rows", "inner", "bound", "K2", "EXPERTS", "TRANSPOSED"],
    **fitting(ROWS="rows", POSITIONS="bound"),
)
@triton.jit
def multiply(
    out, source, weight, mixture, bias, rows, inner, groups, positions, bound,
    L0, L1, L2, O0, O1, O2,
    # steps of out along sample, channel and position; of source along sample and position; of
    # weight along sample (or expert), group, row of the output, channel of the source and tap; of
    # mixture along sample, expert and tap
    ON, OC, OP, SN, SP, WN, WG, WI, WJ, WK, MN, ME, MK,
    TRANSPOSED: tl.constexpr, EXPERTS: tl.constexpr, BIASED: tl.constexpr,
    RANK: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_INNER: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, INNER: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out[i, p] = sum_{k, j} W[i, k, j] source[p * stride - padding + k * dilation, j].

    W is one sample's kernel. EXPERTS > 0: W = sum_e mixture[n, e, k] weight[e], mixed tile by tile.
    TRANSPOSED, the input's gradient: source[(p + padding - k * dilation) / stride, j], where that
    is whole. `bound` is a power near the number of positions: what to tune for.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    H1, H2, M0, M1, M2 = O1, O2, L0, L1, L2
    if TRANSPOSED:
        H1, H2, M0, M1, M2 = L1, L2, O0, O1, O2
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    blocks, parts = tl.cdiv(positions, POSITIONS), tl.cdiv(rows, ROWS)
    p = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    i = program // blocks % parts * ROWS + tl.arange(0, ROWS)
    g = program // (blocks * parts) % groups
    n = program // (blocks * parts * groups)
    b0, b1, b2 = p // (H1 * H2), p // H2 % H1, p % H2
    r0, r1, r2 = b0, b1, b2
    if TRANSPOSED:
        b0, b1, b2 = b0 + P0, b1 + P1, b2 + P2
        r0, r1, r2 = b0 % S0, b1 % S1, b2 % S2
        b0, b1, b2 = b0 // S0, b1 // S1, b2 // S2
    else:
        b0, b1, b2 = b0 * S0 - P0, b1 * S1 - P1, b2 * S2 - P2
    j = tl.arange(0, INNER)
    kernel = weight + g * WG + i[:, None] * WI + j[None, :] * WJ
    if EXPERTS == 0:
        kernel += n * WN
    lines = source + n * SN + g * inner
    lines += (index_of(b0, b1, b2, M1, M2, RANK) * SP)[None, :] + j[:, None]
    b2 = tl.where(p < positions, b2, -(1 << 30))  # beyond all lengths
    total = tl.zeros((ROWS, POSITIONS), SUM)
    TAPS: tl.constexpr = K0 * K1 * K2
    CACHE: tl.constexpr = "" if AHEAD else ".ca"  # else copies pass the first cache by
    turns = TAPS * tl.cdiv(inner, INNER)
    k, start = 0, 0
    if AHEAD:
        v = gather(
            lines, j, k, start, inner, zero, b0, b1, b2, r0, r1, r2, M0, M1, M2, SP,
            TRANSPOSED, RANK, EVEN_INNER, INNER, K1, K2, S0, S1, S2, D0, D1, D2, CACHE,
        )  # fmt: skip
    for turn in range(turns):
        used = within(i, rows, EVEN_ROWS, ROWS)[:, None]
        used = used & within(j + start, inner, EVEN_INNER, INNER)[None, :]
        tile = kernel + ((start + zero) * WJ + (k + zero) * WK)
        if EXPERTS == 0:
            w = tl.load(tile, mask=used, other=0)
        else:
            mix = tl.zeros((ROWS, INNER), SUM)
            for e in tl.static_range(EXPERTS):
                share = tl.load(mixture + n * MN + e * ME + k * MK).to(SUM)
                mix += share * tl.load(tile + (e + zero) * WN, mask=used, other=0).to(SUM)
            w = mix.to(source.dtype.element_ty)
        next_k, next_start = next_of(k, start, TAPS, INNER)
        if AHEAD:  # after the last one, again its own
            more = turn + 1 < turns
            k, start = tl.where(more, next_k, k), tl.where(more, next_start, start)
        ahead = gather(
            lines, j, k, start, inner, zero, b0, b1, b2, r0, r1, r2, M0, M1, M2, SP,
            TRANSPOSED, RANK, EVEN_INNER, INNER, K1, K2, S0, S1, S2, D0, D1, D2, CACHE,
        )  # fmt: skip
        factor = v if AHEAD else ahead
        total = tl.dot(w, factor, total, input_precision=PRECISION, out_dtype=total.dtype)
        if AHEAD:
            v = ahead
        else:
            k, start = next_k, next_start
    channel = g * rows + i
    if BIASED:
        add = tl.load(bias + n * groups * rows + channel, mask=i < rows, other=0)
        total += add.to(SUM)[:, None]
    target = out + n * ON + channel[:, None] * OC + p[None, :] * OP
    used = (i < rows)[:, None] & (p < positions)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@triton.jit
def offsets(
    out, count, L1, L2, SC, SP, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """out[m] = what channel j(m) and tap k(m) add to an address in the source."""
    m = wide(tl.program_id(0), FAR) * SIZE + tl.arange(0, SIZE)
    j, k = m // (K0 * K1 * K2), m % (K0 * K1 * K2)
    step = (k // (K1 * K2) * D0 * L1 + k // K2 % K1 * D1) * L2 + k % K2 * D2
    tl.store(out + m, j * SC + step * SP, mask=m < count)


@tuned(FLAT, ["rows", "inner", "bound", "K2"], **fitting(ROWS="rows", POSITIONS="bound"))
@triton.jit
def multiply_flat(
    out, source, weight, bias, steps, rows, inner, groups, positions, bound,
    # the input's sizes with its padding, the output's
    L1, L2, O1, O2,
    # steps of out and source along sample, channel and position; of weight along sample and row
    ON, OC, OP, SN, SC, SP, WN, WI,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[i, p] = sum_m W[i, m] source[j(m), p * stride + k(m) * dilation], m channel and tap.

    What is gathered for the next product is on its way during this one.
    """
    TAPS: tl.constexpr = K0 * K1 * K2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    parts, blocks = tl.cdiv(rows, ROWS), tl.cdiv(positions, POSITIONS)
    i = program % parts * ROWS + tl.arange(0, ROWS)
    p = program // parts % blocks * POSITIONS + tl.arange(0, POSITIONS)
    g = program // (parts * blocks) % groups
    n = program // (parts * blocks * groups)
    kernel = weight + n * WN + (g * rows + i)[:, None] * WI
    q = (p // (O1 * O2) * S0 * L1 + p // O2 % O1 * S1) * L2 + p % O2 * S2
    if S2 == 1:  # but for the ends of lines: threads side by side read numbers side by side
        q = tl.max_contiguous(q, POSITIONS)
    lines = source + n * SN + g * inner * SC + (q * SP)[None, :]
    total = tl.zeros((ROWS, POSITIONS), SUM)
    v = tl.zeros((INNER, POSITIONS), source.dtype.element_ty)
    for start in range(0, inner * TAPS + INNER, INNER):
        m = start + tl.arange(0, INNER)
        step = tl.load(steps + m, mask=m < inner * TAPS, other=0)
        inside = (p < positions)[None, :] & (m < inner * TAPS)[:, None]
        ahead = tl.load(lines + step[:, None], mask=inside, other=0)
        m -= INNER
        used = (i < rows)[:, None] & ((m >= 0) & (m < inner * TAPS))[None, :]
        w = tl.load(kernel + m[None, :], mask=used, other=0)
        total = tl.dot(w, v, total, input_precision=PRECISION, out_dtype=total.dtype)
        v = ahead
    channel = g * rows + i
    if BIASED:
        add = tl.load(bias + n * groups * rows + channel, mask=i < rows, other=0)
        total += add.to(SUM)[:, None]
    target = out + n * ON + channel[:, None] * OC + p[None, :] * OP
    used = (i < rows)[:, None] & (p < positions)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@triton.jit
def onward(
    x0, x1, x2, d1, d2, O1, O2, STEP: tl.constexpr, RANK: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
):  # fmt: skip
    """What STEP output positions further on see: carried over as digits are, without a division.

    They are o * S + d in each dimension, with o < O but for the first.
    """
    if RANK == 1:
        return x0, x1, x2 + STEP * S2
    x2 += STEP % O2 * S2
    carry = x2 >= O2 * S2 + d2
    x2 = tl.where(carry, x2 - O2 * S2, x2)
    if RANK == 2:
        return x0, tl.where(carry, x1 + S1, x1) + STEP // O2 * S1, x2
    x1 = tl.where(carry, x1 + S1, x1) + STEP // O2 % O1 * S1
    carry = x1 >= O1 * S1 + d1
    x1 = tl.where(carry, x1 - O1 * S1, x1)
    return tl.where(carry, x0 + S0, x0) + STEP // (O1 * O2) * S0, x1, x2


@tuned(TILES, ["rows", "inner", "bound", "K2"], **fitting(ROWS="rows", POSITIONS="inner"))
@triton.jit
def correlate(
    out, grad, source, rows, inner, groups, positions, bound,
    L0, L1, L2, O0, O1, O2,
    # steps of out along sample, row and tap; of grad and source along sample and position
    WN, WI, WK, ON, OP, SN, SP,
    RANK: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_INNER: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[n, i, k, j] = sum_p grad[n, p, i] source[n, p * stride - padding + k * dilation, j].

    POSITIONS counts channels j here, and INNER positions: a tile of the result is ROWS by POSITIONS
    as in `multiply`.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    blocks, parts = tl.cdiv(inner, POSITIONS), tl.cdiv(rows, ROWS)
    j = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    i = program // blocks % parts * ROWS + tl.arange(0, ROWS)
    k = program // (blocks * parts) % (K0 * K1 * K2)
    g = program // (blocks * parts * (K0 * K1 * K2)) % groups
    n = program // (blocks * parts * (K0 * K1 * K2) * groups)
    slopes = grad + n * ON + (g * rows + i)[:, None]
    lines = source + n * SN + (g * inner + j)[None, :]
    total = tl.zeros((ROWS, POSITIONS), SUM)
    p = tl.arange(0, INNER)
    d0, d1, d2 = k // (K1 * K2) * D0 - P0, k // K2 % K1 * D1 - P1, k % K2 * D2 - P2
    x0, x1, x2 = p // (O1 * O2) * S0 + d0, p // O2 % O1 * S1 + d1, p % O2 * S2 + d2
    for first in range(0, positions, INNER):
        p = first + tl.arange(0, INNER)
        real = p < positions
        used = real[None, :] & within(i, rows, EVEN_ROWS, ROWS)[:, None]
        slope = tl.load(slopes + p[None, :] * OP, mask=used, other=0)
        inside = real & exists(x0, x1, x2, L0, L1, L2, RANK)
        used = inside[:, None] & within(j, inner, EVEN_INNER, POSITIONS)[None, :]
        q = index_of(x0, x1, x2 + zero, L1, L2, RANK)
        v = tl.load(lines + (q * SP)[:, None], mask=used, other=0)
        x0, x1, x2 = onward(x0, x1, x2, d1, d2, O1, O2, INNER, RANK, S0, S1, S2)
        total = tl.dot(slope, v, total, input_precision=PRECISION, out_dtype=total.dtype)
    target = out + n * WN + (g * rows + i)[:, None] * WI + k * WK + j[None, :]
    used = (i < rows)[:, None] & (j < inner)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@tuned(FLAT, ["rows", "inner", "bound", "K2"], **fitting(ROWS="rows"))
@triton.jit
def correlate_flat(
    out, grad, source, steps, rows, inner, groups, positions, bound,
    # the input's sizes with its padding, the output's
    L1, L2, O1, O2,
    # steps of out along sample and row; of grad along sample and position; of source along sample,
    # channel and position
    WN, WI, ON, OP, SN, SC, SP,
    RANK: tl.constexpr, PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[n, i, m] = sum_p grad[n, p, i] source[n, j(m), p * stride + k(m) * dilation].

    m as in `multiply_flat`. POSITIONS counts m here, and INNER positions.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    length = inner * (K0 * K1 * K2)
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    blocks, parts = tl.cdiv(length, POSITIONS), tl.cdiv(rows, ROWS)
    m = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    i = program // blocks % parts * ROWS + tl.arange(0, ROWS)
    g = program // (blocks * parts) % groups
    n = program // (blocks * parts * groups)
    step = tl.load(steps + m, mask=m < length, other=0)
    slopes = grad + n * ON + (g * rows + i)[:, None]
    lines = source + n * SN + g * inner * SC + step[None, :]
    total = tl.zeros((ROWS, POSITIONS), SUM)
    v = tl.zeros((INNER, POSITIONS), source.dtype.element_ty)
    p = tl.arange(0, INNER)
    x0, x1, x2 = p // (O1 * O2) * S0, p // O2 % O1 * S1, p % O2 * S2
    for first in range(0, positions + INNER, INNER):
        p = first + tl.arange(0, INNER)
        q = index_of(x0, x1, x2 + zero, L1, L2, RANK)
        if S2 == 1:  # but for the ends of lines
            q = tl.max_contiguous(q, INNER)
        inside = (p < positions)[:, None] & (m < length)[None, :]
        ahead = tl.load(lines + (q * SP)[:, None], mask=inside, other=0)
        x0, x1, x2 = onward(x0, x1, x2, 0, 0, O1, O2, INNER, RANK, S0, S1, S2)
        p -= INNER
        used = (i < rows)[:, None] & ((p >= 0) & (p < positions))[None, :]
        slope = tl.load(slopes + p[None, :] * OP, mask=used, other=0)
        total = tl.dot(slope, v, total, input_precision=PRECISION, out_dtype=total.dtype)
        v = ahead
    target = out + n * WN + (g * rows + i)[:, None] * WI + m[None, :]
    used = (i < rows)[:, None] & (m < length)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@triton.jit
def fold(
    out, columns, channels, positions, L1, L2, O0, O1, O2,
    # steps of out along sample, channel and position; of columns along sample and channel
    ON, OC, OP, CN, CC,
    RANK: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """out[c, q] = sum_k columns[(c, k), (q + padding - k * dilation) / stride], where whole."""
    TAPS: tl.constexpr = K0 * K1 * K2
    program = wide(tl.program_id(0), FAR)
    blocks = tl.cdiv(channels * positions, SIZE)
    n, m = program // blocks, program % blocks * SIZE + tl.arange(0, SIZE)
    c, q, real = m // positions, m % positions, m < channels * positions
    q0, q1, q2 = q // (L1 * L2) + P0, q // L2 % L1 + P1, q % L2 + P2
    line = columns + n * CN + c * TAPS * CC
    total = tl.zeros((SIZE,), tl.float64 if DOUBLE else tl.float32)
    for k in range(TAPS):
        x0, x1, x2 = q0 - k // (K1 * K2) * D0, q1 - k // K2 % K1 * D1, q2 - k % K2 * D2
        whole = (x0 % S0 == 0) & (x1 % S1 == 0) & (x2 % S2 == 0)
        seen = whole & exists(x0 // S0, x1 // S1, x2 // S2, O0, O1, O2, RANK)
        at = index_of(x0 // S0, x1 // S1, x2 // S2, O1, O2, RANK)
        total += tl.load(line + k * CC + at, mask=real & seen, other=0).to(total.dtype)
    tl.store(out + n * ON + c * OC + q * OP, total.to(out.dtype.element_ty), mask=real)


def channels_last(weight: Tensor) -> Tensor:
    """Kernels (N, C_out, C_in / groups, *K) as (N, C_out, taps, C_in / groups), in one piece."""
    flat = weight.flatten(3)
    return transposed(flat.flatten(0, 1)).unflatten(0, flat.shape[:2])


def channels_before_taps(kernels: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `channels_last`."""
    return transposed(kernels.flatten(0, 1)).reshape(-1, *shape[1:])


def grid_of(matrices: int, rows: int, columns: int) -> Callable[[dict[str, int]], tuple[int]]:
    """A program for each tile of ROWS by POSITIONS of so many matrices."""
    return lambda tile: (matrices * cdiv(rows, tile["ROWS"]) * cdiv(columns, tile["POSITIONS"]),)


def convolve(
    out: Tensor,
    source: Tensor,
    kernels: Tensor,
    mixture: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    geometry: Geometry,
    groups: int,
    back: bool = False,
) -> None:
    """Launches `multiply`; `out` is written in place.

    Args:
        kernels: (N, C_out, taps, C_in / groups), or (E, ...) with a mixture (N, E) or (N, E, *K).
        bias: (N, C_out).
        sizes: of the convolution's input and output, three each.
        back: out is the input's gradient, source that of the output.
    """
    planes, lines = out.flatten(2), rows_of(source)
    count, inner = planes.shape[1] // groups, lines.shape[2] // groups
    by_sample, by_row, by_tap, _ = kernels.stride()
    steps = [by_sample, kernels.shape[1] // groups * by_row, by_row, 1, by_tap]
    if back:
        steps[2], steps[3] = steps[3], steps[2]
    experts, shares = 0, [0, 0, 0]
    if mixture is not None:
        mixture = mixture.flatten(2) if mixture.dim() > 2 else mixture.unsqueeze(2)
        experts = mixture.shape[1]
        shares = [*mixture.stride()[:2], mixture.stride(2) if mixture.shape[2] > 1 else 0]

    grid = grid_of(planes.shape[0] * groups, count, planes.shape[2])
    launch(multiply)[grid](
        planes, lines, kernels, kernels if mixture is None else mixture,
        kernels if bias is None else bias.contiguous(), count, inner, groups,
        planes.shape[2], bound(planes.shape[2]), *sizes,
        *planes.stride(), *lines.stride()[:2], *steps, *shares,
        TRANSPOSED=back, EXPERTS=experts, BIASED=bias is not None,
        RANK=len(geometry.kernel), PRECISION=precision(out), DOUBLE=out.dtype == torch.float64,
        FAR=far(planes, lines, kernels), **even(ROWS=count, INNER=inner), **constants(geometry),
    )  # fmt: skip


def offsets_in(source: Tensor, count: int, geometry: Geometry, far: bool) -> Tensor:
    """Launches `offsets`: `count` pairs of channel and tap in a source (N, C, *L) with padding."""
    steps = source.new_empty(count, dtype=torch.int64 if far else torch.int32)
    launch(offsets)[(cdiv(count, 256),)](
        steps, count, *three(source.shape[2:], 1)[1:], *source.flatten(2).stride()[1:],
        FAR=far, **constants(geometry), SIZE=256,
    )  # fmt: skip
    return steps


def convolve_flat(
    out: Tensor,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> None:
    """Launches `multiply_flat`; `out` is written in place."""
    source = framed(source, geometry.padding)
    planes, lines = out.flatten(2), source.flatten(2)
    kernels = weight.contiguous().flatten(2)
    count, inner = planes.shape[1] // groups, lines.shape[1] // groups
    wide_ones = far(planes, lines, kernels)
    steps = offsets_in(source, kernels.shape[2], geometry, wide_ones)

    grid = grid_of(planes.shape[0] * groups, count, planes.shape[2])
    launch(multiply_flat)[grid](
        planes, lines, kernels, kernels if bias is None else bias.contiguous(), steps,
        count, inner, groups, planes.shape[2], bound(planes.shape[2]),
        *three(source.shape[2:], 1)[1:], *three(out.shape[2:], 1)[1:],
        *planes.stride(), *lines.stride(), *kernels.stride()[:2],
        BIASED=bias is not None, PRECISION=precision(out), DOUBLE=out.dtype == torch.float64,
        FAR=wide_ones, **constants(geometry),
    )  # fmt: skip


def input_gradient_flat(
    out: Tensor, slopes: Tensor, weight: Tensor, geometry: Geometry, groups: int
) -> None:
    """Launches `multiply`, for the gradients of all taps' samples, and `fold`; `out` is written."""
    planes, kernels = out.flatten(2), weight.contiguous().flatten(2)
    positions = prod(slopes.shape[2:])
    columns = planes.new_empty(len(planes), groups * kernels.shape[2], positions)
    convolve(
        columns, slopes, kernels.unsqueeze(2), None, None, [1, 1, positions] * 2, ONE, groups,
        back=True,
    )  # fmt: skip
    channels, length = planes.shape[1:]
    size = 256
    launch(fold)[(len(planes) * cdiv(channels * length, size),)](
        planes, columns, channels, length,
        *three(out.shape[2:], 1)[1:], *three(slopes.shape[2:], 1),
        *planes.stride(), *columns.stride()[:2],
        RANK=len(geometry.kernel), DOUBLE=out.dtype == torch.float64, FAR=far(planes, columns),
        **constants(geometry), SIZE=size,
    )  # fmt: skip


def kernel_gradient_flat(
    out: Tensor, grad: Tensor, input: Tensor, geometry: Geometry, groups: int
) -> None:
    """Launches `correlate_flat`; `out`, (N, C_out, C_in / groups, *K), is written in place."""
    source = framed(input, geometry.padding)
    slopes, lines, kernels = rows_of(grad), source.flatten(2), out.flatten(2)
    count, inner = kernels.shape[1] // groups, lines.shape[1] // groups
    wide_ones = far(slopes, lines, kernels)
    steps = offsets_in(source, kernels.shape[2], geometry, wide_ones)

    grid = grid_of(kernels.shape[0] * groups, count, kernels.shape[2])
    launch(correlate_flat)[grid](
        kernels, slopes, lines, steps,
        count, inner, groups, slopes.shape[1], bound(slopes.shape[1]),
        *three(source.shape[2:], 1)[1:], *three(grad.shape[2:], 1)[1:],
        *kernels.stride()[:2], *slopes.stride()[:2], *lines.stride(),
        RANK=len(geometry.kernel), PRECISION=precision(out), DOUBLE=out.dtype == torch.float64,
        FAR=wide_ones, **constants(geometry),
    )  # fmt: skip


def kernel_gradient(
    grad: Tensor,
    input: Tensor,
    sizes: list[int],
    geometry: Geometry,
    groups: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Launches `correlate`: the gradient of the kernels, (N, C_out, taps, C_in / groups)."""
    slopes, lines = rows_of(grad), rows_of(input)
    batch, channels, inner = slopes.shape[0], slopes.shape[2], lines.shape[2] // groups
    taps, count = prod(geometry.kernel), channels // groups
    out = grad.new_empty(batch, channels, taps, inner, dtype=dtype)
    if not out.numel():
        return out

    grid = grid_of(batch * groups * taps, count, inner)
    launch(correlate)[grid](
        out, slopes, lines, count, inner, groups, slopes.shape[1], bound(slopes.shape[1]), *sizes,
        *out.stride()[:3], *slopes.stride()[:2], *lines.stride()[:2],
        RANK=len(geometry.kernel), PRECISION=precision(grad), DOUBLE=out.dtype == torch.float64,
        FAR=far(out, slopes, lines), **even(ROWS=count, INNER=inner), **constants(geometry),
    )  # fmt: skip
    return out


def large(weight: Tensor, *others: Tensor) -> bool:
    """Whether the kernels are what moves."""
    return weight.numel() >= LARGE * sum(t.numel() for t in others)


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    if formulation(input, weight, settings) == "matmul":
        return matmul(input, weight, bias, settings)
    output = output_like(input, eager.shape(input, weight, bias, *settings))
    if not output.numel():
        return output
    geometry, sizes = geometry_of(weight.shape[3:], settings), sizes_of(input, output)
    if large(weight, input, output):
        convolve_flat(output, input, weight, bias, geometry, settings[3])
    else:
        rest = (None, bias, sizes, geometry, settings[3])
        convolve(output, input, channels_last(weight), *rest)
    return output


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    *settings, mask = rest
    gb = grad.flatten(2).sum(2) if mask[2] else None
    if formulation(input, weight, settings) == "matmul":
        return [*matmul_backward(grad, input, weight, settings, mask[:2]), gb]
    geometry, sizes = geometry_of(weight.shape[3:], settings), sizes_of(input, grad)
    slopes = rows_of(grad).transpose(1, 2).unflatten(2, grad.shape[2:])
    as_they_lie = large(weight, input, grad)
    gx = gw = None
    if mask[0]:
        gx = gradient_like(input)
        columns = prod(geometry.kernel) * gx.numel()
        if gx.numel() and as_they_lie and weight.numel() >= FOLDED * columns:
            input_gradient_flat(gx, slopes, weight, geometry, settings[3])
        elif gx.numel():
            kernels = channels_last(weight)
            convolve(gx, slopes, kernels, None, None, sizes, geometry, settings[3], back=True)
    if mask[1] and as_they_lie:
        gw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        kernel_gradient_flat(gw, slopes, input, geometry, settings[3])
    elif mask[1]:
        gw = kernel_gradient(slopes, input, sizes, geometry, settings[3])
        gw = channels_before_taps(gw, weight.shape)
    return [gx, gw, gb]


operator = eager.twin("triton_conv_per_sample", _forward, _backward, register)


def conv_per_sample(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    return operator(input, weight, bias, *map(list, geometry[1:]), groups)
