"""Dynamic convolution decomposition: a static kernel and a dynamic residual (Li, ICLR 2021)."""

from math import isqrt
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.attention import SafeBatchNorm, batch_norm
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd, positive
from dynaconv.layers.centres import between_centres
from dynaconv.layers.regions import region_means
from dynaconv.registry import register_family


@register_family("dcd", primitive="conv", paper="Li et al., ICLR 2021")
class DCDConv(DynamicConv):
    """A static kernel, scaled per output channel, and channels fused in a small latent space.

        h = fc(pool(x)),    h = h hsigmoid(se(h))
        Lambda = hsigmoid(fc_scale(h)),    Phi = fc_phi(h) as an L x L matrix
        y = Lambda (W_0 * x) + P (bn2(Phi q) + q) + b,    q = bn1(Q^T x)

    hsigmoid(v) = relu6(v + 3) / 3 is 1 at 0. For any kernel size, Q^T and P are 1x1: q lies at the
    centres of W_0's windows. The paper has Phi q alone, the published code the batch norms and
    the shortcut too; its bias-free layer has no b. `from_conv` starts with P = 0 and Lambda = 1.

    The sparse dynamic residual of the paper is a direct sum of `blocks`, each with its own P, Phi
    and Q over its part of the channels; with `groups` no block mixes two groups.

    Args:
        pool: cells a dimension of pool(x); 1 in the authors' bottlenecks, 2 in their basic blocks.
        latent: L of one block; None is sqrt(C_in pool^D / blocks), rounded down.
        reduction: max(C_in pool^D, blocks L^2) over the length of h.
        min_hidden: its least length.
        blocks: blocks of the residual, a multiple of groups; None is one a group.
    """

    convolving = ("q", "p")

    def build(
        self,
        pool: int = 1,
        latent: int | None = None,
        reduction: float = 16,
        min_hidden: int = 4,
        blocks: int | None = None,
    ) -> None:
        self.pool, self.blocks = pool, self.groups if blocks is None else blocks
        at_least(1, pool=pool, blocks=self.blocks, min_hidden=min_hidden)
        positive(reduction=reduction)
        self._check_blocks()
        pooled = self.in_channels * pool**self.rank
        self.latent = max(isqrt(pooled // self.blocks), 1) if latent is None else latent
        at_least(1, latent=self.latent)
        hidden = max(int(max(pooled, self.blocks * self.latent**2) / reduction), min_hidden)
        channels = self.blocks * self.latent
        self.weight = nn.Parameter(self.initial_kernels())
        self.fc = nn.Linear(pooled, hidden, bias=False)
        self.se = nn.Linear(hidden, hidden, bias=False)
        self.fc_scale = nn.Linear(hidden, self.out_channels, bias=False)
        self.fc_phi = nn.Linear(hidden, self.blocks * self.latent**2, bias=False)
        one_by_one: dict[str, Any] = {"groups": self.blocks, "bias": False}
        self.q = conv_nd(self.rank, self.in_channels, channels, 1, stride=self.stride, **one_by_one)
        self.p = conv_nd(self.rank, channels, self.out_channels, 1, **one_by_one)
        self.bn1, self.bn2 = SafeBatchNorm(channels), SafeBatchNorm(channels)

    def _check_blocks(self) -> None:
        for name, value in (
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ):
            if value % self.blocks:
                raise ValueError(f"blocks={self.blocks} does not divide {name}={value}")
        if self.blocks % self.groups:
            raise ValueError(
                f"blocks={self.blocks} is no multiple of groups={self.groups}, so that a block "
                "would mix groups"
            )

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`scale` Lambda (N, C_out) and `phi` (N, blocks, L, L)."""
        h = self.fc(region_means(x, mask, (self.pool,) * self.rank).flatten(1))
        h = h * _hsigmoid(self.se(h))
        phi = self.fc_phi(h).unflatten(1, (self.blocks, self.latent, self.latent))
        return {"scale": _hsigmoid(self.fc_scale(h)), "phi": phi}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        dynamic = self.generate(x, mask)
        scale = dynamic["scale"].unflatten(1, (-1, *(1,) * self.rank))
        static = self.convolve_static(x, self.weight, None)
        return self.add_bias(scale * static + self.residual(x, dynamic["phi"], mask))

    def residual(self, x: Tensor, phi: Tensor, mask: Tensor | None) -> Tensor:
        """P (bn2(Phi q) + q), (N, C_out, *L_out)."""
        out_mask = None if mask is None else self.output_mask(mask)
        q = batch_norm(self.bn1, self.q(between_centres(self, x)), out_mask)
        latents = q.flatten(2).unflatten(1, (self.blocks, self.latent))
        fused = (phi @ latents.to(phi.dtype)).reshape(q.shape)
        return self.p(batch_norm(self.bn2, fused, out_mask) + q)

    def init_from(self, conv: ConvNd) -> None:
        """W_0 is the kernel, without residual and scaled by 1."""
        self.weight.copy_(conv.weight)
        nn.init.zeros_(self.p.weight)
        nn.init.zeros_(self.fc_scale.weight)

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
                "pool": 2,
                "latent": 3,
            },
            {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": 2, "blocks": 2},
        ]


def _hsigmoid(v: Tensor) -> Tensor:
    """From 0 to 2, and 1 at 0: twice the usual."""
    return F.relu6(v + 3) / 3
