"""WeightNet: two layers over the pooled input make the whole kernel (Ma, ECCV 2020)."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family


@register_family(
    "weightnet", primitive="conv_per_sample", paper="Ma et al., ECCV 2020", transposed=True
)
class WeightNetConv(DynamicConv):
    """The kernel itself is generated, by a grouped linear layer from a sigmoid code.

        s = sigmoid(fc(reduce(mean(x)))),    M C_out numbers in G C_out groups
        W[j] = sum_i V[j, i] s[group(j), i],    y = W * x + b

    Every entry j of the kernel is a mixture of the M / G numbers of its group, one G-th of an
    output channel's kernel; there are no experts. A depthwise layer has one group a channel, as
    published. The authors share `reduce` among the layers of a block and have no b.

    Published, V is drawn with variance 1 for M = G, which a batch norm afterwards makes up for;
    here a fresh W has the spread that nn.ConvNd draws. `from_conv` is exact as published: with
    fc = 0 all s are 1/2.

    Args:
        multiplier: M.
        divisor: G, a divisor of M and, except depthwise, of the entries of an output channel's
            kernel.
        reduction: length of the pooled input's code over input channels.
        min_hidden: its least length.
    """

    causality = "pooled"

    def build(
        self,
        multiplier: int = 2,
        divisor: int = 2,
        reduction: float = 1 / 16,
        min_hidden: int = 16,
    ) -> None:
        at_least(1, multiplier=multiplier, divisor=divisor, min_hidden=min_hidden)
        at_least(0, reduction=reduction)
        if multiplier % divisor:
            raise ValueError(f"divisor={divisor} does not divide multiplier={multiplier}")
        depthwise = self.groups == self.in_channels == self.out_channels
        taps, parts = prod(self.kernel_shape()[1:]), 1 if depthwise else divisor
        if taps % parts:
            raise ValueError(
                f"divisor={divisor} does not divide the {taps} entries of an output channel's "
                f"kernel {self.kernel_shape()[1:]}"
            )
        hidden = max(int(self.in_channels * reduction), min_hidden)
        groups, inputs = self.out_channels * parts, multiplier // divisor
        self.reduce = nn.Linear(self.in_channels, hidden)
        self.fc = nn.Linear(hidden, groups * inputs)
        drawn = [self.initial_kernels().reshape(groups, -1) for _ in range(inputs)]
        self.weight = nn.Parameter(torch.stack(drawn, 2) * 2 / inputs**0.5)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        code = torch.sigmoid(self.fc(self.reduce(masked_mean(x, mask))))
        code = code.unflatten(1, (self.weight.shape[0], -1))
        made = torch.einsum("ngi,gji->ngj", code, self.weight)
        return {"weight": made.flatten(1).unflatten(1, self.kernel_shape())}

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return self.convolve_samples(x, weight, self.bias)

    def init_from(self, conv: ConvNd) -> None:
        """s = 1/2; each of the M / G weights of an entry a share of it, d_i more.

        The d_i (a tenth of the share's spread) sum to 0 and make the inputs of a group differ.
        """
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        inputs = self.weight.shape[2]
        share = conv.weight.reshape(self.weight.shape[0], -1, 1) * 2 / inputs
        noise = torch.randn_like(self.weight) * 0.1 * share.std(correction=0)
        self.weight.copy_(share + noise - noise.mean(2, keepdim=True))

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "groups": 4,
                "bias": False,
                "multiplier": 6,
            },
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 2,
                "groups": 2,
                "multiplier": 4,
                "divisor": 1,
                "min_hidden": 3,
            },
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]
