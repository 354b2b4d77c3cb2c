"""Triton kernels for the GPU; under TRITON_INTERPRET=1 they run on the CPU, for tests.

Without Triton everything works on eager.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import torch

from dynaconv.dispatch import Backend, Problem, is_forced, register_backend

# Importing Triton takes half a second: only where there can be work for it.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BUILT_FOR_GPU = bool(torch.version.cuda or torch.version.hip or torch.version.xpu)
PRIMITIVES = ("conv_per_position", "conv_per_sample", "conv_mixture", "deform_conv")


def supports(problem: Problem) -> str | None:
    """The GPU's float32, bfloat16 and float16; not what wants plain ATen operators."""
    if problem.device == "cpu" and not (INTERPRETING and is_forced("triton")):
        return "for GPUs"
    if problem.dtype == torch.float64 and not INTERPRETING:
        return "has no torch.float64"
    if problem.exporting:
        return "torch.export is given plain ATen operators: the reference"
    if problem.transformed:
        return "torch.func's gradients go through plain ATen operators: the reference"
    if torch.are_deterministic_algorithms_enabled() and problem.primitive == "deform_conv":
        return "adds up gradients of deform_conv in any order"
    return None


if (BUILT_FOR_GPU or INTERPRETING) and find_spec("triton"):
    modules = {name: import_module(f"{__name__}.{name}") for name in PRIMITIVES}
    functions = {name: getattr(module, name) for name, module in modules.items()}
    register_backend(Backend("triton", supports, functions))
