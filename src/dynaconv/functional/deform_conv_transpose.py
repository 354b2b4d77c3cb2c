"""Transposed convolution that adds to its output at offset positions."""

from math import prod

from torch import Tensor

from dynaconv.dispatch import Problem, choose
from dynaconv.functional._checks import (
    autocast,
    check_alike,
    check_amount,
    check_device,
    check_enlarged,
    check_floating,
    check_groups,
    check_input,
    check_shape,
)
from dynaconv.shapes import Geometry, IntOrTuple, ntuple

NAME = "deform_conv_transpose"


def deform_conv_transpose(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    modulation: Tensor | None = None,
) -> Tensor:
    """The transpose of deform_conv: every tap adds to the output at an offset position.

        y[n, o, q] = b[o] + sum_{c, k, p} weight[c, o, k] * modulation[n, k, p] * x[n, c, p]
                     * hat(q - (p * stride - padding + k * dilation + offset[n, k, p]))

    hat is the product over dimensions of max(0, 1 - |.|): a value is shared linearly between the
    positions beside it, and lost outside. Zero offsets make torch.nn.functional.conv_transpose2d.

    Args:
        input: (N, C_in, *L).
        offset: (N, offset_groups * prod(K) * D, *L) in positions of the output, laid out as in
            deform_conv; offset_groups divides C_out. Under autocast its dtype is kept.
        weight: (C_in, C_out / groups, *K).
        bias: (C_out,).
        stride, padding, output_padding, groups, dilation: as in
            torch.nn.functional.conv_transpose2d, in its order.
        modulation: (N, offset_groups * prod(K), *L), a factor for each value.

    Returns:
        (N, C_out, *L_out) as torch.nn.functional.conv_transpose2d.

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point or differs from the input's.
    """
    tensors = {"offset": offset, "weight": weight, "bias": bias, "modulation": modulation}
    rank = check_input(NAME, input, **tensors)
    input, weight, bias, modulation = autocast(  # type: ignore[assignment]
        input, weight, bias, modulation
    )
    check_alike(NAME, input, weight=weight, bias=bias, modulation=modulation)
    check_device(NAME, input, offset=offset)
    check_floating(NAME, offset=offset)
    if offset.dtype.itemsize < 4:  # half precision cannot hold a position
        offset = offset.float()
    batch, channels, *length = input.shape
    check_groups(NAME, channels, groups, "input channels")
    check_shape(NAME, "weight", weight, (channels, "C_out / groups", *("k",) * rank))
    out_channels = weight.shape[1] * groups
    check_groups(NAME, out_channels, groups, "output channels")
    if bias is not None:
        check_shape(NAME, "bias", bias, (out_channels,))
    geometry = Geometry(
        tuple(weight.shape[2:]),
        ntuple(stride, rank, "stride"),
        ntuple(padding, rank, "padding", minimum=0),
        ntuple(dilation, rank, "dilation"),
    )
    size = check_enlarged(NAME, tuple(length), geometry, output_padding)
    check_amount(NAME, input, out_channels, size)
    taps = prod(geometry.kernel)
    check_shape(NAME, "offset", offset, (batch, "offset_groups * taps * D", *length))
    check_groups(NAME, offset.shape[1], taps * rank, "offset channels (taps * dimensions)")
    offset_groups = offset.shape[1] // (taps * rank)
    check_groups(NAME, out_channels, offset_groups, "output channels (offset groups)")
    if modulation is not None:
        check_shape(NAME, "modulation", modulation, (batch, offset_groups * taps, *length))
    others = {"offset": offset, "weight": weight, "bias": bias, "modulation": modulation}
    problem = Problem.of(NAME, input, **others)
    return choose(problem)(input, offset, weight, bias, modulation, geometry, size, groups)
