"""DCNv3 (Wang, CVPR 2023) and DCNv4 (Xiong, CVPR 2024): samples weighted by the features."""

from functools import partial
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import deform_conv
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd, positive, without_autocast
from dynaconv.layers.sampling import around_centres, kernel_grid, zero_
from dynaconv.registry import register_family
from dynaconv.shapes import IntOrTuple, ntuple


class _DCN(DynamicConv):
    """What both share: values sampled at offsets, weighted, between two 1x1 convolutions."""

    dw_conv: ConvNd | None
    value_proj: ConvNd | None
    output_proj: ConvNd | None
    center_scale: ConvNd | None
    grid: Tensor

    def build(
        self,
        offset_groups: int | None = None,
        dw_kernel_size: IntOrTuple | None = None,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        center_feature_scale: bool = False,
        pointwise: bool = True,
    ) -> None:
        positive(offset_scale=offset_scale)
        self.offset_groups = self._resolve_offset_groups(offset_groups)
        self.offset_scale, self.remove_center = offset_scale, remove_center
        self._check_center()
        channels, conv = self.in_channels, partial(conv_nd, self.rank, self.in_channels)
        size = (
            None if dw_kernel_size is None else ntuple(dw_kernel_size, self.rank, "dw_kernel_size")
        )
        self.dw_size = size or (1,) * self.rank
        self.dw_conv = conv(channels, size, self.stride, groups=channels) if size else None
        taps = self.offset_groups * (prod(self.kernel_size) - remove_center)
        self.offset, self.modulation = conv(taps * self.rank, 1), conv(taps, 1)
        self.center_scale = conv(self.offset_groups, 1) if center_feature_scale else None
        zero_(self.offset, self.modulation, self.center_scale)
        self._build_projections(pointwise)
        # Where the taps lie from the centre, in the offset's layout.
        center = [d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        grid = (kernel_grid(self) - torch.tensor(center)).float()
        self.register_buffer("grid", grid.reshape(-1, *(1,) * self.rank), persistent=False)

    def _resolve_offset_groups(self, offset_groups: int | None) -> int:
        if offset_groups is None:
            at_most_four = max(gcd(self.in_channels, groups) for groups in (1, 2, 3, 4))
            return self.groups if self.groups > 1 else at_most_four
        at_least(1, offset_groups=offset_groups)
        if self.in_channels % offset_groups:
            raise ValueError(
                f"offset_groups={offset_groups} does not divide in_channels={self.in_channels}"
            )
        return offset_groups

    def _check_center(self) -> None:
        taps = prod(self.kernel_size)
        if self.remove_center and (taps == 1 or taps % 2 == 0):
            raise ValueError(
                "remove_center=True needs odd sizes and more than one tap, not kernel_size="
                f"{self.kernel_size}"
            )

    def _build_projections(self, pointwise: bool) -> None:
        """The 1x1 convolutions before and after; the second one's bias is the layer's own."""
        if not pointwise and self.in_channels != self.out_channels:
            raise ValueError(
                "pointwise=False leaves out what changes the number of channels, so in_channels="
                f"{self.in_channels} must be out_channels={self.out_channels}"
            )
        self.value_proj = self.output_proj = None
        if pointwise:
            conv = partial(conv_nd, self.rank, self.in_channels, kernel_size=1, groups=self.groups)
            self.value_proj = conv(self.in_channels)
            self.output_proj = conv(self.out_channels, bias=False)
            nn.init.xavier_uniform_(self.value_proj.weight)
            nn.init.xavier_uniform_(self.output_proj.weight)
            nn.init.zeros_(self.value_proj.bias)  # type: ignore[arg-type]
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def normalise(self, logits: Tensor) -> Tensor:
        """The modulation from logits (N, offset_groups, taps, *L_out)."""
        raise NotImplementedError

    # The dynamic quantities ----------------------------------------------------------------

    def query(self, x: Tensor) -> Tensor:
        """The features (N, C_in, *L_out) that offset and modulation follow."""
        if self.dw_conv is None:
            return self.at_center(x)
        return self.dw_conv(around_centres(self, x, self.dw_size))

    def at_center(self, x: Tensor) -> Tensor:
        """x at the windows' centres, zero where one lies outside: (N, C, *L_out)."""
        steps = (slice(None, None, s) for s in self.stride)
        return around_centres(self, x, (1,) * self.rank)[(slice(None), slice(None), *steps)]

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        # Positions need more digits than half precision has: no autocast here.
        with without_autocast(x.device.type):
            return self.from_query(self.query(x.to(self.offset.weight.dtype)))

    def from_query(self, query: Tensor) -> dict[str, Tensor]:
        """Offset and modulation of every tap; those of a removed centre are 0."""
        split = lambda made: made.unflatten(1, (self.offset_groups, -1))
        offset = split(self.offset(query)).unflatten(2, (-1, self.rank))
        modulation = self.normalise(split(self.modulation(query)))
        if self.remove_center:
            offset, modulation = _with_center(offset), _with_center(modulation)
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32)).flatten(2, 3)
        if self.offset_scale != 1:
            offset = self.offset_scale * offset + (self.offset_scale - 1) * self.grid
        return {"offset": offset.flatten(1, 2), "modulation": modulation.flatten(1, 2)}

    # The convolution -----------------------------------------------------------------------

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        dynamic = self.generate(x, mask)
        values = x if self.value_proj is None else self.value_proj(x)
        if mask is not None:
            values = values.masked_fill(~mask.unsqueeze(1), 0)
        sampled = self.convolve(values, **dynamic)
        return self.add_bias(sampled if self.output_proj is None else self.output_proj(sampled))

    def convolve(  # type: ignore[override]
        self,
        x: Tensor,
        offset: Tensor,
        modulation: Tensor,
        center_scale: Tensor | None = None,
    ) -> Tensor:
        values, padding = self.pad(x)
        ones = values.new_ones(self.in_channels, 1, *self.kernel_size)
        geometry = (self.stride, padding, self.dilation, self.in_channels)
        modulation = modulation.to(values.dtype)
        sampled = deform_conv(values, offset, ones, None, *geometry, modulation=modulation)
        if self.center_scale is None:
            return sampled
        if center_scale is None:  # DCNv4's follows what was sampled
            center_scale = torch.sigmoid(self.center_scale(sampled))
        share = center_scale.to(sampled.dtype)
        share = share.repeat_interleave(self.in_channels // self.offset_groups, 1)
        return sampled * (1 - share) + self.at_center(x) * share

    # An exact start ------------------------------------------------------------------------

    def init_from(self, conv: ConvNd) -> None:
        """A kernel of one tap goes to the output projection, the taps of others to modulation."""
        if self.offset_scale != 1 or self.remove_center or self.center_scale is not None:
            raise ValueError(
                f"{self.family} starts as a static convolution only with offset_scale=1 and "
                "without remove_center and center_feature_scale, which move, drop or blend taps"
            )
        if self.value_proj is not None:
            nn.init.dirac_(self.value_proj.weight, self.groups)
        if prod(self.kernel_size) == 1 and self.output_proj is not None:
            self.output_proj.weight.copy_(conv.weight)
            self.take(torch.ones(self.offset_groups))
            return
        if not self.groups == self.in_channels == self.out_channels == self.offset_groups:
            raise ValueError(
                f"{self.family} weights the same taps for all channels of a group, so it can start "
                "only as a depthwise convolution with a group for each channel (groups = "
                "offset_groups = in_channels = out_channels) or as one of kernel_size=1, not "
                f"groups={self.groups}, offset_groups={self.offset_groups}, {self.in_channels} to "
                f"{self.out_channels} channels, kernel_size={self.kernel_size}"
            )
        if self.output_proj is not None:
            nn.init.dirac_(self.output_proj.weight, self.groups)
        self.take(conv.weight.flatten())

    def take(self, taps: Tensor) -> None:
        """Makes (offset_groups * taps,) the modulation everywhere."""
        raise NotImplementedError

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        same = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            same | {"stride": 2, "groups": 2, "offset_scale": 1.5, "center_feature_scale": True},
            same | {"padding": 2, "bias": False, "offset_groups": 2, "remove_center": True},
        ]


def _with_center(taps: Tensor) -> Tensor:
    """(N, G, K - 1, ...) -> (N, G, K, ...) with zeros for the tap in the middle."""
    before, after = taps.tensor_split(2, 2)
    return torch.cat([before, torch.zeros_like(before[:, :, :1]), after], 2)


@register_family("dcnv3", primitive="deform_conv", paper="Wang et al., CVPR 2023")
class DCNv3Conv(_DCN):
    """Each group of channels averages its samples; where and with which weights, features say.

        q = gelu(norm(dw(x))),    m[g, p] = softmax_k(modulation(q)[g, p]),    v = value_proj(x)
        z[c, p] = sum_k m[g, k, p] v[c, p + s (k + offset(q)[g, k, p])],    y = output_proj(z) + b

    g is the group of channel c, k the tap's distance from the centre, s the offset_scale; dw is a
    depthwise convolution around the window's centre, norm a layer norm over channels, the others
    are 1x1 convolutions. Offset and modulation start at 0: training starts from average pooling
    between two projections. Published for half padding, stride 1 and as many output as input
    channels (InternImage; its taps go column by column, offsets x first; here row by row, the
    first dimension first, as in deform_conv). `from_conv` takes kernels of one tap: weights from a
    softmax are positive and sum to 1. InternImage trains `offset` and `center_scale` ten times
    slower (`dynaconv.parameter_groups`).

    Args:
        offset_groups: groups of channels with taps of their own; None takes `groups`, or with
            groups=1 at most 4 (the published default). `groups` is that of the projections.
        dw_kernel_size: size of dw; None takes kernel_size.
        offset_scale: s; the regular taps spread by it, too.
        remove_center: no tap at the centre.
        center_feature_scale: z = (1 - a) z + a v[c, p] with a = sigmoid(center_scale(q))[g, p].
    """

    lr_factors = {"offset": 0.1, "center_scale": 0.1}

    def build(  # type: ignore[override]
        self,
        offset_groups: int | None = None,
        dw_kernel_size: IntOrTuple | None = None,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        center_feature_scale: bool = False,
    ) -> None:
        size = self.kernel_size if dw_kernel_size is None else dw_kernel_size
        super().build(offset_groups, size, offset_scale, remove_center, center_feature_scale)
        self.norm = nn.LayerNorm(self.in_channels, eps=1e-6)

    def query(self, x: Tensor) -> Tensor:
        features = super().query(x).movedim(1, -1)
        return F.gelu(self.norm(features)).movedim(-1, 1)

    def normalise(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, 2)

    def from_query(self, query: Tensor) -> dict[str, Tensor]:
        made = super().from_query(query)
        if self.center_scale is not None:
            made["center_scale"] = torch.sigmoid(self.center_scale(query))
        return made

    def take(self, taps: Tensor) -> None:
        if prod(self.kernel_size) > 1:
            raise ValueError(
                "dcnv3's taps come out of a softmax, positive and with sum 1, trained ones are not "
                "so; dcnv4 can start as this convolution"
            )


@register_family("dcnv4", primitive="deform_conv", paper="Xiong et al., CVPR 2024")
class DCNv4Conv(_DCN):
    """DCNv3 without the softmax: the weights of the samples are free.

        q = dw(x),    m = modulation(q),    v = value_proj(x)
        z[c, p] = sum_k m[g, k, p] v[c, p + s (k + offset(q)[g, k, p])],    y = output_proj(z) + b

    g is the group of channel c, k the tap's distance from the centre, s the offset_scale. q is x at
    the window's centre unless dw_kernel_size asks for a depthwise convolution. The modulation
    starts at 1 / taps: average pooling between two projections, as in DCNv3. Published it starts at
    0, so that y = b at first, which suits a branch beside a shortcut; before a batch norm and a
    ReLU no gradient would pass (`zero_start`). `from_conv` starts from a depthwise kernel.
    Published in CUDA only, for 3x3, groups of a multiple of 16 channels and as many output as input
    channels (its taps go column by column, offsets x first; here row by row, the first dimension
    first, as in deform_conv). FlashInternImage trains what makes them ten times slower
    (`dynaconv.parameter_groups`).

    Args:
        offset_groups: groups of channels with taps of their own; None takes `groups`, or with
            groups=1 at most 4 (the published default). `groups` is that of the projections.
        dw_kernel_size: size of dw; None leaves it out.
        offset_scale: s; the regular taps spread by it, too.
        remove_center: no tap at the centre.
        center_feature_scale: z = (1 - a) z + a v[c, p] with a = sigmoid(center_scale(z))[g, p]
            (the code's; in DCNv3 a follows q).
        pointwise: whether there are value_proj and output_proj.
        zero_start: the modulation starts at 0.
    """

    lr_factors = {"offset": 0.1, "modulation": 0.1, "center_scale": 0.1}

    def build(
        self,
        offset_groups: int | None = None,
        dw_kernel_size: IntOrTuple | None = None,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        center_feature_scale: bool = False,
        pointwise: bool = True,
        zero_start: bool = False,
    ) -> None:
        sampling = (offset_groups, dw_kernel_size, offset_scale)
        super().build(*sampling, remove_center, center_feature_scale, pointwise)
        if not zero_start:
            share = self.offset_groups / self.modulation.out_channels
            nn.init.constant_(self.modulation.bias, share)  # type: ignore[arg-type]

    def normalise(self, logits: Tensor) -> Tensor:
        return logits

    def take(self, taps: Tensor) -> None:
        self.modulation.bias.copy_(taps)  # type: ignore[union-attr]

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        depthwise = {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 4}
        return [
            *super().samples(rank),
            depthwise | {"dw_kernel_size": 3, "pointwise": False},
        ]
