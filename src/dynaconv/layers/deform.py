"""Deformable convolution, v1 (Dai, ICCV 2017) and modulated v2 (Zhu, CVPR 2019)."""

from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import (
    ConvNd,
    DynamicConv,
    at_least,
    causal,
    conv_nd,
    positive,
    without_autocast,
)
from dynaconv.layers.sampling import zero_
from dynaconv.registry import register_family


class _Deform(DynamicConv):
    """Offsets (and modulation) from a convolution of the input, zero at the start."""

    modulated: bool
    causality = "window"
    lr_factors = {"offset_conv": 0.1}

    def build(self, offset_groups: int = 1, offset_bound: float | None = None) -> None:
        at_least(1, offset_groups=offset_groups)
        if self.sampled_channels % offset_groups:
            raise ValueError(
                f"offset_groups={offset_groups} does not divide the {self.sampled_channels} "
                "channels that are sampled"
            )
        if offset_bound is not None:
            positive(offset_bound=offset_bound)
        elif self.causal:
            raise ValueError("causal=True needs offset_bound: how far back a tap may reach")
        self.offset_groups, self.offset_bound = offset_groups, offset_bound
        self.weight = nn.Parameter(self.initial_kernels())
        taps = offset_groups * prod(self.kernel_size)
        self.offset_channels = taps * self.rank
        self.offset_conv = conv_nd(
            self.rank,
            self.in_channels,
            self.offset_channels + (taps if self.modulated else 0),
            self.kernel_size,
            **self.generator_geometry(),
        )
        zero_(self.offset_conv)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        # Positions need more digits than half precision has: no autocast here.
        with without_autocast(x.device.type):
            seen = x[..., self.reach :] if self.causal else x
            made = self.offset_conv(seen.to(self.offset_conv.weight.dtype))
        offset = made[:, : self.offset_channels]
        if self.offset_bound is not None:
            offset = self.offset_bound * torch.tanh(offset / self.offset_bound)
        if self.causal:
            offset = self._not_ahead(offset)
        if not self.modulated:
            return {"offset": offset}
        return {"offset": offset, "modulation": self.modulate(made[:, self.offset_channels :])}

    def modulate(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def convolve(  # type: ignore[override]
        self, x: Tensor, offset: Tensor, modulation: Tensor | None = None
    ) -> Tensor:
        if modulation is not None:
            modulation = modulation.to(x.dtype)
        if not self.causal:
            return self.convolve_deformed(x, offset, self.weight, self.bias, modulation)
        before = (self.reach, 0)  # windows that only serve to be reached from later ones
        offset = F.pad(offset, before)
        modulation = None if modulation is None else F.pad(modulation, before)
        output = self.convolve_deformed(x, offset, self.weight, self.bias, modulation)
        return output[..., self.reach :]

    @property
    def reach(self) -> int:
        """How many positions a causal kernel's taps move back at most."""
        return ceil(self.offset_bound or 0)

    @property
    def past(self) -> int:
        return self._span + self.reach

    @property
    def _span(self) -> int:
        """How far back the first tap is at rest; torch.compile reads no property of super()."""
        return self.dilation[0] * (self.kernel_size[0] - 1)

    def _not_ahead(self, offset: Tensor) -> Tensor:
        """Offsets (N, offset_groups * K, T) that leave each tap at its window's end at most."""
        room = self._span - self.dilation[0] * torch.arange(self.kernel_size[0])
        room = room.repeat(self.offset_groups).unsqueeze(1)
        return offset.minimum(room.to(offset))

    def init_from(self, conv: ConvNd) -> None:
        self.weight.copy_(conv.weight)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "groups": 2,
                "bias": False,
                "offset_groups": 2,
                "offset_bound": 2.0,
            },
            *causal(
                rank,
                {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "offset_bound": 1.5},
            ),
        ]


@register_family("deform", primitive="deform_conv", paper="Dai et al., ICCV 2017", transposed=True)
class DeformConv(_Deform):
    """Each tap samples the input at an offset that follows the features there.

        offset = offset_conv(x),    y[p] = b + sum_k W[k] x(p + k + offset[k, p])

    offset_conv has the layer's own geometry and starts at zero, so training starts from a plain
    convolution; the paper trains it ten times slower (`dynaconv.parameter_groups`).

    Args:
        offset_groups: groups of input channels with offsets of their own.
        offset_bound: no offset beyond this many positions (tanh); None leaves them free.
    """

    modulated = False


@register_family(
    "deform_v2", primitive="deform_conv", paper="Zhu et al., CVPR 2019", transposed=True
)
class ModulatedDeformConv(_Deform):
    """Each tap samples at an offset and is weighted by a modulation, both from the features.

        offset, m = split(offset_conv(x))
        y[p] = b + sum_k W[k] g sigmoid(m[k, p]) x(p + k + offset[k, p])

    As published g = 1, so that the modulation starts at 1/2; `from_conv` takes g = 2, with which
    it starts at 1. Offsets start at zero and train ten times slower (`dynaconv.parameter_groups`).

    Args:
        offset_groups: groups of input channels with offsets and modulation of their own.
        offset_bound: no offset beyond this many positions (tanh); None leaves them free.
        gate_scale: g.
    """

    modulated = True
    exact_options = {"gate_scale": 2.0}

    def build(
        self,
        offset_groups: int = 1,
        offset_bound: float | None = None,
        gate_scale: float = 1.0,
    ) -> None:
        positive(gate_scale=gate_scale)
        self.gate_scale = gate_scale
        super().build(offset_groups, offset_bound)

    def modulate(self, logits: Tensor) -> Tensor:
        return self.gate_scale * torch.sigmoid(logits)

    def init_from(self, conv: ConvNd) -> None:
        """Offsets zero; the modulation's start g / 2 is divided out of the kernel."""
        self.weight.copy_(conv.weight * (2 / self.gate_scale))
