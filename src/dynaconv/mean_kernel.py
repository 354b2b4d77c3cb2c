"""What a dynamic layer makes of its inputs on average, and the kernel that this amounts to."""

import copy
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.layers.base import DynamicConv
from dynaconv.static_form import LeastSquares, StaticForm


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

    Read off from what it makes of noise. None where the kernel has another size on that.
    """
    layer, held = form.layer, copy.copy(form.layer)

    def generate(x: Tensor, mask: Tensor | None, *more: Any) -> dict[str, Tensor]:
        made = layer.generate(x, mask, *more)
        return {name: quantities.mean(name).to(q.dtype).expand(q.shape) for name, q in made.items()}

    held.generate = generate  # type: ignore[method-assign]
    noise = _noise(form)
    if layer.static_geometry(tuple(noise.shape[2:])) != form.geometry:
        return None
    squares = LeastSquares(form)
    squares.add(noise, held.forward(noise))
    return squares.solve()


def _noise(form: StaticForm) -> Tensor:
    """(1, C_in, *L), with windows for twice the unknowns."""
    rank, like = form.layer.rank, next(form.layer.parameters())
    side = ceil((2 * form.unknowns) ** (1 / rank))
    kernel, stride, _, dilation = form.geometry
    if form.transposed:
        size = [side // s + k for s, k in zip(stride, kernel, strict=True)]
    else:
        size = [side * s + d * k for s, d, k in zip(stride, dilation, kernel, strict=True)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, form.layer.in_channels, *size, generator=generator)
    return noise.to(like.device, like.dtype)
