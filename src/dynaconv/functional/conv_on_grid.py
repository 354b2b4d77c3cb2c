"""A convolution whose taps lie at real positions of each sample, dimension by dimension."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.functional._checks import (
    DTYPES,
    autocast,
    check_alike,
    check_device,
    check_groups,
    check_input,
    check_shape,
    check_tensors,
)

NAME = "conv_on_grid"
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_on_grid(
    input: Tensor,
    positions: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolves each sample at positions of its own, in 1-D, 2-D or 3-D.

        y[n, o, p] = bias[o] + sum_{c, k} weight[o, c, k] x[n, c](t_1[n, p_1, k_1], ... t_D[...])

    x(t) is linear between the points and zero outside, as in deformable convolution; here the
    positions are a product of one list a dimension, as strides and dilations make them, so that
    sampling costs little beside the multiplications: those of a static convolution with this
    output. Differentiable in everything, the positions included.

    Args:
        input: (N, C_in, *L).
        positions: for each dimension d (N, L_out[d], K[d]), in positions of the input from 0.
        weight: (C_out, C_in / groups, *K).
        bias: (C_out,).
        groups: as in torch.nn.functional.conv2d.

    Returns:
        (N, C_out, *L_out).

    Raises:
        ValueError: shapes that do not fit, with what was given and what is needed.
        TypeError: a dtype that is not floating point, or that differs from the input's.
    """
    rank = check_input(NAME, input, weight=weight, bias=bias)
    input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    check_alike(NAME, input, weight=weight, bias=bias)
    check_groups(NAME, input.shape[1], groups, "input channels")
    kernel = ("k",) * rank
    check_shape(NAME, "weight", weight, ("C_out", input.shape[1] // groups, *kernel))
    check_groups(NAME, weight.shape[0], groups, "output channels (from weight's shape)")
    if bias is not None:
        check_shape(NAME, "bias", bias, (weight.shape[0],))
    if not isinstance(positions, Sequence) or isinstance(positions, str | bytes):
        raise TypeError(f"{NAME}: positions is of {type(positions)}; give a list of tensors")
    if len(positions) != rank:
        raise ValueError(
            f"{NAME}: {len(positions)} lists of positions; give {rank}, one a dimension"
        )
    for d, given in enumerate(positions):
        check_tensors(NAME, **{f"positions[{d}]": given})
        check_shape(NAME, f"positions[{d}]", given, (input.shape[0], "l_out", weight.shape[2 + d]))
        check_device(NAME, input, **{f"positions[{d}]": given})
        if given.dtype not in DTYPES:
            raise TypeError(f"{NAME}: positions[{d}] has dtype {given.dtype}; give floating point")
    x = sample(input, [t.flatten(1) for t in positions])
    return CONVS[rank](x, weight, bias, weight.shape[2:], groups=groups)


def sample(x: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """x (N, C, *L) at a grid of positions, for each dimension d (N, S[d]): (N, C, *S)."""
    order = list(range(len(positions)))
    if not torch.compiler.is_compiling():  # a traced order would hold for some sizes only
        growth = [t.shape[1] / length for t, length in zip(positions, x.shape[2:], strict=True)]
        order.sort(key=growth.__getitem__)  # what shrinks goes first
    for d in order:
        x = _sample_dimension(x, positions[d], 2 + d)
    return x


def _sample_dimension(x: Tensor, t: Tensor, dim: int) -> Tensor:
    """x at the positions t (N, S) of one dimension."""
    length, along = x.shape[dim], [-1 if d == dim else 1 for d in range(1, x.dim())]
    shape = [*x.shape[:dim], t.shape[1], *x.shape[dim + 1 :]]
    t = t.unflatten(1, along)  # what backward keeps is no view: inductor has none with such strides
    lower = t.detach().floor()
    share = t - lower
    output: Tensor | None = None
    for point, part in ((lower, 1 - share), (lower + 1, share)):
        inside = (point >= 0) & (point < length)
        part = torch.where(inside, part, 0).to(x.dtype)
        index = torch.where(inside, point, 0).long()
        value = x.gather(dim, index.expand(shape))
        output = value * part if output is None else torch.addcmul(output, value, part)
    return output  # type: ignore[return-value]
