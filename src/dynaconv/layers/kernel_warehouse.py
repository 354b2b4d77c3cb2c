"""KernelWarehouse: kernels put together from cells that layers share (Li, ICML 2024)."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.attention import Squeeze
from dynaconv.layers.base import ConvNd, DynamicConv, positive
from dynaconv.layers.cells import Share, Warehouse
from dynaconv.registry import register_family

EPSILON = 1e-3
MIN_HIDDEN = 16


class CellScores(nn.Module):
    """z: (N, hidden) -> (N, m, n + 1), a score of each mixture for each cell and for none.

    With basis_ratio < 1 the scores of other layers' cells are combinations of a few (at least 16),
    since m n grows with the square of the layers that share.
    """

    basis: nn.Linear | None

    def __init__(self, hidden: int, share: Share, cells: int, basis_ratio: float = 1.0) -> None:
        super().__init__()
        positive(basis_ratio=basis_ratio)
        mixtures, others = share.assigned.shape[0], cells - share.own
        self.first, self.own, self.scores, self.basis = share.first, share.own, cells + 1, None
        if basis_ratio >= 1 or not others:
            self.fc = nn.Linear(hidden, mixtures * (cells + 1))
            nn.init.zeros_(self.fc.bias)
        else:
            basis = max(int(others * basis_ratio), 16)
            self.fc = nn.Linear(hidden, mixtures * (share.own + basis + 1), bias=False)
            self.basis = nn.Linear(basis, others, bias=False)
            self.bias = nn.Parameter(torch.zeros(mixtures, cells + 1))
            nn.init.kaiming_normal_(self.basis.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, hidden: Tensor) -> Tensor:
        if self.basis is None:
            return self.fc(hidden).unflatten(1, (-1, self.scores))
        made = self.fc(hidden).unflatten(1, (-1, self.own + self.basis.in_features + 1))
        own, other, none = made.split([self.own, self.basis.in_features, 1], 2)
        other = self.basis(other)
        before, after = other[..., : self.first], other[..., self.first :]
        return torch.cat([before, own, after, none], 2) + self.bias


@register_family(
    "kernel_warehouse", primitive="conv_per_sample", paper="Li et al., ICML 2024", transposed=True
)
class KernelWarehouseConv(DynamicConv):
    """Each cell of the kernel is a mixture, per sample, of the cells e_j in a warehouse.

        w_i = sum_j alpha_ij e_j,    W = the w_i side by side,    y = W * x + b
        alpha_ij = (1 - tau) z_ij / (sum_j' |z_ij'| + 1e-3) + tau beta_ij
        z = scores(relu(bn(fc(mean(x)))))

    beta is 1 where mixture i owns cell j: at tau = 1 the layer is static, each of its cells a cell
    of the warehouse; at tau = 0 it mixes all cells, with signs. The paper lowers tau from 1 to 0
    over the first 10 to 20 epochs: `dynaconv.anneal(model, progress)`. A fresh
    layer has tau = 0, one `from_conv` has tau = 1, where the scores do not learn yet.

    A layer alone has a warehouse of its own; `dynaconv.share_kernels` gives one to many layers.

    As in the published code, the scores (and the sum over j') have one more entry, for a cell that
    is zero; the paper has it below budget 1, and no 1e-3. The batch norm trains at batch 1 too.
    The LayerNorm that the authors' ConvNeXt has in its place is not provided.

    Args:
        budget: cells in the warehouse for each cell of the kernel, b: a whole number, or 1 over
            one. Below 1, mixtures without a cell start from zero.
        reduction: hidden channels of the attention over input channels; at least 16.
        in_ratio, out_ratio: a cell's channels over those of the kernel.
        spatial_partition: cells of one tap; False leaves the taps of the kernel together.
    """

    causality = "pooled"
    warehouse: Warehouse
    assigned: Tensor
    temperatures = (1.0, 0.0)
    temperature: Tensor

    def build(
        self,
        budget: float = 1.0,
        reduction: float = 1 / 16,
        in_ratio: float = 1.0,
        out_ratio: float = 1.0,
        spatial_partition: bool = True,
    ) -> None:
        positive(reduction=reduction)
        hidden = max(int(self.in_channels * reduction), MIN_HIDDEN)
        self.squeeze = Squeeze(self.in_channels, hidden, norm=True)
        nn.init.kaiming_normal_(self.squeeze.fc.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("temperature", torch.tensor(0.0))
        shapes = [self.kernel_shape()]
        warehouse = Warehouse(shapes, budget, in_ratio, out_ratio, spatial_partition)
        self.draw_from(warehouse, warehouse.shares[0])

    def draw_from(self, warehouse: Warehouse, share: Share, basis_ratio: float = 1.0) -> None:
        """From now on the kernel is a mixture of the cells of `warehouse`, by fresh scores."""
        cells, hidden = warehouse.cells, self.squeeze.fc.out_features
        scores = CellScores(hidden, share, cells.shape[0], basis_ratio)
        self.warehouse = warehouse
        self.scores = scores.to(cells.device, cells.dtype).train(self.training)
        self.register_buffer("assigned", share.assigned.to(cells.device))

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        z = self.scores(self.squeeze(x, mask))
        contrast = z / (z.abs().sum(2, keepdim=True) + EPSILON)
        alpha = (1 - self.temperature) * contrast + self.temperature * self.beta(z)
        return {"attention": alpha[..., :-1]}

    def convolve(self, x: Tensor, attention: Tensor) -> Tensor:  # type: ignore[override]
        return self.convolve_samples(x, self.assemble(attention), self.bias)

    def beta(self, like: Tensor) -> Tensor:
        """The one-to-one assignment (m, n + 1), zero cell last."""
        return F.one_hot(self.assigned, self.warehouse.cells.shape[0] + 1).to(like.dtype)

    # Between kernels and cells -------------------------------------------------------------

    def grid(self) -> tuple[int, int, int]:
        """How many cells the kernel has along its taps, its output and its input channels."""
        shape, cell = self.kernel_shape(), self.warehouse.cells.shape[1:]
        return prod(shape[2:]) // prod(cell[2:]), shape[0] // cell[0], shape[1] // cell[1]

    def assemble(self, attention: Tensor) -> Tensor:
        """Kernels (N, C_out, C_in / groups, *K) of mixtures by `attention` (N, m, n)."""
        cells = self.warehouse.cells
        mixed = attention @ cells.flatten(1)
        parts = mixed.unflatten(2, (*cells.shape[1:3], -1)).unflatten(1, self.grid())
        return parts.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, *self.kernel_shape())

    def cut(self, kernel: Tensor) -> Tensor:
        """The m cells (m, c_out, c_in, *k) of a kernel, in the order of the mixtures."""
        cell, (along, outer, inner) = self.warehouse.cells.shape[1:], self.grid()
        parts = kernel.reshape(outer, cell[0], inner, cell[1], along, -1)
        return parts.permute(4, 0, 2, 1, 3, 5).reshape(-1, *cell)

    @torch.no_grad()
    def static_kernel(self) -> Tensor | None:
        """The kernel at tau = 1, None where the budget left mixtures without a cell."""
        if (self.assigned == self.warehouse.cells.shape[0]).any():
            return None
        return self.assemble(self.beta(self.warehouse.cells)[None, :, :-1])[0]

    @torch.no_grad()
    def store(self, kernel: Tensor) -> None:
        """Puts the cells of `kernel` where the mixtures find them at tau = 1, as far as they do."""
        found = self.assigned < self.warehouse.cells.shape[0]
        self.warehouse.cells[self.assigned[found]] = self.cut(kernel)[found]

    def init_from(self, conv: ConvNd) -> None:
        """The kernel's cells as the layer's own, and tau = 1."""
        if self.static_kernel() is None:
            raise ValueError(
                f"a warehouse of budget={self.options['budget']} holds fewer cells than the kernel "
                "has; give a budget of at least 1"
            )
        self.store(conv.weight)
        self.temperature.fill_(1)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "groups": 2,
                "bias": False,
                "budget": 2,
                "in_ratio": 0.5,
                "out_ratio": 0.5,
            },
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 3,
                "stride": 2,
                "budget": 0.5,
                "out_ratio": 0.5,
                "spatial_partition": False,
            },
        ]
