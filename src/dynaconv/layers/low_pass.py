"""The low frequencies of each sample's real part, as one operator.

Samples of a padded batch have spectra of their own sizes, which the padding mask decides: what
torch.compile cannot trace. It sees an operator instead, of a fixed size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dynaconv.masking import each_size, fill_up

# x (N, C, *L) and bands -> for each band, the part of x that belongs to it, of the same shape. A
# filter is real and even in the frequency, so that it is its own transpose, as `_backward` needs.
Filter = Callable[[Tensor, Sequence[float]], list[Tensor]]
FILTERS: dict[str, Filter] = {}


def register_filter(name: str) -> Callable[[Filter], Filter]:
    """Decorator: lets `low_pass` find a filter by its name."""

    def enrol(filter: Filter) -> Filter:
        FILTERS[name] = filter
        return filter

    return enrol


def low_pass(x: Tensor, mask: Tensor | None, bands: Sequence[float], filter: str) -> list[Tensor]:
    """What the filter keeps of x (N, C, *L) for each band, zero where mask (N, *L) is False."""
    if mask is None:
        return FILTERS[filter](x, bands)
    return [_masked(x, mask, band, filter) for band in bands]


@custom_op(
    "dynaconv::low_pass",
    mutates_args=(),
    schema="(Tensor x, Tensor mask, float band, str filter) -> Tensor",
)
def _masked(x: Tensor, mask: Tensor, band: float, filter: str) -> Tensor:
    if not mask.any():
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    kept = each_size(lambda alone: FILTERS[filter](alone, [band])[0], x, mask).data
    return fill_up(kept, x.shape[2:]).contiguous()


@_masked.register_fake
def _(x: Tensor, mask: Tensor, band: float, filter: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_masked.register_vmap
def _(info: Any, in_dims: tuple, x: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, int]:
    along = lambda t, d: t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
    folded = [along(t, d).flatten(0, 1) for t, d in zip((x, mask), in_dims, strict=False)]
    return _masked(*folded, *rest).unflatten(0, (info.batch_size, -1)), 0


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, mask, ctx.band, ctx.filter = inputs
    ctx.save_for_backward(mask)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (mask,) = ctx.saved_tensors
    return _masked(grad, mask, ctx.band, ctx.filter), None, None, None


_masked.register_autograd(_backward, setup_context=_save)
