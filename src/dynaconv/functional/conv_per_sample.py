"""One kernel for each batch element."""

from torch import Tensor

from dynaconv.dispatch import Problem, choose
from dynaconv.functional._checks import (
    autocast,
    check_alike,
    check_amount,
    check_groups,
    check_input,
    check_output,
    check_shape,
)
from dynaconv.shapes import IntOrTuple, Padding, resolve_padding

NAME = "conv_per_sample"


def conv_per_sample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves every sample with a kernel of its own, in 1-D, 2-D or 3-D.

        y[n, o, p] = bias[n, o] + sum_{c, k} weight[n, o, c, k] * x[n, c, p * stride + k * dilation]

    Args:
        input: (N, C_in, *L).
        weight: (N, C_out, C_in / groups, *K).
        bias: (C_out,) for all samples or (N, C_out) for each.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.

    Returns:
        (N, C_out, *L_out).

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point or differs from the input's.
    """
    problem, args = prepare(input, weight, bias, stride, padding, dilation, groups)
    return choose(problem)(*args)


def prepare(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> tuple[Problem, tuple]:
    """The checked arguments as backends take them, and the problem that they pose."""
    rank = check_input(NAME, input, weight=weight, bias=bias)
    input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    check_alike(NAME, input, weight=weight, bias=bias)
    batch, channels = input.shape[:2]
    check_groups(NAME, channels, groups, "input channels")
    _check_weight(weight, batch, channels // groups, rank)
    out_channels = weight.shape[1]
    check_groups(NAME, out_channels, groups, "output channels")
    if bias is not None and bias.dim() == 1:
        check_shape(NAME, "bias", bias, (out_channels,))
        bias = bias.expand(batch, out_channels)
    if bias is not None:
        check_shape(NAME, "bias", bias, (batch, out_channels))
    kernel = tuple(weight.shape[3:])
    input, geometry = resolve_padding(input, kernel, stride, padding, dilation)
    output = check_output(NAME, tuple(input.shape[2:]), geometry)
    check_amount(NAME, input, out_channels, output)
    problem = Problem.of(NAME, input, weight=weight, bias=bias)
    return problem, (input, weight, bias, geometry, groups)


def _check_weight(weight: Tensor, batch: int, channels: int, rank: int) -> None:
    kernel = tuple(weight.shape[3:]) if weight.dim() == 3 + rank else ("k",) * rank
    if weight.dim() == 3 + rank and weight.shape[0] != batch:
        wanted = ", ".join(str(s) for s in (batch, "C_out", channels, *kernel))
        raise ValueError(
            f"{NAME}: weight has {weight.shape[0]} kernels for a batch of {batch}; "
            f"give one kernel per sample, shape ({wanted})"
        )
    check_shape(NAME, "weight", weight, (batch, "C_out", channels, *kernel))
