"""LDConv (Zhang, Image and Vision Computing 2024): any number of taps, sampled at offsets."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import deform_conv
from dynaconv.layers.base import ConvNd, DynamicConv, conv_nd, without_autocast
from dynaconv.layers.sampling import around_centres, fitted, kernel_grid, repeated
from dynaconv.masking import sizes_from_mask
from dynaconv.registry import register_family
from dynaconv.shapes import IntOrTuple, ntuple

BORDERS = ("published", "clamp", "zeros")


@register_family("ldconv", primitive="deform_conv", paper="Zhang et al., Image Vis. Comput. 2024")
class LDConv(DynamicConv):
    """A kernel of any number of taps, each at an offset that follows the features.

        offset = offset_conv(x)                        3x3, around the window's centre
        y[p] = b + sum_{t < N} W[t] x(p s - padding + grid[t] + offset[t, p])

    Output positions are those of nn.ConvNd with this kernel_size. The grid starts at the window's
    first position: for N = prod(kernel_size) taps it is the kernel's own, otherwise the digits of
    t to the base round(N ** (1 / D)), the first one free to grow (5 taps in 2-D: two rows of two
    and one tap below), times the dilation. As published: kernel_size=1, taps=N; then the window is
    the grid's first tap, and there are ceil(L / s) outputs. The published batch norm and SiLU are
    left to the model.

    Offsets are constants at first: only offset_conv's weight is zero, its bias is drawn as in
    nn.ConvNd. They train ten times slower (`dynaconv.parameter_groups`); in the published code the
    hook that should do so has no effect.

    Args:
        taps: N; None for prod(kernel_size).
        border: what a tap beyond the input reads. "zeros": zeros. "clamp": the nearest position.
            "published": that too, but twice for each dimension in which the tap lies before the
            first position, on the last one, or after it (so a regular tap on the last one as well).
            With padding_mode="zeros" and the latter two, padding only moves the windows; with
            another mode the border is that of the padded input.
        zero_offset: offset_conv's bias starts at zero too, and with it every offset.
    """

    lr_factors = {"offset_conv": 0.1}
    exact_options = {"border": "zeros", "zero_offset": True}
    grid: Tensor

    def build(
        self, taps: int | None = None, border: str = "published", zero_offset: bool = False
    ) -> None:
        if border not in BORDERS:
            raise ValueError(f"border={border!r}; choose from {BORDERS}")
        self.border, self.zero_offset = border, zero_offset
        self.weight = nn.Parameter(self.initial_kernels())
        # Channels as published: all taps' offsets along the first dimension, then the next.
        channels = (self.in_channels, self.rank * self.taps)
        self.offset_conv = conv_nd(self.rank, *channels, 3, self.stride)
        nn.init.zeros_(self.offset_conv.weight)
        if zero_offset:
            nn.init.zeros_(self.offset_conv.bias)  # type: ignore[arg-type]
        self.register_buffer("grid", self.initial_grid(), persistent=False)

    def resolve_kernel_size(self, kernel_size: IntOrTuple) -> tuple[int, ...]:
        size, taps = super().resolve_kernel_size(kernel_size), self.options.get("taps")
        self.taps = prod(size) if taps is None else ntuple(taps, 1, "taps")[0]
        return size

    def kernel_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, self.taps)

    def initial_grid(self) -> Tensor:
        """Where the taps lie without offset, (taps, D), from the window's first position."""
        if self.taps == prod(self.kernel_size):
            return kernel_grid(self)
        base, rest, digits = round(self.taps ** (1 / self.rank)), torch.arange(self.taps), []
        for _ in range(self.rank - 1):
            digits.append(rest % base)
            rest = rest // base
        return torch.stack([rest, *reversed(digits)], 1) * torch.tensor(self.dilation)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        # Positions need more digits than half precision has: no autocast here.
        with without_autocast(x.device.type):
            seen = around_centres(self, x, (3,) * self.rank)
            made = self.offset_conv(seen.to(self.offset_conv.weight.dtype))
        offset = made.to(torch.promote_types(made.dtype, torch.float32))
        offset = offset.unflatten(1, (self.rank, self.taps)).transpose(1, 2)
        if self.border == "zeros":
            return {"offset": offset.flatten(1, 2)}
        start, last = self.positions(tuple(offset.shape[3:])), self.last_positions(x, mask)
        position = offset + start
        inside = (position >= 0) & (position < last)
        nearest = position.clamp(min=0).minimum(last.to(position.dtype)) - start
        bounded = {"offset": offset.where(inside, nearest.detach()).flatten(1, 2)}
        if self.border == "clamp":
            return bounded
        return bounded | {"modulation": (1 + (~inside).to(x.dtype)).prod(2)}

    def positions(self, output: tuple[int, ...]) -> Tensor:
        """Where the taps lie without offset, (taps, D, *L_out), in the input after `pad`."""
        zeros = self.padding_mode == "zeros"
        before = self.geometry().padding if zeros else (0,) * self.rank
        return repeated(self.grid, output, self.stride, before)

    def last_positions(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The last real position of each sample after `pad`, (N or 1, 1, D, 1, ...)."""
        if mask is None:
            sizes = torch.tensor([self.pad(x)[0].shape[2:]], device=x.device)
        else:
            sizes = sizes_from_mask(mask).clamp(min=1)
        return (sizes - 1).unflatten(1, (1, self.rank, *(1,) * self.rank))

    def convolve(  # type: ignore[override]
        self, x: Tensor, offset: Tensor, modulation: Tensor | None = None
    ) -> Tensor:
        """deform_conv of a column of taps, from which the offsets lead to the grid's."""
        x = self.pad(x)[0]
        output = tuple(offset.shape[2:])
        column = F.pad(torch.arange(self.taps, device=x.device).unsqueeze(1), (0, self.rank - 1))
        kernel = (self.taps, *(1,) * (self.rank - 1))
        x, stride = fitted(x, kernel, output)
        there = self.positions(output) - repeated(column, output, stride, (0,) * self.rank)
        offset = offset + there.flatten(0, 1).to(offset.dtype)
        if modulation is not None:
            modulation = modulation.to(x.dtype)
        weight, groups = self.weight.unflatten(2, kernel), self.groups
        return deform_conv(
            x, offset, weight, self.bias, stride, groups=groups, modulation=modulation
        )

    def init_from(self, conv: ConvNd) -> None:
        """Without offsets the taps are the kernel's."""
        if self.taps != prod(self.kernel_size):
            raise ValueError(
                f"taps={self.taps} are not those of kernel_size={self.kernel_size}; leave taps out"
            )
        if self.border != "zeros" or not self.zero_offset:
            raise ValueError(
                "ldconv starts as a static convolution only with border='zeros', as that reads "
                "zeros outside, and zero_offset=True"
            )
        self.weight.copy_(conv.weight.flatten(2))

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        plain = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
        return [
            plain,
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 1,
                "stride": 2,
                "groups": 2,
                "bias": False,
                "taps": 5,
                "border": "clamp",
            },
            plain | {"border": "zeros", "zero_offset": True},
        ]
