"""conv_per_sample in ATen: grouped convolution, a loop of convolutions, or matrix products.

The cost rule, from `benchmarks/conv_per_sample.py --rule` on a CPU:

- a single tap without stride or padding is one batched matrix product;
- grouping the batch costs nothing a sample, but lays out every kernel anew, which dominates once
  all N kernels together leave the cache (LARGE numbers). A loop costs some 30 microseconds a sample
  and runs each convolution at a static one's speed, which pays for kernels of BIG numbers or more;
  in 3-D, where one-sample convolutions are slow, only where positions are few;
- the gradient of the kernel is a matrix product with the unfolded input where positions are fewer
  than half the output channels: unfolded, a sample is then small beside its kernel. Only as many
  samples as fit into CHUNK numbers are unfolded at a time.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.backends import reference
from dynaconv.backends.operator import (
    GEOMETRY,
    Operator,
    few_at_a_time,
    gradient_like,
    output_like,
)
from dynaconv.shapes import Geometry

LARGE, BIG, CHUNK = 2**22, 3 * 2**16, 2**20
# Positions of a 3-D input for which a loop can pay.
FEW = 64
# stride, padding and dilation as lists, then groups, as the operator gets them.
Settings = Sequence[Any]


def formulation(input: Tensor, weight: Tensor, settings: Settings) -> str:
    """Which of `FORWARD` computes the output and the input's gradient."""
    stride, padding, _, groups = settings
    if prod(weight.shape[3:]) == 1 and groups == 1 and max(stride) == 1 and max(padding) == 0:
        return "matmul"
    loop = weight.numel() >= LARGE and prod(weight.shape[1:]) >= BIG
    loop = loop and (input.dim() < 5 or prod(input.shape[2:]) <= FEW)
    return "loop" if loop and input.device.type == "cpu" else "grouped"


def weight_formulation(grad: Tensor, input: Tensor, weight: Tensor, settings: Settings) -> str:
    """Which formulation computes the kernels' gradient."""
    choice = formulation(input, weight, settings)
    few = 2 * prod(grad.shape[2:]) <= weight.shape[1] and settings[3] == 1
    return "unfold" if few and choice != "matmul" and input.device.type == "cpu" else choice


def static(x: Tensor, w: Tensor, settings: Settings, b: Tensor | None = None) -> Tensor:
    """One kernel for the whole batch."""
    stride, padding, dilation, groups = settings
    zeros = [0] * len(stride)
    return torch.convolution(x, w, b, stride, padding, dilation, False, zeros, groups)


def static_backward(
    grad: Tensor, x: Tensor, w: Tensor, settings: Settings, mask: list[bool]
) -> list[Tensor]:
    """The gradients of x and w of a static convolution."""
    stride, padding, dilation, groups = settings
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, padding, dilation, False, zeros, groups, [*mask, False]
    )[:2]


# Forward ---------------------------------------------------------------------------------------


def grouped(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """The batch folded into the groups of one convolution."""
    batch, out = weight.shape[:2]
    *geometry, groups = settings
    x = input.reshape(1, -1, *input.shape[2:])
    b = None if bias is None else bias.reshape(-1)
    y = static(x, weight.flatten(0, 1), (*geometry, groups * batch), b)
    return y.reshape(batch, out, *y.shape[2:])


def loop(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """One convolution a sample."""
    biases = [None] * len(input) if bias is None else bias.unbind()
    samples = zip(input.split(1), weight.unbind(), biases, strict=True)
    return torch.cat([static(x, w, settings, b) for x, w, b in samples])


def matmul(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """A single tap: y[n] = W[n] x[n]."""
    w, x = weight.flatten(2), input.flatten(2)
    y = torch.bmm(w, x) if bias is None else torch.baddbmm(bias.unsqueeze(2), w, x)
    return y.unflatten(2, input.shape[2:])


# Backward: the gradients that the mask (input, weight) asks for ----------------------------------


def grouped_backward(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, mask: list[bool]
) -> list[Tensor]:
    batch = len(input)
    *geometry, groups = settings
    fold = lambda t: t.reshape(1, -1, *t.shape[2:])
    gx, gw = static_backward(
        fold(grad),
        fold(input),
        weight.flatten(0, 1),
        (*geometry, groups * batch),
        mask,
    )
    return [gx.reshape(input.shape) if mask[0] else gx, gw.reshape(weight.shape) if mask[1] else gw]


def loop_backward(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, mask: list[bool]
) -> list[Tensor]:
    gradients = [gradient_like(t) if m else t for t, m in zip((input, weight), mask, strict=True)]
    for n, (g, x, w) in enumerate(zip(grad.split(1), input.split(1), weight.unbind(), strict=True)):
        gx, gw = static_backward(g, x, w, settings, mask)
        if mask[0]:
            gradients[0][n] = gx[0]
        if mask[1]:
            gradients[1][n] = gw
    return gradients


def matmul_backward(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, mask: list[bool]
) -> list[Tensor]:
    g, x, w = grad.flatten(2), input.flatten(2), weight.flatten(2)
    gx = torch.bmm(w.transpose(1, 2), g).reshape(input.shape) if mask[0] else input
    gw = torch.bmm(g, x.transpose(1, 2)).reshape(weight.shape) if mask[1] else weight
    return [gx, gw]


def unfold_backward(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, mask: list[bool]
) -> list[Tensor]:
    """The weight's gradient only: g[n] columns[n]^T."""
    stride, padding, dilation, _ = settings
    geometry = Geometry(tuple(weight.shape[3:]), tuple(stride), tuple(padding), tuple(dilation))
    gw = weight.new_empty(len(weight), weight.shape[1], prod(weight.shape[2:]))
    numbers = prod(weight.shape[2:]) * prod(grad.shape[2:])
    for part in few_at_a_time(len(input), max(1, CHUNK // numbers)):
        window, size = reference.padded_windows(input[part], geometry)
        columns = window.flatten(2 + len(size)).flatten(1, -2)
        torch.bmm(grad[part].flatten(2), columns.transpose(1, 2), out=gw[part])
    return [input, gw.reshape(weight.shape)]


FORWARD = {"grouped": grouped, "loop": loop, "matmul": matmul}
BACKWARD = {
    "grouped": grouped_backward,
    "loop": loop_backward,
    "matmul": matmul_backward,
    "unfold": unfold_backward,  # of the weight alone
}


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """y[n] = W[n] * x[n] + b[n] by the cheaper formulation."""
    return FORWARD[formulation(input, weight, settings)](input, weight, bias, settings)


def convolve_backward(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, mask: list[bool]
) -> list[Tensor]:
    """The gradients of input and weight, each by its cheaper formulation."""
    for_input = formulation(input, weight, settings)
    for_weight = weight_formulation(grad, input, weight, settings)
    if for_input == for_weight or not all(mask):
        choice = for_weight if mask[1] else for_input
        return BACKWARD[choice](grad, input, weight, settings, mask)
    gx = BACKWARD[for_input](grad, input, weight, settings, [True, False])[0]
    return [gx, BACKWARD[for_weight](grad, input, weight, settings, [False, True])[1]]


# The operator ------------------------------------------------------------------------------------


def _shape(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> tuple:
    geometry = Geometry(tuple(weight.shape[3:]), *map(tuple, settings[:3]))
    return (*weight.shape[:2], *geometry.output_size(input.shape[2:]))


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    if not input.numel():
        return output_like(input, _shape(input, weight, bias, *settings)).zero_()
    return convolve(input, weight, bias, settings)


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    *settings, mask = rest
    gb = grad.flatten(2).sum(2) if mask[2] else None
    if not any(mask[:2]):
        return [None, None, gb]
    if not grad.numel() or not input.numel():
        return [torch.zeros_like(input), torch.zeros_like(weight), gb]
    gx, gw = convolve_backward(grad, input, weight, settings, mask[:2])
    return [gx, gw, gb]


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    geometry = Geometry(tuple(weight.shape[3:]), *map(tuple, settings[:3]))
    return reference.conv_per_sample(input, weight, bias, geometry, settings[3])


def _flops(input: tuple, weight: tuple, *rest: Any) -> int:
    return 2 * prod(rest[-1]) * prod(weight[2:])


operator = Operator(
    "conv_per_sample",
    ("input", "weight", "bias?"),
    (),
    f"{GEOMETRY}, SymInt groups",
    _forward,
    _backward,
    _reference,
    _shape,
    _flops,
)


def conv_per_sample(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    return operator(input, weight, bias, *map(list, geometry[1:]), groups)
