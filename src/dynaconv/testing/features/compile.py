"""torch.compile: one whole graph for all batch and spatial sizes, with eager's values."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynaconv.layers.base import DynamicConv
from dynaconv.masking import mask_from_sizes
from dynaconv.testing.families import SIZES, Arguments, randomized, require
from dynaconv.testing.features.registry import feature
from dynaconv.testing.tolerance import close

# Batch, and positions that are added to each dimension of SIZES, of the calls one after another.
CALLS = ((3, 0), (2, 1), (4, 3))


@feature("compile", "torch.compile")
def check_compile(cls: type[DynamicConv], arguments: Arguments) -> None:
    """One graph serves all batch and spatial sizes, forward and backward."""
    compare(cls, arguments)


@feature("compile_mask", "torch.compile with a padding mask")
def check_compile_mask(cls: type[DynamicConv], arguments: Arguments) -> None:
    """The same with a padding mask, for layers that take one."""
    if arguments.get("padding_mode", "zeros") == "zeros":
        compare(cls, arguments, masked=True)


def compare(
    cls: type[DynamicConv],
    arguments: Arguments,
    masked: bool = False,
    training: bool = False,
    automatic: bool = False,
    backend: str = "aot_eager",
    calls: int = len(CALLS),
) -> None:
    """Compiles a layer with fullgraph=True and holds outputs and gradients against eager's.

    Args:
        masked: whether the samples of a batch differ in size.
        training: in training mode, buffers included; otherwise in evaluation mode.
        automatic: torch finds out at the second call that sizes change, and compiles twice;
            otherwise it is told at the first, and compiles once.
        backend: of torch.compile.
        calls: how many of CALLS; at the first alone inductor takes sizes for fixed.

    Raises:
        AssertionError: a value differs.
        torch._dynamo.exc.TorchDynamoException: the graph breaks, or a further size recompiles it.
    """
    eager = randomized(cls, arguments).train(training)
    layer = copy.deepcopy(eager)
    with compiled(layer, backend) as function:
        for call, (batch, more) in enumerate(CALLS[:calls]):
            x, mask = inputs(cls, arguments, batch, more, masked)
            if not call and not automatic and backend != "inductor":
                mark_dynamic(x, mask)
            # inductor itself holds on to sizes at times: there the values alone are asked.
            strict = call > automatic and backend != "inductor"
            with torch._dynamo.config.patch(error_on_recompile=strict):
                actual = results(function, layer, x, mask)
            expected = results(eager, eager, x, mask)
            for what, tensor in expected.items():
                close(actual[what], tensor, f"{cls.__name__} compiled, call {call}: {what}")


@contextmanager
def compiled(call: Any, backend: str = "aot_eager") -> Iterator[Any]:
    """`call` compiled without graph breaks; what was compiled is forgotten before and after."""
    torch._dynamo.reset()
    try:
        yield torch.compile(call, fullgraph=True, backend=backend)
    finally:
        torch._dynamo.reset()


def inputs(
    cls: type[DynamicConv], arguments: Arguments, batch: int, more: int, masked: bool
) -> tuple[Tensor, Tensor | None]:
    """x (batch, C_in, *L) that wants its gradient, and a mask of falling sizes."""
    size = torch.tensor(SIZES[cls.rank]) + more
    x = torch.randn(batch, arguments["in_channels"], *size.tolist(), dtype=torch.float64)
    sizes = size - torch.arange(batch).unsqueeze(1)
    mask = mask_from_sizes(sizes, size.tolist()) if masked else None
    return x.requires_grad_(), mask


def mark_dynamic(x: Tensor, mask: Tensor | None = None) -> None:
    """Tells torch.compile that batch and spatial sizes will change."""
    for tensor in (x, mask):
        if tensor is not None:
            sizes = [d for d in range(tensor.dim()) if tensor is mask or d != 1]
            torch._dynamo.mark_dynamic(tensor, sizes)


def results(function: Any, layer: DynamicConv, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The output, the gradients of input and parameters, and the buffers, by name."""
    torch.manual_seed(0)
    output = function(x, mask)
    named = {"input": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(output.sin().sum(), list(named.values()), allow_unused=True)
    found = {"output": output, **{name: b.clone() for name, b in layer.named_buffers()}}
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            found[f"gradient of {name}"] = gradient
    require("gradient of input" in found, f"{type(layer).__name__}: the input has no gradient")
    return found
