"""C++ kernels for the CPU, over libtorch's stable ABI; csrc/ holds them.

Without the library everything works on eager; the log says so once, with how to build it.
"""

from collections.abc import Callable

import torch

from dynaconv.backends.native import library
from dynaconv.backends.native.conv_mixture import conv_mixture
from dynaconv.backends.native.conv_per_position import conv_per_position
from dynaconv.backends.native.conv_per_sample import conv_per_sample
from dynaconv.backends.native.deform_conv import deform_conv
from dynaconv.dispatch import Backend, Problem, register_backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def supports(problem: Problem) -> str | None:
    """The CPU's float32, float64 and bfloat16; not what wants plain ATen operators."""
    if problem.device != "cpu":
        return "for the CPU"
    if problem.dtype not in DTYPES:
        return f"has no {problem.dtype}"
    if problem.exporting:
        return "torch.export is given plain ATen operators: the reference"
    if problem.transformed:
        return "torch.func's gradients go through plain ATen operators: the reference"
    if library.MISSING:
        library.say_once()
    return library.MISSING


FUNCTIONS: tuple[Callable, ...] = (
    conv_per_position,
    conv_per_sample,
    conv_mixture,
    deform_conv,
)
register_backend(Backend("native", supports, {f.__name__: f for f in FUNCTIONS}))
