"""Involution: a kernel per position, shared by channels (Li, CVPR 2021)."""

from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.attention import SafeBatchNorm, batch_norm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal, conv_nd
from dynaconv.layers.centres import at_centres
from dynaconv.registry import register_family


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

    causality = "pointwise"

    def build(self, group_channels: int = 16, reduction: int = 4) -> None:
        at_least(1, group_channels=group_channels, reduction=reduction)
        channels, conv = self.out_channels, partial(conv_nd, self.rank)
        if self.groups > 1:
            self.kernel_groups = self.groups
        else:
            self.kernel_groups = channels // _largest_divisor(channels, group_channels)
        hidden = max(self.in_channels // reduction, 1)
        taps = self.kernel_groups * torch.Size(self.kernel_size).numel()
        self.project = self.projection()
        self.reduce = conv(self.in_channels, hidden, 1, bias=False)
        self.bn = SafeBatchNorm(hidden)
        self.span = conv(hidden, taps, 1)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        out_mask = None if mask is None else self.output_mask(mask)
        hidden = self.reduce(at_centres(self, x, mask))
        hidden = F.relu(batch_norm(self.bn, hidden, out_mask))
        weight = self.span(hidden)
        return {"weight": weight.unflatten(1, (self.kernel_groups, *self.kernel_size))}

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        x = x if self.project is None else self.project(x)
        return self.add_bias(self.convolve_positions(x, weight))

    def init_from(self, conv: ConvNd) -> None:
        """A depthwise kernel becomes the generator's bias."""
        self.require_depthwise()
        nn.init.zeros_(self.span.weight)
        self.span.bias = nn.Parameter(conv.weight.flatten().clone())

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1},
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 2, "stride": 2},
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "bias": False},
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]


def _largest_divisor(channels: int, limit: int) -> int:
    """The largest divisor of `channels` that is at most `limit`."""
    return max(gcd(channels, size) for size in range(1, limit + 1))
