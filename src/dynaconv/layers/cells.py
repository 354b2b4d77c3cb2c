"""A warehouse: kernel cells that one or more layers mix (KernelWarehouse, Li, ICML 2024)."""

from collections.abc import Sequence
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynaconv.layers.base import positive


class Share(NamedTuple):
    """A layer's part in a warehouse of n cells: `own` cells from `first` on are its own."""

    first: int
    own: int
    assigned: Tensor  # (m,), for each mixture the cell that beta gives it, n for none


class Warehouse(nn.Module):
    """Cells (n, c_out, c_in, *k) and how they are dealt out to the layers that mix them.

    c_out and c_in are the greatest common divisors of the kernels' shapes, times a ratio; k is one
    tap, or the whole kernel. A kernel of m cells brings budget * m cells into the warehouse.

    Args:
        kernels: the layers' kernel shapes (C_out, C_in / groups, *K), in their order.
        budget: the paper's b: how many cells there are for each one that the kernels are cut into;
            a whole number, or 1 over one.
        in_ratio, out_ratio: a cell's channels over the common divisor of the kernels' channels.
        spatial_partition: cells of one tap; False leaves the taps of a kernel together.

    Raises:
        ValueError: shapes that cannot be cut alike, or a budget that deals out no whole cells.
    """

    def __init__(
        self,
        kernels: Sequence[tuple[int, ...]],
        budget: float = 1.0,
        in_ratio: float = 1.0,
        out_ratio: float = 1.0,
        spatial_partition: bool = True,
    ) -> None:
        super().__init__()
        positive(budget=budget, in_ratio=in_ratio, out_ratio=out_ratio)
        taps = {kernel[2:] for kernel in kernels}
        if not spatial_partition and len(taps) > 1:
            raise ValueError(
                f"kernels of sizes {sorted(taps)} share cells of one tap only; leave "
                "spatial_partition=True, or give them warehouses of their own"
            )
        cell = (
            _part(gcd(*(kernel[0] for kernel in kernels)), out_ratio, "out_ratio"),
            _part(gcd(*(kernel[1] for kernel in kernels)), in_ratio, "in_ratio"),
            *((1,) * len(kernels[0][2:]) if spatial_partition else kernels[0][2:]),
        )
        places = [one_to_one(prod(kernel) // prod(cell), budget) for kernel in kernels]
        counts = [count for _, count in places]
        total = sum(counts)
        self.shares = []
        for i, (place, count) in enumerate(places):
            first = sum(counts[:i])
            assigned = torch.tensor([total if p < 0 else first + p for p in place])
            self.shares.append(Share(first, count, assigned))
        cells = torch.empty(total, *cell)
        for first, own, _ in self.shares:
            brought = cells[first : first + own].flatten(0, 1)
            nn.init.kaiming_normal_(brought, mode="fan_out", nonlinearity="relu")
        self.cells = nn.Parameter(cells)

    def extra_repr(self) -> str:
        return f"{tuple(self.cells.shape)}, layers={len(self.shares)}"


def one_to_one(mixtures: int, budget: float) -> tuple[list[int], int]:
    """beta: which of its layer's own cells each mixture starts from, and how many cells these are.

    From budget 1 on every mixture has one. Below, one mixture in 1 / budget has, another one from
    each row of 1 / budget to the next; the others start from none, -1.
    """
    many = max(budget, 1 / budget)
    if abs(many - round(many)) > 1e-6 * many:
        raise ValueError(f"budget={budget} must be a whole number, or 1 over a whole number")
    many = round(many)
    if budget >= 1:
        return [i * many for i in range(mixtures)], mixtures * many
    rows = [divmod(i, many) for i in range(mixtures)]
    places = [row if column == row % many else -1 for row, column in rows]
    return places, max(places) + 1


def _part(channels: int, ratio: float, name: str) -> int:
    """channels * ratio, rounded down, at least 1; ValueError unless it divides `channels`."""
    part = max(int(channels * ratio), 1)
    if channels % part:
        raise ValueError(f"{name}={ratio} cuts {channels} channels into {part}, with a rest")
    return part
