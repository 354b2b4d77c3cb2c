"""ODConv: attention along all four dimensions of the kernel space (Li, ICLR 2022)."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.layers.attention import Squeeze
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal, positive
from dynaconv.registry import register_family

GATES = ("channel", "filter", "spatial")


@register_family("odconv", primitive="conv_mixture", paper="Li et al., ICLR 2022", transposed=True)
class ODConv(DynamicConv):
    """Experts under four attentions: input channel, output channel, tap and expert.

        h = relu(bn(fc(mean(x)))),   a_w = softmax(kernel_fc(h) / T)
        a_c, a_f, a_s = g * sigmoid(channel_fc(h) / T), filter_fc, spatial_fc likewise
        y = a_f * ((sum_e a_w,e W_e) a_s) * (a_c x) + b

    As in the published code, a depthwise layer has no a_f, a single tap no a_s, and a single
    expert no a_w. The published code has no bias and g = 1; `from_conv` takes g = 2, with which
    zero logits leave the kernel as it is. The batch norm trains at batch 1 too. The authors lower
    T from 30 to 1 over the first epochs: `dynaconv.anneal(model, progress, start=30)`.

    Args:
        experts: number of kernels E.
        reduction: hidden channels of the attention over input channels.
        min_hidden: hidden channels of the attention at least.
        temperature: T at the start, a buffer.
        gate_scale: g.
    """

    causality = "pooled"
    exact_options = {"gate_scale": 2.0}
    kernel_fc: nn.Linear | None

    def build(
        self,
        experts: int = 4,
        reduction: float = 1 / 16,
        min_hidden: int = 16,
        temperature: float = 1.0,
        gate_scale: float = 1.0,
    ) -> None:
        at_least(1, experts=experts, min_hidden=min_hidden)
        positive(reduction=reduction, temperature=temperature, gate_scale=gate_scale)
        self.experts, self.gate_scale = experts, gate_scale
        self.weight = nn.Parameter(torch.empty(experts, *self.kernel_shape()))
        for kernel in self.weight:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        hidden = max(int(self.in_channels * reduction), min_hidden)
        self.attention = Squeeze(self.in_channels, hidden, norm=True)
        depthwise = self.groups == self.in_channels == self.out_channels
        sizes = {
            "channel": self.in_channels,
            "filter": 1 if depthwise else self.out_channels,
            "spatial": prod(self.kernel_size),
            "kernel": experts,
        }
        for name, size in sizes.items():
            head = nn.Linear(hidden, size) if size > 1 or name == "channel" else None
            self.register_module(f"{name}_fc", head)
            if head is not None:
                nn.init.kaiming_normal_(head.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(head.bias)
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        hidden = self.attention(x, mask)
        attention = {}
        for name in GATES:
            head = getattr(self, f"{name}_fc")
            if head is not None:
                attention[name] = self.gate_scale * torch.sigmoid(head(hidden) / self.temperature)
        if self.kernel_fc is not None:
            logits = self.kernel_fc(hidden) / self.temperature
            attention["coefficients"] = torch.softmax(logits, dim=1)
        return attention

    def convolve(self, x: Tensor, channel: Tensor, **attention: Tensor) -> Tensor:  # type: ignore[override]
        """a_c scales the input and a_f the output; a_s a_w are the experts' coefficients."""
        ones = (1,) * self.rank
        coefficients = attention.get("coefficients", x.new_ones(x.shape[0], 1))
        if "spatial" in attention:
            taps = attention["spatial"].unflatten(1, (1, *self.kernel_size))
            coefficients = coefficients.unflatten(1, (-1, *ones)) * taps
        x = x * channel.unflatten(1, (-1, *ones))
        if "filter" not in attention:
            return self.convolve_mixture(x, self.weight, coefficients, self.bias)
        output = self.convolve_mixture(x, self.weight, coefficients, None)
        return self.add_bias(output * attention["filter"].unflatten(1, (-1, *ones)))

    def init_from(self, conv: ConvNd) -> None:
        """Gates at g sigmoid(0) = g / 2, experts alike; for g = 2 the kernel itself.

        The coefficients start near-uniform: drawn as published, they would be near one-hot.
        """
        heads = [h for h in (getattr(self, f"{name}_fc") for name in GATES) if h is not None]
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        if self.kernel_fc is not None:
            nn.init.normal_(self.kernel_fc.weight, std=0.1)
        self.weight.copy_(conv.weight / (self.gate_scale / 2) ** len(heads))

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 4, "experts": 1},
            {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "bias": False, "min_hidden": 4},
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]
