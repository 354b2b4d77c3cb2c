"""Where taps lie, and windows around the layer's centres, for layers that sample at offsets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import DynamicConv


def around_centres(layer: DynamicConv, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """x padded or cropped so that strided windows of `size` have the centres of the layer's."""
    output, before = layer.output_size(tuple(x.shape[2:])), layer.geometry().padding
    if layer.padding_mode != "zeros":
        x, before = layer.pad(x)[0], (0,) * layer.rank
    widths = []
    for d in reversed(range(layer.rank)):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1) // 2
        start = before[d] - reach + (size[d] - 1) // 2
        end = (output[d] - 1) * layer.stride[d] + size[d] - start - x.shape[2 + d]
        widths += [start, end]
    return F.pad(x, widths)


def kernel_grid(layer: DynamicConv) -> Tensor:
    """The taps of the layer's own kernel, (prod(K), D), from the window's first."""
    along = [torch.arange(k) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), -1).reshape(-1, layer.rank)


def repeated(
    taps: Tensor, output: tuple[int, ...], stride: tuple[int, ...], before: tuple[int, ...]
) -> Tensor:
    """taps (T, D) at every output position, (T, D, *L_out), `before` positions earlier."""
    axes = [
        torch.arange(n, device=taps.device) * s - p
        for n, s, p in zip(output, stride, before, strict=True)
    ]
    windows = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return taps[(..., *(None,) * len(output))] + windows


def fitted(
    x: Tensor, kernel: tuple[int, ...], output: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """x with zeros at its ends, and the stride with which `kernel` gives `output` positions."""
    stride, ends = [], []
    for length, k, n in zip(x.shape[2:], kernel, output, strict=True):
        stride.append(max(1, -(-(length - k + 1) // n)))
        ends.append(max(0, k + (n - 1) * stride[-1] - length))
    return F.pad(x, [width for end in reversed(ends) for width in (0, end)]), tuple(stride)


def zero_(*modules: nn.Module | None) -> None:
    """Every parameter of the modules becomes 0."""
    for module in modules:
        for parameter in () if module is None else module.parameters():
            nn.init.zeros_(parameter)
