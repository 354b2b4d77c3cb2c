"""For each batch element, a mixture of a few expert kernels."""

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

NAME = "conv_mixture"


def conv_mixture(
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves every sample with its own mixture of E expert kernels, in 1-D, 2-D or 3-D.

        W[n] = sum_e coefficients[n, e] * weight[e],    y[n] = W[n] * x[n] + b[n]

    Mixing the kernels first and mixing the experts' outputs give the same; the cheaper is taken.
    Coefficients may differ from tap to tap: weight[e] is then multiplied by those of each tap.

    Args:
        input: (N, C_in, *L).
        weight: (E, C_out, C_in / groups, *K), the experts.
        coefficients: (N, E), or (N, E, *K) where each tap has its own.
        bias: (C_out,) for all, or (E, C_out), mixed like the kernels by coefficients (N, E).
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.

    Returns:
        (N, C_out, *L_out).

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point or differs from the input's.
    """
    problem, args = prepare(input, weight, coefficients, bias, stride, padding, dilation, groups)
    return choose(problem)(*args)


def prepare(
    input: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> tuple[Problem, tuple]:
    """The checked arguments as backends take them, and the problem that they pose."""
    tensors = {"weight": weight, "coefficients": coefficients, "bias": bias}
    rank = check_input(NAME, input, **tensors)
    input, weight, coefficients, bias = autocast(  # type: ignore[assignment]
        input, weight, coefficients, bias
    )
    check_alike(NAME, input, weight=weight, coefficients=coefficients, bias=bias)
    batch, channels = input.shape[:2]
    check_groups(NAME, channels, groups, "input channels")
    kernel = tuple(weight.shape[3:]) if weight.dim() == 3 + rank else ("k",) * rank
    check_shape(NAME, "weight", weight, ("E", "C_out", channels // groups, *kernel))
    experts, out_channels = weight.shape[:2]
    check_groups(NAME, out_channels, groups, "output channels")
    by_tap = coefficients.dim() > 2
    check_shape(NAME, "coefficients", coefficients, (batch, experts, *(kernel if by_tap else ())))
    if bias is not None:
        mixed = bias.dim() == 2 and not by_tap
        check_shape(NAME, "bias", bias, (experts, out_channels) if mixed else (out_channels,))
    input, geometry = resolve_padding(input, kernel, stride, padding, dilation)  # type: ignore[arg-type]
    output = check_output(NAME, tuple(input.shape[2:]), geometry)
    check_amount(NAME, input, out_channels, output)
    problem = Problem.of(NAME, input, weight=weight, coefficients=coefficients, bias=bias)
    return problem, (input, weight, coefficients, bias, geometry, groups)
