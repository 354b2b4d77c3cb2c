"""CARAFE: each output position reassembles its neighbourhood with weights from the content."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import conv_per_position
from dynaconv.layers.base import at_least, conv_nd
from dynaconv.layers.interleave import interleave
from dynaconv.layers.upsampler import Upsampler
from dynaconv.registry import register_family
from dynaconv.shapes import Geometry


@register_family("carafe", primitive="conv_per_position", paper="Wang et al., ICCV 2019")
class CARAFE(Upsampler):
    """Up-sampling by a kernel for each output position, predicted from the input around it.

        W[q, k] = softmax_k(content_encoder(channel_compressor(x)))
        y[c, q] = sum_k W[group(c), q, k] x[c, floor(q / stride) + k] + b

    k runs over the kernel_size window around floor(q / stride). As in the published code (mmcv's
    CARAFEPack), taps beyond the border read zeros and the softmax still counts them, so that
    borders darken; another `padding_mode` fills them. The compressor starts by Xavier, the encoder
    near zero: training starts from the mean over the window. Published without b, which starts at
    0, and for as many output as input channels; where the numbers differ, a 1x1 convolution of x
    comes first.

    Args:
        kernel_size: taps of the reassembly, odd; published 5 (`up_kernel`).
        groups: kernels a position, each for a group of channels (`up_group`).
        compressed_channels: channels that the encoder sees.
        encoder_kernel, encoder_dilation: of the encoder's convolution, odd kernels.
    """

    window = 5

    def build(
        self,
        compressed_channels: int = 64,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
    ) -> None:
        at_least(
            1,
            compressed_channels=compressed_channels,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
        )
        for name, sizes in (
            ("kernel_size", self.kernel_size),
            ("encoder_kernel", (encoder_kernel,)),
        ):
            if any(size % 2 == 0 for size in sizes):
                raise ValueError(f"{name}={sizes} must be odd: windows lie around a position")
        kernels = self.groups * prod(self.stride)
        self.project = self.projection()
        self.channel_compressor = conv_nd(self.rank, self.in_channels, compressed_channels, 1)
        self.content_encoder = conv_nd(
            self.rank,
            compressed_channels,
            kernels * prod(self.kernel_size),
            encoder_kernel,
            padding=encoder_dilation * (encoder_kernel // 2),
            dilation=encoder_dilation,
            padding_mode=self.padding_mode,
        )
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for bias in (self.channel_compressor.bias, self.content_encoder.bias, self.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """W as (N, G, prod(K), *stride, *L): the kernels of each input position's sub-positions."""
        compressed = self.channel_compressor(x)
        if mask is not None:
            compressed = compressed.masked_fill(~mask.unsqueeze(1), 0)
        logits = self.content_encoder(compressed)
        logits = logits.unflatten(1, (self.groups, prod(self.kernel_size), *self.stride))
        return {"weight": torch.softmax(logits, 2)}

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`weight` W, (N, G, *K, *L_out)."""
        weight = super().kernels(input, padding_mask)["weight"]
        weight = interleave(weight.flatten(1, 2 + self.rank), self.stride)
        return {"weight": weight.unflatten(1, (self.groups, *self.kernel_size))}

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """One call for all sub-positions: each is a set of channels beside the others."""
        x = x if self.project is None else self.project(x)
        ones, half = (1,) * self.rank, tuple(k // 2 for k in self.kernel_size)
        x, padding = self.pad(x, Geometry(self.kernel_size, ones, half, ones))
        count = prod(self.stride)
        weight = weight.flatten(3, 2 + self.rank).movedim(3, 1).flatten(1, 2)
        weight = weight.unflatten(2, self.kernel_size)
        copies = x.unsqueeze(1).expand(-1, count, *x.shape[1:]).flatten(1, 2)
        output = conv_per_position(copies, weight, 1, padding)
        output = output.unflatten(1, (count, -1)).transpose(1, 2).flatten(1, 2)
        return self.add_bias(interleave(output, self.stride))

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "compressed_channels": 6},
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": (5, *(1,) * (rank - 1)),
                "stride": (3, *(2,) * (rank - 1)),
                "groups": 2,
                "bias": False,
                "compressed_channels": 5,
                "encoder_kernel": 5 if rank == 1 else 3,
                "encoder_dilation": 2,
            },
        ]
