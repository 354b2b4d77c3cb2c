"""What every primitive asks of its arguments before any work."""

import torch
from torch import Tensor

from dynaconv.shapes import INTS, Geometry, IntOrTuple, enlarged_size, ntuple

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_input(name: str, input: Tensor) -> int:
    """The rank of the convolution, from an input (N, C, *L)."""
    rank = input.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name}: input has shape {tuple(input.shape)}; give (N, C, *L) with 1 to 3 sizes in L"
        )
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: input has dtype {input.dtype}; give a floating-point tensor")
    return rank


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
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups={groups} does not divide {channels} {what}")


def check_output(name: str, size: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """The output's spatial shape, refused where the kernel does not fit into the input."""
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
