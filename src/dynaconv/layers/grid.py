"""Where taps lie when each sample has a stride or a dilation of its own, for `conv_on_grid`."""

import torch
from torch import Tensor

from dynaconv.layers.base import DynamicConv
from dynaconv.shapes import Geometry


def origin(layer: DynamicConv, x: Tensor) -> tuple[Tensor, tuple[int, ...], Geometry]:
    """x, where tap 0 of output position 0 lies before it, and the output size's geometry.

    Zeros around x need not be written: `conv_on_grid` reads them. Other padding modes write it.
    """
    geometry = layer.geometry()
    if layer.padding_mode == "zeros":
        return x, geometry.padding, geometry
    x, _ = layer.pad(x)
    zeros = (0,) * layer.rank
    return x, zeros, geometry._replace(padding=zeros)


def positions(
    geometry: Geometry,
    before: tuple[int, ...],
    size: tuple[int, ...],
    stride: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """In each dimension t[n, p, k] = s[n] p - before + d (K - 1) / 2 + r[n] d (k - (K - 1) / 2).

    Args:
        size: L_out.
        stride, scale: s and r, (N, D).

    Returns:
        For each dimension (N, L_out[d], K[d]).
    """
    lists = []
    for d, (taps, step) in enumerate(zip(geometry.kernel, geometry.dilation, strict=True)):
        middle = (taps - 1) / 2
        p = torch.arange(size[d], device=stride.device, dtype=stride.dtype)
        k = torch.arange(taps, device=stride.device, dtype=stride.dtype) - middle
        start = stride[:, d, None] * p + (step * middle - before[d])
        lists.append(start.unsqueeze(2) + scale[:, d, None, None] * (step * k))
    return lists
