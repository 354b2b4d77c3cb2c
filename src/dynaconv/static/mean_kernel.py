"""What a dynamic layer makes of its inputs on average, and the kernel that this amounts to."""

import copy
from itertools import product
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.layers.base import DynamicConv
from dynaconv.static.form import StaticForm


class Quantities:
    """Means and spreads of a layer's dynamic quantities over samples and positions."""

    def __init__(self, layer: DynamicConv) -> None:
        self.layer = layer
        self.over: dict[str, tuple[int, ...]] = {}
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, x: Tensor) -> None:
        """Takes in what the layer makes of x (N, C_in, *L)."""
        made = self.layer.generate(x, None)
        if not self.over:
            self.over = self._averaged(x[:1])
        for name, quantity in made.items():
            over, quantity = self.over[name], quantity.double()
            total = quantity.sum(over, keepdim=True)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.squares[name] = self.squares.get(name, 0.0) + quantity.square().sum().item()
            count = prod(quantity.shape[d] for d in over)
            self.counts[name] = self.counts.get(name, 0) + count

    def _averaged(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Dimensions to average over: the samples', and those that grow with the input."""
        wider = F.pad(x, [w for s in reversed(self.layer.stride) for w in (0, s)])
        small, large = (self.layer.generate(seen, None) for seen in (x, wider))
        return {
            name: (0, *(d for d in range(1, q.dim()) if q.shape[d] != large[name].shape[d]))
            for name, q in small.items()
        }

    def mean(self, name: str) -> Tensor:
        """The mean, with sizes 1 where it is taken over samples or positions."""
        return self.sums[name] / self.counts[name]

    def spread(self) -> dict[str, tuple[float, float]]:
        """By name: root mean square, and that of the distance to the mean."""
        found = {}
        for name, count in self.counts.items():
            mean = self.mean(name)
            whole = self.squares[name] / (count * mean.numel())
            off = max(whole - mean.square().mean().item(), 0.0)
            found[name] = (whole**0.5, off**0.5)
        return found


def mean_kernel(form: StaticForm, quantities: Quantities) -> tuple[Tensor, Tensor] | None:
    """W (C_out, C_in / groups, *K) and b (C_out,) of the layer with its quantities held at means.

    Read off from how it answers impulses. None where the kernel has another size on those.
    """
    layer, held, comb = form.layer, copy.copy(form.layer), Comb(form)
    if layer.static_geometry(comb.size) != form.geometry:
        return None

    def generate(x: Tensor, mask: Tensor | None, *more: Any) -> dict[str, Tensor]:
        made = layer.generate(x, mask, *more)
        return {name: quantities.mean(name).to(q.dtype).expand(q.shape) for name, q in made.items()}

    held.generate = generate  # type: ignore[method-assign]
    like = next(layer.parameters())
    answer = lambda x: held.forward(x.to(like.device, like.dtype))[0].double()
    rest = answer(torch.zeros(1, layer.in_channels, *comb.size))
    weight = rest.new_zeros(form.kernel_shape)
    for phase in comb.phases:
        comb.read(answer(comb.impulses(phase)) - rest, phase, weight)
    middle: Any = (n // 2 for n in rest.shape[1:])
    return weight, rest[(slice(None), *middle)]


class Comb:
    """An impulse for each channel of a group, so far apart that a kernel sees one at a time.

    With a stride an impulse meets some taps only, so it is moved through all `phases`.
    """

    def __init__(self, form: StaticForm) -> None:
        self.form, self.rank = form, form.layer.rank
        self.channels = form.kernel_shape[1]
        kernel, stride, padding, dilation = form.geometry
        self.stride = (1,) * self.rank if form.transposed else stride
        self.side = ceil(self.channels ** (1 / self.rank))
        extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        # Whole strides, so that all impulses are at one phase.
        whole = lambda lengths: [-(-n // s) * s for n, s in zip(lengths, self.stride, strict=True)]
        self.spacing = whole(extent)
        self.margin = whole(e + p for e, p in zip(extent, padding, strict=True))
        pairs = zip(self.margin, self.spacing, self.stride, strict=True)
        self.size = tuple(2 * m + self.side * gap + s for m, gap, s in pairs)
        self.phases = list(product(*map(range, self.stride)))

    def impulses(self, phase: tuple[int, ...]) -> Tensor:
        """(1, C_in, *size), 1 at each channel's place."""
        channels = torch.arange(self.channels)
        cells = torch.unravel_index(channels, (self.side,) * self.rank)
        starts = zip(cells, self.margin, self.spacing, phase, strict=True)
        places = [m + gap * cell + shift for cell, m, gap, shift in starts]
        comb = torch.zeros(self.form.groups, self.channels, *self.size)
        comb[(slice(None), channels, *places)] = 1
        return comb.flatten(0, 1).unsqueeze(0)

    def read(self, answer: Tensor, phase: tuple[int, ...], weight: Tensor) -> None:
        """Writes the taps that the impulses met into W, from the answer (C_out, *L_out)."""
        taps, places = zip(*map(self._met, range(self.rank), phase), strict=True)
        index: list[Any] = []
        for d, place in enumerate(places):
            along = [1] * (2 * self.rank)
            along[d], along[self.rank + d] = place.shape
            index.append(place.reshape(along))
        seen = answer[(slice(None), *index)].flatten(1, self.rank)[:, : self.channels]
        met: Any = torch.meshgrid(*taps, indexing="ij")
        weight[(slice(None), slice(None), *met)] = seen

    def _met(self, d: int, shift: int) -> tuple[Tensor, Tensor]:
        """Along dimension d: the taps, and where impulse i meets tap j, (side, taps)."""
        kernel, stride, padding, dilation = (part[d] for part in self.form.geometry)
        taps = torch.arange(kernel)
        starts = self.margin[d] + self.spacing[d] * torch.arange(self.side).unsqueeze(1)
        if self.form.transposed:
            return taps, starts * stride - padding + dilation * taps
        taps = taps[(shift + padding - dilation * taps) % stride == 0]
        return taps, (starts + shift + padding - dilation * taps) // stride
