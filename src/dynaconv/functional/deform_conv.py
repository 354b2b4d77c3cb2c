"""Convolution that samples its input at offset positions."""

from math import prod

import torch
from torch import Tensor

from dynaconv.dispatch import Problem, choose
from dynaconv.functional._checks import (
    autocast,
    check_alike,
    check_amount,
    check_device,
    check_floating,
    check_groups,
    check_input,
    check_output,
    check_shape,
)
from dynaconv.shapes import IntOrTuple, Padding, resolve_padding

NAME = "deform_conv"


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    modulation: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v1 (Dai, ICCV 2017), with modulation v2 (Zhu, CVPR 2019).

        y[n, o, p] = b[o] + sum_{c, k} weight[o, c, k] * modulation[n, k, p]
                            * x[n, c, p * stride + k * dilation + offset[n, k, p]]

    x is interpolated linearly between positions and zero outside. In 2-D, layout and results are
    those of torchvision.ops.deform_conv2d; 1-D and 3-D follow the same rule.

    Args:
        input: (N, C_in, *L).
        offset: (N, offset_groups * prod(K) * D, *L_out) in positions, D the number of dimensions:
            for each tap the shift along the first spatial dimension, then the next.
            offset_groups divides C_in. Under autocast its dtype is kept.
        weight: (C_out, C_in / groups, *K).
        bias: (C_out,).
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        modulation: (N, offset_groups * prod(K), *L_out), a factor for each sampled value.

    Returns:
        (N, C_out, *L_out).

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point or differs from the input's.
    """
    problem, args = prepare(
        input, offset, weight, bias, stride, padding, dilation, groups, modulation
    )
    return choose(problem)(*args)


def prepare(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    modulation: Tensor | None = None,
) -> tuple[Problem, tuple]:
    """The checked arguments as backends take them, and the problem that they pose."""
    tensors = {"offset": offset, "weight": weight, "bias": bias, "modulation": modulation}
    rank = check_input(NAME, input, **tensors)
    input, weight, bias, modulation = autocast(  # type: ignore[assignment]
        input, weight, bias, modulation
    )
    check_alike(NAME, input, weight=weight, bias=bias, modulation=modulation)
    check_device(NAME, input, offset=offset)
    if offset.dtype != torch.float32:  # float32 coordinates go with data of any dtype
        check_alike(NAME, input, offset=offset)
    check_floating(NAME, offset=offset)
    if offset.dtype.itemsize < 4:  # half precision cannot hold a position
        offset = offset.float()
    batch, channels = input.shape[:2]
    check_groups(NAME, channels, groups, "input channels")
    kernel = tuple(weight.shape[2:]) if weight.dim() == 2 + rank else ("k",) * rank
    check_shape(NAME, "weight", weight, ("C_out", channels // groups, *kernel))
    check_groups(NAME, weight.shape[0], groups, "output channels")
    if bias is not None:
        check_shape(NAME, "bias", bias, (weight.shape[0],))
    input, geometry = resolve_padding(input, kernel, stride, padding, dilation)  # type: ignore[arg-type]
    output = check_output(NAME, tuple(input.shape[2:]), geometry)
    check_amount(NAME, input, weight.shape[0], output)
    offset_groups = _check_offset(offset, channels, geometry.kernel, (batch, *output))
    if modulation is not None:
        taps = offset_groups * prod(geometry.kernel)
        check_shape(NAME, "modulation", modulation, (batch, taps, *output))
    problem = Problem.of(
        NAME, input, offset=offset, weight=weight, bias=bias, modulation=modulation
    )
    return problem, (input, offset, weight, bias, modulation, geometry, groups)


def _check_offset(
    offset: Tensor, channels: int, kernel: tuple[int, ...], sizes: tuple[int, ...]
) -> int:
    """The number of offset groups, from the offset's channels."""
    rank, taps = len(kernel), prod(kernel)
    batch, *output = sizes
    if offset.dim() != 2 + rank or offset.shape[1] % (taps * rank) or not offset.shape[1]:
        rule = f"offset_groups * {taps} taps * {rank} dimensions"
        check_shape(NAME, "offset", offset, (batch, rule, *output))
        raise ValueError(
            f"{NAME}: offset has {offset.shape[1]} channels; give a multiple of {taps * rank} "
            f"({taps} taps * {rank} dimensions)"
        )
    check_shape(NAME, "offset", offset, (batch, offset.shape[1], *output))
    offset_groups = offset.shape[1] // (taps * rank)
    check_groups(NAME, channels, offset_groups, "input channels (offset groups)")
    return offset_groups
