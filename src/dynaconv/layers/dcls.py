"""DCLS: taps at learned positions inside a large kernel (Khalfaoui-Hassani, ICLR 2023)."""

from itertools import product
from math import prod, sqrt
from typing import Any, Self

import torch
from torch import Tensor, nn

from dynaconv.functional import conv
from dynaconv.layers.base import CONVS, ConvNd, DynamicConv, at_least
from dynaconv.layers.continuous import at_least_float32
from dynaconv.layers.flexconv import widened
from dynaconv.registry import register_family
from dynaconv.shapes import Geometry

# What a tap spreads over at least: the published sigma_0 of each interpolation.
LEAST = {"linear": 1.0, "triangle": 1.0, "gauss": 0.27}
EPSILON = 1e-7


@register_family("dcls", primitive="conv", paper="Khalfaoui-Hassani et al., ICLR 2023")
class DCLSConv(DynamicConv):
    """A convolution with few taps, whose positions in the kernel are learned.

        K[o, c, i] = sum_t W[o, c, t] S(i - P[o, c, t]) / (sum_j S(j - P[o, c, t]) + 1e-7)
        "gauss":     S(u) = exp(-sum_d (u_d / (0.27 + |width_d|))^2 / 2)
        "linear":    S(u) = prod_d max(0, 1 - |u_d|)
        "triangle":  S(u) = prod_d max(0, 1 + |width_d| - |u_d|)
        y = b + K * x,    i over the extent E = dilation (kernel_size - 1) + 1

    A dilated convolution whose taps left their grid: give the arguments of one, or, as published,
    the extent as kernel_size and the number of taps. `positions` (D, C_out, C_in / groups, taps)
    count from the kernel's centre, in training each call first moves them back into the kernel.
    "linear" is the paper's (v1 in its code), the other two are of its sequel (ICML workshops 2023),
    where Gaussians spread taps best. Taps that are not needed lose their weight, they do not come
    back: `size` can grow with the data, and hardly shrinks.

    The published code counts the dimensions backwards and confuses the sides of kernels that are
    not square; here dimension d is the input's. Its triangles start at width 0, where |width| has
    no slope and they stay; here they start as the Gaussians do. Between whole positions "linear"
    has the published gradient, on one the slope of the side that leads inwards, not 0, so that
    taps which start on a grid can leave it. The authors train positions at 5 times the rate
    without weight decay (see `dynaconv.parameter_groups` for the rate), and share them between
    layers of one stage: `second.positions = first.positions`.

    Args:
        taps: how many; None for as many as kernel_size has.
        interpolation: "gauss", "linear" or "triangle".
    """

    exact_options = {"interpolation": "linear"}
    lr_factors = {"positions": 5.0}

    def build(self, taps: int | None = None, interpolation: str = "gauss") -> None:
        taps = prod(self.kernel_size) if taps is None else taps
        at_least(1, taps=taps)
        if interpolation not in LEAST:
            raise ValueError(f"interpolation={interpolation!r}; choose from {list(LEAST)}")
        pairs = zip(self.kernel_size, self.dilation, strict=True)
        self.extent = tuple(d * (k - 1) + 1 for k, d in pairs)
        if max(self.extent) == 1:
            raise ValueError("a kernel of one position leaves taps no choice; enlarge kernel_size")
        self.taps, self.interpolation = taps, interpolation
        shape = (*self.kernel_shape()[:2], taps)
        bound = 1 / sqrt(shape[1] * taps)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.positions = nn.Parameter(torch.empty(self.rank, *shape).normal_(0, 0.5))
        self.register_parameter("widths", None)
        if interpolation != "linear":
            self.widths = nn.Parameter(torch.full((self.rank, *shape), 0.23))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.keep_inside()

    @torch.no_grad()
    def keep_inside(self) -> None:
        """Moves positions that left the kernel back to its border."""
        low = [-(extent // 2) for extent in self.extent]
        high = [extent - 1 - extent // 2 for extent in self.extent]
        self.positions.clamp_(_rows(low, self.positions), _rows(high, self.positions))

    def shares(self, d: int) -> Tensor:
        """S along dimension d: (C_out, C_in / groups, taps, E_d)."""
        dtype, extent = at_least_float32(self.positions), self.extent[d]
        i = torch.arange(extent, device=self.positions.device, dtype=dtype)
        position = (self.positions[d].to(dtype) + extent // 2).unsqueeze(-1)
        # What `keep_inside` has not seen, as under fully_shard, has a gradient that leads back.
        position = position + (position.clamp(0, extent - 1) - position).detach()
        if self.widths is None:
            # By halves, not by |u|, whose slope is 0 on a whole position.
            low = position.detach().floor().clamp(max=max(extent - 2, 0))
            high = position - low
            return torch.where(i == low, 1 - high, 0) + torch.where(i == low + 1, high, 0)
        width = LEAST[self.interpolation] + self.widths[d].to(dtype).abs().unsqueeze(-1)
        if self.interpolation == "triangle":
            return (width - (i - position).abs()).relu()
        return torch.exp(-0.5 * ((i - position) / width).square())

    def kernel(self) -> Tensor:
        """K, (C_out, C_in / groups, *E)."""
        shares = [self.shares(d) for d in range(self.rank)]
        total = torch.stack([s.sum(-1) for s in shares]).prod(0) + EPSILON
        letters = "xyz"[: self.rank]
        equation = ",".join(["oct", *(f"oct{letter}" for letter in letters)]) + f"->oc{letters}"
        weight = self.weight.to(total.dtype) / total
        return torch.einsum(equation, weight, *shares).to(self.weight.dtype)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """For every sample the same, means over the channels: positions (N, taps, D), and size.

        `size` (N, D) is what the taps of a kernel span, in positions of the input.
        """
        positions = self.positions.to(at_least_float32(self.positions))
        span = positions.amax(-1) - positions.amin(-1)
        found = {"size": 1 + span.mean((1, 2)), "positions": positions.mean((1, 2)).t()}
        return {name: t.expand(x.shape[0], *t.shape) for name, t in found.items()}

    def static_geometry(self, size: tuple[int, ...]) -> Geometry:
        return self.geometry()._replace(kernel=self.extent, dilation=(1,) * self.rank)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.training:
            self.keep_inside()
        x, padding = self.pad(x)
        settings = (self.stride, padding, 1, self.groups)
        return conv(x, self.kernel(), self.bias, *settings)

    @classmethod
    def like(cls, conv: ConvNd, room: int = 0, **options: Any) -> Self:
        """`room`: positions that taps get beyond each end of `conv`'s kernel, to move into."""
        if room and isinstance(conv, CONVS[cls.rank]):
            options = {"taps": prod(conv.kernel_size)} | options
        return super().like(widened(conv, room, cls.rank), **options)

    def init_from(self, conv: ConvNd) -> None:
        """One tap on each of the convolution's, with the weights that interpolate to its own."""
        if self.taps != prod(conv.kernel_size):
            raise ValueError(
                f"taps={self.taps}: a start from a kernel of {tuple(conv.kernel_size)} needs one "
                f"tap for each of its {prod(conv.kernel_size)}"
            )
        pairs = list(zip(conv.kernel_size, conv.dilation, self.extent, strict=True))
        starts = [(e - d * (k - 1) - 1) // 2 for k, d, e in pairs]
        places = [range(s, s + d * k, d) for s, (k, d, e) in zip(starts, pairs, strict=True)]
        centre = torch.tensor([e // 2 for e in self.extent])
        grid = torch.tensor(list(product(*places))) - centre
        self.positions.copy_(grid.t()[:, None, None])
        shape = conv.weight.shape[:2]
        target = torch.zeros(*shape, *self.extent, dtype=torch.float64, device=conv.weight.device)
        inside = tuple(slice(p.start, p.stop, p.step) for p in places)
        target[(slice(None), slice(None), *inside)] = conv.weight.double()
        target, spread = target.flatten(2).flatten(0, 1).t(), self.spread().double()
        solution = torch.linalg.lstsq(spread, target).solution
        if not torch.allclose(spread @ solution, target, rtol=1e-10, atol=1e-12):
            raise ValueError(
                f"{self.interpolation} interpolation fills the holes of a dilated kernel and the "
                "room around it; interpolation='linear' starts as this convolution"
            )
        self.weight.copy_(solution.t().unflatten(0, shape))

    def spread(self) -> Tensor:
        """Of the first channels: what each tap adds to the kernel at weight 1, (prod(E), taps)."""
        shares = [self.shares(d)[0, 0] for d in range(self.rank)]
        added = shares[0]
        for share in shares[1:]:
            added = (added.unsqueeze(-1) * share.unsqueeze(1)).flatten(1)
        total = torch.stack([s.sum(-1) for s in shares]).prod(0) + EPSILON
        return (added / total.unsqueeze(1)).t()

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 2,
                "stride": 2,
                "padding": 2,
                "dilation": (3,) * rank,
                "groups": 2,
                "interpolation": "linear",
            },
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 3,
                "groups": 4,
                "bias": False,
                "taps": 5,
                "interpolation": "triangle",
            },
        ]


def _rows(values: list[int], like: Tensor) -> Tensor:
    """`values`, one for each of the rows of `like`; sharded as that is."""
    one, dtype, device = (1,) * (like.ndim - 1), like.dtype, like.device
    rows = torch.stack([torch.full(one, v, dtype=dtype, device=device) for v in values])
    if hasattr(like, "device_mesh") and hasattr(like, "placements"):
        from torch.distributed.tensor import distribute_tensor  # half a second

        rows = rows.expand_as(like)
        return distribute_tensor(rows, like.device_mesh, like.placements, src_data_rank=None)
    return rows
