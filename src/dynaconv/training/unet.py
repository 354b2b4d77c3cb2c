"""A small U-Net of ordinary layers; :func:`dynaconv.convert` makes its dynamic versions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.masked import apply
from dynaconv.masking import (
    Padded,
    check_mask,
    mask_from_sizes,
    replicate_edges,
    sizes_from_mask,
)


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

    Shapes:
        input (N, in_channels, H, W) of any height and width from 1, and padding_mask (N, H, W)
        bool, True where real, for images of different sizes; output (N, classes, H, W), at real
        positions what each image gives alone.

    Raises:
        ValueError: for fewer than two widths, or widths below 1.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"UNet: needs two or more widths from 1, got {tuple(widths)}")
        first, *_, last = widths
        pairs = list(pairwise(widths))
        down = nn.Conv2d(in_channels, first, 4, stride=2, padding=1)
        self.stem = nn.Sequential(down, *double(first, first))
        self.encoder = nn.ModuleList(double(a, b) for a, b in pairs[:-1])
        self.bottleneck = double(pairs[-1][0], last)
        self.decoder = nn.ModuleList(double(a + b, a) for a, b in reversed(pairs))
        self.enlarge = nn.ModuleList(Enlarge() for _ in self.decoder)
        self.head = nn.Conv2d(first, classes, 1)
        self.halve = nn.MaxPool2d(2)
        self.multiple = 2 ** len(widths)

    def pad(self, image: Tensor) -> Tensor:
        """image (N, C, H, W), its last row and column repeated so that every level halves it."""
        height, width = image.shape[-2:]
        border = (0, -width % self.multiple, 0, -height % self.multiple)
        return F.pad(image, border, mode="replicate")

    def forward(self, image: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        height, width = image.shape[-2:]
        x, mask = self._padded(image, padding_mask)
        x, mask = apply(self.stem, x, mask)
        skips = [x]
        for block in [*self.encoder, self.bottleneck]:
            x, mask = apply(block, *apply(self.halve, x, mask))
            skips.append(x)
        steps = zip(self.enlarge, self.decoder, reversed(skips[:-1]), strict=True)
        for enlarge, block, skip in steps:
            x, mask = apply(enlarge, x, mask)
            x, mask = apply(block, torch.cat((x, skip), dim=1), mask)
        x, _ = bilinear(*apply(self.head, x, mask))
        return x[..., :height, :width]

    def _padded(self, image: Tensor, mask: Tensor | None) -> Padded:
        """Each image padded as alone, and the mask of that."""
        if mask is None:
            return Padded(self.pad(image), None)
        check_mask(mask, image)
        x = self.pad(replicate_edges(image, mask))
        sizes = sizes_from_mask(mask)
        return Padded(x, mask_from_sizes(sizes + -sizes % self.multiple, x.shape[2:]))


class Enlarge(nn.Module):
    """Twice the height and width: (N, C, H, W) to (N, C, 2 H, 2 W). No weights.

    A layer of the same sizes may take its place.
    """

    def forward(self, x: Tensor) -> Tensor:
        return bilinear(x, None).data

    def masked_forward(self, x: Tensor, mask: Tensor | None) -> Padded:
        return bilinear(x, mask)


def bilinear(x: Tensor, mask: Tensor | None) -> Padded:
    """Twice the height and width by linear interpolation, at borders from what is real alone."""
    if mask is not None:
        x = replicate_edges(x, mask)
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return Padded(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False), mask)
