"""conv_per_position in Triton: a tile of positions and channels a program, tap after tap.

What moves through memory once is the kernels, the input and the output; the taps' overlapping
windows come from the cache, the channels of a position in one wide read where a group has LINE of
them: they then lie last in memory. The input has its padding around it, so that no tap asks whether
it is inside. All three kernels gather, so that results are the same every time.
"""

from typing import Any

import torch
import torch.nn.functional as F
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
    rows_of,
    seen_from,
    three,
    tuned,
    wide,
)
from dynaconv.shapes import Geometry

# mypy: disable-error-code="no-untyped-def"
# Channels of a group from which on they lie last.
LINE = 4
# Groups of a tile lie side by side in memory: together they fill lines of the cache.
TILES = [
    {"POSITIONS": 32, "GROUPS": 4, "CHANNELS": 16},
    {"POSITIONS": 64, "GROUPS": 4, "CHANNELS": 16},
    {"POSITIONS": 32, "GROUPS": 2, "CHANNELS": 16},
    {"POSITIONS": 64, "GROUPS": 1, "CHANNELS": 16},
    {"POSITIONS": 32, "GROUPS": 1, "CHANNELS": 64},
    {"POSITIONS": 64, "GROUPS": 1, "CHANNELS": 32},
    {"POSITIONS": 32, "GROUPS": 8, "CHANNELS": 8},
    {"POSITIONS": 32, "GROUPS": 8, "CHANNELS": 4},
    {"POSITIONS": 128, "GROUPS": 1, "CHANNELS": 4},
    {"POSITIONS": 128, "GROUPS": 1, "CHANNELS": 1},
    {"POSITIONS": 512, "GROUPS": 1, "CHANNELS": 1},
]
BY_TAPS = [
    {"POSITIONS": 16, "TAPS": 4, "GROUPS": 4, "CHANNELS": 16},
    {"POSITIONS": 32, "TAPS": 2, "GROUPS": 4, "CHANNELS": 16},
    {"POSITIONS": 64, "TAPS": 4, "GROUPS": 1, "CHANNELS": 16},
    {"POSITIONS": 128, "TAPS": 2, "GROUPS": 1, "CHANNELS": 16},
    {"POSITIONS": 16, "TAPS": 4, "GROUPS": 1, "CHANNELS": 64},
    {"POSITIONS": 32, "TAPS": 8, "GROUPS": 1, "CHANNELS": 32},
    {"POSITIONS": 16, "TAPS": 4, "GROUPS": 8, "CHANNELS": 4},
    {"POSITIONS": 64, "TAPS": 4, "GROUPS": 1, "CHANNELS": 4},
    {"POSITIONS": 128, "TAPS": 4, "GROUPS": 1, "CHANNELS": 1},
    {"POSITIONS": 512, "TAPS": 1, "GROUPS": 1, "CHANNELS": 1},
]
KEY = ["channels", "K2", "SP"]


def fitting(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list:
    """Tiles that the groups and a group's channels fill, the channels not by many."""
    channels, groups = arguments["channels"], arguments["groups"]
    fits = lambda t: channels >= t["CHANNELS"] > min(channels, 16) // 4 and groups >= t["GROUPS"]
    return [config for config in configs if fits(config.kwargs)]


@tuned(TILES, KEY, prune_configs_by={"early_config_prune": fitting})
@triton.jit
def forward(
    out, source, weight, channels, groups, positions,
    # the input's sizes with its padding, the output's
    L1, L2, O1, O2,
    # steps of out and source along sample, channel and position; of weight: tap too
    ON, OC, OP, SN, SC, SP, WN, WG, WK, WP,
    DOUBLE: tl.constexpr, FAR: tl.constexpr, UNROLL: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[p, g, c] = sum_k weight[k, p, g] source[p * stride + k * dilation, g, c]."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    parts, bundles = tl.cdiv(channels, CHANNELS), tl.cdiv(groups, GROUPS)
    blocks = tl.cdiv(positions, POSITIONS)
    c = (program % parts * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]
    g = (program // parts % bundles * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    p = program // (parts * bundles) % blocks * POSITIONS + tl.arange(0, POSITIONS)
    n = program // (parts * bundles * blocks)
    q = (p // (O1 * O2) * S0 * L1 + p // O2 % O1 * S1) * L2 + p % O2 * S2
    p, q = p[:, None, None], q[:, None, None]
    real = (p < positions) & (g < groups)
    used = real & (c < channels)
    channel = g * channels + c
    rows = source + n * SN + channel * SC + q * SP
    factors = weight + n * WN + g * WG + p * WP
    total = tl.zeros((POSITIONS, GROUPS, CHANNELS), SUM)
    for k0 in range(K0):
        for k1 in range(K1):
            for k2 in tl.range(K2, loop_unroll_factor=UNROLL):
                step = (k0 * D0 * L1 + k1 * D1) * L2 + k2 * D2 + zero
                k = (k0 * K1 + k1) * K2 + k2 + zero
                factor = tl.load(factors + k * WK, mask=real, other=0)
                value = tl.load(rows + step * SP, mask=used, other=0)
                total += factor.to(SUM) * value.to(SUM)
    target = out + n * ON + channel * OC + p * OP
    tl.store(target, total.to(out.dtype.element_ty), mask=used)


@tuned(TILES, KEY, prune_configs_by={"early_config_prune": fitting})
@triton.jit
def by_input(
    out, grad, weight, channels, groups, positions, L1, L2, O0, O1, O2,
    # steps of out and grad along sample, channel and position; of weight: tap too
    ON, OC, OP, SN, SC, SP, WN, WG, WK, WP,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[q, g, c] = sum_k weight[k, p, g] grad[p, g, c] over the p that see q by tap k."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    parts, bundles = tl.cdiv(channels, CHANNELS), tl.cdiv(groups, GROUPS)
    blocks = tl.cdiv(positions, POSITIONS)
    c = (program % parts * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]
    g = (program // parts % bundles * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    q = program // (parts * bundles) % blocks * POSITIONS + tl.arange(0, POSITIONS)
    n = program // (parts * bundles * blocks)
    real = (q < positions)[:, None, None] & (g < groups)
    channel = g * channels + c
    rows = grad + n * SN + channel * SC
    factors = weight + n * WN + g * WG
    total = tl.zeros((POSITIONS, GROUPS, CHANNELS), SUM)
    for k in tl.range(K0 * K1 * K2, loop_unroll_factor=4):
        p, inside = seen_from(
            q // (L1 * L2), q // L2 % L1, q % L2, k, O0, O1, O2,
            K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2,
        )  # fmt: skip
        p, inside = p[:, None, None], inside[:, None, None] & real
        factor = tl.load(factors + (k + zero) * WK + p * WP, mask=inside, other=0)
        value = tl.load(rows + p * SP, mask=inside & (c < channels), other=0)
        total += factor.to(SUM) * value.to(SUM)
    target = out + n * ON + channel * OC + q[:, None, None] * OP
    tl.store(target, total.to(out.dtype.element_ty), mask=real & (c < channels))


@tuned(BY_TAPS, KEY, prune_configs_by={"early_config_prune": fitting})
@triton.jit
def by_weight(
    out, grad, source, channels, groups, positions,
    # the input's sizes with its padding, the output's
    L1, L2, O1, O2,
    # steps of out (a gradient of the weight), of grad and of source
    WN, WG, WK, WP, ON, OC, OP, SN, SC, SP,
    DOUBLE: tl.constexpr, FAR: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    POSITIONS: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[k, p, g] = sum_c grad[p, g, c] source[p * stride + k * dilation, g, c]."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = wide(tl.program_id(0), FAR)
    zero = program * 0  # in the width of addresses
    bundles, blocks = tl.cdiv(groups, GROUPS), tl.cdiv(positions, POSITIONS)
    g = program % bundles * GROUPS + tl.arange(0, GROUPS)
    p = program // bundles % blocks * POSITIONS + tl.arange(0, POSITIONS)
    n = program // (bundles * blocks)
    q = (p // (O1 * O2) * S0 * L1 + p // O2 % O1 * S1) * L2 + p % O2 * S2
    real = (p < positions)[:, None] & (g < groups)[None, :]
    slopes = grad + n * ON + p[:, None, None] * OP
    rows = source + n * SN + q[:, None, None, None] * SP
    target = out + n * WN + g[None, None, :] * WG + p[:, None, None] * WP
    for first in range(0, K0 * K1 * K2, TAPS):
        k = first + tl.arange(0, TAPS)
        asked = real[:, None, :] & (k < K0 * K1 * K2)[None, :, None]
        step = (k // (K1 * K2) * D0 * L1 + k // K2 % K1 * D1) * L2 + k % K2 * D2 + zero
        total = tl.zeros((POSITIONS, TAPS, GROUPS), SUM)
        for start in range(0, channels, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            channel = g[:, None] * channels + c[None, :]
            some = (c < channels)[None, None, :]
            slope = tl.load(
                slopes + channel[None, :, :] * OC, mask=real[:, :, None] & some, other=0
            ).to(SUM)
            value = tl.load(
                rows + step[None, :, None, None] * SP + channel[None, None, :, :] * SC,
                mask=asked[:, :, :, None] & some[:, None, :, :], other=0,
            ).to(SUM)  # fmt: skip
            total += tl.sum(slope[:, None, :, :] * value, 3)
        at = target + (k + zero)[None, :, None] * WK
        tl.store(at, total.to(out.dtype.element_ty), mask=asked)


def _planes(weight: Tensor, rank: int) -> Tensor:
    """(N, G, *K, *L_out) as (N, G, taps, P)."""
    return weight.flatten(2, 1 + rank).flatten(3)


def _lines(tensor: Tensor, channels: int, padding: tuple[int, ...] = ()) -> Tensor:
    """(N, C, *L) as (N, C, P), padded; channels last in memory where `channels` of a group pay."""
    if channels >= LINE:
        return rows_of(tensor, padding).transpose(1, 2)
    if any(padding):
        tensor = F.pad(tensor, [p for p in reversed(padding) for _ in range(2)])
    return tensor.flatten(2)


def _sizes(tensor: Tensor, padding: tuple[int, ...] = ()) -> list[int]:
    """Three spatial sizes, with the padding."""
    around = three(padding, 0)
    return [n + 2 * p for n, p in zip(three(tensor.shape[2:], 1), around, strict=True)]


def _grid(batch: int, groups: int, channels: int, positions: int) -> Any:
    """Programs of a tile: of by_weight all channels of a group are one's."""

    def grid(tile: dict[str, int]) -> tuple[int]:
        parts = 1 if "TAPS" in tile else triton.cdiv(channels, tile["CHANNELS"])
        bundles = triton.cdiv(groups, tile["GROUPS"])
        return (batch * bundles * parts * triton.cdiv(positions, tile["POSITIONS"]),)

    return grid


def _forward(input: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    output = output_like(input, eager.shape(input, weight, *settings))
    if not output.numel():
        return output
    geometry = geometry_of(weight.shape[2 : input.dim()], settings)
    batch, groups = weight.shape[:2]
    channels = input.shape[1] // groups
    planes, lines = output.flatten(2), _lines(input, channels, geometry.padding)
    factors = _planes(weight, len(geometry.kernel))
    launch(forward)[_grid(batch, groups, channels, planes.shape[2])](
        planes, lines, factors, channels, groups, planes.shape[2],
        *_sizes(input, geometry.padding)[1:], *_sizes(output)[1:],
        *planes.stride(), *lines.stride(), *factors.stride(),
        DOUBLE=input.dtype == torch.float64, FAR=far(planes, lines, factors),
        UNROLL=_unrolled(geometry.kernel[-1]), **constants(geometry),
    )  # fmt: skip
    return output


def _unrolled(count: int) -> int:
    """How many turns of a loop to write out: all, or some that leave few over."""
    return int(count) if count <= 9 else min(range(8, 3, -1), key=lambda n: int(count) % n)


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
    channels = out.shape[1] // groups
    launch(by_input)[_grid(batch, groups, channels, planes.shape[2])](
        planes, slopes, factors, channels, groups, planes.shape[2],
        *_sizes(out)[1:], *_sizes(grad),
        *planes.stride(), *slopes.stride(), *factors.stride(),
        DOUBLE=out.dtype == torch.float64, FAR=far(planes, slopes, factors),
        **constants(geometry),
    )  # fmt: skip


def _of_weight(
    out: Tensor, grad: Tensor, slopes: Tensor, input: Tensor, geometry: Geometry
) -> None:
    """Launches `by_weight`; `out` is written in place."""
    batch, groups = out.shape[:2]
    channels = input.shape[1] // groups
    factors, lines = _planes(out, len(geometry.kernel)), _lines(input, channels, geometry.padding)
    launch(by_weight)[_grid(batch, groups, channels, slopes.shape[2])](
        factors, slopes, lines, channels, groups, slopes.shape[2],
        *_sizes(input, geometry.padding)[1:], *_sizes(grad)[1:],
        *factors.stride(), *slopes.stride(), *lines.stride(),
        DOUBLE=out.dtype == torch.float64, FAR=far(factors, slopes, lines),
        **constants(geometry),
    )  # fmt: skip


operator = eager.twin("triton_conv_per_position", _forward, _backward, register)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return operator(input, weight, *map(list, geometry[1:]))
