"""ModulatedConv: a style scales the input channels of the kernel (Karras, CVPR 2020)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional._checks import DTYPES, check_tensors
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal, without_autocast
from dynaconv.layers.tracing import one_node
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family

EPSILON = 1e-8


@register_family("modulated", primitive="conv", paper="Karras et al., CVPR 2020", transposed=True)
class ModulatedConv(DynamicConv):
    """A style scales the kernel's input channels, and its output channels to unit norm (StyleGAN2).

        s = affine(style),       W'[o, c, k] = s_c W[o, c, k]
        d_o = g_o / sqrt(sum_{c, k} W'[o, c, k]^2 + 1e-8),       y = d (W' * x) + b

    The style (N, style_channels) is given with the input, as by StyleGAN's mapping network. Where
    none is given it is the mean of the input over its real positions, so that the layer can stand
    for any nn.ConvNd. affine starts around 1. Input and output are scaled, not kernels, which
    gives the same and leaves one kernel for the whole batch; kernel and style are first brought to
    where half precision holds their products, whatever their size.

    The published layer has no gain g, multiplies parameters of unit variance by constants
    (equalised learning rate; here they are drawn at that size), and adds noise, resampling and an
    activation, which are layers of their own. With g = |W[o]| and s = 1 demodulation changes
    nothing: so `from_conv` starts, exactly; without g, only demodulate=False can.

    Args:
        style_channels: of the style; by default those of the input, which its mean needs.
        demodulate: divide by the norm; without it (as in StyleGAN2's toRGB) d = g.
        gain: g, a learned factor for each output channel; otherwise 1.
    """

    causality = "pooled"
    exact_options = {"gain": True}
    gain: nn.Parameter | None

    def build(
        self, style_channels: int | None = None, demodulate: bool = True, gain: bool = False
    ) -> None:
        self.style_channels = self.in_channels if style_channels is None else style_channels
        at_least(1, style_channels=self.style_channels)
        self.demodulate = demodulate
        self.weight = nn.Parameter(self.initial_kernels())
        self.register_parameter(
            "gain", nn.Parameter(torch.ones(self.out_channels)) if gain else None
        )
        self.affine = nn.Linear(self.style_channels, self.in_channels)
        nn.init.normal_(self.affine.weight, std=1 / math.sqrt(self.style_channels))
        nn.init.ones_(self.affine.bias)

    # The style -----------------------------------------------------------------------------

    @one_node
    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, style: Tensor | None = None
    ) -> Tensor:
        """style (N, style_channels), or (style_channels,) for an input without batch."""
        x, mask = self.prepare(input, padding_mask)
        return self.finish(self.compute(x, mask, self._checked(style, x)), x, input)

    def kernels(
        self, input: Tensor, padding_mask: Tensor | None = None, style: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`channel` s (N, C_in), and `filter` d (N, C_out) if the layer has any."""
        x, mask = self.prepare(input, padding_mask)
        return self.generate(x, mask, self._checked(style, x))

    def compute(self, x: Tensor, mask: Tensor | None, style: Tensor | None = None) -> Tensor:
        if style is None:
            return super().compute(x, mask)
        if self.causal:
            x = F.pad(x, (self.past, 0))
        return self.convolve(x, **self.generate(x, mask, style))

    def _checked(self, style: Tensor | None, x: Tensor) -> Tensor | None:
        """style (N, style_channels). ValueError or TypeError for another, or none to be had."""
        wanted = (x.shape[0], self.style_channels)
        if style is None:
            if self.style_channels != self.in_channels:
                raise ValueError(
                    f"style_channels={self.style_channels} differs from in_channels="
                    f"{self.in_channels}, so the input's mean is no style; give style {wanted}"
                )
            return None
        check_tensors(type(self).__name__, style=style)
        style = style.unsqueeze(0) if style.dim() == 1 else style
        if style.device != x.device:
            raise ValueError(f"style is on {style.device}, input on {x.device}; move one of them")
        if tuple(style.shape) != wanted:
            raise ValueError(f"style has shape {tuple(style.shape)}; give {wanted}")
        if style.dtype not in DTYPES:
            raise TypeError(f"style has dtype {style.dtype}; give floating point numbers")
        return style

    def generate(
        self, x: Tensor, mask: Tensor | None, style: Tensor | None = None
    ) -> dict[str, Tensor]:
        style = masked_mean(x, mask) if style is None else style
        channel = _precise(self.affine(style.to(self.affine.weight.dtype)))
        made = {"channel": channel}
        if self.demodulate:
            made["filter"] = self._demodulation(channel)
        elif self.gain is not None:
            made["filter"] = _precise(self.gain).expand(channel.shape[0], -1)
        return made

    def _demodulation(self, channel: Tensor) -> Tensor:
        """d (N, C_out): sum_{c, k} (s_c W[o, c, k])^2 needs no kernel for each sample."""
        with without_autocast(channel.device.type):
            power = _precise(self.weight).flatten(2).square().sum(2).unflatten(0, (self.groups, -1))
            style = channel.square().unflatten(1, (self.groups, -1))
            square = torch.einsum("ngc,goc->ngo", style, power).flatten(1)
            scale = (square + EPSILON).rsqrt()
        return scale if self.gain is None else scale * _precise(self.gain)

    # The convolution -----------------------------------------------------------------------

    def convolve(  # type: ignore[override]
        self, x: Tensor, channel: Tensor, filter: Tensor | None = None
    ) -> Tensor:
        ones = (1,) * self.rank
        if filter is None:
            x = x * channel.to(x.dtype).unflatten(1, (-1, *ones))
            return self.convolve_static(x, self.weight, self.bias)
        # Whatever is taken out of kernel and style comes back in the filter.
        size = _largest(self.weight) * math.sqrt(self.weight[0].numel())
        weight = (_precise(self.weight) / size.unflatten(0, (-1, 1, *ones))).to(self.weight.dtype)
        top = _largest(channel).unsqueeze(1)
        x = x * (channel / top).to(x.dtype).unflatten(1, (-1, *ones))
        output = self.convolve_static(x, weight, None)
        filter = (filter * size * top).to(output.dtype)
        return self.add_bias(output * filter.unflatten(1, (-1, *ones)))

    def init_from(self, conv: ConvNd) -> None:
        """The kernel at style 1, its norm as the gain."""
        if self.demodulate and self.gain is None:
            raise ValueError(
                "demodulation brings every output channel's kernel to unit norm; gain=True gives "
                "the norm back, demodulate=False leaves it"
            )
        self.weight.copy_(conv.weight)
        nn.init.zeros_(self.affine.weight)
        if self.gain is not None and self.demodulate:
            self.gain.copy_((conv.weight.flatten(1).square().sum(1) + EPSILON).sqrt())

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
                "gain": True,
            },
            {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "demodulate": False},
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
        ]


def _precise(values: Tensor) -> Tensor:
    """values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _largest(values: Tensor) -> Tensor:
    """The largest size in each row of values (R, ...), above 0; (R,), a constant to autograd."""
    return _precise(values.detach()).flatten(1).abs().amax(1).clamp(min=EPSILON)
