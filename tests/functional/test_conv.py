"""conv with kernels of any size: errors of its FFT, the plans it makes, and its rule."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from dynaconv import backend, explain
from dynaconv.functional import conv
from dynaconv.testing import check_primitive, close

eager = importlib.import_module("dynaconv.backends.eager.conv")
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Promised for float32 at any size, relative to the largest value.
ERROR = 1e-4
LARGE = [
    # batch, channels, groups, size, kernel
    (1, 2, 1, (16384,), (16384,)),
    (1, 2, 2, (16384,), (511,)),
    (2, 2, 1, (4096,), (1023,)),
    (1, 2, 2, (224, 224), (111, 111)),
    (1, 3, 1, (96, 130), (64, 31)),
    (1, 2, 1, (20, 24, 18), (15, 9, 17)),
]


@pytest.fixture
def path(request, monkeypatch):
    monkeypatch.setattr(eager, "all_direct", lambda *a: False)
    monkeypatch.setattr(eager, "formulation", lambda *a: request.param)
    return request.param


def results(x, w, g, **settings):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = conv(x, w, **settings)
    return y, *torch.autograd.grad(y, (x, w), g.to(y.dtype))


def correlated(x, w, padding):
    """The definition by a double-precision transform over every pair: no wrap-around at all."""
    size = [n + k + 2 * padding for n, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    dims = tuple(range(2, x.dim()))
    wide = F.pad(x, [padding] * 2 * len(dims))
    spectra = torch.fft.rfftn(wide, s=size, dim=dims), torch.fft.rfftn(w, s=size, dim=dims).conj()
    y = torch.fft.irfftn(torch.einsum("nc...,oc...->no...", *spectra), s=size, dim=dims)
    outputs = [n + 2 * padding - k + 1 for n, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    return y[(..., *[slice(n) for n in outputs])]


def direct(x, w, padding, groups):
    parts = zip(x.chunk(groups, 1), w.chunk(groups), strict=True)
    return torch.cat([correlated(a, b, padding) for a, b in parts], 1)


@pytest.mark.parametrize("path", ["fft"], indirect=True)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_errors_stay_small_in_float32(case, path):
    batch, channels, groups, size, kernel = case
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    w = torch.randn(channels, channels // groups, *kernel, dtype=torch.float64)
    padding = min(kernel) // 2
    leaves = x.requires_grad_(), w.requires_grad_()
    y = direct(*leaves, padding, groups)
    g = torch.randn_like(y)
    expected = y, *torch.autograd.grad(y, leaves, g)
    actual = results(x.float(), w.float(), g, padding=padding, groups=groups)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - e).abs().max() <= ERROR * e.abs().max()


def test_the_comparison_is_torchs_convolution():
    x, w = torch.randn(2, 4, 9, 8).double(), torch.randn(6, 2, 5, 4).double()
    torch.testing.assert_close(direct(x, w, 2, 2), F.conv2d(x, w, padding=2, groups=2))


@pytest.mark.parametrize("path", ["flipped"], indirect=True)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_other_engine(rank, groups, path):
    x = torch.randn(2, 4, *(7, 8, 9)[:rank], dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 4 // groups, *(3, 2, 4)[:rank], dtype=torch.float64, requires_grad=True)
    settings = {"padding": (1, 0, 2)[:rank], "dilation": (2, 1, 1)[:rank], "groups": groups}
    y = CONVS[rank](x, w, **settings)
    g = torch.randn_like(y)
    # The kernel's gradient has no other engine.
    flipped = eager.flipped_output(x, w, arguments(settings))
    torch.testing.assert_close(flipped, y)
    gradient = eager.flipped_input(g, w, arguments(settings))
    torch.testing.assert_close(gradient, torch.autograd.grad(y, x, g)[0])


def arguments(settings):
    padding, dilation = list(settings["padding"]), list(settings["dilation"])
    return [1] * len(padding), padding, dilation, settings["groups"]


RULE = [
    # what, input, kernel, groups, formulation
    ("output", (1, 16, 224, 224), (3, 3), 16, "direct"),
    ("output", (1, 16, 224, 224), (111, 111), 16, "fft"),
    ("weight", (1, 16, 224, 224), (7, 7), 16, "fft"),
    ("output", (8, 64, 28, 28), (3, 3), 1, "direct"),
    ("output", (1, 16, 64), (3,), 1, "direct"),
    ("output", (1, 16, 16384), (16383,), 16, "fft"),
    ("input", (1, 16, 32, 32, 32), (5, 5, 5), 16, "flipped"),
]


@pytest.mark.parametrize("case", RULE, ids=str)
def test_the_rule(case):
    what, size, kernel, groups, expected = case
    padding, ones = [k // 2 for k in kernel], [1] * len(kernel)
    x, w = torch.empty(size), torch.empty(size[1], size[1] // groups, *kernel)
    assert eager.formulation(what, x, w, (ones, padding, ones, groups)) == expected


def test_a_sequence_is_cut_and_an_image_is_not():
    plan = lambda *a: eager.best_plan("output", *a)[1]
    assert plan((1, 16, 16384), (16, 1, 512), ((1,), (256,), (1,), 16)).tiles[0] > 4
    whole = plan((1, 16, 56, 56), (16, 1, 55, 55), ((1, 1), (27, 27), (1, 1), 16))
    assert whole.tiles == (1, 1)


@pytest.mark.parametrize("least", [1, 2, 3, 17, 127, 128, 129, 1000, 24577])
def test_fast_lengths(least):
    n = eager.fast_length(least)
    assert least <= n < max(2 * least, 4)
    while n % 2 == 0:
        n //= 2
    assert n in eager.ODD


def test_the_rule_on_the_contract_calls():
    assert check_primitive("conv", "eager") == 126


def test_small_kernels_are_torchs_own_convolution():
    x, w = torch.randn(2, 4, 9, 9), torch.randn(4, 4, 3, 3, requires_grad=True)
    assert "Convolution" in type(conv(x, w).grad_fn).__name__
    assert "eager: chosen" in explain(conv, x, w)


def test_large_kernels_under_transforms_and_export():
    x, w = torch.randn(1, 2, 2000).double(), torch.randn(2, 1, 1501).double()
    loss = lambda x, w: conv(x, w, groups=2).square().sum()
    expected = torch.func.grad(lambda x, w: F.conv1d(x, w, groups=2).square().sum())(x, w)
    torch.testing.assert_close(torch.func.grad(loss)(x, w), expected)

    class Call(torch.nn.Module):
        def forward(self, x, w):
            return conv(x, w, groups=2)

    program = torch.export.export(Call(), (x, w))
    assert "conv1d" in str(program.graph) or "convolution" in str(program.graph)
    assert "fft" not in str(program.graph)


def test_strides_beyond_the_input_have_gradients(monkeypatch):
    """The only output sees padding alone in one dimension: its gradient is cut off whole."""
    x = torch.randn(2, 1, 4, 4, 1, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(eager, "all_direct", lambda *a: False)
    monkeypatch.setattr(eager, "formulation", lambda *a: "fft")
    results = {}
    for name in ("eager", "reference"):
        with backend(name):
            y = conv(x, w, stride=2**31 - 1, padding=(2, 2, 1))
        results[name] = (y, *torch.autograd.grad(y.square().sum(), [x, w]))
    for a, b in zip(results["eager"], results["reference"], strict=True):
        close(a, b, "conv with a far stride")
