"""Dynamic filter networks: all weights of a filter are generated (De Brabandere, NeurIPS 2016)."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv_per_sample
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.layers.centres import at_centres
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family


@register_family("dfn", primitive="conv_per_sample", paper="De Brabandere et al., NeurIPS 2016")
class DynamicFilterConv(DynamicConv):
    """A network generates every weight of the filters: for each sample, or for each position.

        h = network(x),    network: convolutions with leaky ReLU, as large as the input
        F = head(mean(h)),       y[o, p] = b[o] + sum_{c, k} F[o, c, k] x[c, p + k]
        F = head(h[p]) if local,  y[o, p] = b[o] + sum_{c, k} F[o, c, k, p] x[c, p + k]

    head is linear; with softmax each filter F[o] is positive and sums to 1. h[p] lies at the
    window's centre, or is the mean of its stride's cell. The published code filters a grey image
    to one channel, or the channels of a colour image alike (`shared`); the published models of
    video and stereo are local with softmax, the one of steerable filters has no softmax. They
    generate from one image and filter it or another; here it is one. Without softmax the filters
    start spread as nn.ConvNd's are.

    Local filters between C_in and C_out channels take C_in * C_out * prod(kernel_size) numbers at
    each position: `shared` is what fits into memory.

    Args:
        local: one filter a position (dynamic local filtering), not one a sample.
        softmax: whether filters are normalised; None, as published: those of positions.
        shared: the channels of each of `groups` groups go through the same filter, alone.
        hidden: channels of the network's layers.
        network_size: kernel_size of the network's layers.
    """

    exact_options = {"softmax": False}

    def build(
        self,
        local: bool = False,
        softmax: bool | None = None,
        shared: bool = False,
        hidden: tuple[int, ...] = (64, 128),
        network_size: int = 3,
    ) -> None:
        if not hidden:
            raise ValueError("hidden=() leaves no network; give the channels of each layer")
        at_least(1, network_size=network_size, **{f"hidden[{i}]": h for i, h in enumerate(hidden)})
        if shared and self.in_channels != self.out_channels:
            raise ValueError(
                "shared=True filters each channel alone; it needs as many output as input "
                f"channels, not {self.in_channels} to {self.out_channels}"
            )
        self.local, self.shared = local, shared
        self.softmax = local if softmax is None else softmax
        self.filters = self.groups if shared else self.out_channels
        self.depth = 1 if shared else self.in_channels // self.groups  # channels a filter sees
        self.network = nn.ModuleList(
            conv_nd(self.rank, c, h, network_size, padding="same", padding_mode=self.padding_mode)
            for c, h in zip((self.in_channels, *hidden), hidden, strict=False)
        )
        weights = self.depth * prod(self.kernel_size)
        self.head = conv_nd(self.rank, hidden[-1], self.filters * weights, 1)
        if not self.softmax:
            bound = weights**-0.5
            nn.init.uniform_(self.head.bias, -bound, bound)  # type: ignore[arg-type]
            with torch.no_grad():
                self.head.weight.mul_(bound)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`weight` (N, G, *K, *L_out) of positions, or `kernel` (N, filters, depth, *K)."""
        for layer in self.network:
            x = F.leaky_relu(layer(x))
            x = x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0)
        if self.local:
            x = at_centres(self, x, mask)
        else:
            x = masked_mean(x, mask).unflatten(1, (-1, *(1,) * self.rank))
        made = self.head(x).unflatten(1, (self.filters, -1))
        made = torch.softmax(made, 2) if self.softmax else made
        if self.local:
            return {"weight": made.flatten(1, 2).unflatten(1, (-1, *self.kernel_size))}
        return {"kernel": made.flatten(2).unflatten(2, (self.depth, *self.kernel_size))}

    def convolve(self, x: Tensor, **filters: Tensor) -> Tensor:
        if self.local:
            return self.add_bias(self._at_positions(x, filters["weight"]))
        kernel = filters["kernel"]
        if not self.shared:
            return self.convolve_samples(x, kernel, self.bias)
        kernel = kernel.repeat_interleave(self.in_channels // self.groups, 1)
        x, padding = self.pad(x)
        geometry = (self.stride, padding, self.dilation, self.in_channels)
        return conv_per_sample(x, kernel, self.bias, *geometry)

    def _at_positions(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum over a filter's channels; each filter sees a copy of those of its group."""
        if self.shared:
            return self.convolve_positions(x, weight)
        copies = self.out_channels // self.groups
        x = x.unflatten(1, (self.groups, 1, -1)).expand(-1, -1, copies, *[-1] * (self.rank + 1))
        parts = self.convolve_positions(x.flatten(1, 3), weight)
        return parts.unflatten(1, (self.out_channels, -1)).sum(2)

    def init_from(self, conv: ConvNd) -> None:
        """The kernel becomes the head's bias."""
        if self.softmax:
            raise ValueError(
                "filters out of a softmax are positive and sum to 1, trained ones are not and do "
                "not; give softmax=False"
            )
        if self.shared and self.groups != self.in_channels:
            raise ValueError(
                "shared=True filters channels alone, so it can start only as a depthwise "
                f"convolution (groups = in_channels = out_channels), not groups={self.groups}"
            )
        nn.init.zeros_(self.head.weight)
        self.head.bias.copy_(conv.weight.flatten())  # type: ignore[union-attr]

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        plain = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "hidden": (8,)}
        same = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 2, "hidden": (6,)}
        return [
            plain | {"padding": 1},
            plain | {"padding": 2, "groups": 2, "local": True, "bias": False},
            same | {"shared": True, "kernel_size": 2, "softmax": True, "network_size": 1},
            same | {"shared": True, "local": True, "softmax": False, "stride": 2},
        ]
