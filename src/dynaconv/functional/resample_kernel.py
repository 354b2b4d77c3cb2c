"""A kernel at another size, so that its response to an image of another size is kept."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.dispatch import under_transform, values_unknown
from dynaconv.functional._checks import check_choice, check_floating, check_tensors
from dynaconv.shapes import IntOrTuple, ntuple, surely

NAME = "resample_kernel"
MODES = ("area", "pinv")


def resample_kernel(weight: Tensor, size: IntOrTuple, mode: str = "area") -> Tensor:
    """The kernel `weight` on a grid of `size` taps over the same extent, in 1-D, 2-D or 3-D.

    Dimension by dimension W' = M W, with M (new taps, old taps):

        "area":  M[j, i] = |cell j and cell i| / |cell i|, the share of tap i that lies in tap j.
                 The taps' sum is kept exactly; a kernel enlarged by a whole factor answers an
                 image enlarged by it (nearest) as before.
        "pinv":  M = pinv(B^T), B the linear, antialiased resize of the window from the old size
                 to the new (FlexiViT, Beyer, CVPR 2023). For larger sizes <W', B x> = <W, x> for
                 every x; for smaller ones it is the least squares solution.

    Args:
        weight: (..., *K).
        size: new taps, one entry for each of the last dimensions that are resampled, or an int
            for a (C_out, C_in, *K) kernel.
        mode: "area" or "pinv".

    Returns:
        (..., *size), differentiable in `weight`.

    Raises:
        ValueError: a size below 1, more sizes than dimensions, another mode.
        TypeError: a weight that is not floating point.
    """
    check_choice(NAME, MODES, mode=mode)
    check_tensors(NAME, weight=weight)
    check_floating(NAME, weight=weight)
    rank = len(size) if isinstance(size, Sequence) else weight.dim() - 2
    if not 1 <= rank <= min(3, weight.dim()):
        raise ValueError(
            f"{NAME}: weight has shape {tuple(weight.shape)}, size={size!r}; give 1 to 3 sizes, "
            "at most one a dimension"
        )
    first = weight.dim() - rank
    for d, new in enumerate(ntuple(size, rank, f"{NAME}: size"), start=first):
        old = weight.shape[d]
        if not surely(new == old):
            # torch.compile does not see through the cache; what torch.func makes must not stay.
            traced = values_unknown() or under_transform()
            make = resampling_matrix if traced else _cached
            matrix = make(old, new, mode).to(weight)
            weight = torch.tensordot(weight, matrix, ([d], [1])).movedim(-1, d)
    return weight


def resampling_matrix(old: int, new: int, mode: str) -> Tensor:
    """M (new, old) of one dimension, in float64."""
    return _overlaps(old, new) if mode == "area" else torch.linalg.pinv(_resize(old, new).T)


_cached = lru_cache(maxsize=256)(resampling_matrix)


def _overlaps(old: int, new: int) -> Tensor:
    """The share of each old cell i of width 1 / old that lies in the new cell j of width 1 / new.

    Edges are counted in units of 1 / (old * new), so they are exact.
    """
    i, j = torch.arange(old), torch.arange(new).unsqueeze(1)
    upper = torch.minimum((i + 1) * new, (j + 1) * old)
    lower = torch.maximum(i * new, j * old)
    return (upper - lower).clamp(min=0).double() / new


def _resize(old: int, new: int) -> Tensor:
    """B (new, old): linear interpolation, antialiased where it makes smaller."""
    eye = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(eye, (new, old), mode="bilinear", antialias=True)[0, 0]
