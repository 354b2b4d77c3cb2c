"""Sizes beyond all measure are computed or refused, and memory stays in proportion."""

import subprocess
import sys

import pytest
import torch

import dynaconv
from dynaconv import functional
from dynaconv.dispatch import backends, down_from
from dynaconv.shapes import LARGEST

HUGE = (2**31, 2**40, 2**62, 2**63, 10**30)
ONES = torch.ones
CALLS = {
    "conv": (ONES(1, 1, 5), ONES(1, 1, 1)),
    "conv_per_sample": (ONES(1, 1, 5), ONES(1, 1, 1, 1)),
    "conv_mixture": (ONES(1, 1, 5), ONES(2, 1, 1, 1), ONES(1, 2)),
    "conv_per_position": (ONES(1, 1, 5), ONES(1, 1, 1, 1)),
    "deform_conv": (ONES(1, 1, 5), torch.zeros(1, 1, 1), ONES(1, 1, 1)),
    "conv_transpose_per_sample": (ONES(1, 1, 1), ONES(1, 1, 1, 1)),
    "deform_conv_transpose": (ONES(1, 1, 1), torch.zeros(1, 1, 1), ONES(1, 1, 1)),
}
# Of the bytes of the arguments, the output and the windows (or values at the taps) that a formula
# lays out: no call takes more than that many times these, and FLOOR.
FACTOR, FLOOR = 4, 2**25
# The oracle keeps what it reads from both neighbours of each position for the gradient.
ORACLE = 12
MEASURE = """
import resource, sys, torch
torch.set_num_threads(1)
from dynaconv import functional
from dynaconv.dispatch import down_from
from tests.reliability.test_memory import PROPORTION, measured
name, backend = sys.argv[1:]
with down_from(backend):
    small, _ = measured(name, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _, bytes = measured(name, 2**14)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(after - before, bytes)
"""


def measured(name, length):
    """A call with a gradient, and the bytes of arguments, output and windows."""
    tensors, windows = PROPORTION[name](length)
    tensors = [t.requires_grad_() for t in tensors]
    y = getattr(functional, name)(*tensors, padding=4)
    y.sum().backward()
    size = sum(t.nbytes for t in tensors) + y.nbytes + 4 * windows
    return y, size


def _per_sample(length):
    return (torch.randn(4, 32, length), torch.randn(4, 32, 32, 9)), 4 * 32 * 9 * length


def _static(length):
    return (torch.randn(4, 32, length), torch.randn(32, 32, 9)), 4 * 32 * 9 * length


def _per_position(length):
    return (torch.randn(4, 32, length), torch.randn(4, 4, 9, length)), 4 * 32 * 9 * length


def _mixture(length):
    experts = torch.randn(4, 32, 32, 9), torch.randn(4, 4)
    return (torch.randn(4, 32, length), *experts), 4 * 32 * 9 * length


def _deform(length):
    offset = torch.randn(4, 9, length)
    return (torch.randn(4, 32, length), offset, torch.randn(32, 32, 9)), 4 * 32 * 9 * length


PROPORTION = {
    "conv": _static,
    "conv_per_sample": _per_sample,
    "conv_mixture": _mixture,
    "conv_per_position": _per_position,
    "deform_conv": _deform,
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", PROPORTION)
def test_memory_is_in_proportion(name, backend):
    command = [sys.executable, "-c", MEASURE, name, backend]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr[-2000:]
    taken, size = map(int, told.stdout.split())
    print(f"{name} on {backend}: {taken / 2**20:.0f} MiB, {taken / size:.1f} times its data")
    oracle = (name, backend) == ("deform_conv", "reference")
    assert taken <= FLOOR + (ORACLE if oracle else FACTOR) * size


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", CALLS)
def test_the_largest_steps_are_computed(name, backend):
    """A kernel of one tap has no dilation, and one position no stride."""
    tensors = [t.clone().requires_grad_() for t in CALLS[name]]
    with down_from(backend):
        y = getattr(functional, name)(*tensors, stride=LARGEST, dilation=LARGEST)
        y.sum().backward()
    assert y.shape == (1, 1, 1)
    assert y.item() == (2 if name == "conv_mixture" else 1)
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("name", CALLS)
def test_steps_beyond_are_refused(name):
    for value in HUGE:
        for argument in ("stride", "padding", "dilation"):
            with pytest.raises(ValueError, match=f"{argument}={value} must be at most"):
                getattr(functional, name)(*CALLS[name], **{argument: value})


@pytest.mark.parametrize("name", [n for n in CALLS if "transpose" not in n])
def test_outputs_beyond_memory_are_refused(name):
    tensors = [t.unsqueeze(-1) if t.dim() > 2 else t for t in CALLS[name]]
    with pytest.raises(ValueError, match=r"more than there is memory|offset has shape|weight has"):
        getattr(functional, name)(*tensors, padding=LARGEST)


@pytest.mark.parametrize(
    "argument", ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
)
def test_layers_of_sizes_beyond_are_refused(argument):
    sizes = {"in_channels": 2, "out_channels": 2, "kernel_size": 3}
    for cls in (dynaconv.ODConv1d, dynaconv.ModulatedDeformConv2d, dynaconv.CondConvTranspose3d):
        for value in (10**12, *HUGE):
            with pytest.raises(ValueError, match=argument):
                cls(**sizes | {argument: value})


def test_kernels_that_no_memory_holds_are_refused():
    for cls in (dynaconv.ODConv2d, dynaconv.DyConv3d, dynaconv.DeformConv1d):
        with pytest.raises(ValueError, match=r"kernel_size=1000000000.*no memory"):
            cls(2, 2, 10**9)
