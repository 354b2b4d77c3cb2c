"""Means over a grid of regions, in each sample's own size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynaconv.masking import sizes_from_mask


def region_means(x: Tensor, mask: Tensor | None, regions: Sequence[int]) -> Tensor:
    """x (N, C, *L), zero where mask (N, *L) is False, as means of regions: (N, C, *regions).

    Region r of R covers floor(r S / R) to ceil((r + 1) S / R) of a sample's size S, as in
    torch.nn.functional.adaptive_avg_pool2d.
    """
    own = None if mask is None else sizes_from_mask(mask)
    sizes = torch.tensor([x.shape[2:]], device=x.device) if own is None else own
    for d, number in enumerate(regions):
        size = sizes[:, d].reshape(-1, 1, 1)
        region = torch.arange(number, device=x.device)
        start, end = region * size // number, -(-(region + 1) * size // number)
        place = torch.arange(x.shape[2 + d], device=x.device).unsqueeze(1)
        inside = ((place >= start) & (place < end)).to(x.dtype)
        share = inside / (end - start).clamp(min=1)
        lines = x.movedim(2 + d, -1)
        means = lines.flatten(1, -2) @ share
        x = means.unflatten(1, lines.shape[1:-1]).movedim(-1, 2 + d)
    return x
