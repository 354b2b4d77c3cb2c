"""FlexConv: a continuous kernel under a Gaussian mask whose size is learned (Romero, ICLR 2022)."""

from math import log, prod, sqrt
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dynaconv.dispatch import values_unknown
from dynaconv.functional import conv
from dynaconv.layers.base import (
    CONVS,
    PADDING_MODES,
    ConvNd,
    DynamicConv,
    at_least,
    positive,
)
from dynaconv.layers.continuous import KernelNetwork, at_least_float32, axis, grid
from dynaconv.registry import register_family
from dynaconv.shapes import same_padding


@register_family("flexconv", primitive="conv", paper="Romero et al., ICLR 2022")
class FlexConv(DynamicConv):
    """A convolution whose kernel is a network under a Gaussian mask that learns its extent.

        K(u) = m(u) phi(u),    m(u) = exp(-sum_d (u_d - mean_d)^2 / (2 (width_d^2 + 1e-8)))
        y = b + K * x,    u from -1 to 1 over the kernel_size taps of each dimension

    phi is `dynaconv.layers.continuous.KernelNetwork`. A dimension ends, the same on both sides,
    where its Gaussian falls below `threshold` for good: taps beyond are neither made nor
    convolved, so that a kernel costs what its mask leaves. Give as kernel_size the largest
    extent, up to twice the input; the authors use odd numbers. The cut gives no gradient, the mask
    does. Masks are the same for all inputs and channels.

    As in the authors' later code (Knigge, ICLR 2023) the mask stays centred; `learn_mean=True`
    learns its centre as the paper has it. Other than there, three taps a dimension always stay,
    for one tap alone tells the mask nothing and could never grow again, and masks start wide
    enough for five. The causal form of that code is not here.

    Args:
        hidden, omega_0, kind, layers: of the network, see `KernelNetwork`.
        mask_width: width at the start; None for the published 0.075, or one tap where that is more.
        learn_mean: whether `mask_mean` trains.
        threshold: where the mask ends; at 0 nothing is cut.
        base: adds free taps, K = m (phi + W), W zero at first. Not published: `from_conv` needs it,
            for a network cannot hold given taps exactly.
    """

    exact_options = {"base": True}
    lr_factors = {"mask_width": 0.1, "mask_mean": 0.1}
    mask_mean: Tensor

    def build(
        self,
        hidden: int = 32,
        omega_0: float | None = None,
        kind: str = "magnet",
        layers: int = 3,
        mask_width: float | None = None,
        learn_mean: bool = False,
        threshold: float = 0.1,
        base: bool = False,
    ) -> None:
        at_least(0, threshold=threshold)
        if not threshold < 1:
            raise ValueError(f"threshold={threshold} must be below 1, the mask's largest value")
        if max(self.kernel_size) == 1:
            raise ValueError("a kernel of one tap has no size; give a larger kernel_size")
        if mask_width is not None:
            positive(mask_width=mask_width)
        steps = [2 / max(k - 1, 1) for k in self.kernel_size]
        given = None if mask_width is None else float(mask_width)
        widths = [max(0.075, step) if given is None else given for step in steps]
        self.threshold = threshold
        self.mask_width = nn.Parameter(torch.tensor(widths))
        self.register_buffer("mask_mean", torch.zeros(self.rank))
        if learn_mean:
            del self.mask_mean
            self.mask_mean = nn.Parameter(torch.zeros(self.rank))
        kept = [k - 2 * c for k, c in zip(self.kernel_size, self.cut(), strict=True)]
        self.network = KernelNetwork(
            self.rank,
            self.kernel_shape()[:2],  # type: ignore[arg-type]
            hidden,
            omega_0,
            kind,
            layers,
            taps=prod(kept),
            # Published: the network's Gabor functions lie where the mask is.
            spread=min(1.0, 1.667 * max(widths)),
        )
        self.register_parameter("weight", None)
        if base:
            self.weight = nn.Parameter(torch.zeros(self.kernel_shape()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # Mask ----------------------------------------------------------------------------------

    def reach(self) -> Tensor:
        """Taps between the centre and where the mask ends, (D,), fractional, with a gradient."""
        dtype = at_least_float32(self.mask_width)
        half = (torch.tensor(self.kernel_size, device=self.mask_width.device).to(dtype) - 1) / 2
        if self.threshold == 0:
            return half
        width, mean = self.mask_width.to(dtype), self.mask_mean.to(dtype)
        root = mean.abs() + width.abs() * sqrt(-2 * log(self.threshold))
        return torch.minimum((root * half).clamp(min=1), half)

    def cut(self) -> list[int]:
        """Taps that fall away at each end of each dimension.

        None under torch.compile and torch.vmap, where no shape can follow a value: `mask` is 0
        there.
        """
        if values_unknown():
            return [0] * self.rank
        half = torch.tensor([(k - 1) / 2 for k in self.kernel_size])
        return torch.ceil(half - self.reach().detach().cpu()).int().tolist()

    def mask(self, axes: list[Tensor]) -> Tensor:
        """m over the taps where `axes` cross, 0 beyond the reach."""
        dtype = at_least_float32(self.mask_width)
        reach, exponent, inside = self.reach().detach(), [], []
        for d, (u, taps) in enumerate(zip(axes, self.kernel_size, strict=True)):
            distance = (u - self.mask_mean[d].to(dtype)).square()
            exponent.append(-0.5 * distance / (self.mask_width[d].to(dtype).square() + 1e-8))
            # The slack is for the rounding of coordinates; `cut` has decided already.
            inside.append(u.abs() * (taps - 1) / 2 <= reach[d] + 1e-3)
        total = torch.stack(torch.meshgrid(*exponent, indexing="ij")).sum(0)
        kept = torch.stack(torch.meshgrid(*inside, indexing="ij")).all(0)
        return torch.exp(total) * kept

    def axes(self, cut: list[int]) -> list[Tensor]:
        """Coordinates of the taps that stay, one tensor a dimension."""
        full = [axis(taps, self.mask_width) for taps in self.kernel_size]
        return [u[c : taps - c] for u, c, taps in zip(full, cut, self.kernel_size, strict=True)]

    # Layer ---------------------------------------------------------------------------------

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """For every sample the same: size (N, D) in positions of the input, mask (N, *K).

        The size is a fraction, with a gradient, so that it can enter a loss.
        """
        dilation = torch.tensor(self.dilation, device=x.device)
        size, m = 1 + 2 * dilation * self.reach(), self.mask(self.axes([0] * self.rank))
        return {"size": size.expand(x.shape[0], -1), "mask": m.expand(x.shape[0], *m.shape)}

    def kernel(self, cut: list[int]) -> Tensor:
        """K without its `cut` taps, (C_out, C_in / groups, *K - 2 cut)."""
        axes = self.axes(cut)
        kernel = self.network.at(grid(axes)).unflatten(2, [u.shape[0] for u in axes])
        if self.weight is not None:
            kernel = kernel + self.weight[_inner(cut, self.kernel_size)]
        return (self.mask(axes) * kernel).to(self.mask_width.dtype)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        cut = self.cut()
        x, padding = self.pad_less(x, cut)
        settings = (self.stride, padding, self.dilation, self.groups)
        return conv(x, self.kernel(cut), self.bias, *settings)

    def pad_less(self, x: Tensor, cut: list[int]) -> tuple[Tensor, tuple[int, ...]]:
        """x, and the padding left to the convolution, for a kernel without `cut` taps an end.

        Where more is cut than was padded, x itself loses its border.
        """
        before = after = self.geometry().padding
        if self.padding == "same":
            before, after = same_padding(self.kernel_size, self.dilation)
        less = [c * step for c, step in zip(cut, self.dilation, strict=True)]
        before, after = (
            tuple(p - c for p, c in zip(side, less, strict=True)) for side in (before, after)
        )
        if self.padding_mode == "zeros" and before == after and min(before) >= 0:
            return x, before
        widths = [w for pair in zip(before[::-1], after[::-1], strict=True) for w in pair]
        x = F.pad(x, [max(w, 0) for w in widths], mode=PADDING_MODES[self.padding_mode])
        return F.pad(x, [min(w, 0) for w in widths]), (0,) * self.rank

    # Conversion ----------------------------------------------------------------------------

    @classmethod
    def like(cls, conv: ConvNd, room: int = 0, **options: Any) -> Self:
        """`room`: taps that the kernel gets beyond each end of `conv`'s, to grow into."""
        return super().like(widened(conv, room, cls.rank), **options)

    def init_from(self, conv: ConvNd) -> None:
        """phi is 0 and the free taps are those of `conv`, over a mask that covers them."""
        if self.weight is None:
            raise ValueError("a network cannot hold given taps exactly; base=True adds free ones")
        nn.init.zeros_(self.network.output.weight)
        nn.init.zeros_(self.network.output.bias)
        reach = sqrt(-2 * log(self.threshold)) if self.threshold else float("inf")
        room = [(k - c) // 2 for k, c in zip(self.kernel_size, conv.kernel_size, strict=True)]
        edges = [
            (c - 1) / max(k - 1, 1) for k, c in zip(self.kernel_size, conv.kernel_size, strict=True)
        ]
        width = self.mask_width.new_tensor(edges) * max(1.0, 2 / reach)
        self.mask_width.copy_(torch.maximum(self.mask_width, width))
        mask = self.mask(self.axes(room))
        self.weight[_inner(room, self.kernel_size)] = (conv.weight / mask).to(self.weight.dtype)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        large = 5 if rank < 3 else 3
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": large, "padding": 1, "hidden": 8},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 4 if rank < 3 else 3,
                "groups": 4,
                "bias": False,
                "kind": "siren",
                "omega_0": 3.0,
                "learn_mean": True,
                "threshold": 0.0,
            },
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": large,
                "stride": 2,
                "padding": 2,
                "hidden": 8,
                "mask_width": 0.5,
                "base": True,
            },
        ]


def _inner(cut: list[int], size: tuple[int, ...]) -> tuple[slice, ...]:
    """Indices of a kernel (C_out, C_in / groups, *K) without `cut` taps at each end."""
    whole = slice(None)
    return (whole, whole, *(slice(c, taps - c) for c, taps in zip(cut, size, strict=True)))


def widened(conv: ConvNd, room: int, rank: int) -> ConvNd:
    """An nn.ConvNd (not initialised) whose windows reach `room` taps further on every side."""
    at_least(0, room=room)
    if not room or not isinstance(conv, CONVS[rank]):
        return conv
    padding = conv.padding
    if padding != "same":
        padding = (0,) * rank if isinstance(padding, str) else padding
        padding = tuple(p + room * d for p, d in zip(padding, conv.dilation, strict=True))
    return skip_init(
        CONVS[rank],
        conv.in_channels,
        conv.out_channels,
        tuple(k + 2 * room for k in conv.kernel_size),
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).train(conv.training)
