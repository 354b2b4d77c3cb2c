"""One kernel for everything, of any size."""

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

NAME = "conv"


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """A static convolution in 1-D, 2-D or 3-D that stays fast where its kernel is large.

        y[n, o, p] = bias[o] + sum_{c, k} weight[o, c, k] * x[n, c, p * stride + k * dilation]

    Args:
        input: (N, C_in, *L).
        weight: (C_out, C_in / groups, *K).
        bias: (C_out,).
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
    channels = input.shape[1]
    check_groups(NAME, channels, groups, "input channels")
    kernel = tuple(weight.shape[2:]) if weight.dim() == 2 + rank else ("k",) * rank
    check_shape(NAME, "weight", weight, ("C_out", channels // groups, *kernel))
    out_channels = weight.shape[0]
    check_groups(NAME, out_channels, groups, "output channels")
    if bias is not None:
        check_shape(NAME, "bias", bias, (out_channels,))
    input, geometry = resolve_padding(input, tuple(weight.shape[2:]), stride, padding, dilation)
    output = check_output(NAME, tuple(input.shape[2:]), geometry)
    check_amount(NAME, input, out_channels, output)
    problem = Problem.of(NAME, input, weight=weight, bias=bias)
    return problem, (input, weight, bias, geometry, groups)
