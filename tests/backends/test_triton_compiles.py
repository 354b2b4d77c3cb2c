"""The Triton kernels through Triton's own compiler, for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# Kernels that multiply matrices, and whether what they read is on its way in time: deform_conv's
# points are to go through the first cache instead, and mix has one product.
PRODUCTS = {
    "conv_per_sample.multiply": True,
    "conv_per_sample.correlate": True,
    "conv_per_sample.multiply_flat": True,
    "conv_per_sample.correlate_flat": True,
    "conv_mixture.mix": False,
    "conv_mixture.unmix": True,
    "deform_conv.forward": False,
}


def printed(script, *arguments):
    """The lines of a script beside this one, as words, from a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.backends.{script}", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exception" not in done.stderr, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def compiled(*arguments):
    """What compile_triton prints: kernel, matrix products, asynchronous copies."""
    lines = printed("compile_triton", *arguments)
    return [(name, int(products), int(copies)) for name, products, copies in lines]


def test_kernels_compile_to_matrix_products_and_pipelined_copies():
    lines = compiled("bf16", "90")
    assert len(lines) == 18
    for name, products, copies in lines:
        assert (products > 0) == (name in PRODUCTS), name
        assert (copies > 0) == PRODUCTS.get(name, False), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tensors_that_are_laid_out_are_read_along_their_lines(dtype):
    assert printed("compile_triton", dtype, "90", "--lay") == [["0", "0"]]


def test_operators_are_open_to_torch_compile():
    kernels = {name: int(count) for name, count in printed("trace_triton")}
    # Of forward and backward, with those that lay tensors out.
    assert kernels == {
        "conv_per_position": 6, "conv_per_sample": 9, "conv_per_sample_of_large_kernels": 7,
        "conv_mixture": 12, "deform_conv": 7,
    }  # fmt: skip


# What inductor's program calls, beside `lay`.
CALLED = {
    "conv_per_position": {"forward", "by_input", "by_weight"},
    "conv_per_sample": {"multiply", "correlate"},
    "conv_per_sample of large kernels": {
        "offsets", "multiply_flat", "multiply", "fold", "correlate_flat",
    },
    "conv_mixture": {"mix", "multiply", "correlate", "unmix"},
    "deform_conv": {"forward", "multiply", "backward", "correlate"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deform_conv", ["--dynamic"]),
        *(
            pytest.param(name, sizes, marks=pytest.mark.slow)
            for name in CALLED
            for sizes in ([], ["--dynamic"])
        ),
    ],
)
def test_inductor_compiles_the_operators(name, sizes):
    lines = printed("inductor_triton", name, *sizes)
    assert {line[0] for line in lines} == CALLED[name] | {"lay"}
    undone = {line[0]: line[2:] for line in lines if line[2:]}  # where a trial adds to or replaces
    assert undone == ({"backward": ["by_input", "columns"]} if name == "deform_conv" else {})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_configuration_compiles(dtype, architecture):
    assert len(compiled(dtype, architecture, "--all")) > 100
