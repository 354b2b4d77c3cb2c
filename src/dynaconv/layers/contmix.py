"""ContMixConv: kernels from the affinity to region centres (Lou, CVPR 2025)."""

from collections.abc import Sequence
from functools import partial, reduce
from itertools import product
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv_per_position
from dynaconv.layers.attention import SafeBatchNorm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd
from dynaconv.layers.regions import region_means
from dynaconv.masking import each_size, fill_up
from dynaconv.registry import register_family

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@register_family("contmix", primitive="conv_per_position", paper="Lou et al., CVPR 2025")
class ContMixConv(DynamicConv):
    """Each position's kernels from its likeness to the centres of the whole input's regions.

        q = bn(query(x)),  k = bn(key(pool(x))),  v = bn(value(x)),  A[g, p, r] = q[g, p] . k[g, r]
        w[g, p] = softmax_taps(proj(s A[g, p]) + position_bias[g])      a small and a large kernel
        y = bn(fuse([small kernels over the first half of v, large over the second])) + b

    s = (C_in / heads)^-1/2. A window that would cross the border is moved inward until it fits, so
    there is no padding, and position_bias[g] has an entry for each distance of a tap from p. Input
    shorter than the kernel is enlarged first and the output averaged back. The core of OverLoCK's
    block, published in 2-D without b; its norm, gate, squeeze and static branch are left out. In
    training, batch statistics of a padded batch are those of the samples of one size.

    Args:
        heads: kernels a position (twice the published num_heads); None takes at most 4.
        small_size: kernel size of the small kernels, odd, as kernel_size is; None takes the
            published 5, or kernel_size where that is smaller.
        regions: regions along each dimension.
        position_bias: whether there is one.
    """

    def build(
        self,
        heads: int | None = None,
        small_size: int | None = None,
        regions: int = 7,
        position_bias: bool = True,
    ) -> None:
        small_size = min(5, *self.kernel_size) if small_size is None else small_size
        heads = gcd(4, self.in_channels // 2, self.out_channels // 2) if heads is None else heads
        at_least(1, heads=heads, small_size=small_size, regions=regions)
        self._check_geometry(small_size)
        hidden, channels = self.in_channels // 2, self.out_channels
        if not hidden or hidden % heads or channels % (2 * heads):
            raise ValueError(
                f"heads={heads} must divide half of {self.in_channels} in_channels and half of "
                f"{channels} out_channels"
            )
        self.heads, self.regions = heads, (regions,) * self.rank
        self.sizes = ((small_size,) * self.rank, self.kernel_size)
        conv = partial(conv_nd, self.rank, kernel_size=1, bias=False)
        self.query, self.key = conv(self.in_channels, hidden), conv(self.in_channels, hidden)
        self.value, self.fuse = conv(self.in_channels, channels), conv(channels, channels)
        self.query_norm, self.key_norm = SafeBatchNorm(hidden), SafeBatchNorm(hidden)
        self.value_norm, self.fuse_norm = SafeBatchNorm(channels), SafeBatchNorm(channels)
        taps = sum(prod(size) for size in self.sizes)
        self.proj = conv_nd(self.rank, prod(self.regions), taps, 1)
        self.position_bias = nn.ParameterList()
        if position_bias:
            for size in self.sizes:
                table = torch.empty(heads, *[2 * k - 1 for k in size])
                self.position_bias.append(nn.Parameter(nn.init.trunc_normal_(table, std=0.02)))

    def _check_geometry(self, small_size: int) -> None:
        if any(k % 2 == 0 for k in (*self.kernel_size, small_size)):
            raise ValueError(f"kernel_size={self.kernel_size}, small_size={small_size} must be odd")
        if small_size > min(self.kernel_size):
            raise ValueError(f"small_size={small_size} is above kernel_size={self.kernel_size}")
        size = self.kernel_size
        single = max(self.stride) == max(self.dilation) == self.groups == 1
        if not single or self.padding_mode != "zeros" or self.output_size(size) != size:
            raise ValueError(
                "contmix has an output for each input position and windows inside the input: give "
                "stride, dilation and groups 1, padding_mode='zeros', padding='same' or half the "
                f"kernel, not {self.stride}, {self.dilation}, {self.groups}, "
                f"{self.padding_mode!r}, {self.padding!r}"
            )

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self.convolve(x, **self.generate(x, None))
        output = each_size(lambda alone: self.compute(alone, None), x, mask).data
        return fill_up(output, x.shape[2:])

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        if mask is not None:
            return {name: self._each(name, x, mask) for name in ("small_weight", "weight")}
        x = self._large_enough(x)
        key = self.key_norm(self.key(region_means(x, None, self.regions)))
        query = self.query_norm(self.query(x)) * (self.in_channels // self.heads) ** -0.5
        query, key = (t.unflatten(1, (self.heads, -1)).flatten(3) for t in (query, key))
        affinity = torch.einsum("ngcp,ngcr->ngrp", query, key).flatten(0, 1)
        logits = self.proj(affinity.unflatten(2, x.shape[2:])).unflatten(0, (-1, self.heads))
        weights = []
        for i, part in enumerate(logits.split([prod(size) for size in self.sizes], 2)):
            if self.position_bias:
                part = part + self._bias(i, x.shape[2:]).to(part.dtype)
            weights.append(torch.softmax(part, 2).unflatten(2, self.sizes[i]))
        return {"small_weight": weights[0], "weight": weights[1]}

    def _each(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        """What `generate` makes of each sample alone, (N, heads, *K, *L)."""
        shape = (self.heads, *self.sizes[name == "weight"])
        alone = lambda sample: self.generate(sample, None)[name].flatten(1, 1 + self.rank)
        return each_size(alone, x, mask).data.unflatten(1, shape)

    def _bias(self, i: int, size: torch.Size) -> Tensor:
        """The position bias of kernel i for input of spatial shape `size`: (heads, taps, *size)."""
        table = self.position_bias[i]
        for k, length in zip(self.sizes[i], size, strict=True):
            place = torch.arange(length, device=table.device).unsqueeze(1)
            start = (place - k // 2).clamp(0, length - k)
            index = start - place + k - 1 + torch.arange(k, device=table.device)
            table = table.movedim(1, -1)[..., index]
        taps, places = range(2, 2 + 2 * self.rank, 2), range(1, 1 + 2 * self.rank, 2)
        return table.permute(0, *taps, *places).flatten(1, self.rank)

    def convolve(self, x: Tensor, small_weight: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        value = self.value_norm(self.value(self._large_enough(x)))
        halves = zip(value.chunk(2, 1), (small_weight, weight), strict=True)
        output = torch.cat([conv_inside(v, w) for v, w in halves], 1)
        if output.shape[2:] != x.shape[2:]:
            output = region_means(output, None, x.shape[2:])
        return self.add_bias(self.fuse_norm(self.fuse(output)))

    def _large_enough(self, x: Tensor) -> Tensor:
        """x (N, C, *L), enlarged until the kernel fits."""
        size = x.shape[2:]
        if 0 in size:
            raise ValueError(f"contmix: input of spatial shape {tuple(size)} has no position")
        if all(k <= length for k, length in zip(self.kernel_size, size, strict=True)):
            return x
        missing = [k / length for k, length in zip(self.kernel_size, size, strict=True)]
        d = missing.index(max(missing))
        need, have = self.kernel_size[d], size[d]
        larger = [length * need // have for length in size]
        return F.interpolate(x, larger, mode=LINEAR[self.rank], align_corners=False)

    def init_from(self, conv: ConvNd) -> None:
        raise ValueError(
            "contmix's kernels come out of a softmax, are positive and sum to 1, and its windows "
            "stay inside the input; no padded convolution with a trained kernel does that"
        )

    @classmethod
    def limits(cls, arguments: dict[str, Any]) -> dict[str, str]:
        sizes = "each sample's real size decides its windows, and to what size it is enlarged"
        return super().limits(arguments) | {"compile_mask": sizes}

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 8, "kernel_size": 5, "padding": 2}
            | {"heads": 2, "small_size": 3, "regions": 2},
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "bias": False}
            | {"heads": 1, "small_size": 1, "regions": 3, "position_bias": False},
        ]


def conv_inside(x: Tensor, weight: Tensor, d: int = 0) -> Tensor:
    """conv_per_position of x (N, C, *L), windows moved inward at the borders; output (N, C, *L).

    weight (N, G, *K, *L). From dimension d on: the positions before, in and after the middle.
    """
    rank = x.dim() - 2
    kernel = weight.shape[2 : 2 + rank]
    if torch.compiler.is_exporting():  # the parts of all dimensions make a large graph
        return _inside_by_taps(x, weight, kernel)
    if d == rank:
        size = zip(x.shape[2:], kernel, weight.shape[2 + rank :], strict=True)
        stride = [1 if length == k + out - 1 else k for length, k, out in size]
        return conv_per_position(x, weight, stride)
    axis, k, length = 2 + d, kernel[d], x.shape[2 + d]
    edge = k // 2
    # The windows of a border are all alike: copies of it, one after another.
    copies = [edge if i == axis else 1 for i in range(x.dim())]
    parts = [(x, edge, length - 2 * edge)]
    if edge:
        before, after = x.narrow(axis, 0, k), x.narrow(axis, length - k, k)
        parts = [(before.repeat(copies), 0, edge), *parts]
        parts.append((after.repeat(copies), length - edge, edge))
    outputs = [conv_inside(v, weight.narrow(axis + rank, i, n), d + 1) for v, i, n in parts]
    return torch.cat(outputs, axis)


def _inside_by_taps(x: Tensor, weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """`conv_inside`, a tap after the other."""
    starts = [
        (torch.arange(length, device=x.device) - k // 2).clamp(0, length - k)
        for length, k in zip(x.shape[2:], kernel, strict=True)
    ]
    x = x.unflatten(1, (weight.shape[1], -1))
    taps = weight.unsqueeze(2).flatten(3, 2 + len(kernel))
    parts = []
    for number, tap in enumerate(product(*map(range, kernel))):
        seen = x
        for d, (i, start) in enumerate(zip(tap, starts, strict=True), start=3):
            seen = seen.index_select(d, start + i)
        parts.append(taps[:, :, :, number] * seen)
    return reduce(torch.add, parts).flatten(1, 2)
