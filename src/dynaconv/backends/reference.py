"""The oracle: every primitive in plain ATen, as its formula reads.

No custom operator, so compile, export, ONNX, vmap, forward mode and double backward come with it.
Letters: N batch, C channels, G groups, E experts, K kernel shape, L spatial shape.
"""

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.dispatch import Backend, Problem, register_backend
from dynaconv.shapes import Geometry, enlarged_size, mixed, windows, zero_padded

CONV_TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """y[n, o, p] = b[o] + sum_{c, k} weight[o, c, k] * window[n, c, k, p]."""
    window, size = padded_windows(input, geometry)
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
    window, size = padded_windows(input, geometry)
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
    return conv_per_sample(input, *mixture(weight, coefficients, bias), geometry, groups)


def mixture(
    weight: Tensor, coefficients: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Each sample's kernel (N, C_out, C_in / groups, *K) and bias (N, C_out)."""
    kernels = mixed(weight, coefficients)
    if bias is not None:
        bias = coefficients @ bias if bias.dim() == 2 else bias.expand(kernels.shape[0], -1)
    return kernels, bias


def conv_per_position(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[n, g, c, p] = sum_k weight[n, g, k, p] * window[n, g, c, k, p]."""
    groups = weight.shape[1]
    window, _ = padded_windows(input, geometry)
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


def conv_transpose_per_sample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    size: tuple[int, ...],
    groups: int,
) -> Tensor:
    """All samples as groups of one transposed convolution; `size` is the output's."""
    rank, batch = len(size), input.shape[0]
    plain = enlarged_size(input.shape[2:], geometry, (0,) * rank)
    extra = [out - whole for out, whole in zip(size, plain, strict=True)]
    if not batch:
        nothing = sum(t.sum() for t in (input, weight, bias) if t is not None)
        return nothing * input.new_ones(0, weight.shape[2] * groups, *size)
    output = CONV_TRANSPOSES[rank](
        input.flatten(0, 1).unsqueeze(0),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        geometry.stride,
        geometry.padding,
        extra,
        batch * groups,
        geometry.dilation,
    )
    return output.squeeze(0).unflatten(0, (batch, -1))


def deform_conv_transpose(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    geometry: Geometry,
    size: tuple[int, ...],
    groups: int,
) -> Tensor:
    """y[n, o, q] = b[o] + sum_{c, k, p} weight[c, o, k] modulation[k, p] x[c, p] hat(q - position).

    The positions are those that deform_conv reads, in the output.
    """
    rank, taps = len(size), prod(geometry.kernel)
    kernel = weight.flatten(2).unflatten(0, (groups, -1))
    values = torch.einsum("gcok,ngcp->ngokp", kernel, input.flatten(2).unflatten(1, (groups, -1)))
    shifts = offset.unflatten(1, (-1, taps, rank)).flatten(4)
    values = values.flatten(1, 2).unflatten(1, (shifts.shape[1], -1))
    if modulation is not None:
        values = values * modulation.flatten(2).unflatten(1, (shifts.shape[1], 1, taps))
    starts = tap_positions(geometry, input.shape[2:], offset.device, offset.dtype)
    positions = [
        (shifts[:, :, :, d] + start.expand(taps, *input.shape[2:]).flatten(1)).flatten(2)
        for d, start in enumerate(starts)
    ]
    values = values.flatten(3)
    output = values.new_zeros(*values.shape[:3], prod(size))
    for index, share in corners(positions, size):
        where = index.unsqueeze(2).expand_as(values)
        output = output.scatter_add(3, where, values * share.unsqueeze(2).to(values.dtype))
    output = output.flatten(1, 2)
    if bias is not None:
        output = output + bias.unsqueeze(-1)
    return output.unflatten(2, size)


def padded_windows(input: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """What the kernel sees at every output position: a view (N, C, *K, *L_out), and L_out."""
    view = windows(zero_padded(input, geometry), geometry)
    return view, tuple(view.shape[2 + len(geometry.kernel) :])


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
    flat, shape = input.flatten(3), positions[0].shape[2:]
    output: Tensor | float = 0.0
    for index, share in corners(positions, tuple(input.shape[3:])):
        gather = index.flatten(2).unsqueeze(2).expand(-1, -1, flat.shape[2], -1)
        value = flat.gather(3, gather).unflatten(3, shape)
        output = output + value * share.unsqueeze(2).to(value.dtype)
    return output  # type: ignore[return-value]


def corners(positions: list[Tensor], length: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The 2^D points around real positions: each one's index in the flat grid, and its share.

    positions: one tensor a dimension, in a grid of spatial shape `length`. Shares are 0 outside.
    """
    lower = [p.detach().floor() for p in positions]
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
        yield index, factor  # type: ignore[misc]


def supports(problem: Problem) -> str | None:
    """Everything."""
    return None


FUNCTIONS = (
    *(conv, conv_per_sample, conv_mixture, conv_per_position, deform_conv),
    *(conv_transpose_per_sample, deform_conv_transpose),
)
register_backend(Backend("reference", supports, {f.__name__: f for f in FUNCTIONS}))
