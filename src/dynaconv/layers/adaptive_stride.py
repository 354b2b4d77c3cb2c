"""The stride chosen per input: each sample's output has a size of its own."""

from collections.abc import Sequence
from math import ceil, log
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import conv_on_grid
from dynaconv.functional._checks import check_output
from dynaconv.functional.conv_on_grid import sample
from dynaconv.layers.attention import Regulator
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, positive
from dynaconv.layers.costs import add_cost
from dynaconv.masking import Padded, crop, pad_batch, sizes_from_mask
from dynaconv.registry import register_family

UNEXPORTED = "how many positions a sample gets follows its values: no graph has such sizes"


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
    a regulariser needs.

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

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Padded, or with `restore` a tensor (N, C_out, *L_out)."""
        if torch.compiler.is_exporting():
            raise ValueError(f"{type(self).__name__}: {UNEXPORTED}")
        x, mask = self.prepare(input, padding_mask)
        stride = self.generate(x, mask)["stride"]
        add_cost(lambda: (stride.new_tensor(self.stride) / stride).prod(1).mean())
        data, kept = self.strided(x, mask, stride)
        if self.restore:
            data = self.restored(data, stride, self.output_size(tuple(x.shape[2:])))
            return data if input.dim() == x.dim() else data.squeeze(0)
        return Padded(data, kept) if input.dim() == x.dim() else Padded(data[0], kept[0])  # type: ignore[index]

    def strided(self, x: Tensor, mask: Tensor | None, stride: Tensor) -> Padded:
        """Each sample at its own stride; those of one input and output size go together."""
        full = torch.tensor(x.shape[2:]).expand(x.shape[0], self.rank)
        sizes = (full if mask is None else sizes_from_mask(mask).cpu()).tolist()
        outputs = [self.size_at(n, s) for n, s in zip(sizes, stride.tolist(), strict=True)]
        groups: dict[tuple, list[int]] = {}
        for i, key in enumerate(zip(map(tuple, sizes), outputs, strict=True)):
            groups.setdefault(key, []).append(i)
        if not groups:
            size = self.output_size(tuple(x.shape[2:]))
            return Padded(x.new_zeros(0, self.out_channels, *size), x.new_ones(0, *size).bool())
        results: dict[int, Tensor] = {}
        for (size, output), index in groups.items():
            grid = self.positions(output, stride[index])
            part = crop(x[index], size)
            if self.padding_mode != "zeros":  # zeros need not be written: they are read outside
                part, _ = self.pad(part)
            made = conv_on_grid(part, grid, self.weight, self.bias, self.groups)
            results |= zip(index, made, strict=True)
        return pad_batch([results[i] for i in range(x.shape[0])])

    def positions(self, size: tuple[int, ...], stride: Tensor) -> list[Tensor]:
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

    def size_at(self, size: Sequence[int], stride: Sequence[float]) -> tuple[int, ...]:
        """Spatial shape of the output of a sample of spatial shape `size` at `stride`.

        With `restore`, positions up to or beyond the last of the restored output: the result is
        then continuous in the stride, and its gradient without bias from what appears or vanishes.
        """
        # A last position may lie a rounding error beyond the input.
        check_output(type(self).__name__, tuple(size), self.geometry())
        if self.restore:
            wanted = self.output_size(tuple(size))
            ends = [(n - 1) * s0 / s for n, s0, s in zip(wanted, self.stride, stride, strict=True)]
            return tuple(ceil(end - 1e-5) + 1 for end in ends)
        dense = self.geometry()._replace(stride=(1,) * self.rank).output_size(size)
        dense = tuple(size) if self.padding == "same" else dense
        return tuple(int((n - 1) / s + 1e-5) + 1 for n, s in zip(dense, stride, strict=True))

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
    def limits(cls, arguments: dict[str, Any]) -> dict[str, str]:
        return super().limits(arguments) | dict.fromkeys(("export", "onnx"), UNEXPORTED)

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
