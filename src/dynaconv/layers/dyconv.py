"""Dynamic Convolution: experts mixed by a softmax with temperature (Chen, CVPR 2020)."""

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.layers.attention import Squeeze
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal, positive
from dynaconv.registry import register_family


@register_family(
    "dyconv", primitive="conv_mixture", paper="Chen et al., CVPR 2020", transposed=True
)
class DyConv(DynamicConv):
    """Experts mixed per sample by a softmax over the pooled input.

        pi = softmax(mix(relu(fc(mean(x)))) / T),    y = (sum_e pi_e W_e) * x + sum_e pi_e b_e

    The paper starts with T = 30, near-uniform mixing in which all experts learn, and lowers it
    to 1 over the first epochs: call `dynaconv.anneal(model, progress)`.

    Args:
        experts: number of kernels E.
        reduction: hidden channels of the attention over input channels.
        temperature: T at the start, a buffer; `dynaconv.anneal` lowers it.
    """

    causality = "pooled"

    def build(self, experts: int = 4, reduction: float = 0.25, temperature: float = 30.0) -> None:
        at_least(1, experts=experts)
        positive(reduction=reduction, temperature=temperature)
        self.experts = experts
        self.weight = nn.Parameter(self.initial_kernels(experts))
        if self.bias is not None:
            self.bias = nn.Parameter(self.initial_bias((experts, self.out_channels)))
        hidden = int(self.in_channels * reduction) + 1
        self.squeeze = Squeeze(self.in_channels, hidden)
        self.mix = nn.Linear(hidden, experts)
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        logits = self.mix(self.squeeze(x, mask))
        return {"coefficients": torch.softmax(logits / self.temperature, dim=1)}

    def convolve(self, x: Tensor, coefficients: Tensor) -> Tensor:  # type: ignore[override]
        return self.convolve_mixture(x, self.weight, coefficients, self.bias)

    def init_from(self, conv: ConvNd) -> None:
        """Every expert a copy: the coefficients sum to 1."""
        self.weight.copy_(conv.weight)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 4, "bias": False},
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]
