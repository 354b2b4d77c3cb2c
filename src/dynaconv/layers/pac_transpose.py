"""PAC that enlarges: the transposed pixel-adaptive convolution (Su, CVPR 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.functional.conv_on_grid import sample
from dynaconv.layers.pac import PACConv
from dynaconv.layers.transposed import Transposed
from dynaconv.masking import sizes_from_mask
from dynaconv.registry import register_family
from dynaconv.shapes import Geometry


@register_family("pac_transpose", primitive="conv", paper="Su et al., CVPR 2019")
class PACConvTranspose(Transposed, PACConv):
    """PAC that enlarges, as nn.ConvTransposeNd does, with a guide of the output's size.

        y_o = sum_k K(f_o, f_{o'}) W[k] x_i + b    over o = stride i - padding + dilation k,
        o' = o + dilation (c - k),    c = ceil(kernel_size / 2) - 1

    Where no guide is given it is the input, enlarged linearly: f at o is x at
    (o + padding - dilation (k - 1) / 2) / stride, the nearest end where that lies outside. Kernels
    are kept as those of nn.ConvNd (published: tap order reversed, the two channel dimensions
    swapped); `kernels` gives K in the order in which windows see the spread input, last tap first.

    Args: as in PACConv.
    """

    def frame(self, x: Tensor) -> Tensor:
        """x with stride - 1 zeros between positions, so that windows at stride 1 are y's."""
        size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *size)
        places = tuple(slice(None, None, s) for s in self.stride)
        spread[(slice(None), slice(None), *places)] = x
        widths: list[int] = []
        for d in reversed(range(self.rank)):
            around = self.dilation[d] * (self.kernel_size[d] - 1) - self.geometry().padding[d]
            widths += [around, around + self.output_padding[d]]
        return F.pad(spread, widths)

    def frame_guide(self, guide: Tensor) -> Tensor:
        """Padded for windows whose centres are the output's positions."""
        widths: list[int] = []
        for k, step in zip(reversed(self.kernel_size), reversed(self.dilation), strict=True):
            widths += [step * (k // 2), step * (k - 1 - k // 2)]
        return F.pad(guide, widths)

    def steps(self) -> Geometry:
        ones, zeros = (1,) * self.rank, (0,) * self.rank
        return Geometry(self.kernel_size, ones, zeros, self.dilation)

    def filters(self) -> Tensor:
        return self.weight.flip(tuple(range(2, 2 + self.rank)))

    def guide_mask(self, mask: Tensor) -> Tensor:
        return self.output_mask(mask)

    def default_guide(self, x: Tensor, mask: Tensor | None) -> Tensor:
        full = torch.tensor([x.shape[2:]], device=x.device)
        ends = (full if mask is None else sizes_from_mask(mask)) - 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        grid = []
        for d, length in enumerate(self.output_size(tuple(x.shape[2:]))):
            offset = self.geometry().padding[d] - self.dilation[d] * (self.kernel_size[d] - 1) / 2
            place = (torch.arange(length, device=x.device, dtype=dtype) + offset) / self.stride[d]
            inside = torch.minimum(place.clamp(min=0), ends[:, d, None].clamp(min=0).to(dtype))
            grid.append(inside.expand(x.shape[0], -1))
        return sample(x.to(dtype), grid)
