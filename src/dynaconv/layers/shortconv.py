"""DynamicShortConv: a short kernel with an update from each token (Sieberling, 2026)."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import conv
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal, conv_nd
from dynaconv.layers.centres import at_centres
from dynaconv.registry import register_family


@register_family(
    "dynamic_shortconv", primitive="conv_per_position", paper="Sieberling et al., arXiv 2026"
)
class DynamicShortConv(DynamicConv):
    """A depthwise kernel, and at each position an update to it that the features there make.

        update[p] = up(down(x[p]))
        y[c, p] = b[c] + x[c, p] + sum_k (weight[c, k] + update[head(c), k, p]) x[c, p + k]

    up starts at zero, so the layer starts as the static convolution. The published layers are
    causal (`causal=True`), in 1-D, without stride and b: "low-rank" has a head for each channel,
    "headwise" (`low_rank=None`) has no down. There the update may come from features other than x,
    those before the query, key or value projection; here it comes from x. Here in 2-D and 3-D too;
    x[p] is the window's centre, or the mean of its stride's cell (of a causal window the last
    position); and a 1x1 convolution of x comes first where the channel numbers differ.

    Args:
        heads: number of updates a position; None gives each output channel its own.
        low_rank: features between down and up; None leaves down out.
        residual: whether x[c, p] is added.
    """

    causality = "pointwise"

    def build(
        self, heads: int | None = None, low_rank: int | None = 16, residual: bool = True
    ) -> None:
        channels = self.out_channels
        self.heads = channels if heads is None else heads
        at_least(1, heads=self.heads, low_rank=1 if low_rank is None else low_rank)
        if channels % self.heads:
            raise ValueError(f"heads={self.heads} does not divide {channels} out_channels")
        self.residual = residual
        self.project = self.projection()
        bound = prod(self.kernel_size) ** -0.5
        kernels = torch.empty(channels, 1, *self.kernel_size)
        self.weight = nn.Parameter(kernels.uniform_(-bound, bound))
        self.down = (
            None
            if low_rank is None
            else conv_nd(self.rank, self.in_channels, low_rank, 1, bias=False)
        )
        taps = self.heads * prod(self.kernel_size)
        self.up = conv_nd(self.rank, low_rank or self.in_channels, taps, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        features = at_centres(self, x, mask)
        features = features if self.down is None else self.down(features)
        return {"update": self.up(features).unflatten(1, (self.heads, *self.kernel_size))}

    def convolve(self, x: Tensor, update: Tensor) -> Tensor:  # type: ignore[override]
        x = x if self.project is None else self.project(x)
        padded, padding = self.pad(x)
        geometry = (self.stride, padding, self.dilation, self.out_channels)
        return conv(padded, self.static_kernel(), self.bias, *geometry) + self.convolve_positions(
            x, update
        )

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        update = super().kernels(input, padding_mask)["update"]
        each = update.repeat_interleave(self.out_channels // self.heads, 1)
        static = self.static_kernel().squeeze(1)
        return {"update": update, "weight": static.reshape(*static.shape, *[1] * self.rank) + each}

    def static_kernel(self) -> Tensor:
        """What every position has, (C_out, 1, *K): weight, and 1 at the position's own tap."""
        return self.weight + self._own_tap() if self.residual else self.weight

    def _own_tap(self) -> Tensor:
        """1 at the last tap of a causal kernel, at the centre of another: (1, 1, *K)."""
        own = torch.zeros_like(self.weight[:1])
        own[(0, 0, *[k - 1 if self.causal else (k - 1) // 2 for k in self.kernel_size])] = 1
        return own

    def init_from(self, conv: ConvNd) -> None:
        """A depthwise kernel becomes the static part."""
        self.require_depthwise()
        self.weight.copy_(conv.weight)
        if self.residual:
            self.weight.sub_(self._own_tap())

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        same = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
        projected = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
        return [
            same | {"padding": 1, "low_rank": 3},
            projected | {"padding": 2, "stride": 2, "heads": 3, "low_rank": None, "bias": False},
            same | {"kernel_size": 2, "groups": 4, "heads": 2, "residual": False},
            *causal(rank, projected | {"heads": 3, "low_rank": 2}),
            *causal(rank, same | {"kernel_size": 4, "low_rank": None, "residual": False}),
        ]
