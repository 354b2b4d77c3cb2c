"""Switchable atrous convolution: each position chooses between two dilations (Qiao, CVPR 2021)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import PADDING_MODES, ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.masking import masked_mean, sizes_from_mask
from dynaconv.registry import register_family
from dynaconv.shapes import same_padding

POOL = 5
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@register_family("switchable_atrous", primitive="conv", paper="Qiao et al., CVPR 2021")
class SwitchableAtrousConv(DynamicConv):
    """Two sizes of one kernel, blended at each position by a switch (SAC of DetectoRS).

        x' = x + pre(mean(x)),    S = switch(pool5(x'))
        u = S conv(x', w, dilation) + (1 - S) conv(x', w + dw, rate * dilation) + b
        y = u + post(mean(u))

    switch is a 1x1 convolution that starts at 1, dw, pre and post start at 0: training starts from
    the plain convolution. S is not bounded. With AWS, w = gamma (v - mean(v)) / std(v) + beta for
    each output channel of the weight v, where gamma and beta are buffers that `from_conv` takes
    from the trained kernel, so that w is that kernel at first.

    pool5 averages 5 positions a dimension around the window's centre; beyond the border it
    reflects, as mmcv does, however small the input (torch's reflection needs 3 positions). mmcv
    (torch 1.8 and later) leaves b out, and triples `padding`, which fits half padding alone; here
    padding grows as the kernel does.

    Args:
        rate: how much larger the large dilation is.
        aws: adaptive weight standardisation.
        pre_context, post_context: the global context before and after.
    """

    weight_gamma: Tensor
    weight_beta: Tensor
    pre_context: nn.Linear | None
    post_context: nn.Linear | None

    def build(
        self,
        rate: int = 3,
        aws: bool = True,
        pre_context: bool = True,
        post_context: bool = True,
    ) -> None:
        at_least(2, rate=rate)
        self.rate, self.aws = rate, aws
        self._check_growth()
        self.weight = nn.Parameter(self.initial_kernels())
        self.weight_diff = nn.Parameter(torch.zeros_like(self.weight))
        if aws:
            ones = (self.out_channels, 1, *(1,) * self.rank)
            self.register_buffer("weight_gamma", torch.ones(ones))
            self.register_buffer("weight_beta", torch.zeros(ones))
        self.switch = conv_nd(self.rank, self.in_channels, 1, 1)
        nn.init.zeros_(self.switch.weight)
        nn.init.ones_(self.switch.bias)  # type: ignore[arg-type]
        self.pre_context = _zero_linear(self.in_channels) if pre_context else None
        self.post_context = _zero_linear(self.out_channels) if post_context else None

    def _check_growth(self) -> None:
        """ValueError where the large kernel has no centre in common with the small one."""
        growth = [(e - 1) * (self.rate - 1) for e in self._extents()]
        if not any(growth):
            raise ValueError("a kernel of one tap has no size to switch; give a larger kernel_size")
        if any(g % 2 for g in growth):
            raise ValueError(
                f"kernel_size={self.kernel_size} with dilation={self.dilation} cannot grow "
                f"{self.rate} times by the same on both sides; give an odd rate, odd kernels or an "
                "even dilation"
            )

    def _extents(self) -> list[int]:
        """Positions that the small kernel spans, once a dimension."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]

    # The two kernels -----------------------------------------------------------------------

    def small_weight(self) -> Tensor:
        """w, standardised if AWS is on."""
        if not self.aws:
            return self.weight
        # Half precision bears neither the squares nor what their root does to gradients.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        mean, std = _moments(weight)
        weight = self.weight_gamma * (weight - mean) / std + self.weight_beta
        return weight.to(self.weight.dtype)

    def _conv(self, x: Tensor, weight: Tensor, rate: int) -> Tensor:
        """x with the kernel at `rate` times the dilation; padding grows as the kernel does."""
        dilation = tuple(rate * d for d in self.dilation)
        if self.padding == "same":
            before, after = same_padding(self.kernel_size, dilation)
        else:
            grown = [(rate - 1) * (e - 1) // 2 for e in self._extents()]
            before = after = tuple(
                p + g for p, g in zip(self.geometry().padding, grown, strict=True)
            )
        left = before
        if self.padding_mode != "zeros" or before != after:
            widths = [
                w for pair in zip(reversed(before), reversed(after), strict=True) for w in pair
            ]
            x, left = F.pad(x, widths, mode=PADDING_MODES[self.padding_mode]), (0,) * self.rank
        conv = CONVOLUTIONS[self.rank - 1]
        return conv(x, weight, None, self.stride, left, dilation, self.groups)

    # The switch ----------------------------------------------------------------------------

    def with_context(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x', zero where it is not real."""
        if self.pre_context is None:
            return x
        return _masked(x + self._spread(self.pre_context(masked_mean(x, mask))), mask)

    def switch_map(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """S (N, 1, *L_out) from x'.

        The 1x1 convolution and the average change places: both are linear, and one channel is
        cheaper to average.
        """
        switch = self.switch(x)
        sizes = None if mask is None else sizes_from_mask(mask).clamp(min=1)
        output = self.geometry().output_size(x.shape[2:])
        if self.padding == "same":
            output = tuple(x.shape[2:])
        for d, (e, s, p) in enumerate(
            zip(self._extents(), self.stride, self.geometry().padding, strict=True)
        ):
            centres = torch.arange(output[d], device=x.device) * s + (e - 1) // 2 - p
            size = x.shape[2 + d] if sizes is None else sizes[:, d].reshape(-1, 1, 1)
            switch = _pool(switch, d, centres, size)
        return switch

    def _spread(self, vector: Tensor) -> Tensor:
        """(N, C) at every position."""
        return vector.unflatten(1, (-1, *(1,) * self.rank))

    # What every family has -----------------------------------------------------------------

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"switch": self.switch_map(self.with_context(x, mask), mask)}

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`switch` S, and `size`: the two kernels' extents in input positions, averaged by it.

        Both (N, 1, *L_out). Extents are means over dimensions; where S leaves [0, 1] they count
        by |S| and |1 - S|.
        """
        switch = super().kernels(input, padding_mask)["switch"]
        small = sum(self._extents()) / self.rank
        large = self.rate * (small - 1) + 1
        near, far = switch.abs(), (1 - switch).abs()
        return {"switch": switch, "size": (near * small + far * large) / (near + far)}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.with_context(x, mask)
        switch, weight = self.switch_map(x, mask), self.small_weight()
        small = self._conv(x, weight, 1)
        large = self._conv(x, weight + self.weight_diff, self.rate)
        output = self.add_bias(switch * small + (1 - switch) * large)
        if self.post_context is None:
            return output
        out_mask = None if mask is None else self.output_mask(mask)
        mean = masked_mean(_masked(output, out_mask), out_mask)
        return output + self._spread(self.post_context(mean))

    def init_from(self, conv: ConvNd) -> None:
        """The kernel, with AWS's gamma and beta from it; switch, dw and contexts start exact."""
        self.weight.copy_(conv.weight)
        if self.aws:
            mean, std = _moments(conv.weight)
            self.weight_beta.copy_(mean)
            self.weight_gamma.copy_(std)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "stride": 2,
                "padding": 1,
                "groups": 2,
                "bias": False,
                "aws": False,
                "post_context": False,
            },
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 3,
                "rate": 2,
                "pre_context": False,
            },
        ]


def _zero_linear(channels: int) -> nn.Linear:
    """A linear layer that starts at 0."""
    linear = nn.Linear(channels, channels)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def _moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output channel's kernel, (C_out, 1, 1, ...)."""
    over = tuple(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, over, keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, zero where the mask is False."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0)


def _pool(x: Tensor, d: int, centres: Tensor, size: int | Tensor) -> Tensor:
    """Means of x (N, 1, *L) over POOL positions of dimension d around `centres` (P,).

    size: where the border lies that positions are reflected at; (N, 1, 1) for one a sample.
    """
    around = torch.arange(POOL, device=x.device) - POOL // 2
    index = _reflected(centres.unsqueeze(1) + around, size)
    index = index.expand(x.shape[0], -1, -1).flatten(1)
    index = index.unflatten(1, (1, *(-1 if i == d else 1 for i in range(x.dim() - 2))))
    shape = list(x.shape)
    shape[2 + d] = -1
    return x.gather(2 + d, index.expand(shape)).unflatten(2 + d, (-1, POOL)).mean(3 + d)


def _reflected(position: Tensor, size: int | Tensor) -> Tensor:
    """Any position as one within range(size), reflected at both ends as often as needed."""
    if not isinstance(size, Tensor):  # ONNX divides by a size only as a tensor
        size = torch.scalar_tensor(size, dtype=torch.long, device=position.device)
    last = size - 1
    period = 2 * last + (last == 0) * 1
    folded = position % period
    return torch.minimum(folded, period - folded) * (last != 0)
