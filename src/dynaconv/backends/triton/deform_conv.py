"""deform_conv in Triton: samples are gathered where they are multiplied, without a column buffer.

The input lies as rows (position, channels), so that a sample is 2^D rows weighted and added. A
depthwise convolution is a sum over the taps; any other multiplies tiles of samples with the weight.
Channels go through in segments that lie in one group of the weight and in one of the offset.
"""

from math import gcd, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaconv.backends.eager.deform_conv import operator as eager
from dynaconv.backends.operator import output_like
from dynaconv.backends.triton.launch import (
    constants,
    far,
    geometry_of,
    launch,
    precision,
    register,
    rows_of,
    sizes_of,
    tuned,
    wide,
)

# mypy: disable-error-code="no-untyped-def"
TILES = [
    {"POSITIONS": 64, "ROWS": 64, "INNER": 32, "stages": 2},
    {"POSITIONS": 64, "ROWS": 128, "INNER": 32, "stages": 2},
    {"POSITIONS": 128, "ROWS": 64, "INNER": 32, "warps": 8, "stages": 2},
    {"POSITIONS": 64, "ROWS": 256, "INNER": 32, "warps": 8, "stages": 2},
    {"POSITIONS": 32, "ROWS": 128, "INNER": 64, "stages": 2},
    {"POSITIONS": 16, "ROWS": 64, "INNER": 64, "stages": 2},
]
BY_CHANNEL = [
    {"POSITIONS": 32, "ROWS": 32},
    {"POSITIONS": 16, "ROWS": 64},
    {"POSITIONS": 64, "ROWS": 16},
    {"POSITIONS": 8, "ROWS": 128},
]
KEY = ["rows", "inner", "segment", "RANK", "K2"]
# A weight's gradient is split along positions, into at most MOST parts: up to BUSY programs of EACH
# positions or more.
BUSY, EACH, MOST = 512, 1024, 64


@triton.jit
def place(
    offset, tap, d, k_d, o_d, stride, padding, dilation, FC, real, SUM: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Where tap `tap` samples along dimension d: its place on the grid plus its offset."""
    moved = tl.load(offset + (tap * RANK + d) * FC, mask=real, other=0)
    return (o_d * stride - padding + k_d * dilation).to(SUM) + moved.to(SUM)


@triton.jit
def neighbour(where, length, UPPER: tl.constexpr):
    """The grid point below or above `where`: its index, its share, and whether it exists."""
    low = tl.floor(where)
    point = low + UPPER
    outside = (point < 0) | (point > length - 1)
    share = where - low
    if UPPER == 0:
        share = 1 - share
    exists = (point == point) & (outside == 0)  # a place that is NaN has none
    return tl.where(exists, point, 0).to(tl.int32), tl.where(outside, 0, share), exists


@triton.jit
def places(
    offset, tap, k, o0, o1, o2, FC, real, SUM: tl.constexpr, RANK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Where tap k samples from output positions (o0, o1, o2), in the dimensions there are."""
    k0, k1, k2 = k // (K1 * K2), k // K2 % K1, k % K2
    x2 = place(offset, tap, RANK - 1, k2, o2, S2, P2, D2, FC, real, SUM, RANK)
    x1, x0 = x2, x2
    if RANK > 1:
        x1 = place(offset, tap, RANK - 2, k1, o1, S1, P1, D1, FC, real, SUM, RANK)
    if RANK > 2:
        x0 = place(offset, tap, 0, k0, o0, S0, P0, D0, FC, real, SUM, RANK)
    return x0, x1, x2


@triton.jit
def corner_of(x0, x1, x2, L0, L1, L2, zero, CORNER: tl.constexpr, RANK: tl.constexpr):
    """One of the 2^RANK grid points around a place.

    Its index (in the width of `zero`), whether it exists, and for each dimension its share (1 where
    there is no dimension).
    """
    index, s2, exists = neighbour(x2, L2, CORNER & 1)
    index = index + zero
    s1, s0 = s2 * 0 + 1, s2 * 0 + 1
    if RANK > 1:
        i1, s1, e1 = neighbour(x1, L1, (CORNER >> 1) & 1)
        index, exists = index + i1 * L2, exists & e1
    if RANK > 2:
        i0, s0, e0 = neighbour(x0, L0, (CORNER >> 2) & 1)
        index, exists = index + i0 * (L1 * L2), exists & e0
    return index, exists, s0, s1, s2


@triton.jit
def sampled(
    rows, c, used, x0, x1, x2, L0, L1, L2, zero, SP,
    RANK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The values (POSITIONS, channels) at places: the points around each, by their shares."""
    total = (used * 0.0).to(SUM)
    for corner in tl.static_range(1 << RANK):
        index, exists, s0, s1, s2 = corner_of(x0, x1, x2, L0, L1, L2, zero, corner, RANK)
        share = (s0 * s1 * s2)[:, None]
        there = used & exists[:, None]
        point = tl.load(rows + index[:, None] * SP + c[None, :], mask=there, other=0)
        total += share * point.to(SUM)
    return total


@tuned(TILES, KEY)
@triton.jit
def forward(
    out, source, offset, weight, bias, modulation,
    batch, rows, inner, segment, groups, by_offset,
    L0, L1, L2, O0, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, WO, WC, WK,
    RANK: tl.constexpr, MODULATED: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[o, p] = bias[o] + sum_{c, k} weight[o, c, k] modulation[k, p] source(place(p, k))[c]."""
    TAPS: tl.constexpr = K0 * K1 * K2
    positions = O0 * O1 * O2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    parts = tl.cdiv(rows, ROWS)
    i = program % parts * ROWS + tl.arange(0, ROWS)
    g = program // parts % groups
    m = (program // (parts * groups)) * POSITIONS + tl.arange(0, POSITIONS)
    real, n, p = m < batch * positions, m // positions, m % positions
    o0, o1, o2 = p // (O1 * O2), p // O2 % O1, p % O2
    channel = g * rows + i
    total = tl.zeros((POSITIONS, ROWS), SUM)
    for s in range(inner // segment):
        first = g * inner + s * segment
        for k in range(TAPS):
            tap = first // by_offset * TAPS + k
            x0, x1, x2 = places(
                offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
                K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
            )  # fmt: skip
            for start in range(0, segment, INNER):
                j = start + tl.arange(0, INNER)
                used = real[:, None] & (j < segment)[None, :]
                lines = source + (n * SN)[:, None]
                value = sampled(lines, first + j, used, x0, x1, x2, L0, L1, L2, zero, SP, RANK, SUM)
                if MODULATED:
                    at = modulation + n * MN + tap * MC + p * MP
                    value *= tl.load(at, mask=real, other=0).to(SUM)[:, None]
                at = weight + channel[None, :] * WO + k * WK
                factor = tl.load(
                    at + (s * segment + j)[:, None] * WC,
                    mask=(j < segment)[:, None] & (i < rows)[None, :], other=0,
                )  # fmt: skip
                value = value.to(factor.dtype)
                total = tl.dot(
                    value, factor, total, input_precision=PRECISION, out_dtype=total.dtype
                )
    if BIASED:
        add = tl.load(bias + channel, mask=i < rows, other=0)
        total += add.to(SUM)[None, :]
    target = out + (n * ON + p * OP)[:, None] + channel[None, :] * OC
    used = real[:, None] & (i < rows)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@tuned(BY_CHANNEL, KEY)
@triton.jit
def forward_depthwise(
    out, source, offset, weight, bias, modulation,
    batch, rows, inner, segment, groups, by_offset,
    L0, L1, L2, O0, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, WO, WC, WK,
    RANK: tl.constexpr, MODULATED: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[o, p] = bias[o] + sum_k weight[o, k] modulation[k, p] source(place(p, k))[o // rows].

    `rows` is the number of output channels for each input channel.
    """
    TAPS: tl.constexpr = K0 * K1 * K2
    positions = O0 * O1 * O2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    width = by_offset * rows
    parts = tl.cdiv(width, ROWS)
    i = program % parts * ROWS + tl.arange(0, ROWS)
    h = program // parts % (groups // by_offset)
    m = (program // (parts * (groups // by_offset))) * POSITIONS
    m += tl.arange(0, POSITIONS)
    real, n, p = m < batch * positions, m // positions, m % positions
    o0, o1, o2 = p // (O1 * O2), p // O2 % O1, p % O2
    channel = h * width + i
    used = real[:, None] & (i < width)[None, :]
    total = tl.zeros((POSITIONS, ROWS), SUM)
    for k in range(TAPS):
        tap = h * TAPS + k
        x0, x1, x2 = places(
            offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        lines = source + (n * SN)[:, None]
        value = sampled(lines, channel // rows, used, x0, x1, x2, L0, L1, L2, zero, SP, RANK, SUM)
        if MODULATED:
            at = modulation + n * MN + tap * MC + p * MP
            value *= tl.load(at, mask=real, other=0).to(SUM)[:, None]
        factor = tl.load(weight + channel * WO + k * WK, mask=i < width, other=0)
        total += value * factor.to(SUM)[None, :]
    if BIASED:
        add = tl.load(bias + channel, mask=i < width, other=0)
        total += add.to(SUM)[None, :]
    target = out + (n * ON + p * OP)[:, None] + channel[None, :] * OC
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@tuned(
    [tile for tile in TILES if tile["ROWS"] <= 128], [*KEY, "DEPTHWISE"], reset_to_zero=["by_input"]
)
@triton.jit
def backward(
    by_input, by_offsets, by_modulation, grad, source, offset, weight, modulation,
    batch, rows, inner, segment, groups, by_offset, offset_groups,
    L0, L1, L2, O0, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, WO, WC, WK,
    # steps of the gradients of offset and modulation
    GN, GC, GP, HN, HC, HP,
    RANK: tl.constexpr, MODULATED: tl.constexpr, DEPTHWISE: tl.constexpr,
    INPUT: tl.constexpr, OFFSET: tl.constexpr, MODULATION: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradients of the input (added to), of offset and of modulation, by tap and position.

    slope[p, c] = sum_o grad[o, p] weight[o, c, k] is that of a modulated sample; each of the points
    around it gets its share of it.
    """
    TAPS: tl.constexpr = K0 * K1 * K2
    positions = O0 * O1 * O2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    k = program % TAPS
    h = program // TAPS % offset_groups
    m = (program // (TAPS * offset_groups)) * POSITIONS + tl.arange(0, POSITIONS)
    real, n, p = m < batch * positions, m // positions, m % positions
    o0, o1, o2 = p // (O1 * O2), p // O2 % O1, p % O2
    tap = h * TAPS + k
    x0, x1, x2 = places(
        offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
        K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
    )  # fmt: skip
    factor = (real * 1.0).to(SUM)
    if MODULATED:
        at = modulation + n * MN + tap * MC + p * MP
        factor = tl.load(at, mask=real, other=0).to(SUM)
    # Of modulation, and of the place in each dimension.
    t, t0, t1, t2 = factor * 0, factor * 0, factor * 0, factor * 0
    for s in range(by_offset // segment):
        first = h * by_offset + s * segment
        g = first // inner
        for start in range(0, segment, INNER):
            j = start + tl.arange(0, INNER)
            c = first + j
            used = real[:, None] & (j < segment)[None, :]
            slope = tl.zeros((POSITIONS, INNER), SUM)
            slopes = grad + (n * ON + p * OP)[:, None]
            if DEPTHWISE:
                for r in range(rows):
                    channel = c * rows + r
                    y = tl.load(slopes + channel[None, :] * OC, mask=used, other=0)
                    w = tl.load(weight + channel * WO + k * WK, mask=j < segment, other=0)
                    slope += y.to(SUM) * w.to(SUM)[None, :]
            else:
                for row in range(0, rows, ROWS):
                    i = row + tl.arange(0, ROWS)
                    channel = g * rows + i
                    y = tl.load(
                        slopes + channel[None, :] * OC,
                        mask=real[:, None] & (i < rows)[None, :], other=0,
                    )  # fmt: skip
                    w = tl.load(
                        weight + channel[:, None] * WO + (c - g * inner)[None, :] * WC + k * WK,
                        mask=(i < rows)[:, None] & (j < segment)[None, :], other=0,
                    )  # fmt: skip
                    slope = tl.dot(y, w, slope, input_precision=PRECISION, out_dtype=slope.dtype)
            for corner in tl.static_range(1 << RANK):
                index, exists, s0, s1, s2 = corner_of(x0, x1, x2, L0, L1, L2, zero, corner, RANK)
                there = used & exists[:, None]
                row_at = (n * SN)[:, None] + index[:, None] * SP + c[None, :]
                if INPUT:
                    given = slope * (factor * s0 * s1 * s2)[:, None]
                    tl.atomic_add(by_input + row_at, given, mask=there, sem="relaxed")
                if OFFSET or MODULATION:
                    point = tl.load(source + row_at, mask=there, other=0).to(SUM)
                    seen = tl.sum(slope * point, 1)
                    t += seen * (s0 * s1 * s2)
                    seen = seen * factor
                    t2 += seen * s0 * s1 * ((corner & 1) * 2 - 1)
                    if RANK > 1:
                        t1 += seen * s0 * s2 * ((corner & 2) - 1)
                    if RANK > 2:
                        t0 += seen * s1 * s2 * ((corner & 4) // 2 - 1)
    if OFFSET:
        at = by_offsets + n * GN + p * GP
        kind = by_offsets.dtype.element_ty
        tl.store(at + (tap * RANK + RANK - 1) * GC, t2.to(kind), mask=real)
        if RANK > 1:
            tl.store(at + (tap * RANK + RANK - 2) * GC, t1.to(kind), mask=real)
        if RANK > 2:
            tl.store(at + (tap * RANK) * GC, t0.to(kind), mask=real)
    if MODULATION:
        at = by_modulation + n * HN + tap * HC + p * HP
        tl.store(at, t.to(by_modulation.dtype.element_ty), mask=real)


@tuned([tile for tile in TILES if tile["ROWS"] <= 128], [*KEY, "DEPTHWISE"])
@triton.jit
def by_weight(
    out, grad, source, offset, modulation,
    batch, rows, inner, segment, groups, by_offset, parts,
    L0, L1, L2, O0, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, XS, XO, XC, XK,
    RANK: tl.constexpr, MODULATED: tl.constexpr, DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[o, c, k] = sum_p grad[o, p] sample[p, c, k], the positions in `parts` parts.

    DEPTHWISE: `inner` channels under one offset group, each with `rows` outputs; out[o, k].
    """
    TAPS: tl.constexpr = K0 * K1 * K2
    positions = O0 * O1 * O2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    k = program % TAPS
    height = rows
    if DEPTHWISE:
        height = inner * rows
    tall, across = tl.cdiv(height, ROWS), tl.cdiv(segment, INNER)
    if DEPTHWISE:
        across = 1
    block = program // TAPS
    i = block % tall * ROWS + tl.arange(0, ROWS)
    j = block // tall % across * INNER + tl.arange(0, INNER)
    segments = inner // segment
    s = block // (tall * across) % segments
    g = block // (tall * across * segments) % groups
    part = block // (tall * across * segments * groups)
    first = g * inner + s * segment
    tap = first // by_offset * TAPS + k
    channel = g * height + i
    length = tl.cdiv(batch * positions, parts * POSITIONS) * POSITIONS
    begin = part * length
    total = tl.zeros((ROWS, INNER), SUM)
    column = tl.zeros((ROWS,), SUM)
    for start in range(0, length, POSITIONS):
        m = begin + start + tl.arange(0, POSITIONS)
        real, n, p = m < batch * positions, m // positions, m % positions
        o0, o1, o2 = p // (O1 * O2), p // O2 % O1, p % O2
        x0, x1, x2 = places(
            offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        lines = source + (n * SN)[:, None]
        factor = (real * 1.0).to(SUM)
        if MODULATED:
            at = modulation + n * MN + tap * MC + p * MP
            factor = tl.load(at, mask=real, other=0).to(SUM)
        if DEPTHWISE:
            used = real[:, None] & (i < height)[None, :]
            value = sampled(
                lines, first + i // rows, used, x0, x1, x2, L0, L1, L2, zero, SP, RANK, SUM
            )
            at = grad + (n * ON + p * OP)[:, None] + channel[None, :] * OC
            slope = tl.load(at, mask=used, other=0).to(SUM)
            column += tl.sum(slope * value * factor[:, None], 0)
        else:
            used = real[:, None] & (j < segment)[None, :]
            value = sampled(lines, first + j, used, x0, x1, x2, L0, L1, L2, zero, SP, RANK, SUM)
            value *= factor[:, None]
            at = grad + channel[:, None] * OC + (n * ON + p * OP)[None, :]
            slope = tl.load(at, mask=(i < height)[:, None] & real[None, :], other=0)
            total = tl.dot(
                slope, value.to(slope.dtype), total, input_precision=PRECISION,
                out_dtype=total.dtype,
            )  # fmt: skip
    at = out + part * XS + channel * XO + k * XK
    if DEPTHWISE:
        tl.store(at, column, mask=i < height)
    else:
        used = (i < height)[:, None] & (j < segment)[None, :]
        tl.store(at[:, None] + (s * segment + j)[None, :] * XC, total, mask=used)


# Launches --------------------------------------------------------------------------------------


class Call:
    """What all launches of one call share.

    Of a depthwise convolution, `inner` and `groups` count the channels and groups of the offset:
    what its kernels go through.
    """

    def __init__(
        self,
        output: Tensor,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        modulation: Tensor | None,
        settings: tuple[Any, ...],
    ) -> None:
        rank, groups = input.dim() - 2, settings[3]
        self.geometry = geometry_of(weight.shape[2:], settings)
        self.taps = prod(weight.shape[2:])
        self.lines = rows_of(input)
        self.offset = offset.flatten(2)
        # (C_out, C_in / groups, taps), its channels last in memory.
        self.kernel = weight.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
        self.modulation = None if modulation is None else modulation.flatten(2)
        self.output = output.flatten(2)
        self.channels, self.groups = input.shape[1], groups
        self.rows, self.inner = weight.shape[0] // groups, weight.shape[1]
        self.offset_groups = offset.shape[1] // (self.taps * rank)
        self.by_offset = self.channels // self.offset_groups
        self.depthwise = self.inner == 1
        self.segment = self.by_offset if self.depthwise else gcd(self.inner, self.by_offset)
        self.batch, self.positions = output.shape[0], self.output.shape[2]
        self.sizes = sizes_of(input, output)
        tensors = (self.lines, self.offset, self.kernel, self.output, self.modulation)
        self.options = {
            "RANK": rank,
            "MODULATED": modulation is not None,
            "PRECISION": precision(input),
            "DOUBLE": input.dtype == torch.float64,
            "FAR": far(*tensors),
            **constants(self.geometry),
        }

    def steps(self) -> list[int]:
        """Of output, rows of the input, offset, modulation."""
        given = self.offset if self.modulation is None else self.modulation
        rows = self.lines.stride()[:2]
        return [*self.output.stride(), *rows, *self.offset.stride(), *given.stride()]

    def blocks(self, tile: dict[str, int]) -> int:
        """Of positions."""
        return triton.cdiv(self.batch * self.positions, tile["POSITIONS"])


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *settings: Any,
) -> Tensor:
    output = output_like(input, eager.shape(input, offset, weight))
    if not output.numel():
        return output
    call = Call(output, input, offset, weight, modulation, settings)

    def grid(tile: dict[str, int]) -> tuple[int]:
        if call.depthwise:
            parts = triton.cdiv(call.by_offset * call.rows, tile["ROWS"])
            return (call.blocks(tile) * parts * call.offset_groups,)
        return (call.blocks(tile) * call.groups * triton.cdiv(call.rows, tile["ROWS"]),)

    arguments = (
        call.output, call.lines, call.offset, call.kernel,
        call.kernel if bias is None else bias.contiguous(),
        call.offset if modulation is None else call.modulation,
        call.batch, call.rows, call.inner, call.segment, call.groups, call.by_offset,
        *call.sizes, *call.steps(), *call.kernel.stride(),
    )  # fmt: skip
    options = call.options | {"BIASED": bias is not None}
    if call.depthwise:
        launch(forward_depthwise)[grid](*arguments, **options)
    else:
        launch(forward)[grid](*arguments, **options)
    return output


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    *settings, mask = rest
    gx = goffset = gmodulation = gw = None
    gb = grad.sum((0, *range(2, grad.dim()))) if mask[3] else None
    if not grad.numel():
        zeros = [None if t is None else torch.zeros_like(t) for t in (input, offset, weight)]
        return [*zeros, gb, None if modulation is None else torch.zeros_like(modulation)]
    call = Call(grad, input, offset, weight, modulation, tuple(settings))
    if mask[0] or mask[1] or mask[4]:
        gx, goffset, gmodulation = _of_data(call, input, [mask[0], mask[1], mask[4]])
    if mask[2]:
        gw = _of_weight(call).to(weight.dtype).reshape(weight.shape)
    return [gx, goffset, gw, gb, gmodulation]


def _of_data(call: Call, input: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients of input, offset and modulation that are wanted."""
    kind = torch.float64 if input.dtype == torch.float64 else torch.float32
    none = call.offset.new_zeros(1, dtype=kind)
    gx = torch.zeros_like(call.lines, dtype=kind) if wanted[0] else none
    goffset = torch.empty_like(call.offset) if wanted[1] else none
    given = call.offset if call.modulation is None else call.modulation
    gmodulation = torch.empty_like(given) if wanted[2] else none
    grid = lambda tile: (call.blocks(tile) * call.taps * call.offset_groups,)
    launch(backward)[grid](
        gx, goffset, gmodulation, call.output, call.lines, call.offset, call.kernel, given,
        call.batch, call.rows, call.inner, call.segment, call.groups, call.by_offset,
        call.offset_groups, *call.sizes, *call.steps(), *call.kernel.stride(),
        *(goffset.stride() if wanted[1] else (0, 0, 0)),
        *(gmodulation.stride() if wanted[2] else (0, 0, 0)),
        DEPTHWISE=call.depthwise, INPUT=wanted[0], OFFSET=wanted[1], MODULATION=wanted[2],
        **call.options,
    )  # fmt: skip
    by_input = gx.transpose(1, 2).reshape(input.shape).to(input.dtype) if wanted[0] else None
    return [by_input, goffset if wanted[1] else None, gmodulation if wanted[2] else None]


def _of_weight(call: Call) -> Tensor:
    """The gradient of the weight (C_out, C_in / groups, taps), in float32 or float64."""
    rows, taps = call.kernel.shape[0], call.taps
    groups, inner = call.groups, call.inner
    if call.depthwise:
        groups, inner = call.offset_groups, call.by_offset
    tiles = taps * groups * triton.cdiv(rows // groups, 64) * triton.cdiv(call.segment, 32)
    enough = call.batch * call.positions // EACH
    parts = torch.sym_max(1, torch.sym_min(min(MOST, BUSY // tiles), enough))
    kind = torch.float64 if call.kernel.dtype == torch.float64 else torch.float32
    kernel = call.kernel.transpose(1, 2)
    out = kernel.new_empty(parts, *kernel.shape, dtype=kind).transpose(2, 3)

    def grid(tile: dict[str, int]) -> tuple[int]:
        if call.depthwise:
            return (taps * parts * groups * triton.cdiv(inner * call.rows, tile["ROWS"]),)
        tall = triton.cdiv(call.rows, tile["ROWS"])
        across = inner // call.segment * triton.cdiv(call.segment, tile["INNER"])
        return (taps * parts * groups * tall * across,)

    given = call.offset if call.modulation is None else call.modulation
    launch(by_weight)[grid](
        out, call.output, call.lines, call.offset, given,
        call.batch, call.rows, inner, call.segment, groups, call.by_offset, parts,
        *call.sizes, *call.steps(), *out.stride(), DEPTHWISE=call.depthwise, **call.options,
    )  # fmt: skip
    return out.sum(0)


operator = eager.twin("triton_deform_conv", _forward, _backward, register)


def deform_conv(*args: Any) -> Tensor:
    *tensors, geometry, groups = args
    return operator(*tensors, *map(list, geometry[1:]), groups)
