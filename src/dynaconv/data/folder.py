"""Images and masks in folders, checked before training starts.

    DIR/train/images/NAME.jpg   DIR/train/masks/NAME.png
    DIR/val/images/NAME.jpg     DIR/val/masks/NAME.png

A mask is a PNG whose pixels are class indices; 255 (or `ignore`) means no class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# A folder with hundreds of faults is told with the first few.
MOST_FAULTS = 20


class FolderError(ValueError):
    """A folder that cannot be trained on; the text names every file and its fault."""


@dataclass(frozen=True)
class Folder:
    """A checked data set: (image, mask) paths of each split, and the number of classes."""

    train: list[tuple[Path, Path]]
    val: list[tuple[Path, Path]]
    classes: int
    ignore: int


def read_image(path: Path | str) -> Tensor:
    """(3, H, W) in [0, 1]. ValueError names the file where it cannot be read."""
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def read_mask(path: Path | str) -> Tensor:
    """(H, W) long of class indices. ValueError names the file and what is wrong with it."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise ValueError(
                    f"{path}: a mask is a single channel of class indices, this has {image.mode}"
                )
            array = np.array(image).astype(np.int64)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as a mask ({error})") from None
    return torch.from_numpy(array)


def check_folder(root: Path | str, classes: int | None = None, ignore: int = 255) -> Folder:
    """Reads every file once.

    Args:
        root: the folder above.
        classes: number of classes; None takes the largest index in the train masks, plus 1.
        ignore: the index that means no class.

    Raises:
        FolderError: names each file and its fault.
    """
    root, faults = Path(root), []
    if not root.is_dir():
        raise FolderError(f"{root}: no such folder")
    pairs = {split: _pairs(root / split, faults) for split in ("train", "val")}
    _stop_at(faults)
    seen: dict[str, dict[int, Path]] = {"train": {}, "val": {}}
    for split, files in pairs.items():
        for image, mask in files:
            _check_pair(image, mask, seen[split], faults)
    _stop_at(faults)
    known = [c for c in seen["train"] if c != ignore]
    if not known:
        raise FolderError(f"{root / 'train' / 'masks'}: no pixel has a class but {ignore}")
    count = max(known) + 1 if classes is None else classes
    for found in seen.values():
        faults += [
            f"{path}: unknown class {value}; known are 0 to {count - 1}, and {ignore} for none"
            for value, path in sorted(found.items())
            if value != ignore and not 0 <= value < count
        ]
    _stop_at(faults)
    return Folder(pairs["train"], pairs["val"], count, ignore)


def _pairs(split: Path, faults: list[str]) -> list[tuple[Path, Path]]:
    """(image, mask) by name; notes what is missing."""
    folders = split / "images", split / "masks"
    missing = [f"{folder}: no such folder" for folder in folders if not folder.is_dir()]
    if missing:
        faults += missing
        return []
    images = {p.stem: p for p in sorted(folders[0].iterdir()) if p.suffix.lower() in IMAGES}
    masks = {p.stem: p for p in sorted(folders[1].iterdir()) if p.suffix.lower() == ".png"}
    if not images:
        faults.append(f"{folders[0]}: no images ({', '.join(IMAGES)})")
    faults += [f"{p}: has no mask {folders[1] / p.stem}.png" for n, p in images.items() if n not in masks]
    faults += [f"{p}: has no image in {folders[0]}" for n, p in masks.items() if n not in images]
    return [(p, masks[n]) for n, p in images.items() if n in masks]


def _check_pair(image: Path, mask: Path, seen: dict[int, Path], faults: list[str]) -> None:
    """Notes an unreadable file or differing sizes; collects the classes with a file for each."""
    try:
        pixels, labels = read_image(image), read_mask(mask)
    except ValueError as error:
        faults.append(str(error))
        return
    if pixels.shape[1:] != labels.shape:
        sizes = [f"{s[1]}x{s[0]}" for s in (labels.shape, pixels.shape[1:])]
        faults.append(f"{mask}: is {sizes[0]}, its image {image.name} is {sizes[1]}")
    for value in labels.unique().tolist():
        seen.setdefault(value, mask)


def _stop_at(faults: list[str]) -> None:
    if faults:
        more = len(faults) - MOST_FAULTS
        shown = faults[:MOST_FAULTS] + ([f"... and {more} more"] if more > 0 else [])
        raise FolderError("\n".join(shown))


class FolderData(Dataset):
    """Items (image (3, H, W) in [0, 1], mask (H, W) long).

    With `size`, random crops of that size, scaled by 0.75 to 1.5 and mirrored, drawn from (seed,
    epoch, index) alone; without it, whole images.
    """

    def __init__(
        self, pairs: list[tuple[Path, Path]], ignore: int, size: int | None = None, seed: int = 0
    ) -> None:
        self.pairs, self.ignore, self.size, self.seed = pairs, ignore, size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        pixels, labels = read_image(image), read_mask(mask)
        if self.size is None:
            return pixels, labels
        mixed = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + index
        return augment(pixels, labels, self.size, self.ignore, torch.Generator().manual_seed(mixed))


def augment(
    image: Tensor, mask: Tensor, size: int, ignore: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random crop (3, size, size) and (size, size); beyond the border nothing is labelled."""
    draw = torch.rand(4, generator=generator)
    scale = 0.75 * 2 ** float(draw[0])
    height, width = (max(1, round(n * scale)) for n in mask.shape)
    image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    mask = F.interpolate(mask[None, None].float(), (height, width), mode="nearest")[0, 0].long()
    right, bottom = max(0, size - width), max(0, size - height)
    image = F.pad(image[None], (0, right, 0, bottom), mode="constant")[0]
    mask = F.pad(mask, (0, right, 0, bottom), value=ignore)
    top = int(float(draw[1]) * (mask.shape[0] - size + 1))
    left = int(float(draw[2]) * (mask.shape[1] - size + 1))
    image, mask = (t[..., top : top + size, left : left + size] for t in (image, mask))
    return (image.flip(-1), mask.flip(-1)) if draw[3] < 0.5 else (image, mask)
