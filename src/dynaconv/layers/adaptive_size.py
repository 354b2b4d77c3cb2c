"""The kernel's size chosen per input, continuously: a dilation, or the width of a mask."""

from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import conv_per_sample, deform_conv
from dynaconv.layers.attention import Regulator
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, positive
from dynaconv.registry import register_family

FIELDS = ("dilation", "mask")
# A Gaussian of this width has fallen to a tenth at coordinates -1 and 1, the kernel's edge.
WIDTH = 1 / sqrt(2 * log(10))


@register_family(
    "adaptive_size",
    primitive="deform_conv",
    paper="dynaconv, after Li, CVPR 2019 and Romero, ICLR 2022",
)
class AdaptiveSizeConv(DynamicConv):
    """A kernel whose extent each sample chooses, one factor r a dimension, by gradient.

        r = R ** tanh(fc(relu(squeeze([mean(x), mean(|dx|)]))))      1 / R ... R, at first 1

        "dilation":  y[p] = b + sum_k W[k] x(c[p] + r d (k - (K - 1) / 2))
        "mask":      y = b + (W exp(-|u|^2 (1 / r^2 - 1) / (2 w^2))) * x

    With "dilation" the taps move apart or together around the window's centre c[p], with linear
    interpolation between the points; the multiplications stay as many. With "mask" a Gaussian over
    the kernel's coordinates u (-1 to 1) narrows or widens; W has taken in the one of width w, at
    r = 1, so that both start as a plain convolution. There, give kernel_size the largest extent.

    Args:
        field: "dilation" or "mask".
        max_scale: R.
        reduction: hidden channels of the head over input channels.
        min_hidden: hidden channels of the head at least.
    """

    def build(
        self,
        field: str = "dilation",
        max_scale: float = 4.0,
        reduction: float = 1 / 4,
        min_hidden: int = 8,
    ) -> None:
        positive(reduction=reduction)
        at_least(1, min_hidden=min_hidden)
        if field not in FIELDS:
            raise ValueError(f"field={field!r}; choose from {FIELDS}")
        if not max_scale > 1:
            raise ValueError(f"max_scale={max_scale} must be above 1")
        if max(self.kernel_size) == 1:
            raise ValueError("a kernel of one tap has no size; give a larger kernel_size")
        self.field, self.max_scale = field, max_scale
        self.weight = nn.Parameter(self.initial_kernels())
        hidden = max(int(self.in_channels * reduction), min_hidden)
        self.head = Regulator(self.in_channels, hidden, self.rank)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"scale": self.max_scale ** self.head(x, mask)}

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`scale` r, and `size`, the extent in positions of the input, each (N, D)."""
        scale = super().kernels(input, padding_mask)["scale"]
        spans = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        seen = scale if self.field == "dilation" else scale.clamp(max=1)
        return {"size": 1 + seen * seen.new_tensor(spans), "scale": scale}

    def convolve(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        size = self.output_size(tuple(x.shape[2:]))
        x, padding = self.pad(x)
        settings = (self.stride, padding, self.dilation, self.groups)
        if self.field == "dilation":
            return deform_conv(x, self.offset(scale, size), self.weight, self.bias, *settings)
        kernels = self.weight * self.mask(scale).to(self.weight.dtype)
        return conv_per_sample(x, kernels, self.bias, *settings)

    def offset(self, scale: Tensor, size: tuple[int, ...]) -> Tensor:
        """(r - 1) d (k - (K - 1) / 2) for each tap, the same everywhere: (N, prod(K) D, *L_out)."""
        axes = [torch.arange(k, device=scale.device) - (k - 1) / 2 for k in self.kernel_size]
        taps = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
        taps = taps.to(scale) * scale.new_tensor(self.dilation)
        offset = ((scale - 1).unsqueeze(1) * taps).flatten(1)
        return offset.unflatten(1, (-1, *[1] * self.rank)).expand(-1, -1, *size)

    def mask(self, scale: Tensor) -> Tensor:
        """exp(-|u|^2 (1 / r^2 - 1) / (2 w^2)), (N, 1, 1, *K), from r (N, D)."""
        exponent = scale.new_zeros(())
        for d, taps in enumerate(self.kernel_size):
            u = torch.linspace(-1, 1, taps).to(scale) if taps > 1 else scale.new_zeros(1)
            along = [-1 if i == d else 1 for i in range(self.rank)]
            narrower = (scale[:, d].pow(-2) - 1) / (2 * WIDTH**2)
            term = narrower.unsqueeze(1) * u.square()
            exponent = exponent + term.unflatten(1, (1, 1, *along))
        return torch.exp(-exponent)

    def init_from(self, conv: ConvNd) -> None:
        """r is 1 at first, whatever the input."""
        self.weight.copy_(conv.weight)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "stride": 2,
                "groups": 2,
                "bias": False,
                "max_scale": 2.0,
            },
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 5 if rank < 3 else 3,
                "padding": 2,
                "field": "mask",
                "min_hidden": 4,
            },
        ]
