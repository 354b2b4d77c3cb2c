"""deform_conv in ATen: rows of channels gathered and weighted by embedding_bag, tap by tap.

With the input laid out as rows (position, channels), a sampled value is a weighted sum of the 2^D
rows around it, which is what embedding_bag computes in one pass. Each tap's values go straight into
a matrix product that accumulates the output, so that no unfolded copy of the input is held. A few
samples go through together, as many as fit into CHUNK numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends import reference
from dynaconv.backends.operator import GEOMETRY, Operator, few_at_a_time, output_like
from dynaconv.shapes import Geometry

# Sampled numbers of one tap that are held at a time: 4 MB in float32.
CHUNK = 2**20


@dataclass
class Sampling:
    """Where the taps of some samples read, and with which factors.

    share[d][u] and inside[d][u] are (B, G, K, P): the part of the upper (u = 1) or lower neighbour
    along dimension d, and whether it lies in the input. index and factor are (B, G, K, P, 2^D),
    for rows of B * G inputs one after the other.
    """

    share: list[list[Tensor]]
    inside: list[list[Tensor]]
    index: Tensor
    factor: Tensor
    modulation: Tensor | None

    @classmethod
    def of(
        cls,
        offset: Tensor,
        modulation: Tensor | None,
        length: tuple[int, ...],
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> "Sampling":
        rank, taps, size = len(length), prod(geometry.kernel), tuple(offset.shape[2:])
        batch = len(offset)
        shifts = offset.unflatten(1, (-1, taps, rank)).flatten(4)  # (B, G, K, D, P)
        share, inside, point = [], [], []
        bases = reference.tap_positions(geometry, size, offset.device, offset.dtype)
        for d, base in enumerate(bases):
            position = shifts[:, :, :, d] + base.expand(-1, *size).flatten(1)
            lower = position.floor()
            upper_share = position - lower
            lower = lower.nan_to_num(0)
            within = [(lower >= -u) & (lower <= length[d] - 1 - u) for u in (0, 1)]
            nan = position.isnan()
            parts = (1 - upper_share, upper_share)
            share.append(
                [part.where(w | nan, 0).to(dtype) for part, w in zip(parts, within, strict=True)]
            )
            inside.append(within)
            lower = lower.clamp(-1, length[d] - 1).long()
            point.append([lower.clamp(min=0), (lower + 1).clamp(max=length[d] - 1)])
        groups = shifts.shape[1]
        first = torch.arange(batch * groups, device=offset.device) * prod(length)
        first = first.reshape(batch, groups, 1, 1)
        index, factor = [], []
        if modulation is not None:
            modulation = modulation.unflatten(1, (groups, taps)).flatten(3).to(dtype)
        for corner in product((0, 1), repeat=rank):
            i, f = point[0][corner[0]], share[0][corner[0]]
            for d in range(1, rank):
                i, f = i * length[d] + point[d][corner[d]], f * share[d][corner[d]]
            index.append(i + first)
            factor.append(f if modulation is None else f * modulation)
        return cls(share, inside, torch.stack(index, -1), torch.stack(factor, -1), modulation)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the gradient of `factor` those of offset and modulation, as their arguments lie."""
        rank = len(self.share)
        corners = list(product((0, 1), repeat=rank))
        part = lambda corner, d: self.share[d][corner[d]]
        by_offset = []
        for d in range(rank):
            total = torch.zeros_like(grad[..., 0])
            for c, corner in enumerate(corners):
                others = prod((part(corner, e) for e in range(rank) if e != d), start=grad[..., c])
                slope = others.where(self.inside[d][corner[d]], 0)
                total = total + slope if corner[d] else total - slope
            by_offset.append(total if self.modulation is None else total * self.modulation)
        offset = torch.stack(by_offset, 3)
        if self.modulation is None:
            return offset.flatten(1, 3), None
        by_corner = [
            prod((part(corner, d) for d in range(rank)), start=grad[..., c])
            for c, corner in enumerate(corners)
        ]
        return offset.flatten(1, 3), torch.stack(by_corner).sum(0).flatten(1, 2)


@dataclass
class Part:
    """Some samples of a call: their rows, where they sample, and shapes."""

    samples: slice
    rows: Tensor
    sampling: Sampling
    batch: int
    groups: int
    positions: int

    def gather(self, tap: int) -> Tensor:
        """What the tap sees at each position: (groups, B * P, C / groups)."""
        index, factor = self.sampling.index[:, :, tap], self.sampling.factor[:, :, tap]
        seen = torch.nn.functional.embedding_bag(
            index.reshape(-1, index.shape[-1]),
            self.rows,
            mode="sum",
            per_sample_weights=factor.reshape(-1, factor.shape[-1]),
        )
        return self.to_weight_groups(seen)

    def to_weight_groups(self, seen: Tensor) -> Tensor:
        """(B * G_offset * P, c) -> (groups, B * P, C / groups)."""
        offset_groups = self.sampling.index.shape[1]
        seen = seen.reshape(self.batch, offset_groups, self.positions, -1).transpose(1, 2)
        return seen.reshape(self.batch * self.positions, self.groups, -1).transpose(0, 1)

    def to_offset_groups(self, seen: Tensor) -> Tensor:
        """(groups, B * P, C / groups) -> (B * G_offset * P, c)."""
        offset_groups = self.sampling.index.shape[1]
        seen = seen.transpose(0, 1).reshape(self.batch, self.positions, offset_groups, -1)
        return seen.transpose(1, 2).flatten(0, 2)

    def scatter(self, rows: Tensor, grad: Tensor, tap: int) -> None:
        """Adds to the rows' gradient what comes from one tap; grad (B * G_offset * P, c)."""
        index, factor = self.sampling.index[:, :, tap], self.sampling.factor[:, :, tap]
        spread = grad.unsqueeze(1) * factor.reshape(len(grad), -1, 1)
        rows.scatter_add_(0, index.reshape(-1, 1).expand(-1, rows.shape[1]), spread.flatten(0, 1))

    def factor_gradient(self, grad: Tensor, tap: int) -> Tensor:
        """d factor (B, G, P, 2^D): each row around a position times that position's gradient."""
        index = self.sampling.index[:, :, tap]
        corners = index.shape[-1]
        bags = torch.arange(len(grad), device=grad.device)
        gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, self.rows, index.reshape(-1), bags * corners, bags.repeat_interleave(corners), 0
        )
        return gradient.reshape(index.shape)


def _parts(
    input: Tensor,
    offset: Tensor,
    modulation: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> Iterator[Part]:
    """The batch, a few samples at a time."""
    batch, channels, *length = input.shape
    positions = prod(offset.shape[2:])
    offset_groups = offset.shape[1] // (prod(geometry.kernel) * len(length))
    dtype = _working_dtype(input)
    size = max(1, CHUNK // (channels * max(positions, prod(length))))
    for samples in few_at_a_time(batch, size):
        x = input[samples].flatten(2).unflatten(1, (offset_groups, -1))
        rows = x.transpose(2, 3).to(dtype).reshape(-1, channels // offset_groups)
        part_modulation = None if modulation is None else modulation[samples]
        sampling = Sampling.of(offset[samples], part_modulation, tuple(length), geometry, dtype)
        yield Part(samples, rows, sampling, len(x), groups, positions)


def _working_dtype(input: Tensor) -> torch.dtype:
    """Half types are gathered and added up in float32."""
    return torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype


def _weights(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(K, groups, C / groups, C_out / groups), one matrix a tap and group."""
    grouped = weight.flatten(2).unflatten(0, (groups, -1)).to(dtype)
    return grouped.permute(3, 0, 2, 1).contiguous()


def _geometry(weight: Tensor, settings: tuple) -> Geometry:
    return Geometry(tuple(weight.shape[2:]), *map(tuple, settings[:3]))


def _shape(input: Tensor, offset: Tensor, weight: Tensor, *rest: object) -> tuple[int, ...]:
    return (input.shape[0], weight.shape[0], *offset.shape[2:])


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *settings: Any,
) -> Tensor:
    geometry, groups = _geometry(weight, settings), settings[3]
    output = output_like(input, _shape(input, offset, weight))
    dtype = _working_dtype(input)
    matrices = _weights(weight, groups, dtype)
    start = weight.new_zeros(len(weight)) if bias is None else bias
    for part in _parts(input, offset, modulation, geometry, groups):
        total = start.to(dtype).reshape(groups, 1, -1).repeat(1, part.batch * part.positions, 1)
        for tap, matrix in enumerate(matrices):
            total.baddbmm_(part.gather(tap), matrix)
        total = total.unflatten(1, (part.batch, -1)).permute(1, 0, 3, 2)
        output[part.samples] = total.reshape(part.batch, len(weight), *offset.shape[2:])
    return output


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    *settings, mask = rest
    geometry, groups = _geometry(weight, tuple(settings)), settings[3]
    dtype = _working_dtype(input)
    matrices = _weights(weight, groups, dtype)
    gx, goffset = torch.zeros_like(input), torch.zeros_like(offset)
    gweight = torch.zeros_like(matrices)
    gmodulation = None if modulation is None else torch.zeros_like(modulation)
    for part in _parts(input, offset, modulation, geometry, groups):
        g = grad[part.samples].flatten(2).unflatten(1, (groups, -1)).to(dtype)
        g = g.permute(1, 0, 3, 2).reshape(groups, part.batch * part.positions, -1)
        grows, gfactor = torch.zeros_like(part.rows), torch.zeros_like(part.sampling.factor)
        for tap, matrix in enumerate(matrices):
            if mask[2]:
                gweight[tap].baddbmm_(part.gather(tap).transpose(1, 2), g)
            if mask[0] or mask[1] or mask[4]:
                gseen = part.to_offset_groups(torch.bmm(g, matrix.transpose(1, 2)))
            if mask[0]:
                part.scatter(grows, gseen, tap)
            if mask[1] or mask[4]:
                gfactor[:, :, tap] = part.factor_gradient(gseen, tap)
        if mask[0]:
            rows = grows.reshape(part.batch, -1, prod(input.shape[2:]), grows.shape[1])
            gx[part.samples] = rows.transpose(2, 3).reshape(gx[part.samples].shape)
        if mask[1] or mask[4]:
            o, m = part.sampling.gradients(gfactor)
            goffset[part.samples] = o.reshape(goffset[part.samples].shape)
            if gmodulation is not None and m is not None:
                gmodulation[part.samples] = m.reshape(gmodulation[part.samples].shape)
    gweight = gweight.permute(1, 3, 2, 0).reshape(weight.shape).to(weight.dtype)
    gbias = grad.flatten(2).sum((0, 2)) if mask[3] else None
    return [gx, goffset, gweight, gbias, gmodulation]


def _reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    *settings: Any,
) -> Tensor:
    geometry, groups = _geometry(weight, settings), settings[3]
    return reference.deform_conv(input, offset, weight, bias, modulation, geometry, groups)


def _flops(input: tuple, offset: tuple, weight: tuple, *rest: Any) -> int:
    """Interpolation at every tap, and the convolution."""
    rank, positions = len(input) - 2, input[0] * prod(offset[2:])
    sampling = 2**rank * positions * input[1] * prod(weight[2:])
    return 2 * (sampling + positions * prod(weight))


operator = Operator(
    "deform_conv",
    ("input", "offset", "weight", "bias?", "modulation?"),
    ("weight", "bias"),
    f"{GEOMETRY}, SymInt groups",
    _forward,
    _backward,
    _reference,
    _shape,
    _flops,
)


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    geometry: Geometry,
    groups: int,
) -> Tensor:
    return operator(input, offset, weight, bias, modulation, *map(list, geometry[1:]), groups)
