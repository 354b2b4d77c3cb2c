"""KernelDNA: layers that derive their kernels from another layer's (Huang, arXiv 2025)."""

from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from dynaconv.layers.attention import Squeeze
from dynaconv.layers.base import CONVS, ConvNd, DynamicConv, at_least, causal, positive
from dynaconv.registry import register_family


@register_family(
    "kerneldna", primitive="conv", paper="Huang et al., arXiv 2503.23379, 2025", transposed=True
)
class KernelDNAConv(DynamicConv):
    """A child layer: a parent's kernel under static adapters, and input channels under a gate.

        W = (1 + a_s) (1 + a_f) W_parent,    a = g sigmoid(gate(relu(bn(fc(mean(x))))))
        y = W * (a x) + b

    a_s[k] and a_f[o], one number a tap and one an output channel, are trained parameters that
    start at 0; the input routes only through the gate, so that the kernel is shared by the batch.
    Alone, a layer is its own parent. The saving comes from sharing:

        child = KernelDNAConv2d(64, 64, 3, padding=1, bias=False).derive_from(parent)

    for a parent nn.ConvNd or KernelDNAConv. The authors let a child stand before its parent, a
    plain convolution, in the last two stages of a ResNet (3x3) or MobileNetV2 (1x1). As published,
    g = 1, there is no b, and a kernel of one tap has no a_s; `from_conv` takes g = 2, with which a
    zero gate leaves x as it is.

    Args:
        reduction: hidden numbers of the gate over input channels.
        min_hidden: hidden numbers at least.
        gate_scale: g.
    """

    exact_options = {"gate_scale": 2.0}
    causality = "pooled"

    spatial: nn.Parameter | None

    def build(self, reduction: float = 0.25, min_hidden: int = 1, gate_scale: float = 1.0) -> None:
        at_least(1, min_hidden=min_hidden)
        positive(reduction=reduction, gate_scale=gate_scale)
        self.gate_scale = gate_scale
        hidden = max(int(self.in_channels * reduction), min_hidden)
        self.weight = nn.Parameter(self.initial_kernels())
        self.filter = nn.Parameter(torch.zeros(self.out_channels))
        self.register_parameter("spatial", None)
        if prod(self.kernel_size) > 1:
            self.spatial = nn.Parameter(torch.zeros(self.kernel_size))
        self.squeeze = Squeeze(self.in_channels, hidden, norm=True)
        self.gate = nn.Linear(hidden, self.in_channels)

    def derive_from(self, parent: ConvNd | DynamicConv) -> Self:
        """Makes this layer a child: from now on its kernel is the parent's own parameter.

        Both are trained as one, counted once by `parameters()`, and stay one in copies and in
        state_dicts of a model that holds both. Move layers to a device or dtype before.

        Raises:
            TypeError: the parent is neither an nn.ConvNd nor a KernelDNAConv.
            ValueError: its kernel has another shape, dtype or device.
        """
        if not isinstance(parent, (KernelDNAConv, *CONVS.values())):
            raise TypeError(f"a parent is an nn.ConvNd or a KernelDNAConv, not {type(parent)}")
        for name in ("shape", "dtype", "device"):
            theirs, ours = (getattr(layer.weight, name) for layer in (parent, self))
            if theirs != ours:
                raise ValueError(f"the parent's kernel has {name} {theirs}, this layer's {ours}")
        self.weight = parent.weight  # type: ignore[assignment]
        return self

    def kernel(self) -> Tensor:
        """W, (C_out, C_in / groups, *K)."""
        outer = (1 + self.filter).unflatten(0, (-1, 1, *(1,) * self.rank))
        adapted = self.weight * outer
        return adapted if self.spatial is None else adapted * (1 + self.spatial)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"channel": self.gate_scale * torch.sigmoid(self.gate(self.squeeze(x, mask)))}

    def convolve(self, x: Tensor, channel: Tensor) -> Tensor:  # type: ignore[override]
        x = x * channel.unflatten(1, (-1, *(1,) * self.rank))
        return self.convolve_static(x, self.kernel(), self.bias)

    def init_from(self, conv: ConvNd) -> None:
        """The kernel, with the gate's start g / 2 divided out; adapters start at 0."""
        self.weight.copy_(conv.weight * (2 / self.gate_scale))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

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
                "min_hidden": 3,
            },
            {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "gate_scale": 1.5},
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]
