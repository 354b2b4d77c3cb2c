"""Fourier transforms by matrix products against those by FFT."""

import pytest

from dynaconv.backends.onnx import STANDARD
from dynaconv.dispatch import preferring
from dynaconv.registry import family
from dynaconv.testing import close
from dynaconv.testing.families import example, randomized


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["fdconv", "adaptive_dilation"])
def test_layers_without_fft_give_the_same(name, rank):
    cls = family(name).classes[rank]
    for arguments in cls.samples(rank):
        layer, x = randomized(cls, arguments), example(cls, arguments)
        expected = layer(x)
        with preferring(STANDARD):
            close(layer(x), expected, f"{layer} by matrices")
