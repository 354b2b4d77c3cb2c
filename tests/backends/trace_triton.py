"""Traces the Triton operators as torch.compile does, with sizes as symbols, and counts kernels.

python -m tests.backends.trace_triton

One line a primitive: its name, and the kernels that its forward and backward are open to.
"""

from importlib import import_module
from types import SimpleNamespace

import torch
import triton
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)
SETTINGS = [[1, 1], [1, 1], [1, 1]]
# No other size is that of the batch or of a dimension: these can so be told apart.
CALLS = {
    "conv_per_position": ([(11, 8, 7, 10), (11, 2, 3, 3, 7, 10)], SETTINGS),
    "conv_per_sample": ([(11, 8, 7, 10), (11, 6, 8, 3, 3), (11, 6)], [*SETTINGS, 1]),
    "conv_per_sample of large kernels": (
        [(11, 20, 4, 5), (11, 28, 20, 3, 3), (11, 28)],
        [*SETTINGS, 1],
    ),
    "conv_mixture": ([(11, 8, 17, 19), (4, 6, 8, 3, 3), (11, 4), (11, 6)], [*SETTINGS, 1]),
    "deform_conv": (
        [(11, 8, 7, 10), (11, 18, 7, 10), (6, 8, 3, 3), (6,), (11, 9, 7, 10)],
        [*SETTINGS, 1],
    ),
}


def pretend():
    """Answers where Triton asks for a GPU."""
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0)
    )


def both(operator, settings):
    """A function of the output's gradient and all tensors: all gradients, and the output."""

    def call(grad, *tensors):
        gradients = operator.backward(grad, *tensors, *settings, [True] * len(tensors))
        return operator.forward(*tensors, *settings), *gradients

    return call


def main():
    pretend()
    for name, (shapes, settings) in CALLS.items():
        tensors = [torch.randn(shape) for shape in shapes]
        operator = import_module(f"dynaconv.backends.triton.{name.split()[0]}").operator
        grad = torch.randn(operator.shape(*tensors, *settings))
        traced = dispatch_functionalize(both(operator, settings))
        graph = make_fx(traced, tracing_mode="symbolic")(grad, *tensors)
        kernels = [n for n in graph.graph.nodes if "triton_kernel" in str(n.target)]
        print(name.replace(" ", "_"), len(kernels), flush=True)


if __name__ == "__main__":
    main()
