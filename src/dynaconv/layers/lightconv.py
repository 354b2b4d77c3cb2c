"""LightConv and DynamicConv (Wu, ICLR 2019): softmax kernels shared by the channels of a head."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv, conv_per_position
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.layers.centres import at_centres
from dynaconv.registry import register_family
from dynaconv.shapes import Padding, resolve_padding, windows, zero_padded


class _Light(DynamicConv):
    """What both share: heads, normalised taps, DropConnect."""

    causality = "pointwise"
    exact_options = {"weight_softmax": False}

    def build(
        self,
        heads: int | None = None,
        weight_softmax: bool = True,
        weight_dropout: float = 0.0,
    ) -> None:
        self.heads = self.groups if heads is None else heads
        at_least(1, heads=self.heads)
        at_least(0, weight_dropout=weight_dropout)
        if weight_dropout >= 1:
            raise ValueError(f"weight_dropout={weight_dropout} must be below 1")
        if self.out_channels % self.heads:
            raise ValueError(f"heads={self.heads} does not divide {self.out_channels} out_channels")
        self.weight_softmax, self.weight_dropout = weight_softmax, weight_dropout
        self.project = self.projection()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def values(self, x: Tensor) -> Tensor:
        """What the kernel is laid over, (N, C_out, *L)."""
        return x if self.project is None else self.project(x)

    def normalise(self, logits: Tensor, dim: int) -> Tensor:
        """The taps along `dim` sum to 1, or stay as they are."""
        return torch.softmax(logits, dim) if self.weight_softmax else logits

    def per_position(self, x: Tensor, weight: Tensor, padding: Padding) -> Tensor:
        """The convolution of the values x with kernels (N, heads, *K, *L_out)."""
        weight = F.dropout(weight, self.weight_dropout, self.training)
        return self.add_bias(conv_per_position(x, weight, self.stride, padding, self.dilation))

    def init_from(self, conv: ConvNd) -> None:
        """Takes a depthwise kernel as the taps."""
        if self.weight_softmax:
            raise ValueError(
                "kernels out of a softmax are positive and sum to 1, trained ones are not and do "
                "not; give weight_softmax=False"
            )
        self.require_depthwise()
        if self.heads != self.out_channels:
            raise ValueError(
                f"heads={self.heads} share kernels, those of {self.out_channels} channels differ; "
                f"give heads={self.out_channels}"
            )
        self.take(conv.weight)

    def take(self, kernel: Tensor) -> None:
        """Makes (C, 1, *K) the kernel at every position."""
        raise NotImplementedError

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        same = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
        projected = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2}
        found: list[dict[str, Any]] = [
            same | {"padding": 1, "heads": 2},
            projected | {"padding": 2, "heads": 3, "bias": False},
            same | {"kernel_size": 2, "groups": 4, "weight_softmax": False},
        ]
        if rank == 1:
            found.append(same | {"dilation": (2,), "heads": 2, "causal": True})
        return found


@register_family("lightconv", primitive="conv", paper="Wu et al., ICLR 2019")
class LightConv(_Light):
    """A depthwise kernel that sums to 1, shared by the channels of a head; the same for any input.

        w = softmax_k(weight),    y[c, p] = b[c] + sum_k w[head(c), k] x[c, p + k]

    What DynamicLightConv is measured against. Published in 1-D for as many output as input
    channels; here in 2-D and 3-D too, with the softmax over all taps, and a 1x1 convolution of x
    comes first where the channel numbers differ.

    Args:
        heads: number of kernels; None takes `groups`.
        weight_softmax: whether the taps are normalised; if not, w = weight.
        weight_dropout: probability in training that a tap is dropped (DropConnect), for each
            position anew.
    """

    def build(
        self,
        heads: int | None = None,
        weight_softmax: bool = True,
        weight_dropout: float = 0.0,
    ) -> None:
        super().build(heads, weight_softmax, weight_dropout)
        self.weight = nn.Parameter(torch.empty(self.heads, 1, *self.kernel_size))
        nn.init.xavier_uniform_(self.weight)

    def taps(self) -> Tensor:
        """w, (heads, 1, *K)."""
        return self.normalise(self.weight.flatten(1), 1).view_as(self.weight)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"weight": self.taps().expand(x.shape[0], *self.weight.shape)}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.convolve(F.pad(x, (self.past, 0)) if self.causal else x)

    def convolve(self, x: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The kernel is the layer's own, whatever `generate` shows of it."""
        x, padding = self.pad(self.values(x))
        if self.training and self.weight_dropout > 0:
            x, geometry = resolve_padding(x, self.kernel_size, self.stride, padding, self.dilation)
            weight = self._at_each(x.shape[0], geometry.output_size(x.shape[2:]))
            return self.per_position(x, weight, geometry.padding)
        kernel = self.taps().repeat_interleave(self.out_channels // self.heads, 0)
        stride, dilation, groups = self.stride, self.dilation, self.out_channels
        return conv(x, kernel, self.bias, stride, padding, dilation, groups)

    def _at_each(self, batch: int, size: tuple[int, ...]) -> Tensor:
        """w for each position: (N, heads, *K, *L_out)."""
        taps = self.taps().squeeze(1)
        return taps.reshape(*taps.shape, *[1] * self.rank).expand(batch, *taps.shape, *size)

    def take(self, kernel: Tensor) -> None:
        self.weight.copy_(kernel)


@register_family("dynamic_lightconv", primitive="conv_per_position", paper="Wu et al., ICLR 2019")
class DynamicLightConv(_Light):
    """A kernel generated at each position from the features there, shared by a head's channels.

        w[p] = softmax_k(weight_linear(x[p]))
        y[c, p] = b[c] + sum_k w[head(c), k, p] x[c, p + k]

    The paper's DynamicConv, published in 1-D without stride for as many output as input channels.
    Here in 2-D and 3-D too, with the softmax over all taps; x[p] is the window's centre, or the
    mean of its stride's cell (of a causal window the last position); and a 1x1 convolution of x
    comes first where the channel numbers differ.

    Args:
        heads: number of kernels a position; None takes `groups`.
        weight_softmax: whether the taps are normalised.
        weight_dropout: probability in training that a tap is dropped (DropConnect).
        renorm_padding: whether the softmax leaves out taps beyond the input (or the sentence).
        weight_bias: whether weight_linear has a bias.
    """

    exact_options = {"weight_softmax": False, "weight_bias": True}

    def build(
        self,
        heads: int | None = None,
        weight_softmax: bool = True,
        weight_dropout: float = 0.0,
        renorm_padding: bool = False,
        weight_bias: bool = False,
    ) -> None:
        super().build(heads, weight_softmax, weight_dropout)
        if renorm_padding and not (weight_softmax and self.padding_mode == "zeros"):
            raise ValueError(
                "renorm_padding=True leaves taps beyond the input out of the softmax; it needs "
                f"weight_softmax=True and padding_mode='zeros', not {weight_softmax}, "
                f"{self.padding_mode!r}"
            )
        self.renorm_padding = renorm_padding
        taps = self.heads * prod(self.kernel_size)
        self.weight_linear = conv_nd(self.rank, self.in_channels, taps, 1, bias=weight_bias)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        features = at_centres(self, x, mask)
        if not self.renorm_padding:
            return {"weight": self._kernels(features, None)}
        real = x.new_ones(1, *x.shape[2:], dtype=torch.bool) if mask is None else mask
        real = F.pad(real, (self.past, 0)) if self.causal else real
        return {"weight": self._kernels(features, self._inside(*self.pad(real.unsqueeze(1))))}

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        x, padding = self.pad(self.values(x))
        return self.per_position(x, weight, padding)

    def _kernels(self, features: Tensor, inside: Tensor | None) -> Tensor:
        """w, (N, heads, *K, *L_out); the taps that are `inside` take part, None for all."""
        logits = self.weight_linear(features).unflatten(1, (self.heads, -1))
        if inside is not None:
            # Not -inf: the taps of a window may all lie outside.
            logits = logits.masked_fill(~inside, torch.finfo(logits.dtype).min)
        return self.normalise(logits, 2).unflatten(2, self.kernel_size)

    def _inside(self, real: Tensor, padding: Padding) -> Tensor:
        """Which taps read a real position: bool (N, 1, *L) -> (N, 1, prod(K), *L_out)."""
        real, geometry = resolve_padding(
            real, self.kernel_size, self.stride, padding, self.dilation
        )
        return windows(zero_padded(real, geometry), geometry).flatten(2, 1 + self.rank)

    def generate_next(self, seen: Tensor, real: Tensor) -> dict[str, Tensor]:
        inside = self._inside(real.unsqueeze(0), 0) if self.renorm_padding else None
        return {"weight": self._kernels(seen, inside)}

    def take(self, kernel: Tensor) -> None:
        """The kernel becomes weight_linear's bias."""
        if self.weight_linear.bias is None:
            raise ValueError(
                "a kernel that follows no input is weight_linear's bias; give weight_bias=True"
            )
        nn.init.zeros_(self.weight_linear.weight)
        self.weight_linear.bias.copy_(kernel.flatten())

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        renormed = {"in_channels": 4, "out_channels": 4, "heads": 2, "renorm_padding": True}
        found = super().samples(rank)
        found.append(renormed | {"kernel_size": 3, "padding": 2, "weight_bias": True})
        if rank == 1:
            found.append(renormed | {"kernel_size": 4, "causal": True})
        return found
