"""deform_conv in Triton: forward gathers samples where they are multiplied, without columns.

The input lies as rows (position, channels), so that a sample is 2^D rows weighted and added. A
depthwise convolution is a sum over the taps; any other multiplies tiles of samples with the weight.
Channels go through in segments that lie in one group of the weight and in one of the offset.

Backward goes through columns (position, group, tap, channel) of a few samples at a time: a product
fills them with the slopes of all samples, one kernel makes of these the gradients of input, offset
and modulation, and leaves the samples in their place, and a product of those is the weight's. The
2^D rows around a sample are so read once for all gradients.
"""

from math import gcd, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaconv.backends.eager.deform_conv import operator as eager
from dynaconv.backends.operator import few_at_a_time, output_like
from dynaconv.backends.triton.conv_per_sample import ONE, convolve, kernel_gradient
from dynaconv.backends.triton.launch import (
    cdiv,
    constants,
    even,
    far,
    fitting,
    geometry_of,
    index_of,
    launch,
    precision,
    register,
    rows_of,
    sizes_of,
    summed,
    tuned,
    wide,
    within,
)

# mypy: disable-error-code="no-untyped-def"
# With one stage the points go through the first cache.
TILES = [
    {"POSITIONS": 64, "ROWS": 64, "INNER": 32, "stages": 1},
    {"POSITIONS": 32, "ROWS": 64, "INNER": 32, "stages": 1},
    {"POSITIONS": 64, "ROWS": 64, "INNER": 16, "stages": 1},
    {"POSITIONS": 64, "ROWS": 64, "INNER": 16, "warps": 8, "stages": 1},
    {"POSITIONS": 64, "ROWS": 128, "INNER": 16, "stages": 1},
    {"POSITIONS": 64, "ROWS": 256, "INNER": 32, "warps": 8, "stages": 1},
    {"POSITIONS": 64, "ROWS": 256, "INNER": 16, "warps": 8, "stages": 1},
]
BY_POSITION = [
    {"POSITIONS": 16, "INNER": 64},
    {"POSITIONS": 8, "INNER": 64, "warps": 2},
    {"POSITIONS": 4, "INNER": 64, "warps": 1},
    {"POSITIONS": 4, "INNER": 128, "warps": 2},
    {"POSITIONS": 8, "INNER": 32, "warps": 1},
    {"POSITIONS": 32, "INNER": 16, "warps": 2},
]
BY_CHANNEL = [
    {"POSITIONS": 32, "ROWS": 32},
    {"POSITIONS": 16, "ROWS": 64},
    {"POSITIONS": 64, "ROWS": 16},
    {"POSITIONS": 8, "ROWS": 128},
]
KEY = ["rows", "inner", "segment", "RANK", "K2"]
# A depthwise weight's gradient is split along positions, into at most MOST parts: up to BUSY
# programs of EACH positions or more.
BUSY, EACH, MOST = 2048, 512, 64
# Numbers in the columns of a few samples; programs that their product with the slopes needs, which
# get LEAST positions or more.
COLUMNS, ENOUGH, LEAST = 2**24, 256, 128
# Bytes of a position's channels of which a tile's surroundings fit into the first cache; fewer
# channels than LEAST_NEAR are not worth to find the places anew.
NEAR, LEAST_NEAR = 512, 32


@triton.jit
def place(
    offset, tap, d, k_d, o_d, stride, padding, dilation, FC, real, SUM: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Where tap `tap` samples along dimension d: its place on the grid plus its offset.

    Positions that are not real sample infinitely far outside.
    """
    moved = tl.load(offset + (tap * RANK + d) * FC, mask=real, other=float("-inf"))
    return (o_d * stride - padding + k_d * dilation).to(SUM) + moved.to(SUM)


@triton.jit
def factor_of(modulation, real, MODULATED: tl.constexpr, SUM: tl.constexpr):
    """What a sample is multiplied by."""
    if MODULATED:
        return tl.load(modulation, mask=real, other=0).to(SUM)
    return (real * 1.0).to(SUM)


@triton.jit
def below(place, length):
    """The grid point at or before a place along one dimension, and the share of the one after it.

    A place that is NaN has none, one that is far outside (or infinite) has them outside.
    """
    low = tl.floor(place)
    share = tl.where(place == low, 0.0, place - low)
    return tl.minimum(tl.maximum(low, -2), length).to(tl.int32), share


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
def around(x0, x1, x2, L0, L1, L2, zero, RANK: tl.constexpr):
    """Of the first of the 2^RANK grid points around a place: its index (in the width of `zero`),
    its coordinates, and in each dimension the share of the points after it.
    """
    i2, s2 = below(x2, L2)
    i0, i1, s0, s1 = i2, i2, s2, s2
    if RANK > 1:
        i1, s1 = below(x1, L1)
    if RANK > 2:
        i0, s0 = below(x0, L0)
    return index_of(i0, i1, i2 + zero, L1, L2, RANK), i0, i1, i2, s0, s1, s2


@triton.jit
def on_line(i, length):
    """Whether 0 <= i < length, in one comparison: without a sign, negative numbers are large."""
    return i.to(tl.uint32) < length


@triton.jit
def corner(
    i0, i1, i2, s0, s1, s2, L0, L1, L2, zero, CORNER: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """One of the 2^RANK grid points around a place.

    How far its index is from that of the first, whether it exists, and its share in each dimension.
    """
    c0: tl.constexpr = CORNER >> 2
    c1: tl.constexpr = CORNER >> 1 & 1
    c2: tl.constexpr = CORNER & 1
    there = on_line(i2 + c2, L2)
    if RANK > 1:
        there = there & on_line(i1 + c1, L1)
    if RANK > 2:
        there = there & on_line(i0 + c0, L0)
    step = index_of(c0, c1, zero + c2, L1, L2, RANK)
    return step, there, s0 if c0 else 1 - s0, s1 if c1 else 1 - s1, s2 if c2 else 1 - s2


@triton.jit
def product(s0, s1, s2, RANK: tl.constexpr):
    """Of as many factors as there are dimensions."""
    if RANK > 1:
        s2 *= s1
    if RANK > 2:
        s2 *= s0
    return s2


@triton.jit
def sampled(
    rows, c, used, factor, x0, x1, x2, L0, L1, L2, zero, SP,
    RANK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The values (POSITIONS, channels) at places, times `factor`: points around by their shares."""
    index, i0, i1, i2, s0, s1, s2 = around(x0, x1, x2, L0, L1, L2, zero, RANK)
    first = rows + (index * SP)[:, None] + c[None, :]
    total = tl.zeros(used.shape, SUM)
    for number in tl.static_range(1 << RANK):
        step, there, h0, h1, h2 = corner(
            i0, i1, i2, s0, s1, s2, L0, L1, L2, zero, number, RANK
        )  # fmt: skip
        point = tl.load(first + step * SP, mask=used & there[:, None], other=0).to(SUM)
        total += (product(h0, h1, h2, RANK) * factor)[:, None] * point
    return total


@triton.jit
def strips(m, positions, O1, O2, RANK: tl.constexpr):
    """The sample and position of number m, and the position's coordinates.

    Numbers go through strips of eight lines, or four in small tiles, across them: what the
    positions of a tile sample is near in both dimensions, and found in the first cache.
    """
    LINES: tl.constexpr = 8 if m.shape[0] > 32 else 4
    n, r = m // positions, m % positions
    if RANK == 1:
        return n, r, r * 0, r * 0, r
    o0, r = r // (O1 * O2), r % (O1 * O2)
    top = r // (LINES * O2) * LINES
    r -= top * O2
    lines = tl.minimum(O1 - top, LINES)
    o1, o2 = top + r % lines, r // lines
    return n, (o0 * O1 + o1) * O2 + o2, o0, o1, o2


@tuned(TILES, KEY, **fitting(ROWS="rows"))
@triton.jit
def forward(
    out, source, offset, weight, bias, modulation,
    batch, positions, rows, inner, segment, groups, by_offset,
    L0, L1, L2, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, WO, WC, WK,
    RANK: tl.constexpr, MODULATED: tl.constexpr, BIASED: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_SEGMENT: tl.constexpr,
    PRECISION: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[o, p] = bias[o] + sum_{c, k} weight[o, c, k] modulation[k, p] source(place(p, k))[c]."""
    TAPS: tl.constexpr = K0 * K1 * K2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    parts = tl.cdiv(rows, ROWS)
    i = program % parts * ROWS + tl.arange(0, ROWS)
    g = program // parts % groups
    m = (program // (parts * groups)) * POSITIONS + tl.arange(0, POSITIONS)
    real = m < batch * positions
    n, p, o0, o1, o2 = strips(m, positions, O1, O2, RANK)
    channel = g * rows + i
    total = tl.zeros((POSITIONS, ROWS), SUM)
    factors = modulation + n * MN + p * MP
    for s in range(inner // segment):
        first = g * inner + s * segment
        tap = first // by_offset * TAPS
        x0, x1, x2 = places(
            offset + n * FN + p * FP, tap, 0, o0, o1, o2, FC, real, SUM, RANK,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        factor = factor_of(factors + tap * MC, real, MODULATED, SUM)
        for k in range(TAPS):
            # On their way during this tap; after the last one, again its own.
            next_k = tl.minimum(k + 1, TAPS - 1)
            y0, y1, y2 = places(
                offset + n * FN + p * FP, tap + next_k, next_k, o0, o1, o2, FC, real, SUM, RANK,
                K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
            )  # fmt: skip
            next_factor = factor_of(factors + (tap + next_k) * MC, real, MODULATED, SUM)
            for start in range(0, segment, INNER):
                j = start + tl.arange(0, INNER)
                asked = within(j, segment, EVEN_SEGMENT, INNER)
                value = sampled(
                    source + (n * SN)[:, None], first + j, asked[None, :], factor, x0, x1, x2,
                    L0, L1, L2, zero, SP, RANK, SUM,
                )  # fmt: skip
                at = weight + channel[None, :] * WO + k * WK + (s * segment + j)[:, None] * WC
                used = asked[:, None] & within(i, rows, EVEN_ROWS, ROWS)[None, :]
                w = tl.load(at, mask=used, other=0)
                total = tl.dot(
                    value.to(w.dtype), w, total, input_precision=PRECISION, out_dtype=total.dtype
                )
            x0, x1, x2, factor = y0, y1, y2, next_factor
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
    batch, positions, rows, inner, segment, groups, by_offset,
    L0, L1, L2, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, WO, WC, WK,
    RANK: tl.constexpr, MODULATED: tl.constexpr, BIASED: tl.constexpr,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
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
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    width = by_offset * rows
    parts = tl.cdiv(width, ROWS)
    i = program % parts * ROWS + tl.arange(0, ROWS)
    h = program // parts % (groups // by_offset)
    m = (program // (parts * (groups // by_offset))) * POSITIONS
    m += tl.arange(0, POSITIONS)
    real = m < batch * positions
    n, p, o0, o1, o2 = strips(m, positions, O1, O2, RANK)
    channel = h * width + i
    total = tl.zeros((POSITIONS, ROWS), SUM)
    for k in range(TAPS):
        tap = h * TAPS + k
        x0, x1, x2 = places(
            offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        at = modulation + n * MN + tap * MC + p * MP
        value = sampled(
            source + (n * SN)[:, None], channel // rows, (i < width)[None, :],
            factor_of(at, real, MODULATED, SUM), x0, x1, x2, L0, L1, L2, zero, SP, RANK, SUM,
        )  # fmt: skip
        w = tl.load(weight + channel * WO + k * WK, mask=i < width, other=0)
        total += value * w.to(SUM)[None, :]
    if BIASED:
        add = tl.load(bias + channel, mask=i < width, other=0)
        total += add.to(SUM)[None, :]
    target = out + (n * ON + p * OP)[:, None] + channel[None, :] * OC
    used = real[:, None] & (i < width)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@tuned(BY_POSITION, [*KEY, "DEPTHWISE"], reset_to_zero=["by_input"], restore_value=["columns"])
@triton.jit
def backward(
    by_input, by_offsets, by_modulation, columns, grad, source, offset, weight, modulation,
    batch, positions, rows, inner, segment, by_offset, offset_groups,
    L0, L1, L2, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, WO, WC, WK,
    # steps of the gradients of offset and modulation, of columns along sample and position
    GN, GC, GP, HN, HC, HP, CN, CP,
    RANK: tl.constexpr, MODULATED: tl.constexpr, DEPTHWISE: tl.constexpr,
    INPUT: tl.constexpr, OFFSET: tl.constexpr, MODULATION: tl.constexpr, KEEP: tl.constexpr,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradients of the input (added to), of offset and of modulation.

    slope[p, c] = sum_o grad[o, p] weight[o, c, k] is that of a modulated sample, and stands in the
    columns unless DEPTHWISE; each of the points around it gets its share of it. KEEP: the samples
    replace the slopes.
    """
    TAPS: tl.constexpr = K0 * K1 * K2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    h = program % offset_groups
    m = program // offset_groups * POSITIONS + tl.arange(0, POSITIONS)
    real = m < batch * positions
    n, p, o0, o1, o2 = strips(m, positions, O1, O2, RANK)
    slopes = grad + (n * ON + p * OP)[:, None]
    for k in range(TAPS):
        tap = h * TAPS + k
        x0, x1, x2 = places(
            offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        factor = factor_of(modulation + n * MN + tap * MC + p * MP, real, MODULATED, SUM)
        index, i0, i1, i2, s0, s1, s2 = around(x0, x1, x2, L0, L1, L2, zero, RANK)
        # Of modulation, and of the place in each dimension.
        t = tl.zeros((POSITIONS,), SUM)
        t0, t1, t2 = t, t, t
        for s in range(by_offset // segment):
            first = h * by_offset + s * segment
            for start in range(0, segment, INNER):
                j = start + tl.arange(0, INNER)
                c = first + j
                used = real[:, None] & (j < segment)[None, :]
                place = columns + (n * CN + p * CP)[:, None]
                place += (c + (first // inner * (TAPS - 1) + k) * inner)[None, :]
                if DEPTHWISE:
                    slope = tl.zeros((POSITIONS, INNER), SUM)
                    for r in range(rows):
                        channel = c * rows + r
                        y = tl.load(slopes + channel[None, :] * OC, mask=used, other=0)
                        w = tl.load(weight + channel * WO + k * WK, mask=j < segment, other=0)
                        slope += y.to(SUM) * w.to(SUM)[None, :]
                else:
                    slope = tl.load(place, mask=used, other=0).to(SUM)
                sample = tl.zeros((POSITIONS, INNER), SUM)
                for number in tl.static_range(1 << RANK):
                    step, there, h0, h1, h2 = corner(
                        i0, i1, i2, s0, s1, s2, L0, L1, L2, zero, number, RANK
                    )  # fmt: skip
                    share = product(h0, h1, h2, RANK)
                    there = used & there[:, None]
                    at = (n * SN + (index + step) * SP)[:, None] + c[None, :]
                    if INPUT:
                        given = slope * (factor * share)[:, None]
                        tl.atomic_add(by_input + at, given, mask=there, sem="relaxed")
                    if OFFSET or MODULATION or KEEP:
                        point = tl.load(source + at, mask=there, other=0).to(SUM)
                        sample += share[:, None] * point
                    if OFFSET or MODULATION:
                        seen = tl.sum(slope * point, 1)
                        t += seen * share
                        t2 += seen * product(h0, h1, number % 2 * 2 - 1, RANK)
                        if RANK > 1:
                            t1 += seen * product(h0, number // 2 % 2 * 2 - 1, h2, RANK)
                        if RANK > 2:
                            t0 += seen * product(number // 4 * 2 - 1, h1, h2, RANK)
                if KEEP:
                    kept = (sample * factor[:, None]).to(columns.dtype.element_ty)
                    tl.store(place, kept, mask=used)
        if OFFSET:
            at = by_offsets + n * GN + p * GP
            kind = by_offsets.dtype.element_ty
            tl.store(at + (tap * RANK + RANK - 1) * GC, (t2 * factor).to(kind), mask=real)
            if RANK > 1:
                tl.store(at + (tap * RANK + RANK - 2) * GC, (t1 * factor).to(kind), mask=real)
            if RANK > 2:
                tl.store(at + (tap * RANK) * GC, (t0 * factor).to(kind), mask=real)
        if MODULATION:
            at = by_modulation + n * HN + tap * HC + p * HP
            tl.store(at, t.to(by_modulation.dtype.element_ty), mask=real)


@tuned(BY_CHANNEL, ["rows", "inner", "RANK", "K2"])
@triton.jit
def by_weight_depthwise(
    out, grad, source, offset, modulation,
    batch, positions, rows, inner, groups, parts,
    L0, L1, L2, O1, O2,
    ON, OC, OP, SN, SP, FN, FC, FP, MN, MC, MP, XS, XO, XK,
    RANK: tl.constexpr, MODULATED: tl.constexpr, DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[o, k] = sum_p grad[o, p] sample[p, o // rows, k], the positions in `parts` parts.

    `groups` and `inner` are those of the offset and their channels, `rows` the outputs of each.
    """
    TAPS: tl.constexpr = K0 * K1 * K2
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    height = inner * rows
    tall = tl.cdiv(height, ROWS)
    k = program % TAPS
    i = program // TAPS % tall * ROWS + tl.arange(0, ROWS)
    g = program // (TAPS * tall) % groups
    part = program // (TAPS * tall * groups)
    tap, channel = g * TAPS + k, g * height + i
    length = tl.cdiv(batch * positions, parts * POSITIONS) * POSITIONS
    total = tl.zeros((POSITIONS, ROWS), SUM)
    for start in range(0, length, POSITIONS):
        m = part * length + start + tl.arange(0, POSITIONS)
        real, n, p = m < batch * positions, m // positions, m % positions
        o0, o1, o2 = p // (O1 * O2), p // O2 % O1, p % O2
        x0, x1, x2 = places(
            offset + n * FN + p * FP, tap, k, o0, o1, o2, FC, real, SUM, RANK,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        at = modulation + n * MN + tap * MC + p * MP
        value = sampled(
            source + (n * SN)[:, None], channel // rows, (i < height)[None, :],
            factor_of(at, real, MODULATED, SUM), x0, x1, x2, L0, L1, L2, zero, SP, RANK, SUM,
        )  # fmt: skip
        used = real[:, None] & (i < height)[None, :]
        at = grad + (n * ON + p * OP)[:, None] + channel[None, :] * OC
        total += value * tl.load(at, mask=used, other=0).to(SUM)
    tl.store(out + part * XS + channel * XO + k * XK, tl.sum(total, 0), mask=i < height)


# Launches --------------------------------------------------------------------------------------


def near(segment: int, input: Tensor) -> int:
    """Channels whose samples are gathered for all taps before those of the next: a divisor."""
    part = gcd(segment, NEAR // input.element_size())
    return part if part >= LEAST_NEAR else segment


class Call:
    """What all launches of one call share; `output` is the output or its gradient, (N, C, P).

    Of a depthwise convolution, `segment` counts the channels of an offset group.
    """

    def __init__(
        self,
        output: Tensor,
        sizes: list[int],
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        modulation: Tensor | None,
        settings: tuple[Any, ...],
    ) -> None:
        self.rank, self.groups = input.dim() - 2, settings[3]
        self.geometry = geometry_of(weight.shape[2:], settings)
        self.taps = prod(weight.shape[2:])
        self.lines = rows_of(input)
        self.offset = offset.flatten(2)
        # (C_out, C_in / groups, taps), its channels last in memory.
        self.kernel = weight.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
        self.modulation = None if modulation is None else modulation.flatten(2)
        self.output, self.sizes = output, sizes
        self.channels = input.shape[1]
        self.rows, self.inner = weight.shape[0] // self.groups, weight.shape[1]
        self.offset_groups = offset.shape[1] // (self.taps * self.rank)
        self.by_offset = self.channels // self.offset_groups
        self.depthwise = self.inner == 1
        self.segment = self.by_offset if self.depthwise else gcd(self.inner, self.by_offset)
        self.batch, self.positions = output.shape[0], output.shape[2]
        tensors = (self.lines, self.offset, self.kernel, self.output, self.modulation)
        self.options = {
            "RANK": self.rank,
            "MODULATED": modulation is not None,
            "DOUBLE": input.dtype == torch.float64,
            "FAR": far(*tensors),
            **constants(self.geometry),
        }

    @property
    def given(self) -> Tensor:
        """The modulation, or a tensor in its place."""
        return self.offset if self.modulation is None else self.modulation

    def steps(self) -> list[int]:
        """Of output, rows of the input, offset, modulation."""
        rows = self.lines.stride()[:2]
        return [*self.output.stride(), *rows, *self.offset.stride(), *self.given.stride()]

    def blocks(self, tile: dict[str, int]) -> int:
        """Of positions."""
        return cdiv(self.batch * self.positions, tile["POSITIONS"])


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
    sizes = sizes_of(input, output)
    call = Call(output.flatten(2), sizes, input, offset, weight, modulation, settings)
    segment = call.segment if call.depthwise else near(call.segment, input)

    def grid(tile: dict[str, int]) -> tuple[int]:
        if call.depthwise:
            parts = cdiv(call.by_offset * call.rows, tile["ROWS"])
            return (call.blocks(tile) * parts * call.offset_groups,)
        return (call.blocks(tile) * call.groups * cdiv(call.rows, tile["ROWS"]),)

    arguments = (
        call.output, call.lines, call.offset, call.kernel,
        call.kernel if bias is None else bias.contiguous(), call.given,
        call.batch, call.positions, call.rows, call.inner, segment, call.groups,
        call.by_offset, *sizes[:3], *sizes[4:], *call.steps(), *call.kernel.stride(),
    )  # fmt: skip
    options = call.options | {"BIASED": bias is not None}
    if call.depthwise:
        launch(forward_depthwise)[grid](*arguments, **options)
    else:
        options |= even(ROWS=call.rows, SEGMENT=segment)
        launch(forward)[grid](*arguments, PRECISION=precision(input), **options)
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
    gb = grad.sum((0, *range(2, grad.dim()))) if mask[3] else None
    if not grad.numel():
        zeros = [None if t is None else torch.zeros_like(t) for t in (input, offset, weight)]
        return [*zeros, gb, None if modulation is None else torch.zeros_like(modulation)]
    rows = rows_of(grad).transpose(1, 2)
    sizes = sizes_of(input, grad)
    call = Call(rows, sizes, input, offset, weight, modulation, tuple(settings))
    gradients = Gradients(call, [mask[0], mask[1], mask[4], mask[2]])
    if call.depthwise:
        if any(gradients.wanted[:3]):
            gradients.add(slice(0, call.batch), None)
        gw = _of_depthwise_weight(call) if mask[2] else None
    else:
        gw = _by_columns(call, gradients)
    gx, goffset, gmodulation = gradients.results()
    if gx is not None:
        gx = gx.transpose(1, 2).reshape(input.shape).to(input.dtype)
    return [gx, goffset, None if gw is None else gw.to(weight.dtype), gb, gmodulation]


class Gradients:
    """Those of input, offset and modulation, if wanted; the fourth that may be is the weight's."""

    def __init__(self, call: Call, wanted: list[bool]) -> None:
        self.call, self.wanted = call, wanted
        kind, none = summed(call.lines), call.offset.new_zeros(1, 1, 1)
        self.input = torch.zeros_like(call.lines, dtype=kind) if wanted[0] else none.to(kind)
        self.offset = torch.empty_like(call.offset) if wanted[1] else none
        self.modulation = torch.empty_like(call.given) if wanted[2] else none

    def add(self, part: slice, columns: Tensor | None) -> None:
        """Of a few samples; `columns` (N, P, channels) has their slopes, and gets the samples."""
        call, take = self.call, lambda t: t[part] if len(t) > 1 else t
        batch = part.stop - part.start
        place = call.lines.new_empty(1, 1, 1) if columns is None else columns
        grid = lambda tile: (cdiv(batch * call.positions, tile["POSITIONS"]) * call.offset_groups,)
        launch(backward)[grid](
            take(self.input), take(self.offset), take(self.modulation), place,
            take(call.output), take(call.lines), take(call.offset), call.kernel, take(call.given),
            batch, call.positions, call.rows, call.inner, call.segment, call.by_offset,
            call.offset_groups, *call.sizes[:3], *call.sizes[4:], *call.steps(),
            *call.kernel.stride(), *self.offset.stride(), *self.modulation.stride(),
            *place.stride()[:2], DEPTHWISE=call.depthwise, INPUT=self.wanted[0],
            OFFSET=self.wanted[1], MODULATION=self.wanted[2],
            KEEP=self.wanted[3] and not call.depthwise,
            **call.options | {"FAR": call.options["FAR"] or far(place)},
        )  # fmt: skip

    def results(self) -> list[Tensor | None]:
        all_of = (self.input, self.offset, self.modulation)
        return [t if w else None for t, w in zip(all_of, self.wanted, strict=False)]


def _by_columns(call: Call, gradients: Gradients) -> Tensor | None:
    """Adds to all gradients, a few samples at a time; that of the weight has its number of rows."""
    if not any(gradients.wanted):
        return None
    width = call.channels * call.taps
    parts = [slice(0, call.batch)]
    if not isinstance(call.batch, torch.SymInt):
        size = max(1, min(call.batch, COLUMNS // (call.positions * width)))
        parts = list(few_at_a_time(call.batch, size))
    # (1, groups * taps * C_in / groups, 1, rows): what a slope takes from each output.
    kernel = call.kernel.unflatten(0, (call.groups, call.rows)).permute(0, 3, 2, 1)
    kernel = kernel.reshape(1, width, 1, call.rows).contiguous()
    flat = call.output.transpose(1, 2)
    sizes = [1, 1, call.positions] * 2
    total: Tensor | None = None
    for part in parts:
        batch = part.stop - part.start
        columns = call.lines.new_empty(batch, call.positions, width)
        if any(gradients.wanted[:3]):
            each = kernel.expand(batch, -1, -1, -1)
            source = flat[part].transpose(1, 2)
            convolve(columns.transpose(1, 2), source, each, None, None, sizes, ONE, call.groups)
        gradients.add(part, columns)
        if gradients.wanted[3]:
            by_part = _product(flat[part], columns, call.groups)
            total = by_part if total is None else total + by_part
    if total is None:
        return None
    total = total.unflatten(1, (call.taps, call.inner)).transpose(1, 2)
    return total.reshape(len(total), -1)


def _product(slopes: Tensor, columns: Tensor, groups: int) -> Tensor:
    """sum_m slopes[m, o] columns[m, channel] in float32 or float64, in parts of the positions."""
    batch, positions, width = columns.shape
    tiles = batch * cdiv(slopes.shape[2], 128) * cdiv(width, 128)
    parts = 1
    if not isinstance(positions, torch.SymInt):
        while positions % (2 * parts) == 0 and positions > LEAST * parts and tiles * parts < ENOUGH:
            parts *= 2
    slopes, columns = (
        t.reshape(batch * parts, positions // parts, -1).transpose(1, 2) for t in (slopes, columns)
    )
    sizes, kind = [1, 1, positions // parts] * 2, summed(slopes)
    return kernel_gradient(slopes, columns, sizes, ONE, groups, kind).sum(0).squeeze(1)


def _of_depthwise_weight(call: Call) -> Tensor:
    """The gradient of a depthwise weight (C_out, 1, taps), in float32 or float64."""
    tiles = call.taps * call.offset_groups * cdiv(call.by_offset * call.rows, 64)
    enough = call.batch * call.positions // EACH
    parts = torch.sym_max(1, torch.sym_min(min(MOST, BUSY // tiles), enough))
    out = call.kernel.new_empty(parts, call.kernel.shape[0], call.taps, dtype=summed(call.kernel))

    def grid(tile: dict[str, int]) -> tuple[int]:
        tall = cdiv(call.by_offset * call.rows, tile["ROWS"])
        return (call.taps * parts * call.offset_groups * tall,)

    launch(by_weight_depthwise)[grid](
        out, call.output, call.lines, call.offset, call.given,
        call.batch, call.positions, call.rows, call.by_offset, call.offset_groups, parts,
        *call.sizes[:3], *call.sizes[4:], *call.steps(), *out.stride(), **call.options,
    )  # fmt: skip
    return out.sum(0)


operator = eager.twin("triton_deform_conv", _forward, _backward, register)


def deform_conv(*args: Any) -> Tensor:
    *tensors, geometry, groups = args
    return operator(*tensors, *map(list, geometry[1:]), groups)
