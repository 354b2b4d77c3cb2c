"""Arguments as nobody should give them, and tensors as memory may hold them."""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

HUGE = (2**31, 2**40, 2**62, 2**63, 10**30)
# What stands in for a number, a tuple of numbers or a word.
SCALARS = (
    *(0, -1, -(2**63), True, False, None, 1.0, 1.5, float("nan"), float("inf"), 1j),
    *("", "same", "valid", "nonsense", b"ab", [], (), (1,), [1, 1], (1, 1, 1, 1, 1), ("a", "b")),
    *((1, None), (True,), (-1,), [1.5], {}, {"a": 1}, {1}, range(2), object(), int, len),
    *(np.int64(1), np.float32(1), np.array(1), np.array([1, 2]), torch.tensor(1), torch.ones(2)),
    *(torch.ones(2, dtype=torch.int64), torch.device("cpu"), torch.float32, "zeros", 2, 3, 7, 50),
    *HUGE,
    *((2**62, 1), (1, 2**40), [2**63]),
)
NO_TENSORS = (
    *(None, 0, 1.5, True, "input", b"", [], (), [1.0, 2.0], {}, object(), np.ones((1, 2, 3))),
    *([torch.ones(2)], torch.float32, torch.Tensor, nn.Linear(1, 1), range(3)),
)


def plausible(value: object) -> bool:
    """Whether a setting is right by itself, so that it may be another argument that is refused."""
    if isinstance(value, str):
        return value in ("same", "valid")
    values = value if isinstance(value, list | tuple | range) else [value]
    return all(type(v) is int and 0 <= v <= 1000 for v in values)


def of_tensor(tensor: Tensor) -> dict[str, object]:
    """By name: what a tensor argument is broken to."""
    changes = {
        "int": lambda: tensor.long(),
        "bool": lambda: tensor > 0,
        "complex": lambda: tensor.to(torch.complex64),
        "other float": lambda: tensor.to(
            torch.float32 if tensor.dtype == torch.float64 else torch.float64
        ),
        "half": lambda: tensor.half(),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "meta": lambda: tensor.to("meta"),
        "one dimension more": lambda: tensor.unsqueeze(0),
        "one dimension more at the end": lambda: tensor.unsqueeze(-1),
        "one dimension less": lambda: tensor.flatten(-2) if tensor.dim() > 1 else tensor.sum(),
        "0-d": lambda: tensor.sum(),
        "flat": lambda: tensor.flatten(),
        "empty": lambda: tensor.new_empty(0),
        "sparse": lambda: tensor.detach().to_sparse(),
        "mkldnn": lambda: tensor.detach().float().to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(
            tensor.detach().float(), 0.1, 0, torch.qint8
        ),
        "nested": lambda: torch.nested.nested_tensor([tensor.detach()]),
        "numpy": lambda: tensor.detach().float().numpy(),
        "list": lambda: tensor.tolist(),
    }
    for d in range(tensor.dim()):
        changes[f"no size in {d}"] = lambda d=d: tensor.narrow(d, 0, 0)
        changes[f"one more in {d}"] = lambda d=d: torch.cat(
            [tensor, tensor.narrow(d, 0, min(1, tensor.shape[d]))], d
        )
        changes[f"one in {d}"] = lambda d=d: tensor.narrow(d, 0, min(1, tensor.shape[d]))
    return changes


def made(way):
    """What way() makes; None where torch has no such tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that are prototypes, or deprecated
        try:
            return way()
        except (RuntimeError, TypeError):
            return None


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def offset(t: Tensor) -> Tensor:
    """At an odd place of a larger storage."""
    return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def negated(t: Tensor) -> Tensor:
    """With the negative bit set: a view that holds -t."""
    return torch._neg_view(-t)


def expanded(t: Tensor) -> Tensor:
    """Its first entry repeated without memory."""
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats[t.dim()]) if t.dim() in formats else t


LAYOUTS = {
    "plain": lambda t: t,
    "strided": strided,
    "offset": offset,
    "transposed": transposed,
    "negated": negated,
    "expanded": expanded,
    "channels last": channels_last,
    "requires grad": lambda t: t.detach().clone().requires_grad_(),
    "parameter": nn.Parameter,
}
