"""CondConv: experts mixed by a sigmoid routing (Yang, NeurIPS 2019)."""

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family


@register_family(
    "condconv", primitive="conv_mixture", paper="Yang et al., NeurIPS 2019", transposed=True
)
class CondConv(DynamicConv):
    """Experts mixed per sample by sigmoids of the pooled input.

        r = sigmoid(fc(mean(x))),    y = (sum_e r_e W_e) * x + sum_e r_e b_e

    The r_e are not normalised, and each expert is drawn like a convolution of its own. Training
    follows the paper with one routing a layer (timm's EfficientNet shares one in a block).

    Args:
        experts: number of kernels E.
    """

    causality = "pooled"

    def build(self, experts: int = 4) -> None:
        at_least(1, experts=experts)
        self.experts = experts
        self.weight = nn.Parameter(self.initial_kernels(experts))
        if self.bias is not None:
            self.bias = nn.Parameter(self.initial_bias((experts, self.out_channels)))
        self.routing = nn.Linear(self.in_channels, experts)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"coefficients": torch.sigmoid(self.routing(masked_mean(x, mask)))}

    def convolve(self, x: Tensor, coefficients: Tensor) -> Tensor:  # type: ignore[override]
        return self.convolve_mixture(x, self.weight, coefficients, self.bias)

    def init_from(self, conv: ConvNd) -> None:
        """Routing 1/2 for everything; experts 2 W / E + d_e with sum_e d_e = 0.

        The d_e (a tenth of W's spread) make the experts differ, so that the routing can learn.
        """
        share = 2 / self.experts
        noise = torch.randn_like(self.weight) * 0.1 * share * conv.weight.std(correction=0)
        self.weight.copy_(share * conv.weight + noise - noise.mean(0))
        if self.bias is not None:
            self.bias.mul_(share)
        nn.init.zeros_(self.routing.weight)
        nn.init.zeros_(self.routing.bias)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 4, "experts": 1},
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]
