"""Selective kernel: branches of growing size, chosen per channel by attention (Li, CVPR 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.attention import SafeBatchNorm, Squeeze, batch_norm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd, positive
from dynaconv.registry import register_family


@register_family("selective_kernel", primitive="conv", paper="Li et al., CVPR 2019")
class SelectiveKernelConv(DynamicConv):
    """Convolutions of several sizes; a softmax over them per sample and output channel.

        U_b = relu(bn_b(W_b * x)),   a = softmax_b(select(relu(bn(fc(mean(sum_b U_b))))))
        y = sum_b a_b U_b + bias

    Branch b has the kernel's taps at (b + 1) times its dilation, as in the paper ("5x5" is a 3x3
    of dilation 2), or, not dilated, a kernel of 2 b more taps a dimension. The published unit has a
    batch norm and ReLU in each branch; `from_conv` leaves them out (`branch_norm=False`), so that
    the layer stands for a convolution alone.

    Args:
        branches: number of sizes B.
        reduction: hidden channels of the attention over output channels.
        min_hidden: hidden channels of the attention at least.
        dilated: whether larger branches are dilated or have more taps.
        branch_norm: batch norm and ReLU in each branch, as published.
    """

    exact_options = {"branch_norm": False}
    convolving = ("convs",)

    def build(
        self,
        branches: int = 2,
        reduction: float = 1 / 16,
        min_hidden: int = 32,
        dilated: bool = True,
        branch_norm: bool = True,
    ) -> None:
        at_least(1, branches=branches, min_hidden=min_hidden)
        positive(reduction=reduction)
        self.branch_norm = branch_norm
        self.convs = nn.ModuleList(self._branch(b, dilated) for b in range(branches))
        self.norms = nn.ModuleList(
            SafeBatchNorm(self.out_channels) for _ in range(branches if branch_norm else 0)
        )
        hidden = max(int(self.out_channels * reduction), min_hidden)
        self.squeeze = Squeeze(self.out_channels, hidden, norm=True)
        self.select = nn.Linear(hidden, branches * self.out_channels, bias=False)

    def _branch(self, b: int, dilated: bool) -> nn.Module:
        """Branch b: larger than the layer's convolution, padded for the same output size."""
        kernel, dilation = self.kernel_size, self.dilation
        grown = tuple(d * (b + 1) for d in dilation) if dilated else dilation
        taps = kernel if dilated else tuple(k + 2 * b for k in kernel)
        growth = [
            d * (k - 1) - d0 * (k0 - 1)
            for d, k, d0, k0 in zip(grown, taps, dilation, kernel, strict=True)
        ]
        if b and not any(growth):
            raise ValueError("a kernel of one tap has no size to select; give a larger kernel_size")
        if any(g % 2 for g in growth):
            raise ValueError(
                f"kernel_size={kernel} with dilation={dilation} cannot grow by the same on both "
                "sides; give odd kernels, an even dilation, or dilated=False"
            )
        if self.padding == "valid" or not isinstance(self.padding, str):
            padding: Any = tuple(
                p + g // 2 for p, g in zip(self.geometry().padding, growth, strict=True)
            )
        else:
            padding = "same"
        return conv_nd(
            self.rank,
            self.in_channels,
            self.out_channels,
            taps,
            self.stride,
            padding,
            grown,
            self.groups,
            bias=False,
            padding_mode=self.padding_mode,
        )

    def branch_outputs(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """U_b, each (N, C_out, *L_out); zero where the output is not real."""
        outputs = [conv(x) for conv in self.convs]
        out_mask = None if mask is None else self.output_mask(mask)
        if self.branch_norm:
            outputs = [
                F.relu(batch_norm(norm, u, out_mask))
                for norm, u in zip(self.norms, outputs, strict=True)
            ]
        if out_mask is None:
            return outputs
        return [u.masked_fill(~out_mask.unsqueeze(1), 0) for u in outputs]

    def attention(self, outputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """a, (N, B, C_out), from the branches' sum."""
        out_mask = None if mask is None else self.output_mask(mask)
        logits = self.select(self.squeeze(torch.stack(outputs).sum(0), out_mask))
        return torch.softmax(logits.unflatten(1, (len(outputs), -1)), dim=1)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"coefficients": self.attention(self.branch_outputs(x, mask), mask)}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        outputs = self.branch_outputs(x, mask)
        shares = self.attention(outputs, mask).to(outputs[0].dtype)
        shares = shares.unflatten(2, (-1, *[1] * self.rank))
        output = shares[:, 0] * outputs[0]
        for b in range(1, len(outputs)):
            output = torch.addcmul(output, shares[:, b], outputs[b])
        return self.add_bias(output)

    def init_from(self, conv: ConvNd) -> None:
        """Equal shares 1 / B of B times the kernel in the smallest branch, zero in the others."""
        if self.branch_norm:
            raise ValueError(
                "branch_norm=True puts a batch norm and ReLU after the convolution; "
                "a static convolution has neither"
            )
        nn.init.zeros_(self.select.weight)
        smallest, *larger = self.convs.parameters()
        smallest.copy_(conv.weight * len(self.convs))
        for weight in larger:
            nn.init.zeros_(weight)

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
                "branches": 3,
                "dilated": False,
                "branch_norm": False,
            },
        ]
