"""Padding masks: which positions of a padded batch are real.

A mask is (N, *L) bool, True where real. The real positions of a sample start at index 0 of every
dimension and fill a block: a sentence's length, an image's height and width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynaconv.shapes import Geometry


def mask_from_sizes(sizes: Tensor | Sequence, shape: Sequence[int]) -> Tensor:
    """The mask (N, *shape) of samples with the given sizes: (N,) lengths or (N, D) shapes.

    >>> mask_from_sizes([1, 3], (4,)).int().tolist()
    [[1, 0, 0, 0], [1, 1, 1, 0]]
    """
    sizes = torch.as_tensor(sizes)
    sizes = sizes.reshape(len(sizes), -1)
    if sizes.shape[1] != len(shape):
        raise ValueError(f"sizes have {sizes.shape[1]} dimensions, shape has {len(shape)}")
    mask = torch.ones(len(sizes), *shape, dtype=torch.bool, device=sizes.device)
    for d, length in enumerate(shape):
        along = [-1 if i == d else 1 for i in range(len(shape))]
        index = torch.arange(length, device=sizes.device).reshape(1, *along)
        mask = mask & (index < sizes[:, d].reshape(-1, *[1] * len(shape)))
    return mask


def sizes_from_mask(mask: Tensor) -> Tensor:
    """Each sample's real size, (N, D), from its mask (N, *L)."""
    rank = mask.dim() - 1
    sizes = []
    for d in range(1, rank + 1):
        others = [i for i in range(1, rank + 1) if i != d]
        line = mask.any(others) if others else mask
        sizes.append(line.sum(1))
    return torch.stack(sizes, 1)


def output_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """The mask of a convolution's output: the positions that each sample has when alone."""
    sizes = sizes_from_mask(mask)
    columns = geometry.output_size(sizes.unbind(1))  # type: ignore[arg-type]
    shape = geometry.output_size(mask.shape[1:])
    return mask_from_sizes(torch.stack(columns, 1).clamp(min=0), shape)  # type: ignore[arg-type]


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real positions: (N, C, *L) -> (N, C). x is zero where the mask is False."""
    if mask is None:
        return x.flatten(2).mean(2)
    count = mask.flatten(1).sum(1, keepdim=True).clamp(min=1)
    return x.flatten(2).sum(2) / count.to(x.dtype)


def check_mask(mask: Tensor, input: Tensor) -> None:
    """ValueError or TypeError unless `mask` is (N, *L) bool on the device of input (N, C, *L)."""
    wanted = (input.shape[0], *input.shape[2:])
    if mask.shape != wanted:
        raise ValueError(f"padding_mask has shape {tuple(mask.shape)}; give {tuple(wanted)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"padding_mask has dtype {mask.dtype}; give bool, True where real")
    if mask.device != input.device:
        raise ValueError(f"padding_mask is on {mask.device}, input on {input.device}")
