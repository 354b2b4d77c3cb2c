"""The reference, which everything else is held against: slow loops, and torch's own convolution."""

from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dynaconv
from dynaconv import functional
from dynaconv.testing import close
from tests.slow import deformed, slow_conv

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LENGTHS = {1: (9,), 2: (5, 6), 3: (3, 5, 4)}
GEOMETRIES = [
    {"kernel": (3, 3, 3), "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1)},
    {"kernel": (2, 3, 1), "stride": (2, 1, 3), "padding": (1, 0, 2), "dilation": (1, 2, 1)},
    {"kernel": (3, 2, 2), "stride": (1, 2, 1), "padding": (2, 1, 0), "dilation": (2, 1, 3)},
]
everywhere = pytest.mark.parametrize(
    ("rank", "geometry"),
    [
        pytest.param(r, {k: v[:r] for k, v in g.items()}, id=f"{r}d-{i}")
        for r, (i, g) in product((1, 2, 3), enumerate(GEOMETRIES))
    ],
)


@pytest.fixture(autouse=True)
def _on_the_reference():
    with dynaconv.backend("reference"):
        yield


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def moves(geometry):
    return {key: geometry[key] for key in ("stride", "padding", "dilation")}


def output_size(rank, geometry):
    x, w = torch.empty(1, 1, *LENGTHS[rank]), torch.empty(1, 1, *geometry["kernel"])
    return CONVS[rank](x, w, **moves(geometry)).shape[2:]


@everywhere
@pytest.mark.parametrize("groups", [1, 2])
def test_conv(rank, geometry, groups):
    x, w = randn(2, 4, *LENGTHS[rank]), randn(6, 4 // groups, *geometry["kernel"])
    bias = randn(6)
    expected = slow_conv(x, lambda n, p: w, **geometry, groups=groups)
    output = functional.conv(x, w, bias, **moves(geometry), groups=groups)
    close(output, expected + bias.reshape(6, *[1] * rank), "conv")


@everywhere
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_per_sample(rank, geometry, groups):
    x, w = randn(2, 4, *LENGTHS[rank]), randn(2, 6, 4 // groups, *geometry["kernel"])
    bias = randn(2, 6)
    expected = slow_conv(x, lambda n, p: w[n], **geometry, groups=groups)
    output = functional.conv_per_sample(x, w, bias, **moves(geometry), groups=groups)
    close(output, expected + bias.reshape(2, 6, *[1] * rank), "conv_per_sample")


@everywhere
def test_conv_mixture(rank, geometry):
    x, w = randn(2, 4, *LENGTHS[rank]), randn(3, 6, 4, *geometry["kernel"])
    a, bias = randn(2, 3), randn(3, 6)
    kernels = [sum(a[n, e] * w[e] for e in range(3)) for n in range(2)]
    shift = torch.stack([sum(a[n, e] * bias[e] for e in range(3)) for n in range(2)])
    expected = slow_conv(x, lambda n, p: kernels[n], **geometry)
    output = functional.conv_mixture(x, w, a, bias, **moves(geometry))
    close(output, expected + shift.reshape(2, 6, *[1] * rank), "conv_mixture")


@everywhere
def test_conv_per_position(rank, geometry):
    x = randn(2, 4, *LENGTHS[rank])
    w = randn(2, 2, *geometry["kernel"], *output_size(rank, geometry))

    def kernel_at(n, p):
        taps = w[(n, slice(None), *[slice(None)] * rank, *p)]
        return taps.repeat_interleave(2, 0).unsqueeze(1)  # two channels a group

    expected = slow_conv(x, kernel_at, **geometry, groups=4)
    close(functional.conv_per_position(x, w, **moves(geometry)), expected, "conv_per_position")


@everywhere
@pytest.mark.parametrize("modulated", [True, False])
def test_deform_conv(rank, geometry, modulated):
    taps, size = prod(geometry["kernel"]), output_size(rank, geometry)
    x, w = randn(2, 4, *LENGTHS[rank]), randn(6, 2, *geometry["kernel"])
    offset = 2 * randn(2, 2 * taps * rank, *size)
    modulation = randn(2, 2 * taps, *size) if modulated else None

    read = deformed(x, geometry["kernel"], offset, modulation)
    expected = slow_conv(x, lambda n, p: w, **geometry, groups=2, read=read)
    output = functional.deform_conv(
        x, offset, w, **moves(geometry), groups=2, modulation=modulation
    )
    close(output, expected, "deform_conv")


@st.composite
def convolutions(draw):
    """Input, kernel and keywords of a static convolution that fits."""
    rank = draw(st.integers(1, 3))
    size = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))
    kernel, dilation, padding, stride = size(1, 4), size(1, 3), size(0, 3), size(1, 3)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    length = [n + draw(st.integers(0, 4)) for n in least]
    groups, batch = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    x = make(batch, groups * draw(st.integers(1, 2)), *length)
    w = make(groups * draw(st.integers(1, 2)), x.shape[1] // groups, *kernel)
    return x, w, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@pytest.mark.parametrize("backend", dynaconv.dispatch.backends())
@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_any_shape_as_torch_convolves_it(backend, call):
    check_as_torch(backend, call)


@pytest.mark.slow
@pytest.mark.parametrize("backend", dynaconv.dispatch.backends())
@settings(max_examples=2000, deadline=None)
@given(convolutions())
def test_many_shapes_as_torch_convolves_them(backend, call):
    check_as_torch(backend, call)


def check_as_torch(backend, call):
    """With one kernel for all, each primitive is torch's convolution."""
    x, w, keys = call
    keys = dict(keys)
    batch, rank = len(x), x.dim() - 2
    expected = CONVS[rank](x, w, **keys)
    taps, size = w[0, 0].numel(), expected.shape[2:]
    with dynaconv.dispatch.down_from(backend):
        static = functional.conv(x, w, **keys)
        each = functional.conv_per_sample(x, w.expand(batch, *w.shape), **keys)
        shares = torch.full((batch, 2), 0.5, dtype=x.dtype)
        mixed = functional.conv_mixture(x, torch.stack([w - 1, w + 1]), shares, **keys)
        still = x.new_zeros(batch, taps * rank, *size)
        placed = functional.deform_conv(x, still, w, **keys)
        outputs = {"conv": static, "per sample": each, "mixture": mixed, "deform": placed}
        for what, output in outputs.items():
            close(output, expected, f"{what} on {backend}")
        groups = keys.pop("groups")
        one = w[:groups, 0]  # a kernel a group of input channels
        everywhere = one.reshape(1, *one.shape, *[1] * rank).expand(
            batch, *[-1] * (1 + rank), *size
        )
        local = functional.conv_per_position(x, everywhere, **keys)
        depthwise = one.repeat_interleave(x.shape[1] // groups, 0).unsqueeze(1)
        expected = CONVS[rank](x, depthwise, **keys, groups=x.shape[1])
        close(local, expected, f"per position on {backend}")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("word", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_padding_by_words(rank, word, kernel):
    x, w = randn(2, 3, *[7] * rank), randn(4, 3, *[kernel] * rank)
    expected = CONVS[rank](x, w, padding=word)
    close(functional.conv(x, w, padding=word), expected, word)
    close(functional.conv_per_sample(x, w.expand(2, *w.shape), padding=word), expected, word)
    still = x.new_zeros(2, kernel**rank * rank, *expected.shape[2:])
    close(functional.deform_conv(x, still, w, padding=word), expected, word)
