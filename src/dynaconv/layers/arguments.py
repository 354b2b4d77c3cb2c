"""What every layer asks of its constructor's arguments before it makes parameters."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from dynaconv.functional._checks import DTYPES
from dynaconv.shapes import LARGEST

SPELLED = {int: "an int", float: "a finite number", bool: "True or False", str: "a word"}
SPELLED |= {NoneType: "None"}
NO_ROOM = ("alloc", "overflow", "memory", "too big", "too large")


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """All are ints of at least 1, and groups divides both channels."""
    for name, value in (
        ("in_channels", in_channels),
        ("out_channels", out_channels),
        ("groups", groups),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an int")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
        if value > LARGEST:
            raise ValueError(f"{name}={value} must be at most {LARGEST}")
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value % groups:
            raise ValueError(f"{name}={value} is not divisible by groups={groups}")


def check_place(
    name: str, device: torch.device | str | int | None, dtype: torch.dtype | None
) -> None:
    """There is such a device, and data may have this dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
        raise TypeError(f"{name}: dtype={dtype!r}; give a floating-point dtype")
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    # AssertionError: torch without CUDA.
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name}: device={device!r} is not here: {reason}") from error


def check_border(
    mode: str, before: tuple[int, ...], after: tuple[int, ...], size: tuple[int, ...]
) -> None:
    """What lies beyond the border can be made of an input of spatial shape `size`."""
    if mode == "replicate":
        return
    for b, a, n in zip(before, after, size, strict=True):
        if max(b, a) > n - (mode == "reflect"):
            raise ValueError(
                f"padding_mode={mode!r} makes {max(b, a)} positions of padding from an input of "
                f"{n}; give less padding or a larger input"
            )


def check_options(cls: type, build: Callable, options: dict[str, Any]) -> None:
    """TypeError for an option that the family does not have, or of another type than it has."""
    known = get_type_hints(build)
    names = [p for p in inspect.signature(build).parameters if p != "self"]
    for name, value in options.items():
        if name not in names:
            has = ", ".join(names) or "none"
            raise TypeError(f"{cls.__name__} has no option {name!r}; its options: {has}")
        kind = known.get(name, Any)
        if not fits(value, kind):
            raise TypeError(f"{cls.__name__}: {name}={value!r} must be {spelled(kind)}")


def fits(value: Any, kind: Any, largest: int = LARGEST) -> bool:
    """Whether `value` is of the annotated `kind`; bools are no numbers, and those are finite."""
    origin = get_origin(kind) or kind
    if origin is Any:
        return True
    if origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        whole = isinstance(value, int)
        return abs(value) <= largest if whole else origin is float and isfinite(value)
    if origin in (Union, UnionType):
        return any(fits(value, one, largest) for one in get_args(kind))
    if origin in (tuple, list, Sequence):
        many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return many and all(fits(v, get_args(kind)[0], largest) for v in value)
    if origin is Callable:
        return callable(value)
    return isinstance(value, origin) if isinstance(origin, type) else True


def spelled(kind: Any) -> str:
    """The annotated kind in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(spelled(one) for one in get_args(kind)))
    if get_origin(kind) in (tuple, list, Sequence):
        return f"several, each {spelled(get_args(kind)[0])}"
    return SPELLED.get(kind, "a function" if get_origin(kind) is Callable else str(kind))


@contextmanager
def room_for(**sizes: Any) -> Iterator[None]:
    """ValueError that names the sizes where no memory holds the block's tensors."""
    try:
        yield
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        plain = isinstance(error, MemoryError | OverflowError)
        if not plain and not any(word in reason.lower() for word in NO_ROOM):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in sizes.items())
        raise ValueError(f"{given}: there is no memory for such tensors ({reason})") from error
