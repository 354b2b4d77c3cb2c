"""The form of the static convolution that stands for a dynamic layer, and its best kernel."""

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.layers.transposed import Transposed, swap_channels
from dynaconv.shapes import enlarged_size, resolve_padding, windows, zero_padded

# Of the unit diagonal of the windows' second moments: what they do not span stays as it was.
RIDGE = 1e-10
# Values of windows that are held in float64 at a time.
CHUNK = 2**24


class StaticForm:
    """Everything about the static convolution but its weights, for inputs of spatial shape `size`.

    Kernels are those of nn.ConvNd, (C_out, C_in / groups, *K), for transposed layers too.
    """

    def __init__(self, layer: DynamicConv, size: tuple[int, ...]) -> None:
        self.layer, self.geometry = layer, layer.static_geometry(size)
        self.groups = layer.static_groups
        self.transposed = isinstance(layer, Transposed)
        inputs = layer.in_channels // self.groups
        self.kernel_shape = (layer.out_channels, inputs, *self.geometry.kernel)

    @property
    def unknowns(self) -> int:
        """Weights of one output channel, and its bias."""
        return prod(self.kernel_shape[1:]) + 1

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial shape of the output for an input of spatial shape `size`."""
        if self.transposed:
            return enlarged_size(size, self.geometry, self.layer.output_padding)  # type: ignore[arg-type]
        return tuple(size) if self.layer.padding == "same" else self.geometry.output_size(size)

    def windows(self, x: Tensor) -> Tensor:
        """What each output position sees: x (N, C_in, *L) as (N, *L_out, C_in, *K)."""
        rank, geometry = self.layer.rank, self.geometry
        if self.transposed:
            seen = windows(self._spread(x), geometry._replace(stride=(1,) * rank))
            seen = seen.flip(tuple(range(2, 2 + rank)))
        else:
            x, padding = self.layer.pad(x, geometry)
            places = (geometry.kernel, geometry.stride, padding, geometry.dilation)
            x, geometry = resolve_padding(x, *places)
            seen = windows(zero_padded(x, geometry), geometry)
        return seen.movedim(tuple(range(-rank, 0)), tuple(range(1, 1 + rank)))

    def _spread(self, x: Tensor) -> Tensor:
        """x with stride - 1 zeros between its positions, and around them what a window sees."""
        kernel, stride, padding, dilation = self.geometry
        spread = x.new_zeros(
            *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))
        )
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
        extra: tuple[int, ...] = self.layer.output_padding  # type: ignore[assignment]
        before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        pairs = [(b, b + e) for b, e in zip(before, extra, strict=True)]
        return F.pad(spread, [width for pair in reversed(pairs) for width in pair])

    def make(self, weight: Tensor, bias: Tensor | None) -> ConvNd:
        """The nn.ConvNd (or nn.ConvTransposeNd), in the layer's mode, dtype and place."""
        layer, geometry = self.layer, self.geometry
        like = next(layer.parameters())
        extra = {"output_padding": layer.output_padding} if self.transposed else {}
        conv = layer.static[layer.rank](
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel_size=geometry.kernel,
            stride=geometry.stride,
            padding=layer.padding if isinstance(layer.padding, str) else geometry.padding,
            dilation=geometry.dilation,
            groups=self.groups,
            bias=bias is not None,
            padding_mode=layer.padding_mode,  # type: ignore[arg-type]
            device=like.device,
            dtype=like.dtype,
            **extra,  # type: ignore[arg-type]
        )
        with torch.no_grad():
            conv.weight.copy_(swap_channels(weight, self.groups, 0) if self.transposed else weight)
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias)
        return conv.train(layer.training)


class LeastSquares:
    """The kernel and bias whose outputs come closest to those seen, by the normal equations.

    min over W, b of |windows W + b - y|^2, in float64, from any number of calls of `add`.
    """

    def __init__(self, form: StaticForm) -> None:
        self.form, self.count = form, 0
        self.moments: Tensor | None = None
        self.targets: Tensor | None = None
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in x (N, C_in, *L) and its output y (N, C_out, *L_out).

        Of many positions, as many as are plenty, drawn at random.
        """
        total, plenty = y.shape[0] * prod(y.shape[2:]), max(4096, 4 * self.form.unknowns)
        picks = torch.arange(total)
        if total > plenty:
            picks = torch.randperm(total, generator=self.generator)[:plenty]
        for seen, target in self._rows(x, y, picks.to(x.device)):
            moments, targets = seen.mT @ seen, seen.mT @ target
            self.moments = moments if self.moments is None else self.moments + moments
            self.targets = targets if self.targets is None else self.targets + targets
        self.count += len(picks)

    def _rows(self, x: Tensor, y: Tensor, picks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows with a 1 after them, (G, n, D + 1), and outputs (G, n, C_out / G)."""
        groups, views = self.form.groups, self.form.windows(x)
        outputs = y.movedim(1, -1)
        rows = max(1, CHUNK // prod(views.shape[1 + self.form.layer.rank :]))
        for part in picks.split(rows):
            at = torch.unravel_index(part, outputs.shape[:-1])
            seen = views[at].unflatten(1, (groups, -1)).flatten(2).double()
            target = outputs[at].unflatten(1, (groups, -1)).double()
            yield F.pad(seen, (0, 1), value=1).transpose(0, 1), target.transpose(0, 1)

    def solve(self, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """W (C_out, C_in / groups, *K) and b (C_out,) in float64.

        What the windows did not span is left as in `start` (W, b), or at 0.
        """
        if self.moments is None or self.targets is None:
            raise ValueError("no windows were added")
        first = torch.zeros_like(self.targets)
        if start is not None:
            weight, bias = start
            both = torch.cat([weight.flatten(1), bias.unsqueeze(1)], 1)
            first = both.unflatten(0, (self.form.groups, -1)).mT
        diagonal = self.moments.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal, 1).rsqrt().unsqueeze(2)
        normal = scale * self.moments * scale.mT
        normal.diagonal(dim1=1, dim2=2).add_(RIDGE)
        rest = scale * (self.targets - self.moments @ first)
        change = torch.cholesky_solve(rest, torch.linalg.cholesky(normal))
        found = (first + scale * change).mT.flatten(0, 1)
        return found[:, :-1].reshape(self.form.kernel_shape), found[:, -1]
