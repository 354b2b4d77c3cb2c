"""A small U-Net of ordinary layers; :func:`dynaconv.convert` makes its dynamic versions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """3x3 conv, batch norm, ReLU: (N, `inputs`, H, W) to (N, `outputs`, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two conv blocks."""
    return nn.Sequential(ConvBlock(inputs, outputs), ConvBlock(outputs, outputs))


class UNet(nn.Module):
    """Encoder and decoder with skip connections, after Ronneberger et al., 2015.

    It works from half resolution down, where a training step costs a quarter, and enlarges what
    it says to the image's size.

    Args:
        in_channels: channels of the image.
        classes: classes a pixel can have.
        widths: channels at half, quarter, eighth ... resolution; at least two.

    Shape:
        input (N, in_channels, H, W) of any height and width from 1; output (N, classes, H, W).

    Raises:
        ValueError: for fewer than two widths, or widths below 1.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"UNet: needs two or more widths from 1, got {tuple(widths)}")
        first, *_, last = widths
        pairs = list(pairwise(widths))
        halve = nn.Conv2d(in_channels, first, 4, stride=2, padding=1)
        self.stem = nn.Sequential(halve, *double(first, first))
        self.encoder = nn.ModuleList(double(a, b) for a, b in pairs[:-1])
        self.bottleneck = double(pairs[-1][0], last)
        self.decoder = nn.ModuleList(double(a + b, a) for a, b in reversed(pairs))
        self.head = nn.Conv2d(first, classes, 1)
        self.multiple = 2 ** len(widths)

    def pad(self, image: Tensor) -> Tensor:
        """image (N, C, H, W), its last row and column repeated so that every level halves it."""
        height, width = image.shape[-2:]
        border = (0, -width % self.multiple, 0, -height % self.multiple)
        return F.pad(image, border, mode="replicate")

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = self.stem(self.pad(image))
        skips = [x]
        for block in [*self.encoder, self.bottleneck]:
            x = block(F.max_pool2d(x, 2))
            skips.append(x)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat((x, skip), dim=1))
        x = F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return x[..., :height, :width]
