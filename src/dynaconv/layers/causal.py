"""Causal layers, as in language models: no output sees what comes after it, in 1-D.

The output at p is what the plain layer, with zeros before the input, gives at the last position of
the input up to p. Families name how their kernel is made in `causality`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.dispatch import values_unknown
from dynaconv.functional._checks import check_tensors

if TYPE_CHECKING:
    from dynaconv.layers.base import DynamicConv


class State(NamedTuple):
    """What a layer keeps of the past between steps."""

    window: Tensor  # (N, C_in, at most past + 1), the positions that the kernel reaches
    total: Tensor  # (N, C_in), the sum of all positions so far
    length: int  # of them


def check(layer: "DynamicConv") -> None:
    """ValueError unless the layer's family and arguments have a causal form."""
    if layer.causality is None:
        raise ValueError(f"{layer.family} has no causal form: its kernel needs the whole input")
    if layer.rank > 1:
        raise ValueError("causal=True is for 1-D: positions of a plane or volume have no order")
    if layer.padding != (0,) or layer.padding_mode != "zeros":
        raise ValueError(
            "causal=True puts its own dilation * (kernel_size - 1) zeros before the input; "
            f"leave padding=0 and padding_mode='zeros', not {layer.padding}, "
            f"{layer.padding_mode!r}"
        )
    if layer.stride != (1,):
        raise ValueError(
            f"causal=True, for an output as long as the input, needs stride 1, not {layer.stride}"
        )


def whole(layer: "DynamicConv", x: Tensor, mask: Tensor | None) -> Tensor:
    """The output (N, C_out, T) for x (N, C_in, T); mask (N, T)."""
    past = F.pad(x, (layer.past, 0))
    if layer.causality == "pooled":
        return _each_prefix(layer, past, x, mask)
    seen = x if layer.causality == "pointwise" else past
    return layer.convolve(past, **layer.generate(seen, mask))


def _each_prefix(layer: "DynamicConv", past: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Every real position is a sample of its own: its window, and the mean up to it.

    Where no size can follow a mask's values, all positions are; those of padding are told apart by
    the mask, for the statistics of a batch norm.
    """
    batch, _, length = x.shape
    windows = past.unfold(2, layer.past + 1, 1).transpose(1, 2)
    count = torch.arange(1, length + 1, device=x.device)
    means = (_sums(x).cumsum(2) / count).to(x.dtype).transpose(1, 2)
    picks, real = mask is not None and not values_unknown(), None
    if picks:
        windows, means = windows[mask], means[mask]
    else:
        windows, means = windows.flatten(0, 1), means.flatten(0, 1)
        real = None if mask is None else mask.reshape(-1, 1)
    output = layer.convolve(windows, **layer.generate(means.unsqueeze(2), real)).squeeze(2)
    if picks:
        blank = output.new_zeros(batch, length, output.shape[1])
        return blank.masked_scatter(mask.unsqueeze(2), output).transpose(1, 2)  # type: ignore[union-attr]
    output = output.unflatten(0, (batch, length)).transpose(1, 2)
    return output if mask is None else output.masked_fill(~mask.unsqueeze(1), 0)


def step(layer: "DynamicConv", x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """The output (N, C_out) at the next position x (N, C_in), and the state after it."""
    if not layer.causal:
        raise ValueError("step needs causal=True: other kernels wait for what comes later")
    check_tensors("step", x=x)
    if state is not None and not isinstance(state, State):
        raise TypeError(f"step: state={state!r} is not what the step before returned")
    if x.dim() != 2 or x.shape[1] != layer.in_channels:
        raise ValueError(f"step: x has shape {tuple(x.shape)}; give (N, {layer.in_channels})")
    layer.check_alike(x=x)
    if state is not None and state.window.shape[:2] != x.shape:
        raise ValueError(
            f"step: x has shape {tuple(x.shape)}, state is of {tuple(state.window.shape[:2])}"
        )
    if state is None:
        state = State(x.new_empty(*x.shape, 0), torch.zeros_like(_sums(x)), 0)
    window = torch.cat([state.window, x.unsqueeze(2)], 2)[..., -layer.past - 1 :]
    state = State(window, state.total + _sums(x), state.length + 1)
    past = F.pad(window, (layer.past + 1 - window.shape[2], 0))
    real = torch.arange(-layer.past - 1, 0, device=x.device).unsqueeze(0) >= -state.length
    if layer.causality == "pooled":
        seen = (state.total / state.length).to(x.dtype).unsqueeze(2)
    else:
        seen = x.unsqueeze(2) if layer.causality == "pointwise" else past
    return layer.convolve(past, **layer.generate_next(seen, real)).squeeze(2), state


def _sums(x: Tensor) -> Tensor:
    """x in a dtype that bears long sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
