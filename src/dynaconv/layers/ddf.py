"""Decoupled dynamic filters: one for each position times one for each channel (Zhou, CVPR 2021)."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv_per_position, conv_per_sample
from dynaconv.layers.base import (
    PADDING_MODES,
    ConvNd,
    DynamicConv,
    at_least,
    conv_nd,
    positive,
    without_autocast,
)
from dynaconv.layers.centres import between_centres
from dynaconv.layers.interleave import interleave
from dynaconv.layers.upsampler import Upsampler
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family
from dynaconv.shapes import IntOrTuple, Padding, same_padding

EPSILON = 1e-10


class FilterNorm(nn.Module):
    """std * (w - mean(w)) / (deviation(w) + 1e-10) + mean, over the taps of each filter.

    (N, filters, taps, ...) to the same. std and mean, (filters, taps), are learned if asked for;
    if not, std is `scale` and mean 0. In float32 at least.
    """

    def __init__(self, shape: tuple[int, int], scale: float, std: bool, mean: bool) -> None:
        super().__init__()
        self.scale = scale
        self.std = nn.Parameter(scale * torch.randn(shape)) if std else None
        self.mean = nn.Parameter(torch.zeros(shape)) if mean else None

    def forward(self, taps: Tensor) -> Tensor:
        w = taps.to(torch.promote_types(taps.dtype, torch.float32))
        w = w - w.mean(2, keepdim=True)
        deviation = torch.linalg.vector_norm(w, dim=2, keepdim=True) / (w.shape[2] - 1) ** 0.5
        w = w / (deviation + EPSILON)
        w = w * (self.scale if self.std is None else _spread(self.std, w.dim() - 3))
        return (w if self.mean is None else w + _spread(self.mean, w.dim() - 3)).to(taps.dtype)


class Branches(nn.Module):
    """The two filters of one DDF: spatial (N, heads, *K, *L_out) and channel (N, C_out, *K).

    FilterNorm enlarges small differences, those of half precision too, so there is no autocast.
    """

    def __init__(
        self,
        layer: "_Decoupled",
        stride: IntOrTuple,
        gain: float,
        se_ratio: float,
        affine: bool,
        gather: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gather = gather
        self.kernel_size, self.shape = layer.kernel_size, (layer.heads, prod(layer.kernel_size))
        channels, (heads, taps) = layer.in_channels, self.shape
        hidden, scale = max(int(channels * se_ratio), 1), gain / taps**0.5
        self.spatial = conv_nd(layer.rank, channels, heads * taps, 1, stride)
        self.spatial_norm = FilterNorm(self.shape, scale, affine, affine)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, layer.out_channels * taps)
        self.channel_norm = FilterNorm((layer.out_channels, taps), scale, True, affine)

    def forward(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """x, laid so that `spatial` reads it at the kernel's places; pooled (N, C_in)."""
        dtype = self.squeeze.weight.dtype
        with without_autocast(x.device.type):
            x = x.to(dtype) if self.gather is None else self.gather(x.to(dtype))
            spatial = self.spatial_norm(self.spatial(x).unflatten(1, self.shape))
            channel = self.excite(F.relu(self.squeeze(pooled.to(dtype))))
            channel = self.channel_norm(channel.unflatten(1, (-1, self.shape[1])))
        return spatial.unflatten(2, self.kernel_size), channel.unflatten(2, self.kernel_size)


class _Decoupled(DynamicConv):
    """What DDF and DDF-Up share: options, the projection, the two filters' meeting."""

    def prepare_options(self, combine: str, heads: int | None, se_ratio: float) -> None:
        """Takes the options that both have; ValueError where they do not fit."""
        self.combine, self.heads = combine, self.groups if heads is None else heads
        at_least(1, heads=self.heads)
        positive(se_ratio=se_ratio)
        if combine not in ("mul", "add"):
            raise ValueError(f"combine={combine!r}; choose 'mul' or 'add'")
        if self.out_channels % self.heads:
            raise ValueError(f"heads={self.heads} does not divide {self.out_channels} out_channels")
        if prod(self.kernel_size) == 1:
            raise ValueError(
                "FilterNorm divides by the deviation of a kernel's taps, and one tap has none; "
                "give a larger kernel_size"
            )
        self.project = self.projection()

    def values(self, x: Tensor) -> Tensor:
        """What the filters are laid over, (N, C_out, *L)."""
        return x if self.project is None else self.project(x)

    def combined(
        self,
        x: Tensor,
        spatial: Tensor,
        channel: Tensor,
        stride: IntOrTuple,
        padding: Padding,
        dilation: IntOrTuple,
    ) -> Tensor:
        """y[c, p] = sum_k (spatial[head(c), k, p] * or + channel[c, k]) x[c, p + k]."""
        geometry = (stride, padding, dilation)
        if self.combine == "add":
            everywhere = conv_per_sample(x, channel.unsqueeze(2), None, *geometry, x.shape[1])
            return conv_per_position(x, spatial, *geometry) + everywhere
        channel = _spread(channel.unflatten(1, (self.heads, -1)), self.rank)
        return conv_per_position(x, (spatial.unsqueeze(2) * channel).flatten(1, 2), *geometry)


@register_family("ddf", primitive="conv_per_position", paper="Zhou et al., CVPR 2021")
class DDFConv(_Decoupled):
    """A kernel made of one filter for each position and one for each channel.

        s[p] = norm(spatial(x[p])),    f[c] = norm(excite(relu(squeeze(mean(x))))[c])
        y[c, p] = b[c] + sum_k s[k, p] f[c, k] x[c, p + k]        (combine="add": s + f)

    norm is FilterNorm over the taps: std * (w - mean(w)) / deviation(w) + mean. As in the
    published code std is learned for f, is gain(nonlinearity) / sqrt(taps) for s, and mean is 0;
    the paper learns std and mean of both: `affine`. Published for as many output as input
    channels, odd kernels with half padding and sizes that the stride divides; here x[p] is at the
    window's centre for any, and a 1x1 convolution of x comes first where the channel numbers
    differ.

    Args:
        combine: "mul" or "add".
        heads: number of spatial filters a position, each for as many neighbouring channels; None
            takes `groups`.
        se_ratio: hidden over input channels of the channel branch.
        nonlinearity: what follows the layer; its gain is in the filters' deviation.
        affine: std and mean of both norms are learned; mean starts at 0.
    """

    exact_options = {"affine": True}

    def build(
        self,
        combine: str = "mul",
        heads: int | None = None,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        affine: bool = False,
    ) -> None:
        self.prepare_options(combine, heads, se_ratio)
        self.affine = affine
        gain = nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
        self.branches = Branches(self, self.stride, gain, se_ratio, affine)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`weight` s (N, heads, *K, *L_out) and `channel_filter` f (N, C_out, *K)."""
        spatial, channel = self.branches(between_centres(self, x), masked_mean(x, mask))
        return {"weight": spatial, "channel_filter": channel}

    def convolve(self, x: Tensor, weight: Tensor, channel_filter: Tensor) -> Tensor:  # type: ignore[override]
        x, padding = self.pad(self.values(x))
        geometry = (self.stride, padding, self.dilation)
        return self.add_bias(self.combined(x, weight, channel_filter, *geometry))

    def init_from(self, conv: ConvNd) -> None:
        """The learned means become a depthwise kernel and what leaves it alone; std starts at 0."""
        if not self.affine:
            raise ValueError(
                "filters out of FilterNorm have mean 0, trained kernels have not; give affine=True"
            )
        self.require_depthwise()
        spatial, channel = self.branches.spatial_norm, self.branches.channel_norm
        for norm in (spatial, channel):
            nn.init.zeros_(norm.std)  # type: ignore[arg-type]
        nn.init.constant_(spatial.mean, 1.0 if self.combine == "mul" else 0.0)  # type: ignore[arg-type]
        channel.mean.copy_(conv.weight.flatten(1))  # type: ignore[union-attr]

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        plain = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "se_ratio": 1.5}
        return [
            plain | {"padding": 1},
            plain | {"out_channels": 6, "stride": 2, "padding": 2, "heads": 3, "bias": False},
            plain | {"kernel_size": 2, "groups": 2, "combine": "add"},
            plain | {"combine": "add", "affine": True, "nonlinearity": "linear"},
        ]


@register_family("ddf_up", primitive="conv_per_position", paper="Zhou et al., CVPR 2021")
class DDFUpsample(_Decoupled, Upsampler):
    """Enlarges by DDF: each place i within an output cell has filters of its own.

        s_i[p] = norm(spatial_i(gather_i(x)[p]))
        f_i[c] = norm(excite_i(relu(squeeze_i(mean(x))))[c])
        y[c, p * stride + i] = b[c] + sum_k s_i[k, p] f_i[c, k] x[c, p + k]    (or s_i + f_i)

    DDF-Up; norm as in DDFConv. gather is a depthwise convolution. Kernels are centred on x[p] and
    read the small input. The published code may make s_i from another input, without gather (joint
    upsampling); here it is the same input. A 1x1 convolution of x comes first where the channel
    numbers differ.

    Args:
        combine, heads, se_ratio, nonlinearity, affine: as in DDFConv.
        gather_size: kernel_size of gather, odd; 1 leaves it out.
    """

    window = 3

    def build(
        self,
        combine: str = "mul",
        heads: int | None = None,
        se_ratio: float = 0.2,
        nonlinearity: str = "linear",
        gather_size: int = 3,
        affine: bool = False,
    ) -> None:
        self.prepare_options(combine, heads, se_ratio)
        at_least(1, gather_size=gather_size)
        if gather_size % 2 == 0:
            raise ValueError(f"gather_size={gather_size} has no centre; give an odd one")
        gain = nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
        around = {"padding": "same", "padding_mode": self.padding_mode, "groups": self.in_channels}
        shape = (self.in_channels, self.in_channels, gather_size)
        self.branches = nn.ModuleList()
        for _ in range(prod(self.stride)):
            gather = conv_nd(self.rank, *shape, **around) if gather_size > 1 else None
            self.branches.append(Branches(self, 1, gain, se_ratio, affine, gather))

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The filters of each place: (N, places, heads, *K, *L) and (N, places, C_out, *K)."""
        pooled = masked_mean(x, mask)
        spatial, channel = zip(*(branch(x, pooled) for branch in self.branches), strict=True)
        return {"weight": torch.stack(spatial, 1), "channel_filter": torch.stack(channel, 1)}

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`weight` s (N, heads, *K, *L_out) and `channel_filter` f (N, places, C_out, *K)."""
        made = super().kernels(input, padding_mask)
        parts = made["weight"].flatten(2, 2 + self.rank).transpose(1, 2)
        weight = interleave(parts.flatten(1, 2), self.stride)
        return made | {"weight": weight.unflatten(1, (self.heads, *self.kernel_size))}

    def convolve(self, x: Tensor, weight: Tensor, channel_filter: Tensor) -> Tensor:  # type: ignore[override]
        before, after = same_padding(self.kernel_size, self.dilation)
        widths = [w for pair in zip(reversed(before), reversed(after), strict=True) for w in pair]
        x = F.pad(self.values(x), widths, mode=PADDING_MODES[self.padding_mode])
        parts = [
            self.combined(x, s, f, 1, 0, 1)
            for s, f in zip(weight.unbind(1), channel_filter.unbind(1), strict=True)
        ]
        return self.add_bias(interleave(torch.stack(parts, 2).flatten(1, 2), self.stride))

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        plain = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "se_ratio": 1.5}
        return [
            plain,
            plain
            | {"out_channels": 6, "kernel_size": 2, "heads": 3, "gather_size": 1, "bias": False},
            plain | {"stride": 3, "combine": "add", "se_ratio": 4, "affine": True},
        ]


def _spread(x: Tensor, dims: int) -> Tensor:
    """x with `dims` dimensions of size 1 behind it."""
    return x.reshape(*x.shape, *(1,) * dims)
