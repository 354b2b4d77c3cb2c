"""Fourier transforms by matrix products, for graphs that have no FFT (`dispatch.has_fft`)."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor


def filtered(x: Tensor, kept: Sequence[Tensor], half: bool = False) -> Tensor:
    """ifftn(fftn(x) box).real for x (N, C, *L), with box the product of `kept`.

    Args:
        kept: for each dimension a factor for each of its frequencies, in the order of FFT.
        half: irfftn(rfftn(x) box): the last of `kept` has L // 2 + 1 entries.
    """
    real, imaginary = x, torch.zeros_like(x)
    last = len(kept) - 1
    for d, factors in enumerate(kept):
        cos, sin = _circulants(factors.to(x.dtype), x.shape[2 + d], half and d == last)
        apply = lambda t, matrix, dim=2 + d: (t.transpose(dim, -1) @ matrix.T).transpose(dim, -1)
        first = apply(real, cos) - apply(imaginary, sin)
        real, imaginary = first, apply(real, sin) + apply(imaginary, cos)
    return real


def _circulants(factors: Tensor, length: int, half: bool) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the filter (L, L) with these factors of frequencies."""
    cos, sin = _waves(factors.shape[0], length, factors)
    if half:
        factors = factors * _twice(factors.shape[0], length, factors)
    place = torch.arange(length, device=factors.device)
    apart = place.unsqueeze(1) - place
    apart = torch.where(apart < 0, apart + length, apart)
    return (factors @ cos / length)[apart], (factors @ sin / length)[apart]


def inverse_real(spectrum: Tensor, shape: tuple[int, int]) -> Tensor:
    """irfft2 of a spectrum (N, rows, columns // 2 + 1, 2) in real and imaginary parts."""
    rows, columns = shape
    cos, sin = _waves(rows, rows, spectrum)
    real, imaginary = spectrum.unbind(-1)
    real, imaginary = cos @ real - sin @ imaginary, cos @ imaginary + sin @ real
    bins = spectrum.shape[2]
    cos, sin = _waves(bins, columns, spectrum)
    twice = _twice(bins, columns, spectrum)
    return ((real * twice) @ cos - (imaginary * twice) @ sin) / (rows * columns)


def _waves(bins: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi f p / L: (bins, L)."""
    frequency = torch.arange(bins, device=like.device).unsqueeze(1)
    turns = frequency * torch.arange(length, device=like.device)
    whole = torch.scalar_tensor(length, dtype=torch.long, device=like.device)
    angle = (turns % whole).to(like.dtype) * (2 * pi / length)
    return angle.cos(), angle.sin()


def _twice(bins: int, length: int, like: Tensor) -> Tensor:
    """2 for each frequency of half a spectrum that stands for its negative too, else 1."""
    frequency = torch.arange(bins, device=like.device)
    alone = (frequency == 0) | (2 * frequency == length)
    return torch.where(alone, 1, 2).to(like.dtype)
