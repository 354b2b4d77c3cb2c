"""What lies at the centres of a convolution's windows, for kernels that are generated there."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dynaconv.layers.base import DynamicConv
from dynaconv.shapes import FAR, same_padding


def at_centres(layer: DynamicConv, x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of x over each stride cell; cell p starts at the centre of the layer's window p.

    x (N, C, *L), zero where mask (N, *L) is False; (N, C, *L_out). Without stride it is x at the
    centres, zero where one lies outside. A causal window's kernel is made at its last position.
    """
    if layer.causal:
        return x
    pairs = _beyond_centres(layer)
    widths, cell = [], list(layer.stride)
    for d in reversed(range(layer.rank)):
        start, end = pairs[d]
        length = x.shape[2 + d] + start + end
        if cell[d] > FAR:  # one cell of what there is, instead of padding as far
            cell[d] = max(1, min(cell[d], length))
        widths += [start, end + -length % cell[d]]
    if not any(widths) and max(layer.stride) == 1:
        return x
    real = x.new_ones(1, *x.shape[2:]) if mask is None else mask.to(x.dtype)
    count = _cell_sums(F.pad(real.unsqueeze(1), widths), cell)
    return _cell_sums(F.pad(x, widths), cell) / count.clamp(min=1)


def between_centres(layer: DynamicConv, x: Tensor) -> Tensor:
    """x (N, C, *L) from the centre of the first window at stride 1 to that of the last.

    Zero where a centre lies outside of x; what a 1x1 convolution of the layer's stride may read.
    """
    widths = [w for pair in reversed(_beyond_centres(layer)) for w in pair]
    return F.pad(x, widths) if any(widths) else x


def _beyond_centres(layer: DynamicConv) -> list[tuple[int, int]]:
    """How far centres of windows lie before the input and after it, for each dimension."""
    before, after = same_padding(layer.kernel_size, layer.dilation)
    given = (before, after) if layer.padding == "same" else (layer.geometry().padding,) * 2
    return [(given[0][d] - before[d], given[1][d] - after[d]) for d in range(layer.rank)]


def _cell_sums(x: Tensor, cell: Sequence[int]) -> Tensor:
    """Sums over cells: (N, C, *L) -> (N, C, *L / cell)."""
    for d, size in enumerate(cell):
        x = x.unflatten(2 + d, (-1, size)).sum(3 + d)
    return x
