"""The oracle: every primitive in plain ATen, as its formula reads.

No custom operator, so compile, export, ONNX, vmap, forward mode and double backward come with it.
Letters: N batch, C channels, G groups, E experts, K kernel shape, L spatial shape.
"""

from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.dispatch import Backend, Problem, register_backend
from dynaconv.shapes import Geometry


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """y[n, o, p] = b[o] + sum_{c, k} weight[o, c, k] * window[n, c, k, p]."""
    window, size = windows(input, geometry)
    columns = window.flatten(2 + len(size)).flatten(2, -2).unflatten(1, (groups, -1))
    kernel = weight.flatten(2).unflatten(0, (groups, -1))
    output = torch.einsum("gock,ngckp->ngop", kernel, columns).flatten(1, 2)
    if bias is not None:
        output = output + bias.unsqueeze(-1)
    return output.unflatten(2, size)


def conv_per_sample(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """y[n, o, p] = b[n, o] + sum_{c, k} weight[n, o, c, k] * window[n, c, k, p]."""
    window, size = windows(input, geometry)
    columns = window.flatten(2 + len(size)).flatten(2, -2).unflatten(1, (groups, -1))
    kernel = weight.flatten(3).unflatten(1, (groups, -1))
    output = torch.einsum("ngock,ngckp->ngop", kernel, columns).flatten(1, 2)
    if bias is not None:
        output = output + bias.unsqueeze(-1)
    return output.unflatten(2, size)


def conv_mixture(
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """W[n] = sum_e coefficients[n, e] * weight[e], then one kernel a sample."""
    mixed = torch.einsum("ne,e...->n...", coefficients, weight)
    if bias is not None:
        bias = coefficients @ bias if bias.dim() == 2 else bias.expand(mixed.shape[0], -1)
    return conv_per_sample(input, mixed, bias, geometry, groups)


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[n, g, c, p] = sum_k weight[n, g, k, p] * window[n, g, c, k, p]."""
    groups = weight.shape[1]
    window, _ = windows(input, geometry)
    window = window.unflatten(1, (groups, -1))
    over_taps = tuple(range(3, 3 + len(geometry.kernel)))
    return (weight.unsqueeze(2) * window).sum(over_taps).flatten(1, 2)


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """y[n, o, p] = b[o] + sum_{c, k} weight[o, c, k] * modulation[k, p] * x(position[k, p])."""
    rank, taps, size = len(geometry.kernel), prod(geometry.kernel), offset.shape[2:]
    # (N, G_offset, taps, D, *L_out)
    shifts = offset.unflatten(1, (-1, taps, rank))
    positions = [
        shifts[:, :, :, d] + base
        for d, base in enumerate(tap_positions(geometry, size, offset.device, offset.dtype))
    ]
    offset_groups = shifts.shape[1]
    sampled = interpolate(input.unflatten(1, (offset_groups, -1)), positions)
    if modulation is not None:
        sampled = sampled * modulation.unflatten(1, (offset_groups, 1, taps))
    # (N, G_offset, C / G_offset, taps, *L_out) -> (N, G, C / G, taps, P)
    columns = sampled.flatten(1, 2).flatten(3).unflatten(1, (groups, -1))
    kernel = weight.flatten(2).unflatten(0, (groups, -1))
    output = torch.einsum("gock,ngckp->ngop", kernel, columns).flatten(1, 2)
    if bias is not None:
        output = output + bias.unsqueeze(-1)
    return output.unflatten(2, size)


def windows(input: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """What the kernel sees at every output position: a view (N, C, *K, *L_out), and L_out."""
    rank = len(geometry.kernel)
    view = F.pad(input, [p for pad in reversed(geometry.padding) for p in (pad, pad)])
    for d, (k, s, step) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        view = view.unfold(2 + d, step * (k - 1) + 1, s)[..., ::step]
    size = tuple(view.shape[2 : 2 + rank])
    positions, taps = range(2, 2 + rank), range(2 + rank, 2 + 2 * rank)
    return view.permute(0, 1, *taps, *positions), size


def tap_positions(
    geometry: Geometry, size: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Where each tap lies without offset: for each dimension, broadcastable to (taps, *L_out)."""
    rank = len(size)
    taps = torch.meshgrid(*[torch.arange(k, device=device) for k in geometry.kernel], indexing="ij")
    positions = []
    for d in range(rank):
        start = torch.arange(size[d], device=device) * geometry.stride[d] - geometry.padding[d]
        along = [-1 if i == d else 1 for i in range(rank)]
        tap = taps[d].reshape(-1, *[1] * rank) * geometry.dilation[d]
        positions.append((start.reshape(1, *along) + tap).to(dtype))
    return positions


def interpolate(input: Tensor, positions: list[Tensor]) -> Tensor:
    """Values of `input` (N, G, C, *L) at real positions, linear between points, zero outside.

    positions: one (N, G, *S) tensor a dimension. Returns (N, G, C, *S).
    """
    length, shape = input.shape[3:], positions[0].shape[2:]
    flat = input.flatten(3)
    lower = [p.detach().floor() for p in positions]
    output: Tensor | float = 0.0
    for corner in product((0, 1), repeat=len(length)):
        index: Tensor | int = 0
        factor: Tensor | float = 1.0
        for d, upper in enumerate(corner):
            point = lower[d] + upper
            share = positions[d] - lower[d]
            outside = (point < 0) | (point > length[d] - 1)
            share = torch.where(outside, 0.0, share if upper else 1 - share)
            point = torch.where(point == point, point, 0).clamp(0, length[d] - 1).long()
            factor, index = factor * share, index * length[d] + point
        gather = index.flatten(2).unsqueeze(2).expand(-1, -1, flat.shape[2], -1)  # type: ignore[union-attr]
        value = flat.gather(3, gather).unflatten(3, shape)
        output = output + value * factor.unsqueeze(2).to(value.dtype)  # type: ignore[union-attr]
    return output  # type: ignore[return-value]


def supports(problem: Problem) -> str | None:
    """Everything."""
    return None


FUNCTIONS = (conv, conv_per_sample, conv_mixture, conv_per_position, deform_conv)
register_backend(Backend("reference", supports, {f.__name__: f for f in FUNCTIONS}))
