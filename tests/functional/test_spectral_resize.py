"""spectral_resize against direct sums over frequencies in float64, and what it promises."""

from math import pi

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dynaconv.functional import spectral_resize
from dynaconv.functional.spectral_resize import resized_shape
from dynaconv.testing import TOLERANCE, close

EXACT = TOLERANCE[torch.float64]
SHAPES = [(9,), (12,), (6, 7), (7, 8), (4, 5, 6), (5, 6, 3)]
double = torch.float64


def wave(frequencies, length, sign):
    """exp(sign 2 pi i f n / length): a row for each position n, a column for each frequency f."""
    phase = torch.outer(torch.arange(length, dtype=double), frequencies.to(double))
    return torch.exp(sign * 2j * pi * phase / length)


def matrix(old, new, frequencies, weights):
    """y[n] = sum_f w_f exp(2 pi i f n / new) (1 / old) sum_j x[j] exp(-2 pi i f j / old)."""
    return (wave(frequencies, new, 1) * weights) @ wave(frequencies, old, -1).T / old


def apply(x, matrices):
    """A matrix along each spatial dimension."""
    for d, each in enumerate(matrices):
        x = torch.movedim(torch.tensordot(each, x.to(each.dtype), dims=([1], [2 + d])), 0, 2 + d)
    return x


def slow_whole(x, size):
    """The frequencies up to half of the smaller size; half itself counts on both sides."""
    matrices = []
    for old, new in zip(x.shape[2:], size, strict=True):
        kept = min(old, new)
        f = torch.arange(-(kept // 2), kept // 2 + 1)
        at_half = 2 * f.abs() == kept
        weights = torch.where(at_half, 1.0 if new < old else 0.5, 1.0).to(double)
        matrices.append(matrix(old, new, f, weights))
    return apply(x, matrices).real


def slow_learned(x, size, smoothness):
    """m(f) = clip(1 + (t - |f|) / R, 0, 1), t = (L // 2) s / L, of the frequencies with m > 0."""
    matrices = []
    for length, s in zip(x.shape[2:], size, strict=True):
        f = torch.arange(-((length - 1) // 2), length // 2 + 1)
        mask = (1 + ((length // 2) * s / length - f.abs()) / smoothness).clamp(0, 1)
        kept = mask > 0
        matrices.append(matrix(length, int(kept.sum()), f[kept], mask[kept]))
    return apply(x, matrices).real


def slow_published(x, size, smoothness):
    """The arithmetic of google-research/diffstride, the last dimension with half its spectrum."""
    matrices = []
    for d, (length, s) in enumerate(zip(x.shape[2:], size, strict=True)):
        if d == x.dim() - 3:
            bins = torch.arange(length // 2 + 1)
            mask = ((smoothness + s / 2 + 1 - bins) / smoothness).clamp(0, 1)
        else:
            half = list(range(length // 2 + length % 2))
            positions = half[length % 2 :][::-1] + half
            ramp = (smoothness + s / 2 - torch.tensor(positions)) / smoothness
            mask = ramp.clamp(0, 1).roll(length // 2)  # the code's fftshift
            bins = torch.arange(length)
        bins, mask = bins[mask > 0], mask[mask > 0]
        rows, new = torch.arange(len(bins)), len(bins)
        weights = torch.ones(new, dtype=double)
        if d == x.dim() - 3:
            new = 2 * (len(bins) - 1)
            weights[1:-1] = 2
        forward = wave(bins, length, -1).T
        matrices.append((wave(rows, new, 1) * weights * mask) @ forward / new)
    return apply(x, matrices).real


def example(shape, **options):
    return torch.randn(2, 3, *shape, dtype=double, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("change", [-4, -3, -2, -1, 0, 1, 2, 5])
def test_whole_sizes(shape, change):
    size = [max(length + change + d, 1) for d, length in enumerate(shape)]
    x = example(shape)
    close(spectral_resize(x, size), slow_whole(x, size), f"{shape} to {size}", EXACT)


@pytest.mark.parametrize("published", [False, True], ids=["symmetric", "published"])
@pytest.mark.parametrize("smoothness", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_learned_sizes(shape, smoothness, published):
    """Output and gradients; what is cut has no gradient in the sums either."""
    slow = slow_published if published else slow_learned
    for share in (0.3, 0.53, 0.8):
        x = example(shape, requires_grad=True)
        size = (share * torch.tensor(shape, dtype=double)).clamp(min=2).requires_grad_()
        output = spectral_resize(x, size, smoothness, published)
        expected = slow(x, size, smoothness)
        close(output, expected, f"{shape} to {size.tolist()}", EXACT)
        assert tuple(output.shape[2:]) == resized_shape(shape, size, smoothness, published)
        pull = torch.randn_like(output)
        actual = torch.autograd.grad(output, [x, size], pull)
        for a, e in zip(actual, torch.autograd.grad(expected, [x, size], pull), strict=True):
            close(a, e, "gradient", EXACT)


@pytest.mark.parametrize("published", [False, True], ids=["symmetric", "published"])
@pytest.mark.parametrize("shape", [(10,), (7, 8)], ids=str)
def test_gradcheck(shape, published):
    """Where no frequency enters or leaves, the gradient is the difference quotient's limit."""
    x = example(shape, requires_grad=True)[:1, :1]
    size = torch.tensor([4.3, 5.1][: len(shape)], dtype=double, requires_grad=True)
    call = lambda x, size: spectral_resize(x, size, 1.7, published)
    assert gradcheck(call, (x, size))
    assert gradgradcheck(call, (x, size))
    if not published:
        assert gradcheck(lambda x: spectral_resize(x, 4), (x,))
        assert gradgradcheck(lambda x: spectral_resize(x, 13), (x,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constants_stay(shape):
    x = torch.full((1, 2, *shape), 3.25, dtype=double)
    sizes = [1, 2, 3, 4, 15, torch.full((len(shape),), 2.6)]
    for size in sizes:
        output = spectral_resize(x, size, 1.5)
        close(output, torch.full_like(output, 3.25), f"constant at {size}", EXACT)


@pytest.mark.parametrize(("old", "new"), [(20, 9), (20, 10), (21, 10), (9, 20), (10, 21), (7, 8)])
def test_band_limited_signals_are_sampled_anew(old, new):
    """What varies slower than both samplings can show is the same function at both."""
    at = lambda n: sum(
        (k + 1) * torch.cos(2 * pi * k * torch.arange(n, dtype=double) / n + k)
        for k in range((min(old, new) + 1) // 2)
    )
    close(spectral_resize(at(old)[None, None], new)[0, 0], at(new), f"{old} to {new}", EXACT)


def test_cutting_and_padding_is_the_ideal_low_pass():
    x = example((12, 15))
    spectrum = np.fft.fft2(x.numpy())
    kept = [np.abs(np.fft.fftfreq(n, 1 / n)) <= 3 for n in (12, 15)]
    expected = np.fft.ifft2(spectrum * kept[0][:, None] * kept[1]).real
    close(spectral_resize(spectral_resize(x, 7), (12, 15)), torch.from_numpy(expected), "", EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothness", [0.3, 1.0, 4.0])
def test_full_size_is_the_identity_and_can_shrink(shape, smoothness):
    x = example(shape)
    size = torch.tensor(shape, dtype=torch.float32, requires_grad=True)
    output = spectral_resize(x, size, smoothness)
    close(output, x, "size L", EXACT)
    output.square().sum().backward()
    assert (size.grad > 0).all()  # less size is less energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [5, torch.tensor([4.7, 3.1])], ids=["whole", "learned"])
def test_dtypes(dtype, size):
    x = example((8, 9)).to(dtype)
    for published in (False, True) if isinstance(size, torch.Tensor) else (False,):
        output = spectral_resize(x, size, 2.0, published)
        assert output.dtype == dtype
        expected = spectral_resize(x.double(), size, 2.0, published)
        close(output, expected, str(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("size", [5, torch.tensor([4.7, 3.1])], ids=["whole", "learned"])
def test_layouts_and_empty_batches(size):
    x = example((8, 9))
    expected = spectral_resize(x, size)
    for view in (
        x.to(memory_format=torch.channels_last),
        torch.stack([x, x], -1)[..., 0],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        close(spectral_resize(view, size), expected, "layout", EXACT)
    for empty in (x[:0], x[:, :0]):
        output = spectral_resize(empty.requires_grad_(), size)
        assert output.shape == (*empty.shape[:2], *expected.shape[2:])
        output.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_sizes_compile_without_a_break(dynamic):
    call = torch.compile(spectral_resize, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape, size in (((8, 9), (5, 4)), ((10, 9), (7, 12))):
        x = example(shape)
        close(call(x, size), spectral_resize(x, size), f"{shape} to {size}", EXACT)


def test_vmap():
    x = example((8, 9))[None].repeat(3, 1, 1, 1, 1) * torch.arange(1.0, 4).reshape(3, 1, 1, 1, 1)
    expected = torch.stack([spectral_resize(each, 4) for each in x])
    close(torch.vmap(lambda each: spectral_resize(each, 4))(x), expected, "vmap", EXACT)


X = torch.zeros(2, 3, 8, 9)


@pytest.mark.parametrize(
    ("error", "call", "text"),
    [
        (ValueError, lambda: spectral_resize(X[0, 0], 4), r"give \(N, C, \*L\)"),
        (TypeError, lambda: spectral_resize(X.int(), 4), "give a floating-point tensor"),
        (ValueError, lambda: spectral_resize(X[..., :0], 4), "give at least 1 position"),
        (ValueError, lambda: spectral_resize(X, 0), "size=0 must be at least 1"),
        (ValueError, lambda: spectral_resize(X, (4, 4, 4)), "has 3 entries; give 1 or 2"),
        (TypeError, lambda: spectral_resize(X, 4.5), "size=4.5 must be int"),
        (ValueError, lambda: spectral_resize(X, 4, 0.0), "smoothness=0.0 must be above 0"),
        (ValueError, lambda: spectral_resize(X, 4, published=True), "is for learned sizes"),
        (TypeError, lambda: spectral_resize(X, torch.tensor([4, 4])), "dtype torch.int64"),
        (ValueError, lambda: spectral_resize(X, torch.ones(3)), r"size has shape \(3,\); give"),
        (ValueError, lambda: spectral_resize(X, torch.tensor([4.0, 0.0])), "must be above 0"),
        (ValueError, lambda: spectral_resize(X, torch.full((2,), torch.nan)), "finite"),
        (ValueError, lambda: spectral_resize(X, torch.ones(2, device="meta")), "size is on meta"),
    ],
)
def test_refusals(error, call, text):
    with pytest.raises(error, match=text):
        call()
