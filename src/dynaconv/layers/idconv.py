"""IDConv: experts mixed tap by tap (Lou, 2023)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.attention import SafeBatchNorm, batch_norm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.layers.regions import region_means
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family


@register_family(
    "idconv", primitive="conv_per_sample", paper="Lou et al., arXiv 2023", transposed=True
)
class IDConv(DynamicConv):
    """Experts mixed anew for each sample, output channel and tap, from the input pooled to K.

        s[e, o, k] = softmax_e(head(pool_K(x))[e, o, k]),   head = span(gelu(bn(reduce(.))))
        W[o, c, k] = sum_e s[e, o, k] weight[e, o, c, k]
        y = W x + sum_e softmax_e(head(mean(x))[e, o]) bias[e, o]

    pool_K averages x over as many regions as the kernel has taps. The input-dependent depthwise
    convolution of TransXNet, published in 2-D, depthwise, without stride; by the same rule any
    convolution has one. The batch norm trains at batch 1 too.

    Args:
        experts: number of kernels E, at least 2.
        reduction: input channels over hidden channels of head.
    """

    def build(self, experts: int = 2, reduction: int = 4) -> None:
        at_least(2, experts=experts)
        at_least(1, reduction=reduction)
        self.experts, conv = experts, partial(conv_nd, self.rank)
        self.weight = nn.Parameter(torch.empty(experts, *self.kernel_shape()))
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty(experts, self.out_channels))
            nn.init.trunc_normal_(self.bias, std=0.02)
        hidden = max(self.in_channels // reduction, 1)
        self.reduce = conv(self.in_channels, hidden, 1, bias=False)
        self.bn = SafeBatchNorm(hidden)
        self.span = conv(hidden, experts * self.out_channels, 1)

    def head(self, pooled: Tensor) -> Tensor:
        """Shares that sum to 1 over the experts, (N, E, C_out, *R), from pooled x (N, C_in, *R)."""
        logits = self.span(F.gelu(batch_norm(self.bn, self.reduce(pooled))))
        return torch.softmax(logits.unflatten(1, (self.experts, -1)), 1)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        shares = {"shares": self.head(region_means(x, mask, self.kernel_size))}
        if self.bias is not None:
            mean = masked_mean(x, mask).unflatten(1, (-1, *[1] * self.rank))
            shares["bias_shares"] = self.head(mean).flatten(2)
        return shares

    def convolve(self, x: Tensor, shares: Tensor, bias_shares: Tensor | None = None) -> Tensor:  # type: ignore[override]
        weight = torch.einsum("neo...,eoc...->noc...", shares, self.weight)
        bias = None
        if self.bias is not None and bias_shares is not None:
            bias = (bias_shares * self.bias).sum(1)
        return self.convolve_samples(x, weight, bias)

    def init_from(self, conv: ConvNd) -> None:
        """Experts alike: shares sum to 1."""
        self.weight.copy_(conv.weight)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 4},
            {"in_channels": 4, "out_channels": 6, "kernel_size": 2, "stride": 2, "experts": 3},
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "bias": False},
        ]
