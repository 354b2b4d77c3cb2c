"""Every primitive on every backend against the float64 reference, on fresh random calls."""

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv import functional
from dynaconv.dispatch import backend
from dynaconv.shapes import resolve_padding
from dynaconv.testing.tolerance import TOLERANCE, close

SIZES = {1: (11,), 2: (7, 9), 3: (5, 4, 6)}
Tensors = dict[str, Tensor]
Call = tuple[Tensors, dict[str, Any]]


def geometries(rank: int) -> list[dict[str, Any]]:
    """Kernel, stride, padding and dilation in odd combinations."""
    cases: list[dict[str, Any]] = [
        {"kernel": 1},
        {"kernel": 3, "padding": 1},
        {"kernel": (3, 2, 1)[:rank], "stride": (2, 1, 3)[:rank], "padding": (1, 0, 2)[:rank]},
        {"kernel": 3, "dilation": 2, "padding": (2, 1, 2)[:rank]},
        {"kernel": (2, 4, 3)[:rank], "padding": "same"},
        {"kernel": 2, "stride": 2, "padding": "valid"},
        {"kernel": 9, "padding": 5, "stride": 3},  # larger than the input
    ]
    return [c | {"kernel": _tuple(c["kernel"], rank)} for c in cases]


def samples(
    primitive: str,
    rank: int,
    dtype: torch.dtype = torch.float64,
    batches: tuple[int, ...] = (3,),
) -> Iterator[Call]:
    """Fresh random calls of a primitive: tensors by name, and settings."""
    for batch, geometry, groups in product(batches, geometries(rank), (1, 2)):
        tensors, settings = MAKERS[primitive](rank, batch, groups, dict(geometry))
        yield {name: t.to(dtype) for name, t in tensors.items()}, settings


def check_primitive(
    primitive: str,
    name: str,
    dtype: torch.dtype = torch.float64,
    ranks: tuple[int, ...] = (1, 2, 3),
    batches: tuple[int, ...] = (0, 1, 3),
    change: Callable[[Tensor], Tensor] = lambda t: t,
) -> int:
    """Compares output and every gradient of a backend with the reference in float64.

    Args:
        primitive, name: which primitive on which backend.
        dtype: of the data.
        change: applied to each tensor before the call, e.g. to make it non-contiguous.

    Returns:
        The number of calls compared.

    Raises:
        AssertionError: one differs by more than TOLERANCE[dtype]; the text says which and how much.
    """
    count = 0
    for rank in ranks:
        for tensors, settings in samples(primitive, rank, dtype, batches):
            expected = _run(primitive, "reference", tensors, settings, torch.float64)
            actual = _run(primitive, name, tensors, settings, dtype, change)
            for what, tensor in actual.items():
                label = f"{primitive} on {name}, {rank}-D, {settings}: {what}"
                close(tensor, expected[what], label, TOLERANCE[dtype])
            count += 1
    return count


def _run(
    primitive: str,
    name: str,
    tensors: Tensors,
    settings: dict[str, Any],
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensors:
    """The output, and the gradient of every tensor by name."""
    leaves = {key: t.detach().to(dtype).requires_grad_() for key, t in tensors.items()}
    with backend(name):
        changed = {key: change(t) for key, t in leaves.items()}
        output = getattr(functional, primitive)(**changed, **settings)
    gradients = torch.autograd.grad(output, list(leaves.values()), _upstream(output))
    named = {f"gradient of {key}": g for key, g in zip(leaves, gradients, strict=True)}
    return {"output": output} | named


def _upstream(output: Tensor) -> Tensor:
    """A gradient of the output, in sixteenths: exact in every dtype."""
    wave = torch.cos(torch.arange(output.numel(), dtype=torch.float64))
    return ((16 * wave).round() / 16).to(output.dtype).reshape(output.shape)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _output_size(size: tuple[int, ...], geometry: dict[str, Any]) -> tuple[int, ...]:
    arguments = [geometry.get("stride", 1), geometry.get("padding", 0), geometry.get("dilation", 1)]
    x, resolved = resolve_padding(torch.empty(1, 1, *size), geometry["kernel"], *arguments)
    return resolved.output_size(x.shape[2:])


def _static(rank: int, batch: int, groups: int, geometry: dict) -> Call:
    kernel = geometry.pop("kernel")
    tensors = {
        "input": torch.randn(batch, 4, *SIZES[rank]),
        "weight": torch.randn(6, 4 // groups, *kernel),
    }
    if groups == 1:
        tensors["bias"] = torch.randn(6)
    return tensors, geometry | {"groups": groups}


def _per_sample(rank: int, batch: int, groups: int, geometry: dict) -> Call:
    kernel = geometry.pop("kernel")
    tensors = {
        "input": torch.randn(batch, 4, *SIZES[rank]),
        "weight": torch.randn(batch, 6, 4 // groups, *kernel),
    }
    if groups == 1:
        tensors["bias"] = torch.randn(batch, 6)
    return tensors, geometry | {"groups": groups}


def _mixture(rank: int, batch: int, groups: int, geometry: dict) -> Call:
    kernel = geometry.pop("kernel")
    by_tap = groups == 2 or "stride" in geometry
    tensors = {
        "input": torch.randn(batch, 4, *SIZES[rank]),
        "weight": torch.randn(3, 6, 4 // groups, *kernel),
        "coefficients": torch.randn(batch, 3, *(kernel if by_tap else ())),
        "bias": torch.randn(6) if by_tap else torch.randn(3, 6),
    }
    return tensors, geometry | {"groups": groups}


def _per_position(rank: int, batch: int, groups: int, geometry: dict) -> Call:
    size = _output_size(SIZES[rank], geometry)
    weight = torch.randn(batch, groups, *geometry.pop("kernel"), *size)
    return {"input": torch.randn(batch, 4, *SIZES[rank]), "weight": weight}, geometry


def _deform(rank: int, batch: int, groups: int, geometry: dict) -> Call:
    size = _output_size(SIZES[rank], geometry)
    kernel = geometry.pop("kernel")
    taps, offset_groups = prod(kernel), 3 - groups
    tensors = {
        "input": torch.randn(batch, 4, *SIZES[rank]),
        # Sixteenths: exact in every dtype, and between the points, where gradients are continuous.
        "offset": (16 * torch.randn(batch, offset_groups * taps * rank, *size)).round() / 8
        + 1 / 16,
        "weight": torch.randn(6, 4 // groups, *kernel),
    }
    if groups == 1:
        tensors["bias"] = torch.randn(6)
    else:
        tensors["modulation"] = torch.rand(batch, offset_groups * taps, *size)
    return tensors, geometry | {"groups": groups}


MAKERS: dict[str, Callable[[int, int, int, dict], Call]] = {
    "conv": _static,
    "conv_per_sample": _per_sample,
    "conv_mixture": _mixture,
    "conv_per_position": _per_position,
    "deform_conv": _deform,
}
