"""DRConv: each region of the input has a kernel of its own (Chen, CVPR 2021)."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.layers.base import ConvNd, DynamicConv, at_least, conv_nd, without_autocast
from dynaconv.layers.regions import region_means
from dynaconv.registry import register_family


@register_family("drconv", primitive="conv_per_sample", paper="Chen et al., CVPR 2021")
class DRConv(DynamicConv):
    """Kernels from the sample, one a region; a guide from the features says which is where.

        W_1 ... W_R = fc2(sigmoid(fc1(pool(x)))),    r[p] = argmax_r guide(x)[r, p]
        y[p] = sum_k W_r[p][k] x[p + k] + b

    pool averages x to the kernel's size, fc1 and fc2 are 1x1 convolutions there, fc2 in R groups;
    guide is a convolution of the layer's geometry. The gradient of the guide is that of a softmax
    in the argmax's place. The output of every region is computed everywhere, R times the work of
    one kernel; without gradients, memory holds one of them at a time.

    `static_kernels` is not published: fc2 gives what is added to R learned kernels, since from
    pooled features alone a kernel cannot be a given one. `from_conv` takes it, with fc2 at zero.

    Args:
        regions: number of kernels R.
        static_kernels: add learned kernels to those generated.
    """

    exact_options = {"static_kernels": True}

    def build(self, regions: int = 8, static_kernels: bool = False) -> None:
        at_least(1, regions=regions)
        self.regions = regions
        made = regions * self.out_channels * (self.in_channels // self.groups)
        self.fc1 = conv_nd(self.rank, self.in_channels, regions**2, 1)
        self.fc2 = conv_nd(self.rank, regions**2, made, 1, groups=regions)
        self.guide = conv_nd(
            self.rank, self.in_channels, regions, self.kernel_size, **self.generator_geometry()
        )
        self.register_parameter("weight", None)
        if static_kernels:
            self.weight = nn.Parameter(self.initial_kernels(regions))

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`kernel` (N, R * C_out, C_in / groups, *K); `guide` (N, R, *L_out), not yet decided."""
        pooled = region_means(x, mask, self.kernel_size)
        kernel = self.fc2(torch.sigmoid(self.fc1(pooled)))
        kernel = kernel.unflatten(1, (self.regions * self.out_channels, -1))
        if self.weight is not None:
            kernel = kernel + self.weight.flatten(0, 1).to(kernel.dtype)
        # Half precision would decide otherwise where two regions are close.
        with without_autocast(x.device.type):
            guide = self.guide(x.to(self.guide.weight.dtype))
        return {"kernel": kernel, "guide": guide}

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`regions` (N, 1, *L_out), each position's region, and `kernel` as in `generate`."""
        made = super().kernels(input, padding_mask)
        chosen = made["guide"].argmax(1, keepdim=True)
        return {"regions": chosen.to(made["guide"].dtype), "kernel": made["kernel"]}

    def convolve(self, x: Tensor, kernel: Tensor, guide: Tensor) -> Tensor:  # type: ignore[override]
        soft = torch.softmax(guide, 1)
        hard = torch.zeros_like(guide).scatter(1, guide.argmax(1, keepdim=True), 1)
        share = hard + (soft - soft.detach())  # the value of hard, the gradient of soft
        share = share.to(kernel.dtype)
        kernels = enumerate(kernel.chunk(self.regions, 1))
        parts = (self.convolve_samples(x, w, None) * share[:, r : r + 1] for r, w in kernels)
        return self.add_bias(reduce(torch.add, parts))

    def init_from(self, conv: ConvNd) -> None:
        """Every region's kernel is the convolution's; nothing generated is added yet."""
        if self.weight is None:
            raise ValueError(
                "kernels generated from pooled features cannot start as a given one; with "
                "static_kernels=True they are added to it"
            )
        self.weight.copy_(conv.weight.expand_as(self.weight))
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)  # type: ignore[arg-type]

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "regions": 3},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "stride": 2,
                "groups": 2,
                "bias": False,
                "regions": 2,
                "static_kernels": True,
            },
        ]
