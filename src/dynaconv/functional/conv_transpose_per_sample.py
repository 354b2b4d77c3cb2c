"""One kernel for each batch element, transposed."""

from torch import Tensor

from dynaconv.dispatch import Problem, choose
from dynaconv.functional._checks import (
    autocast,
    check_alike,
    check_amount,
    check_enlarged,
    check_groups,
    check_input,
    check_shape,
)
from dynaconv.shapes import Geometry, IntOrTuple, ntuple

NAME = "conv_transpose_per_sample"


def conv_transpose_per_sample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """Transposed convolution of every sample with a kernel of its own, in 1-D, 2-D or 3-D.

        y[n, o, p * stride + k * dilation - padding] += weight[n, c, o, k] * x[n, c, p]

    Args:
        input: (N, C_in, *L).
        weight: (N, C_in, C_out / groups, *K).
        bias: (C_out,) for all samples or (N, C_out) for each.
        stride, padding, output_padding, groups, dilation: as in
            torch.nn.functional.conv_transpose2d, in its order.

    Returns:
        (N, C_out, *L_out), L_out = (L - 1) stride - 2 padding + dilation (K - 1) + output_padding
        + 1.

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point or differs from the input's.
    """
    rank = check_input(NAME, input, weight=weight, bias=bias)
    input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    check_alike(NAME, input, weight=weight, bias=bias)
    batch, channels = input.shape[:2]
    check_groups(NAME, channels, groups, "input channels")
    free = ("k",) * rank
    check_shape(NAME, "weight", weight, (batch, channels, "C_out / groups", *free))
    out_channels = weight.shape[2] * groups
    check_groups(NAME, out_channels, groups, "output channels")
    if bias is not None and bias.dim() == 1:
        check_shape(NAME, "bias", bias, (out_channels,))
        bias = bias.expand(batch, out_channels)
    if bias is not None:
        check_shape(NAME, "bias", bias, (batch, out_channels))
    geometry = Geometry(
        tuple(weight.shape[3:]),
        ntuple(stride, rank, "stride"),
        ntuple(padding, rank, "padding", minimum=0),
        ntuple(dilation, rank, "dilation"),
    )
    size = check_enlarged(NAME, tuple(input.shape[2:]), geometry, output_padding)
    check_amount(NAME, input, out_channels, size)
    problem = Problem.of(NAME, input, weight=weight, bias=bias)
    return choose(problem)(input, weight, bias, geometry, size, groups)
