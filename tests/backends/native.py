"""What the tests of the native and the Triton kernels share."""

import os
import subprocess
import sys
from math import prod

import pytest
import torch
from hypothesis import strategies as st

import dynaconv
from dynaconv import functional
from dynaconv.backends.native import library
from dynaconv.shapes import Geometry
from dynaconv.testing import TOLERANCE, close

needs_the_library = pytest.mark.skipif(library.MISSING is not None, reason=str(library.MISSING))
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(t):
    return t.contiguous(memory_format=FORMATS[t.dim()]) if t.dim() in FORMATS else t


LAYOUTS = {
    "channels_last": channels_last,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([t, t])[len(t) :],
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
}


def run(name, primitive, tensors, settings, wanted=None, upstream=None):
    """The output and the gradients of the wanted tensors (else all), by name."""
    wanted = list(tensors) if wanted is None else wanted
    leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in tensors.items()}
    with dynaconv.backend(name):
        output = getattr(functional, primitive)(**leaves, **settings)
    if upstream is None:  # in sixteenths: exact in every dtype
        wave = torch.arange(output.numel(), dtype=torch.float64).cos()
        upstream = ((16 * wave).round() / 16).reshape(output.shape)
    gradients = torch.autograd.grad(output, [leaves[k] for k in wanted], upstream.to(output))
    return {"output": output.detach()} | dict(zip(wanted, gradients, strict=True))


def check(primitive, tensors, settings, tolerance=None, backend="native", **choices):
    """AssertionError unless the backend gives what the reference gives in float64."""
    tolerance = tolerance or TOLERANCE[tensors["input"].dtype]
    exact = {name: t.double() for name, t in tensors.items()}
    expected = run("reference", primitive, exact, settings, **choices)
    for what, value in run(backend, primitive, tensors, settings, **choices).items():
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        close(value, expected[what], f"{primitive} of {shapes}, {settings}: {what}", tolerance)


def deformed_call(
    channels,
    out_channels,
    size,
    kernel,
    batch=2,
    groups=1,
    offset_groups=1,
    bias=True,
    modulated=True,
    dtype=torch.float64,
    **geometry,
):
    """A fresh random call of deform_conv; offsets keep off the points of the grid."""
    rank, taps = len(size), prod(kernel)
    defaults = {"stride": 1, "padding": 0, "dilation": 1} | geometry
    fields = [v if isinstance(v, tuple) else (v,) * rank for v in defaults.values()]
    output = Geometry(kernel, *fields).output_size(size)
    offset = torch.randn(batch, offset_groups * taps * rank, *output, dtype=dtype)
    tensors = {
        "input": torch.randn(batch, channels, *size, dtype=dtype),
        "offset": (16 * offset).round() / 8 + 1 / 16,
        "weight": torch.randn(out_channels, channels // groups, *kernel, dtype=dtype),
    }
    if bias:
        tensors["bias"] = torch.randn(out_channels, dtype=dtype)
    if modulated:
        tensors["modulation"] = torch.rand(batch, offset_groups * taps, *output, dtype=dtype)
    return tensors, geometry | {"groups": groups}


def random_geometry(draw):
    """Size, kernel and settings of a call that has an output, by Hypothesis's `draw`."""
    rank = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))
    kernel, dilation, padding = each(1, 5), each(1, 3), each(0, 4)
    fits = zip(kernel, dilation, padding, each(0, 12 // rank), strict=True)
    size = tuple(max(1, d * (k - 1) + 1 - 2 * p) + extra for k, d, p, extra in fits)
    return size, kernel, {"stride": each(1, 4), "padding": padding, "dilation": dilation}


def on_instruction_set(name, test_file, function):
    """Calls `function(name)` of a test file in a process whose kernels use that instruction set."""
    folder, module = os.path.split(test_file)
    root = os.path.dirname(os.path.dirname(folder))
    code = (
        f"import tests.backends.{module.removesuffix('.py')} as t; t.{function.__name__}('{name}')"
    )
    environment = os.environ | {"DYNACONV_ISA": name}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
