"""DySample: up-sampling as sampling at points that follow the content (Liu, ICCV 2023)."""

from math import gcd, prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional._checks import autocast
from dynaconv.layers.base import conv_nd, without_autocast
from dynaconv.layers.interleave import interleave
from dynaconv.layers.upsampler import Upsampler
from dynaconv.masking import replicate_edges
from dynaconv.registry import register_family

STYLES = ("lp", "pl")
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
OFFSET_GROUPS = 4


@register_family("dysample", primitive="grid_sample", paper="Liu et al., ICCV 2023")
class DySample(Upsampler):
    """Up-sampling by one point of the input for each output position, moved by the features.

        o = scope * offset(x),    scope = 1/4, or sigmoid(scope(x)) / 2 with `dyscope`
        y[c, q] = x[c]((q + 1/2) / stride - 1/2 + o[group(c), q]) + b

    x(t) is linear between positions and clamped at the border. offset is a 1x1 convolution that
    starts near zero, so training starts near linear interpolation; `from_upsample` starts exactly
    there. Style "lp" makes the offsets of all sub-positions from the position's features, "pl"
    shuffles the features to the output's positions first. Published without b, which starts at 0,
    and for as many output as input channels; where the numbers differ, a 1x1 convolution of x
    comes before the sampling. The offset's channels are the published ones, the last dimension's
    first, so published weights fit.

    Args:
        kernel_size: 1, as one point is read.
        groups: of the 1x1 convolution that changes the number of channels.
        style: "lp" or "pl"; "pl" needs in_channels divisible by prod(stride).
        offset_groups: groups of output channels with points of their own; by default 4, as
            published, or what 4 has in common with the channels.
        dyscope: a learned range of the offsets.
    """

    window = 1

    def build(
        self, style: str = "lp", offset_groups: int | None = None, dyscope: bool = False
    ) -> None:
        self.style = style
        if offset_groups is None:
            offset_groups = gcd(OFFSET_GROUPS, self.out_channels)
        self.offset_groups = offset_groups
        self._check()
        count = prod(self.stride)
        self.project = self.projection()
        inputs, outputs = self.in_channels, self.rank * self.offset_groups
        if style == "lp":
            outputs *= count
        else:
            inputs //= count
        self.offset = conv_nd(self.rank, inputs, outputs, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        self.scope = conv_nd(self.rank, inputs, outputs, 1, bias=False) if dyscope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r}; choose from {STYLES}")
        if max(self.kernel_size) > 1:
            raise ValueError(f"kernel_size={self.kernel_size}: one point is read; leave it at 1")
        if self.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={self.padding_mode!r}: points are clamped at the border, nothing "
                "is padded; leave it out"
            )
        if self.offset_groups < 1 or self.out_channels % self.offset_groups:
            raise ValueError(
                f"offset_groups={self.offset_groups} does not divide "
                f"out_channels={self.out_channels}"
            )
        if self.style == "pl" and self.in_channels % prod(self.stride):
            raise ValueError(
                f"style='pl' shuffles channels into {prod(self.stride)} sub-positions, which does "
                f"not divide in_channels={self.in_channels}; take style='lp'"
            )

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`offset` (N, offset_groups * D, *L_out) in input positions, first dimension first."""
        # Positions need more digits than half precision has: no autocast here.
        with without_autocast(x.device.type):
            features = x.to(self.offset.weight.dtype)
            if self.style == "pl":
                features = interleave(features, self.stride)
            scope = 0.25 if self.scope is None else torch.sigmoid(self.scope(features)) / 2
            offset = scope * self.offset(features)
        if self.style == "lp":
            offset = interleave(offset, self.stride)
        pairs = offset.unflatten(1, (self.rank, self.offset_groups)).flip(1)
        return {"offset": pairs.transpose(1, 2).flatten(1, 2)}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        offset = self.generate(x, mask)["offset"]
        x = x if self.project is None else self.project(x)
        (x,) = autocast(x)  # type: ignore[assignment]
        # Beyond its border a sample reads what lies there: its last positions.
        x = x if mask is None else replicate_edges(x, mask)
        return self.add_bias(self._sample(x, offset))

    def _sample(self, x: Tensor, offset: Tensor) -> Tensor:
        """x at each output position's place plus `offset`."""
        device, dtype = x.device, torch.promote_types(offset.dtype, torch.float32)
        shifts = offset.to(dtype).unflatten(1, (self.offset_groups, self.rank))
        places = []
        for d in reversed(range(self.rank)):
            length, s = x.shape[2 + d], self.stride[d]
            centres = (torch.arange(length * s, device=device, dtype=dtype) + 0.5) / s
            along = [-1 if i == d else 1 for i in range(self.rank)]
            places.append((shifts[:, :, d] + centres.reshape(along)) * (2 / length) - 1)
        grid = torch.stack(places, -1).flatten(0, 1)
        seen = x.to(dtype).unflatten(1, (self.offset_groups, -1)).flatten(0, 1)
        if self.rank == 1:  # as a plane of one row
            seen, grid = seen.unsqueeze(2), F.pad(grid, (0, 1)).unsqueeze(1)
        output = F.grid_sample(seen, grid, "bilinear", "border", align_corners=False)
        output = output.squeeze(2) if self.rank == 1 else output
        return output.unflatten(0, (-1, self.offset_groups)).flatten(1, 2).to(x.dtype)

    @classmethod
    def from_upsample(cls, upsample: nn.Upsample, channels: int, **options: Any) -> Self:
        """A layer that computes what a linear `upsample` computes, until it is trained.

        Raises:
            ValueError: nn.Upsample in another mode, by a size, or by a fraction.
        """
        given = upsample.scale_factor
        factors = given if isinstance(given, tuple) else (given,) * cls.rank
        whole = all(f is not None and float(f).is_integer() for f in factors)
        if upsample.mode != MODES[cls.rank] or upsample.align_corners or not whole:
            raise ValueError(
                f"{cls.__name__} starts as nn.Upsample(scale_factor=a whole number, "
                f"mode={MODES[cls.rank]!r}), not as {upsample}"
            )
        stride = tuple(int(f) for f in factors)  # type: ignore[arg-type]
        layer = cls(channels, channels, stride=stride, **options)
        nn.init.zeros_(layer.offset.weight)
        return layer.train(upsample.training)

    @classmethod
    def limits(cls, arguments: dict[str, Any]) -> dict[str, str]:
        missing = "torch.nn.functional.grid_sample has no forward mode"
        return super().limits(arguments) | {"jvp": missing}

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 4, "kernel_size": 1},
            {
                "in_channels": 12 * 2 ** (rank - 1),
                "out_channels": 12 * 2 ** (rank - 1),
                "kernel_size": 1,
                "stride": (3, *(2,) * (rank - 1)),
                "bias": False,
                "style": "pl",
                "offset_groups": 2,
                "dyscope": True,
            },
            {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "groups": 2, "dyscope": True},
        ]
