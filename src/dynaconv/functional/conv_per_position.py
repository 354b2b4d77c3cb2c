"""One kernel for each output position, shared by the channels of a group."""

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

NAME = "conv_per_position"


def conv_per_position(
    input: Tensor,
    weight: Tensor,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """Filters each output position with a kernel of its own, in 1-D, 2-D or 3-D.

        y[n, c, p] = sum_k weight[n, group(c), k, p] * x[n, c, p * stride + k * dilation]

    Channels are not mixed: C / G neighbouring channels share each of the G kernels.

    Args:
        input: (N, C, *L).
        weight: (N, G, *K, *L_out); G divides C.
        stride, padding, dilation: as in torch.nn.functional.conv2d.

    Returns:
        (N, C, *L_out).

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point or differs from the input's.
    """
    problem, args = prepare(input, weight, stride, padding, dilation)
    return choose(problem)(*args)


def prepare(
    input: Tensor,
    weight: Tensor,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
) -> tuple[Problem, tuple]:
    """The checked arguments as backends take them, and the problem that they pose."""
    rank = check_input(NAME, input, weight=weight)
    input, weight = autocast(input, weight)  # type: ignore[assignment]
    check_alike(NAME, input, weight=weight)
    batch, channels = input.shape[:2]
    free = ("k",) * rank + ("l_out",) * rank
    if weight.dim() != 2 + 2 * rank:
        check_shape(NAME, "weight", weight, (batch, "G", *free))
    check_groups(NAME, channels, weight.shape[1], "input channels (from weight's shape)")
    kernel = tuple(weight.shape[2 : 2 + rank])
    input, geometry = resolve_padding(input, kernel, stride, padding, dilation)
    output = check_output(NAME, tuple(input.shape[2:]), geometry)
    check_amount(NAME, input, channels, output)
    check_shape(NAME, "weight", weight, (batch, "G", *kernel, *output))
    return Problem.of(NAME, input, weight=weight), (input, weight, geometry)
