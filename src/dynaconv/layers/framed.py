"""The input with its border, for kernels that compare or pick what windows see."""

from torch import Tensor

from dynaconv.functional._checks import check_output
from dynaconv.layers.base import DynamicConv
from dynaconv.shapes import resolve_padding, zero_padded


def framed(layer: DynamicConv, x: Tensor) -> Tensor:
    """x (N, C, *L) with all of the layer's padding. ValueError where the kernel does not fit."""
    x, padding = layer.pad(x)
    place = (layer.kernel_size, layer.stride, padding, layer.dilation)
    x, geometry = resolve_padding(x, *place)
    check_output(type(layer).__name__, tuple(x.shape[2:]), geometry)
    return zero_padded(x, geometry)
