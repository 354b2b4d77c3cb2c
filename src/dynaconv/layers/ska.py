"""SKAConv: large-kernel perception, small-kernel aggregation (Wang, CVPR 2025)."""

from functools import partial
from math import gcd, prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.attention import SafeBatchNorm, batch_norm, masked_group_norm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.layers.centres import at_centres
from dynaconv.registry import register_family


@register_family("ska", primitive="conv_per_position", paper="Wang et al., CVPR 2025")
class SKAConv(DynamicConv):
    """Small kernels, one a position, made from a large neighbourhood ("see large, focus small").

        h = bn(large(relu(bn(reduce(x)))))
        w[p] = norm(logits(relu(bn(mix(h[p])))))
        y[c, p] = b[c] + sum_k w[c mod G, k, p] x[c, p + k]

    large is a depthwise convolution; norm is a group norm over the taps and positions of a kernel,
    in a padded batch over the real ones. Published in 2-D, without stride and b, for as many output
    as input channels; here h[p] is at the window's centre, or the mean of its stride's cell, and a
    1x1 convolution of x comes first where the channel numbers differ.

    Args:
        group_channels: channels that share a kernel, at most: C_out / G is their greatest common
            divisor with C_out. With `groups` > 1, G is `groups`.
        perception_size: kernel size of large.
        reduction: input channels over channels of h.
        residual: y = bn(y) + x instead, the paper's LSConv; needs an output shaped like the input.
    """

    absorbed = ("norms.1.bias",)

    def build(
        self,
        group_channels: int = 8,
        perception_size: int = 7,
        reduction: int = 2,
        residual: bool = False,
    ) -> None:
        at_least(
            1, group_channels=group_channels, perception_size=perception_size, reduction=reduction
        )
        channels, conv = self.out_channels, partial(conv_nd, self.rank)
        shared = gcd(channels, group_channels)
        self.kernel_groups = self.groups if self.groups > 1 else channels // shared
        self.project = self.projection()
        hidden, place = max(self.in_channels // reduction, 1), {"padding": "same", "bias": False}
        self.reduce = conv(self.in_channels, hidden, 1, bias=False)
        self.large = conv(
            hidden, hidden, perception_size, groups=hidden, padding_mode=self.padding_mode, **place
        )
        self.mix = conv(hidden, hidden, 1, bias=False)
        self.norms = nn.ModuleList(SafeBatchNorm(hidden) for _ in range(3))
        taps = self.kernel_groups * prod(self.kernel_size)
        self.logits = conv(hidden, taps, 1)
        self.norm = nn.GroupNorm(self.kernel_groups, taps)
        if residual:
            self._check_residual()
        self.out_norm = SafeBatchNorm(channels) if residual else None

    def _check_residual(self) -> None:
        size = (2 * max(self.kernel_size) * max(self.dilation),) * self.rank
        if self.in_channels != self.out_channels or self.output_size(size) != size:
            raise ValueError(
                "residual=True adds the input: it needs as many output as input channels, stride 1 "
                f"and padding='same' or half the kernel, not {self.in_channels} to "
                f"{self.out_channels} channels, stride={self.stride}, padding={self.padding!r}"
            )

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        out_mask = None if mask is None else self.output_mask(mask)
        features = F.relu(batch_norm(self.norms[0], self.reduce(x), mask))
        features = batch_norm(self.norms[1], self.large(_real(features, mask)), mask)
        features = at_centres(self, _real(features, mask), mask)
        features = F.relu(batch_norm(self.norms[2], self.mix(features), out_mask))
        weight = masked_group_norm(self.norm, self.logits(features), out_mask)
        return {"weight": weight.unflatten(1, (self.kernel_groups, *self.kernel_size))}

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        x = x if self.project is None else self.project(x)
        # Channels of one kernel side by side, as conv_per_position has them, and back.
        x = x.unflatten(1, (-1, self.kernel_groups)).transpose(1, 2).flatten(1, 2)
        output = self.convolve_positions(x, weight)
        output = output.unflatten(1, (self.kernel_groups, -1)).transpose(1, 2).flatten(1, 2)
        return self.add_bias(output)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        output = super().compute(x, mask)
        if self.out_norm is None:
            return output
        return batch_norm(self.out_norm, output, mask) + x.to(output.dtype)

    def init_from(self, conv: ConvNd) -> None:
        """A depthwise kernel becomes the bias of norm."""
        if self.out_norm is not None:
            raise ValueError("residual=True has a batch norm and adds x; give residual=False")
        self.require_depthwise()
        nn.init.zeros_(self.norm.weight)
        self.norm.bias.copy_(conv.weight.flatten())

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        same = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
        small = {"group_channels": 2, "perception_size": 5}
        return [
            same | small | {"padding": 1},
            same | small | {"out_channels": 6, "padding": 2, "stride": 2, "bias": False},
            same | {"kernel_size": 2, "groups": 4, "perception_size": 3, "reduction": 1},
            same | small | {"padding": 1, "residual": True},
        ]


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, zero where mask is False."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0)
