"""Frequency-adaptive dilated convolution: a dilation for each position (Chen, CVPR 2024)."""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.dispatch import has_fft
from dynaconv.functional import deform_conv
from dynaconv.layers.attention import Squeeze
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd, positive, without_autocast
from dynaconv.layers.fourier import filtered
from dynaconv.layers.low_pass import low_pass, register_filter
from dynaconv.registry import register_family
from dynaconv.shapes import same_padding


@register_family("adaptive_dilation", primitive="deform_conv", paper="Chen et al., CVPR 2024")
class AdaptiveDilationConv(DynamicConv):
    """The kernel's regular grid of taps grows and shrinks with the features at each position.

        x' = FreqSelect(x),   o = offset_conv(x'),   m = g sigmoid(modulation_conv(x'))
        D[p] = 1 + d |o[p]|                     (the code), or d relu(1 + o[p])       (the paper)
        y[p] = b + sum_k W[k] m[k, p] x'(centre(p) + D[p] (k - (K - 1) / 2))

    D starts at d (1 + epsilon), or at d; d is the layer's `dilation` (where it differs between
    dimensions, so does D, in the same ratio). FreqSelect reweights frequency bands of the input at
    each position:

        x' = sum_i 2 sigmoid(conv_i(x)) (low_{i-1} - low_i) + low_last,     low_0 = x

    where low_i keeps 1 / bands[i] of the spectrum. AdaKern scales the kernel's mean over taps and
    the rest, per sample, by factors 2 sigmoid(fc(relu(bn(fc(mean(x')))))):

        W[o, c] = low_filter[o] low_channel[c] mean_k V[o, c] + high_filter[o] high_channel[c]
                  (V[o, c] - mean_k V[o, c])

    As published, o and m come from undilated convolutions at the window's centre, g = 1, and the
    last band is left as it is (in the paper it has a weight too). Published for 3x3 kernels with
    half padding, by default replicated (padding_mode="replicate"; beyond it, zeros), and AdaKern
    for groups=1. `from_conv` takes the paper's D and g = 2, with which all starts exactly at the
    static kernel: |o| starting at exactly 0 would have no gradient.

    Args:
        zero_dilation: D as in the paper. It can shrink the kernel to one point, where relu has no
            gradient back: train offset_conv slowly.
        epsilon: what |o| starts above its place, so that it has a gradient.
        dilation_bound: D stays below this (tanh around its start). None bounds it where all but
            the central tap lie outside of the input.
        gate_scale: g.
        offset_groups: groups of input channels with dilation and modulation of their own.
        adapt_low, adapt_high: AdaKern for the two parts of the kernel.
        bands: FreqSelect's bands, falling parts of the spectrum; () leaves it out.
        low_band: a weight for the last band too.
        reduction: hidden channels of AdaKern's attention over input channels.
        min_hidden: hidden channels of the attention at least.
    """

    exact_options = {"zero_dilation": True, "gate_scale": 2.0}
    grid: Tensor
    low: "Ratio | None"
    high: "Ratio | None"

    def build(
        self,
        zero_dilation: bool = False,
        epsilon: float = 1e-4,
        dilation_bound: float | None = None,
        gate_scale: float = 1.0,
        offset_groups: int = 1,
        adapt_low: bool = True,
        adapt_high: bool = True,
        bands: Sequence[float] = (2, 4, 8),
        low_band: bool = False,
        reduction: float = 1 / 16,
        min_hidden: int = 16,
    ) -> None:
        at_least(1, offset_groups=offset_groups, min_hidden=min_hidden)
        positive(epsilon=epsilon, gate_scale=gate_scale, reduction=reduction)
        self._check(offset_groups, dilation_bound)
        self.zero_dilation, self.epsilon, self.gate_scale = zero_dilation, epsilon, gate_scale
        self.dilation_bound, self.offset_groups = dilation_bound, offset_groups
        self.select = FreqSelect(self.rank, self.in_channels, bands, low_band) if bands else None
        self.weight = nn.Parameter(self.initial_kernels())
        self.offset_conv = self._generator(offset_groups)
        if not zero_dilation:
            start = (self.dilation[0] - 1) / self.dilation[0]
            nn.init.constant_(self.offset_conv.bias, start + epsilon)  # type: ignore[arg-type]
        self.modulation_conv = self._generator(offset_groups * prod(self.kernel_size))
        hidden = max(int(self.in_channels * reduction), min_hidden)
        ratio = lambda: Ratio(self.in_channels, self.out_channels, hidden)
        self.low, self.high = (ratio() if adapt else None for adapt in (adapt_low, adapt_high))
        places = [
            [(i - (k - 1) / 2) * d for i in range(k)]
            for k, d in zip(self.kernel_size, self.dilation, strict=True)
        ]
        self.register_buffer("grid", torch.tensor(list(product(*places))), persistent=False)

    def _check(self, offset_groups: int, dilation_bound: float | None) -> None:
        if prod(self.kernel_size) == 1:
            raise ValueError("a kernel of one tap has no dilation; give a larger kernel_size")
        if self.in_channels % offset_groups:
            raise ValueError(
                f"offset_groups={offset_groups} does not divide in_channels={self.in_channels}"
            )
        if dilation_bound is not None and dilation_bound <= max(self.dilation):
            raise ValueError(
                f"dilation_bound={dilation_bound} must be above dilation={self.dilation}, "
                "where training starts"
            )

    def _generator(self, channels: int) -> ConvNd:
        """A convolution of the framed input that starts at zero."""
        conv = conv_nd(self.rank, self.in_channels, channels, self.kernel_size, self.stride)
        for parameter in conv.parameters():
            nn.init.zeros_(parameter)
        return conv

    # What is generated ---------------------------------------------------------------------

    def selected(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x' of the same shape."""
        return x if self.select is None else self.select(x, mask)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return self.from_selected(self.selected(x, mask), mask)

    def from_selected(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """From x': `scale` D / d and `modulation`, (N, offset_groups [* taps], *L_out); factors."""
        # Positions need more digits than half precision has: no autocast here.
        with without_autocast(x.device.type):
            framed = self._framed(x.to(self.weight.dtype))
            scale = self._scale(self.offset_conv(framed), max(framed.shape[2:]))
            modulation = self.gate_scale * torch.sigmoid(self.modulation_conv(framed))
        made = {"scale": scale, "modulation": modulation}
        for name, ratio in (("low", self.low), ("high", self.high)):
            if ratio is not None:
                made[f"{name}_channel"], made[f"{name}_filter"] = ratio(x, mask)
        return made

    def _framed(self, x: Tensor) -> Tensor:
        """x padded, or cropped, so that undilated windows lie at the centres of the dilated."""
        x, padding = self.pad(x)
        before = after = (0,) * self.rank
        if padding == "same":
            before, after = same_padding(self.kernel_size, self.dilation)
        elif isinstance(padding, tuple):
            before = after = padding
        widths = []
        for d in reversed(range(self.rank)):
            surplus = (self.dilation[d] - 1) * (self.kernel_size[d] - 1)
            widths += [before[d] - surplus // 2, after[d] - (surplus - surplus // 2)]
        return F.pad(x, widths) if any(widths) else x

    def _scale(self, o: Tensor, longest: int) -> Tensor:
        """D / d, bounded."""
        o = o.float() if o.dtype.itemsize < 4 else o
        scale = F.relu(1 + o) if self.zero_dilation else 1 / self.dilation[0] + o.abs()
        if self.dilation_bound is None:
            return scale.clamp(max=2 * (longest + max(self._extents())))
        room = self.dilation_bound / max(self.dilation) - 1
        return 1 + room * torch.tanh((scale - 1) / room)

    def _extents(self) -> list[int]:
        """Positions beside the first that the static kernel spans, once a dimension."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`size` (N, 1, *L_out), `modulation`, and AdaKern's factors.

        size is the extent D (k - 1) + 1 in input positions, the mean over dimensions and groups.
        """
        made = super().kernels(input, padding_mask)
        scale = made.pop("scale").mean(1, keepdim=True)
        return {"size": scale * (sum(self._extents()) / self.rank) + 1, **made}

    # The convolution -----------------------------------------------------------------------

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.selected(x, mask)
        return self.convolve(x, **self.from_selected(x, mask))

    def convolve(  # type: ignore[override]
        self, x: Tensor, scale: Tensor, modulation: Tensor, **factors: Tensor
    ) -> Tensor:
        ones = (1,) * self.rank
        grid = self.grid.to(scale.dtype).flatten().unflatten(0, (-1, *ones))
        offset = ((scale - 1).unsqueeze(2) * grid).flatten(1, 2)
        modulation = modulation.to(x.dtype)
        x, padding = self.pad(x)
        geometry = (self.stride, padding, self.dilation)
        batch = x.shape[0]
        if not factors or not batch:
            return deform_conv(
                x, offset, self.weight, self.bias, *geometry, self.groups, modulation=modulation
            )
        # A kernel for each sample: samples become groups of one.
        fold = lambda t: t.flatten(0, 1).unsqueeze(0)
        output = deform_conv(
            fold(x),
            fold(offset),
            self.adapted(factors).flatten(0, 1),
            None if self.bias is None else self.bias.repeat(batch),
            *geometry,
            batch * self.groups,
            modulation=fold(modulation),
        )
        return output.squeeze(0).unflatten(0, (batch, -1))

    def adapted(self, factors: dict[str, Tensor]) -> Tensor:
        """AdaKern's kernels (N, C_out, C_in / groups, *K)."""
        mean = self.weight.mean(tuple(range(2, 2 + self.rank)), keepdim=True)
        low = self._scaled(mean, "low", factors)
        return low + self._scaled(self.weight - mean, "high", factors)

    def _scaled(self, part: Tensor, name: str, factors: dict[str, Tensor]) -> Tensor:
        """A part of the kernel times its factors, with a batch dimension."""
        if f"{name}_channel" not in factors:
            return part.unsqueeze(0)
        ones, groups = (1,) * self.rank, self.groups
        channel = factors[f"{name}_channel"].unflatten(1, (groups, 1, -1, *ones))
        filter = factors[f"{name}_filter"].unflatten(1, (groups, -1, 1, *ones))
        return (part.unflatten(0, (groups, -1)) * channel * filter).flatten(1, 2)

    def init_from(self, conv: ConvNd) -> None:
        """The kernel over the modulation's start g / 2; all factors start at 1."""
        if not self.zero_dilation:
            raise ValueError(
                "with zero_dilation=False the dilation starts epsilon above the convolution's; "
                "zero_dilation=True starts exactly there"
            )
        self.weight.copy_(conv.weight * (2 / self.gate_scale))
        for ratio in (self.low, self.high):
            if ratio is not None:
                for head in (ratio.channel_fc, ratio.filter_fc):
                    nn.init.zeros_(head.weight)

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
                "zero_dilation": True,
                "dilation_bound": 4.0,
                "gate_scale": 1.5,
                "offset_groups": 2,
                "adapt_low": False,
                "bands": (2,),
                "low_band": True,
            },
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 3,
                "adapt_low": False,
                "adapt_high": False,
                "bands": (),
            },
        ]


class Ratio(nn.Module):
    """AdaKern's factors from x' (N, C_in, *L): for input channels (N, C_in), output (N, C_out)."""

    def __init__(self, in_channels: int, out_channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = Squeeze(in_channels, hidden, norm=True)
        self.channel_fc = nn.Linear(hidden, in_channels)
        self.filter_fc = nn.Linear(hidden, out_channels)
        for linear in (self.squeeze.fc, self.channel_fc, self.filter_fc):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        for linear in (self.channel_fc, self.filter_fc):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.squeeze(x, mask)
        channel, filter = self.channel_fc(hidden), self.filter_fc(hidden)
        return 2 * torch.sigmoid(channel), 2 * torch.sigmoid(filter)


class FreqSelect(nn.Module):
    """Bands of the input's spectrum, reweighted at each position; starts as the identity.

    (N, C, *L) -> (N, C, *L). With a mask (N, *L), each sample's spectrum is that of its real part.
    """

    def __init__(
        self, rank: int, channels: int, bands: Sequence[float], low_band: bool = False
    ) -> None:
        super().__init__()
        at_least(1, **{f"bands[{i}]": band for i, band in enumerate(bands)})
        self.bands, self.low_band = tuple(bands), low_band
        self.convs = nn.ModuleList(
            conv_nd(rank, channels, 1, 3, padding=1) for _ in range(len(bands) + low_band)
        )
        for parameter in self.convs.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not x.shape[0]:  # an FFT of nothing is an error
            return x
        above = x.float() if x.dtype.itemsize < 4 else x  # half precision has no FFT
        weights, output = self.weights(x).split(1, 1), torch.zeros_like(above)
        for weight, below in zip(weights, self.below(above, mask), strict=False):
            output = output + weight * (above - below)
            above = below
        return (output + (weights[-1] * above if self.low_band else above)).to(x.dtype)

    def below(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """For each band, what x has below its upper limit."""
        return low_pass(x, mask, self.bands, "adaptive_dilation")

    def weights(self, x: Tensor) -> Tensor:
        """The bands' weights (N, B, *L)."""
        return torch.cat([2 * torch.sigmoid(conv(x)) for conv in self.convs], 1)


@register_filter("adaptive_dilation")
def _low_frequencies(x: Tensor, bands: Sequence[float]) -> list[Tensor]:
    kept = [_low_pass(x, band) for band in bands]
    if not has_fft():
        return [filtered(x, inside) for inside in kept]
    over = tuple(range(2, x.dim()))
    spectrum = torch.fft.fftn(x, dim=over)
    return [torch.fft.ifftn(spectrum * box(inside), dim=over).real for inside in kept]


def _low_pass(x: Tensor, band: float) -> list[Tensor]:
    """Which frequencies of x (N, C, *L) belong to its lowest 1 / band, for each dimension."""
    kept = []
    for length in x.shape[2:]:
        # Rounded as published, so that the box may lie half a frequency off the centre.
        # In tensors: an exported graph knows the length no earlier.
        whole = torch.scalar_tensor(length, dtype=torch.float64, device=x.device)
        start, stop = ((whole / 2 + side * whole / (2 * band)).round() for side in (-1, 1))
        from_centre = (torch.arange(length, device=x.device) + length // 2) % whole
        kept.append((from_centre >= start) & (from_centre < stop))
    return kept


def box(kept: Sequence[Tensor]) -> Tensor:
    """The frequencies (*L) that all dimensions keep."""
    whole = kept[0]
    for inside in kept[1:]:
        whole = whole.unsqueeze(-1) & inside
    return whole
