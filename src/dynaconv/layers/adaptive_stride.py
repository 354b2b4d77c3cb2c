"""The stride chosen per input: each sample's output has a size of its own."""

from collections.abc import Sequence
from math import ceil, log
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.dispatch import values_unknown
from dynaconv.functional import conv_on_grid
from dynaconv.functional._checks import check_output
from dynaconv.functional.conv_on_grid import sample
from dynaconv.layers.attention import Regulator
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, positive
from dynaconv.layers.costs import add_cost
from dynaconv.layers.tracing import one_node
from dynaconv.masking import Padded, crop, mask_from_sizes, pad_batch, sizes_from_mask
from dynaconv.registry import register_family

UNIT = 2**20  # of a position, in which the largest output is counted


@register_family(
    "adaptive_stride", primitive="conv_on_grid", paper="dynaconv, after Riad, ICLR 2022"
)
class AdaptiveStrideConv(DynamicConv):
    """A convolution whose stride each sample chooses within bounds, a real number a dimension.

        s = clamp(stride R ** tanh(fc(relu(squeeze([mean(x), mean(|dx|)])))), low, high)
        y[p] = b + sum_k W[k] x(s p + d k - padding),   p = 0 ... floor((L + 2 padding - span) / s)

    x lies between its points by linear interpolation, so y is differentiable in s; the clamp lets
    the gradient through, so that no stride gets stuck. At first s is `stride`. A sample with twice
    the stride has half the positions a dimension, and costs that much less.

    The output is `Padded`: (N, C_out, *largest L_out), zero where its mask is False.
    `dynaconv.MaskedSequential` takes it from there. With `restore=True` the output is a tensor of
    nn.ConvNd's size, resized back by linear interpolation, for models of any kind (`from_conv`
    and `convert` take that). `with collect_costs() as costs:` around a forward pass collects what
    a regulariser needs. Under torch.compile, torch.export and torch.vmap, where no size can follow
    a value, all samples are computed as far as `low` reaches: nothing is saved there, and `Padded`
    is as large as that.

    Args:
        low, high: bounds of the stride, real numbers.
        restore: resize the output to the size at `stride`.
        reduction: hidden channels of the head over input channels.
        min_hidden: hidden channels of the head at least.
    """

    exact_options = {"restore": True}

    def build(
        self,
        low: float = 1.0,
        high: float = 4.0,
        restore: bool = False,
        reduction: float = 1 / 4,
        min_hidden: int = 8,
    ) -> None:
        positive(low=low, reduction=reduction)
        at_least(1, min_hidden=min_hidden)
        if not low < high or not all(low <= s <= high for s in self.stride):
            raise ValueError(
                f"low={low}, high={high}, stride={self.stride}: give low <= stride <= high"
            )
        self.low, self.high, self.restore = low, high, restore
        self.reach = [log(max(high / s, s / low)) for s in self.stride]
        self.weight = nn.Parameter(self.initial_kernels())
        hidden = max(int(self.in_channels * reduction), min_hidden)
        self.head = Regulator(self.in_channels, hidden, self.rank)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        moved = self.head(x, mask)
        start, reach = moved.new_tensor(self.stride), moved.new_tensor(self.reach)
        stride = start * torch.exp(reach * moved)
        return {"stride": stride + (stride.clamp(self.low, self.high) - stride).detach()}

    @one_node
    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Padded, or with `restore` a tensor (N, C_out, *L_out)."""
        x, mask = self.prepare(input, padding_mask)
        stride = self.generate(x, mask)["stride"]
        add_cost(lambda: (stride.new_tensor(self.stride) / stride).prod(1).mean())
        data, kept = self.strided(x, mask, stride)
        if self.restore:
            data = self.restored(data, stride, self.output_size(tuple(x.shape[2:])))
            return self.finish(data, x, input)
        kept = kept if input.dim() == x.dim() else kept[0]  # type: ignore[index]
        return Padded(self.finish(data, x, input), kept)

    def strided(self, x: Tensor, mask: Tensor | None, stride: Tensor) -> Padded:
        """Each sample at its own stride; those of one input and output size go together."""
        full = torch.tensor(x.shape[2:], device=x.device).expand(x.shape[0], self.rank)
        sizes = full if mask is None else sizes_from_mask(mask)
        outputs = self.sizes_at(sizes, stride)
        if values_unknown():
            return self.strided_together(x, stride, outputs)
        groups: dict[tuple, list[int]] = {}
        for i, key in enumerate(zip(_tuples(sizes), _tuples(outputs), strict=True)):
            groups.setdefault(key, []).append(i)
        if not groups:
            size = self.output_size(tuple(x.shape[2:]))
            return Padded(x.new_zeros(0, self.out_channels, *size), x.new_ones(0, *size).bool())
        results: dict[int, Tensor] = {}
        for (size, output), index in groups.items():
            made = self.strided_alike(crop(x[index], size), stride[index], output)
            results |= zip(index, made, strict=True)
        return pad_batch([results[i] for i in range(x.shape[0])])

    def strided_together(self, x: Tensor, stride: Tensor, outputs: Tensor) -> Padded:
        """All samples at once, computed as far as the lowest stride reaches: no size is a value's.

        outputs (N, D) are the samples' own sizes.
        """
        size = self.largest_size(tuple(x.shape[2:]))
        kept = mask_from_sizes(outputs, size)
        data = self.strided_alike(x, stride, size)
        return Padded(data.masked_fill(~kept.unsqueeze(1), 0), kept)

    def strided_alike(self, x: Tensor, stride: Tensor, size: Sequence[int]) -> Tensor:
        """Samples of one input and output size, each at its own stride (N, D)."""
        check_output(type(self).__name__, tuple(x.shape[2:]), self.geometry())
        grid = self.positions(size, stride)
        if self.padding_mode != "zeros":  # zeros need not be written: they are read outside
            x, _ = self.pad(x)
        return conv_on_grid(x, grid, self.weight, self.bias, self.groups)

    def positions(self, size: Sequence[int], stride: Tensor) -> list[Tensor]:
        """s[n] p + d k - padding for each dimension, (N, L_out, K)."""
        kernel, _, padding, dilation = self.geometry()
        grid = []
        for d in range(self.rank):
            before = padding[d] if self.padding_mode == "zeros" else 0
            p = torch.arange(size[d], device=stride.device, dtype=stride.dtype)
            k = torch.arange(kernel[d], device=stride.device, dtype=stride.dtype)
            start = stride[:, d, None] * p - before
            grid.append(start.unsqueeze(2) + dilation[d] * k)
        return grid

    def sizes_at(self, sizes: Tensor, stride: Tensor) -> Tensor:
        """The outputs' spatial shapes for samples of spatial shapes `sizes`, each (N, D).

        With `restore`, positions up to or beyond the last of the restored output: the result is
        then continuous in the stride, and its gradient without bias from what appears or vanishes.
        """
        last = torch.stack(self.lasts(sizes.unbind(1)), 1) / stride.detach().double()
        # A last position may lie a rounding error beyond the input.
        whole = torch.ceil(last - 1e-5) if self.restore else torch.floor(last + 1e-5)
        return whole.long() + 1

    def largest_size(self, size: tuple[int, ...]) -> list[int]:
        """No output for an input of spatial shape `size` is larger, whatever its stride.

        In whole numbers: inductor takes no size that comes from a real one.
        """
        low = self.low * (1 - 2**-23)  # float32 may have rounded a stride down
        each, more = ceil(UNIT / low), ceil(UNIT * 1e-5)
        return [(last * each + more) // UNIT + 1 + self.restore for last in self.lasts(size)]

    def lasts(self, size: Sequence[Any]) -> list[Any]:
        """Where the last output lies in an input of spatial shape `size`, once a dimension."""
        if self.restore:
            wanted = self.output_size(tuple(size))
            return [(n - 1) * s for n, s in zip(wanted, self.stride, strict=True)]
        dense = self.geometry()._replace(stride=(1,) * self.rank).output_size(size)
        return [n - 1 for n in (size if self.padding == "same" else dense)]

    def restored(self, data: Tensor, stride: Tensor, size: Sequence[int]) -> Tensor:
        """The output (N, C_out, *size) at the positions it would have with the start's stride."""
        grid = []
        for d, length in enumerate(size):
            q = torch.arange(length, device=stride.device, dtype=stride.dtype)
            grid.append(q * (self.stride[d] / stride[:, d, None]))
        return sample(data, grid)

    def output_mask(self, padding_mask: Tensor) -> Tensor:
        if self.restore:
            return super().output_mask(padding_mask)
        raise ValueError(
            "the output's sizes follow the input's values, not its mask alone; "
            "they come with the output: data, mask = layer(input, padding_mask)"
        )

    def init_from(self, conv: ConvNd) -> None:
        """At first every sample has the convolution's own stride."""
        if not self.restore:
            raise ValueError("restore=False gives a padded batch and its mask, not a tensor")
        self.weight.copy_(conv.weight)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "restore": True},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "stride": 2,
                "groups": 2,
                "bias": False,
                "low": 1.5,
                "high": 3.0,
                "restore": True,
                "min_hidden": 4,
            },
        ]


def _tuples(sizes: Tensor) -> list[tuple[int, ...]]:
    return [tuple(size) for size in sizes.tolist()]
