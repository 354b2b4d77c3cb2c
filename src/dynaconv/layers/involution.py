"""Involution: a kernel per position, shared by channels (Li, CVPR 2021)."""

from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv_per_position
from dynaconv.layers.attention import SafeBatchNorm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.registry import register_family
from dynaconv.shapes import same_padding


@register_family("involution", primitive="conv_per_position", paper="Li et al., CVPR 2021")
class Involution(DynamicConv):
    """A kernel generated at each position from the features there, shared by a channel group.

        H[p] = span(relu(bn(reduce(pool(x)[p])))),    y[c, p] = sum_k H[group(c), k, p] x[c, p + k]

    pool averages the stride's cells. Published for as many output as input channels and for odd
    kernels with half padding; here pool(x)[p] lies at the window's centre for every padding and
    dilation, and a 1x1 convolution of x comes first where the channel numbers differ.

    Args:
        group_channels: channels that share a kernel, at most; their number is the largest that
            divides the channels. With `groups` > 1, that is the number of kernels a position.
        reduction: input channels over hidden channels of the generator.
    """

    def build(self, group_channels: int = 16, reduction: int = 4) -> None:
        at_least(1, group_channels=group_channels, reduction=reduction)
        channels, conv = self.out_channels, partial(conv_nd, self.rank)
        if self.groups > 1:
            self.kernel_groups = self.groups
        else:
            self.kernel_groups = channels // _largest_divisor(channels, group_channels)
        hidden = max(self.in_channels // reduction, 1)
        taps = self.kernel_groups * torch.Size(self.kernel_size).numel()
        self.project = (
            None
            if self.in_channels == channels
            else conv(self.in_channels, channels, 1, groups=self.groups, bias=False)
        )
        self.reduce = conv(self.in_channels, hidden, 1, bias=False)
        self.bn = SafeBatchNorm(hidden)
        self.span = conv(hidden, taps, 1)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        out_mask = None if mask is None else self.output_mask(mask)
        hidden = F.relu(self.bn(self.reduce(self._at_centres(x, mask)), out_mask))
        weight = self.span(hidden)
        return {"weight": weight.unflatten(1, (self.kernel_groups, *self.kernel_size))}

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        x = x if self.project is None else self.project(x)
        x, padding = self.pad(x)
        return self.add_bias(conv_per_position(x, weight, self.stride, padding, self.dilation))

    def _at_centres(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of x over each stride cell; cell p starts at the centre of window p."""
        before, after = same_padding(self.kernel_size, self.dilation)
        given = (before, after) if self.padding == "same" else (self.geometry().padding,) * 2
        widths = []
        for d in reversed(range(self.rank)):
            start, end = given[0][d] - before[d], given[1][d] - after[d]
            widths += [start, end + -(x.shape[2 + d] + start + end) % self.stride[d]]
        if not any(widths) and max(self.stride) == 1:
            return x
        real = x.new_ones(1, *x.shape[2:]) if mask is None else mask.to(x.dtype)
        count = _cell_sums(F.pad(real.unsqueeze(1), widths), self.stride)
        return _cell_sums(F.pad(x, widths), self.stride) / count.clamp(min=1)

    def init_from(self, conv: ConvNd) -> None:
        """A depthwise kernel becomes the generator's bias."""
        if not self.groups == self.in_channels == self.out_channels:
            raise ValueError(
                "involution mixes no channels, so it can start only as a depthwise convolution "
                f"(groups = in_channels = out_channels), not groups={self.groups}, "
                f"{self.in_channels} to {self.out_channels} channels"
            )
        nn.init.zeros_(self.span.weight)
        self.span.bias = nn.Parameter(conv.weight.flatten().clone())

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1},
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 2, "stride": 2},
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "bias": False},
        ]


def _cell_sums(x: Tensor, cell: tuple[int, ...]) -> Tensor:
    """Sums over cells: (N, C, *L) -> (N, C, *L / cell)."""
    for d, size in enumerate(cell):
        x = x.unflatten(2 + d, (-1, size)).sum(3 + d)
    return x


def _largest_divisor(channels: int, limit: int) -> int:
    """The largest divisor of `channels` that is at most `limit`."""
    return max(gcd(channels, size) for size in range(1, limit + 1))
