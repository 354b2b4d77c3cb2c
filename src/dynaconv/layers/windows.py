"""What the windows of a convolution see, for kernels that compare or pick positions."""

import torch.nn.functional as F
from torch import Tensor

from dynaconv.functional._checks import check_output
from dynaconv.layers.base import DynamicConv
from dynaconv.shapes import Geometry, resolve_padding


def framed(layer: DynamicConv, x: Tensor) -> Tensor:
    """x (N, C, *L) with all of the layer's padding. ValueError where the kernel does not fit."""
    x, padding = layer.pad(x)
    place = (layer.kernel_size, layer.stride, padding, layer.dilation)
    x, geometry = resolve_padding(x, *place)
    check_output(type(layer).__name__, tuple(x.shape[2:]), geometry)
    return F.pad(x, [p for pad in reversed(geometry.padding) for p in (pad, pad)])


def windows(x: Tensor, geometry: Geometry) -> Tensor:
    """x (N, C, *L), padded already, as each kernel position sees it: a view (N, C, *K, *L_out)."""
    rank = len(geometry.kernel)
    for d, (k, s, step) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        x = x.unfold(2 + d, step * (k - 1) + 1, s)[..., ::step]
    return x.permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
