"""Scenes of real handwritten digits on real photographs, with a class for every pixel.

The 1797 digits and the two photographs come with scikit-learn, so nothing is downloaded. Digits
are 8 to 56 pixels wide, turned, in bright ink: one kernel size does not fit them all.
Train and validation share neither a digit nor a pixel of a photograph.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "val"]

BACKGROUND = 10
CLASS_NAMES = (*(str(digit) for digit in range(10)), "background")
SCALES = (8.0, 56.0)
SIZE_BUCKETS = {"small": (8.0, 16.0), "medium": (16.0, 32.0), "large": (32.0, 57.0)}
MAX_TURN = math.radians(50)
MAX_CROP = 144
# Photographs at this brightness under bright ink: what a digit is, not whether, is the question.
DIM = 0.6
TRAIN_COLUMNS = 0.7
TRAIN_DIGITS = 0.8


class Scene(NamedTuple):
    """One item: `image` (3, H, W) in [0, 1], `mask` (H, W) long, `sizes` (H, W) in pixels.

    `sizes` holds the width of the digit whose square covers the pixel, 0 where there is none.
    """

    image: Tensor
    mask: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Sources:
    """Real material of one split.

    `digits` (D, 8, 8) in [0, 1], their `labels` (D,) and places `digit_ids` (D,) in the file;
    `photos`, each (3, H, W) in [0, 1], and the (start, stop) `columns` that they were cut from.
    """

    digits: Tensor
    labels: Tensor
    digit_ids: Tensor
    photos: tuple[Tensor, ...]
    columns: tuple[tuple[int, int], ...]


@lru_cache(maxsize=2)
def load_sources(split: Split) -> Sources:
    """The digits and the photograph columns that belong to `split`, and to it alone."""
    from sklearn.datasets import load_digits, load_sample_images

    raw = load_digits()
    labels = torch.from_numpy(raw.target).long()
    ids = digit_ids(labels, split)
    digits = torch.from_numpy(raw.images).float()[ids] / 16
    photos, columns = [], []
    for array in load_sample_images().images:
        photo = torch.tensor(array).permute(2, 0, 1).float() / 255
        cut = int(photo.shape[2] * TRAIN_COLUMNS)
        start, stop = (0, cut) if split == "train" else (cut, photo.shape[2])
        photos.append(photo[:, :, start:stop])
        columns.append((start, stop))
    return Sources(digits, labels[ids], ids, tuple(photos), tuple(columns))


def digit_ids(labels: Tensor, split: Split) -> Tensor:
    """Indices of the digits of `split`: of each class the first 80% train, the rest validate."""
    parts = []
    for digit in range(10):
        ids = (labels == digit).nonzero().flatten()
        cut = int(len(ids) * TRAIN_DIGITS)
        parts.append(ids[:cut] if split == "train" else ids[cut:])
    return torch.cat(parts).sort().values


class InMemory(Dataset[Scene]):
    """Scenes stacked in memory: images (N, 3, H, W), masks (N, H, W), sizes (N, H, W)."""

    def __init__(self, images: Tensor, masks: Tensor, sizes: Tensor) -> None:
        self.images, self.masks, self.sizes = images, masks, sizes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Scene:
        return Scene(self.images[index], self.masks[index], self.sizes[index])


class DigitScenes(Dataset[Scene]):
    """`length` scenes of `size` x `size` pixels; item i depends on (split, seed, i) alone.

    Args:
        split: "train" or "val".
        length: number of scenes.
        size: height and width in pixels, at least 16.
        seed: another seed gives other scenes of the same digits and photographs.

    Raises:
        ValueError: for an unknown split, a negative length or a size below 16.
    """

    def __init__(self, split: Split, length: int, size: int = 64, seed: int = 0) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"DigitScenes: split must be 'train' or 'val', got {split!r}")
        if length < 0 or size < 16:
            raise ValueError(
                f"DigitScenes: needs length >= 0 and size >= 16, got {length} and {size}"
            )
        self.split, self.length, self.size, self.seed = split, length, size, seed
        self.sources = load_sources(split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"DigitScenes: index {index} of {self.length} scenes")
        return make_scene(self.sources, self.size, _generator(self.split, self.seed, index))

    def in_memory(self) -> InMemory:
        """All scenes, made once: epochs then cost no time for making them."""
        images, masks, sizes = zip(*(self[i] for i in range(len(self))), strict=True)
        return InMemory(torch.stack(images), torch.stack(masks), torch.stack(sizes))


def make_scene(sources: Sources, size: int, generator: torch.Generator) -> Scene:
    """One scene, from the random numbers of `generator` alone."""
    image = _crop(sources, size, generator)
    mask = torch.full((size, size), BACKGROUND)
    sizes = torch.zeros(size, size)
    for scale in _scales(size, generator):
        centre = _free_centre(sizes, scale, generator)
        if centre is None:
            continue
        pick = int(torch.randint(len(sources.digits), (), generator=generator))
        turn = (2 * _uniform(generator) - 1) * MAX_TURN
        ink, square = place(sources.digits[pick], size, centre, scale, turn)
        # Handwriting fades at its edge; a steep ramp keeps strokes legible at 56 pixels.
        alpha = ((ink - 0.25) / 0.35).clamp(0, 1)
        image = _paint(image, alpha, generator)
        mask[alpha > 0.5] = sources.labels[pick]
        sizes[square | (alpha > 0.5)] = scale  # interpolated ink reaches a little further
    noise = 0.02 * torch.randn(image.shape, generator=generator)
    return Scene((image + noise).clamp(0, 1), mask, sizes)


def place(
    digit: Tensor, size: int, centre: tuple[float, float], scale: float, turn: float
) -> tuple[Tensor, Tensor]:
    """`digit` (8, 8) as ink (size, size), `scale` pixels wide, and the square it covers (bool).

    Args:
        centre: row and column of the digit's middle, in pixels.
        turn: anticlockwise turn in radians.
    """
    rows, cols = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    y, x = rows + 0.5 - centre[0], cols + 0.5 - centre[1]
    cos, sin = math.cos(turn), math.sin(turn)
    grid = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1) * (2 / scale)
    ink = F.grid_sample(digit[None, None], grid[None], mode="bicubic", align_corners=False)
    return ink[0, 0].clamp(0, 1), grid.abs().amax(dim=-1) <= 1


def _generator(split: Split, seed: int, index: int) -> torch.Generator:
    # A product of large odd numbers spreads neighbouring (seed, index) pairs over 63 bits.
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + (split == "val")) % 2**63
    return torch.Generator().manual_seed(mixed)


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _scales(size: int, generator: torch.Generator) -> list[float]:
    """Widths of the digits of a scene in pixels, largest first, equally likely per octave."""
    low, high = SCALES[0], min(SCALES[1], 0.875 * size)
    count = int(torch.randint(3, 7, (), generator=generator))
    draws = torch.rand(count, generator=generator) * math.log(high / low)
    return sorted((low * draws.exp()).tolist(), reverse=True)


def _free_centre(
    sizes: Tensor, scale: float, generator: torch.Generator, tries: int = 12
) -> tuple[float, float] | None:
    """A centre whose square is free of other digits' squares, or None after `tries` draws."""
    size, half = sizes.shape[0], scale / 2
    for _ in range(tries):
        row, col = (_uniform(generator, half, size - half) for _ in range(2))
        top, left = max(0, int(row - half)), max(0, int(col - half))
        if not sizes[top : math.ceil(row + half), left : math.ceil(col + half)].any():
            return row, col
    return None


def _crop(sources: Sources, size: int, generator: torch.Generator) -> Tensor:
    """A dimmed crop (3, size, size) of a photograph, at a random zoom, perhaps mirrored."""
    photo = sources.photos[int(torch.randint(len(sources.photos), (), generator=generator))]
    limit = min(MAX_CROP, *photo.shape[1:])
    side = int(_uniform(generator, min(size, limit), limit))
    top = int(_uniform(generator, 0, photo.shape[1] - side + 1))
    left = int(_uniform(generator, 0, photo.shape[2] - side + 1))
    crop = photo[:, top : top + side, left : left + side]
    if _uniform(generator) < 0.5:
        crop = crop.flip(-1)
    return DIM * F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]


def _paint(image: Tensor, alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Blends bright ink of a random tint by `alpha` (H, W)."""
    colour = 1 - 0.25 * torch.rand(3, generator=generator)
    return image * (1 - alpha) + colour[:, None, None] * alpha
