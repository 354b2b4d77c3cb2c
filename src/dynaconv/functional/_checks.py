"""What every primitive asks of its arguments before any work."""

import os
from collections.abc import Sequence
from math import prod
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.shapes import INTS, Geometry, IntOrTuple, enlarged_size, ntuple

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tensors that may be None.
OPTIONAL = ("bias", "modulation")
# Bytes of an output that no machine holds, and that this one does not.
MOST = 2**44
MEMORY = (
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else MOST
)

# Numbers from there on overflow in float32.
LIMIT = 1e38


def check_input(name: str, input: Tensor, **others: Tensor | None) -> int:
    """The rank of the convolution, from an input (N, C, *L); the others are tensors as well."""
    check_tensors(name, input=input, **others)
    rank = input.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name}: input has shape {tuple(input.shape)}; give (N, C, *L) with 1 to 3 sizes in L"
        )
    if 0 in input.shape[2:]:
        raise ValueError(f"{name}: input has shape {tuple(input.shape)}; give at least 1 position")
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: input has dtype {input.dtype}; give a floating-point tensor")
    return rank


def check_tensors(name: str, **tensors: Tensor | None) -> None:
    """All are dense tensors; those of OPTIONAL names may be None."""
    for what, tensor in tensors.items():
        if tensor is None and what in OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {what} is of {type(tensor)}; give a tensor")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name}: {what} is {kind}; give a dense tensor")


def check_floating(name: str, **tensors: Tensor) -> None:
    """All have a dtype that data may have."""
    for what, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: {what} has dtype {tensor.dtype}; give a floating-point tensor"
            )


def check_choice(name: str, choices: Sequence[str], **values: str) -> None:
    """Each value is one of the words."""
    for what, value in values.items():
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: {what}={value!r}; choose from {tuple(choices)}")


def check_number(name: str, **values: float) -> None:
    """Each value is a finite number above 0."""
    check_finite(name, **values)
    for what, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: {what}={value} must be above 0")


def check_finite(name: str, **values: float) -> None:
    """Each value is a number, and finite."""
    for what, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: {what}={value!r} must be a number")
        if not abs(value) < LIMIT:
            raise ValueError(f"{name}: {what}={value} must be finite, and below {LIMIT:g}")


def check_module(name: str, **modules: nn.Module) -> None:
    """Each is a module."""
    for what, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: {what} is of {type(module)}; give an nn.Module")


def check_count(name: str, minimum: int = 0, **values: int) -> None:
    """Each value is an int of at least `minimum`."""
    for what, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name}: {what}={value!r} must be an int")
        if value < minimum:
            raise ValueError(f"{name}: {what}={value} must be at least {minimum}")


def check_list(name: str, kind: type | UnionType, spelled: str, **values: Any) -> list:
    """The one value as a list, all its entries of `kind`."""
    ((what, value),) = values.items()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name}: {what} is of {type(value)}; give a list of {spelled}")
    for i, entry in enumerate(value):
        if isinstance(entry, bool) or not isinstance(entry, kind):
            raise TypeError(f"{name}: {what}[{i}] is of {type(entry)}; give {spelled}")
    return list(value)


def check_bool(name: str, **values: bool) -> None:
    """Each value is True or False."""
    for what, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {what}={value!r} must be True or False")


def check_device(name: str, input: Tensor, **others: Tensor | None) -> None:
    """The other tensors live on the input's device."""
    for other, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{name}: {other} is on {tensor.device}, input on {input.device}; move one of them"
            )


def check_alike(name: str, input: Tensor, **others: Tensor | None) -> None:
    """The other tensors live on the input's device and have its dtype."""
    check_device(name, input, **others)
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"{name}: {other} has dtype {tensor.dtype}, input {input.dtype}; "
                f"cast one, e.g. {other}.to(input.dtype)"
            )


def check_shape(name: str, what: str, tensor: Tensor, expected: tuple[object, ...]) -> None:
    """`tensor` has the expected shape; a string stands for a free size, by its name."""
    free = [isinstance(size, str) for size in expected]
    if tensor.dim() != len(expected) or any(
        not any_size and given != size
        for given, size, any_size in zip(tensor.shape, expected, free, strict=True)
    ):
        wanted = ", ".join(str(size) for size in expected) + "," * (len(expected) == 1)
        raise ValueError(f"{name}: {what} has shape {tuple(tensor.shape)}; give ({wanted})")


def check_groups(name: str, channels: int, groups: int, what: str = "channels") -> None:
    """`groups` is a positive int that divides `channels`."""
    if isinstance(groups, bool) or not isinstance(groups, INTS):
        raise TypeError(f"{name}: groups={groups!r} must be an int")
    if channels < 1:
        raise ValueError(f"{name}: there are {channels} {what}; give at least 1 (groups={groups})")
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups={groups} does not divide {channels} {what}")


def check_output(name: str, size: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """The output's spatial shape, refused where the kernel does not fit into the input."""
    check_taps(name, geometry)
    output = geometry.output_size(size)
    for length, k, p, d, out in zip(
        size, geometry.kernel, geometry.padding, geometry.dilation, output, strict=True
    ):
        if out < 1:
            raise ValueError(
                f"{name}: a kernel of {k} taps, dilation {d}, spans {d * (k - 1) + 1} positions, "
                f"more than the padded input's {length + 2 * p}; give padding or a larger input"
            )
    return output


def check_taps(name: str, geometry: Geometry) -> None:
    """The kernel has at least one tap."""
    if any(k < 1 for k in geometry.kernel):
        raise ValueError(
            f"{name}: weight has a kernel of shape {geometry.kernel}; give at least 1 tap"
        )


def check_amount(name: str, input: Tensor, channels: int, size: tuple[int, ...]) -> None:
    """Memory holds what has so many channels and spatial shape `size`, one for each sample."""
    if torch.compiler.is_compiling() or type(input) not in (Tensor, nn.Parameter):
        return
    amount = max(1, input.shape[0]) * channels * prod(size) * input.dtype.itemsize
    if amount > (MEMORY if input.device.type == "cpu" else MOST):
        raise ValueError(
            f"{name}: what has spatial shape {size} takes {amount >> 30} GiB, more than there is "
            "memory; give less padding, stride or dilation"
        )


def check_output_padding(name: str, extra: tuple[int, ...], geometry: Geometry) -> None:
    """Each dimension's output padding is below its stride or its dilation."""
    for e, s, d in zip(extra, geometry.stride, geometry.dilation, strict=True):
        if e >= max(s, d):
            raise ValueError(
                f"{name}: output_padding={extra} must be below stride {geometry.stride} "
                f"or dilation {geometry.dilation}"
            )


def check_enlarged(
    name: str, size: tuple[int, ...], geometry: Geometry, output_padding: IntOrTuple
) -> tuple[int, ...]:
    """The spatial shape of a transposed convolution's output, refused where it is empty."""
    check_taps(name, geometry)
    extra = ntuple(output_padding, len(size), "output_padding", minimum=0)
    check_output_padding(name, extra, geometry)
    output = enlarged_size(size, geometry, extra)
    if min(output) < 1:
        raise ValueError(
            f"{name}: the output of input size {size} would have size {output}; give less padding "
            "or a larger input"
        )
    return output


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The data cast to autocast's dtype where it is on, as F.conv2d does with its own.

    Offsets and coordinates are not passed through here: they stay as they are.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    cast = lambda t: t.to(dtype) if t is not None and t.dtype != torch.float64 else t
    return [cast(t) for t in tensors]
