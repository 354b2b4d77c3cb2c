"""Images and masks in folders, checked before training starts.

    DIR/train/images/NAME.jpg   DIR/train/masks/NAME.png
    DIR/val/images/NAME.jpg     DIR/val/masks/NAME.png

A mask is a PNG whose pixels are class indices; 255 (or `ignore`) means no class.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dynaconv.data.errors import InputError, refuse
from dynaconv.data.images import read_image, read_mask
from dynaconv.masking import pad_batch

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASKS = (".png",)

Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Folder:
    """A checked data set: (image, mask) paths of each split, and the number of classes."""

    train: list[Pair]
    val: list[Pair]
    classes: int


def check_folder(root: Path | str, classes: int | None = None, ignore: int = 255) -> Folder:
    """Reads every file once and refuses the folder if one of them cannot be trained on.

    Args:
        root: the folder above.
        classes: number of classes; None takes the largest index in the train masks, plus 1.
        ignore: the index that means no class.

    Raises:
        InputError: names each file and its fault.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    faults: list[str] = []
    train, val = (_pairs(root / split, faults) for split in ("train", "val"))
    refuse(sorted(faults))
    seen_train, seen_val = _classes_of(train, faults), _classes_of(val, faults)
    refuse(sorted(faults))
    if classes is None:
        classes = _count_classes(root / "train" / "masks", seen_train, ignore)
    for value, mask in [*sorted(seen_train.items()), *sorted(seen_val.items())]:
        if value != ignore and not 0 <= value < classes:
            known = f"known are 0 to {classes - 1}, and {ignore} for none"
            faults.append(f"{mask}: unknown class {value}; {known}")
    refuse(sorted(faults))
    return Folder(train, val, classes)


def _pairs(split: Path, faults: list[str]) -> list[Pair]:
    """(image, mask) by name; notes what is missing."""
    folders = split / "images", split / "masks"
    missing = [f"{folder}: no such folder" for folder in folders if not folder.is_dir()]
    if missing:
        faults += missing
        return []
    images, masks = _by_stem(folders[0], IMAGES, faults), _by_stem(folders[1], MASKS, faults)
    if not images:
        faults.append(f"{folders[0]}: no images ({', '.join(IMAGES)})")
    for stem in images.keys() - masks.keys():
        faults.append(f"{images[stem]}: has no mask {folders[1] / stem}.png")
    for stem in masks.keys() - images.keys():
        faults.append(f"{masks[stem]}: has no image in {folders[0]}")
    return [(path, masks[stem]) for stem, path in images.items() if stem in masks]


def _by_stem(folder: Path, suffixes: Iterable[str], faults: list[str]) -> dict[str, Path]:
    """Files by name without suffix, in order; notes two files of one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            faults.append(f"{path}: has the name of {found[path.stem].name}; rename one of them")
        found[path.stem] = path
    return found


def _classes_of(pairs: list[Pair], faults: list[str]) -> dict[int, Path]:
    """Classes in the masks, each with a file that has it; notes bad files and differing sizes."""
    seen: dict[int, Path] = {}
    for image, mask in pairs:
        try:
            pixels, labels = read_image(image), read_mask(mask)
        except InputError as error:
            faults.append(str(error))
            continue
        if pixels.shape[1:] != labels.shape:
            height, width = pixels.shape[1:]
            size = f"{labels.shape[1]}x{labels.shape[0]}"
            faults.append(f"{mask}: is {size}, its image {image.name} is {width}x{height}")
        for value in labels.unique().tolist():
            seen.setdefault(value, mask)
    return seen


def _count_classes(masks: Path, seen: Iterable[int], ignore: int) -> int:
    """The largest class and one; at least two are needed to tell anything apart."""
    count = max((value for value in seen if value != ignore), default=-1) + 1
    if count < 2:
        found = ", ".join(map(str, sorted(seen)))
        raise InputError(
            f"{masks}: has the values {found} alone, where {ignore} means no class; "
            "number the classes from 0, at least two of them"
        )
    return count


class PaddedImages(NamedTuple):
    """Images of different sizes in one batch.

    `image` (N, 3, H, W), `mask` (N, H, W) long, `ignore` where there is no image, and
    `padding_mask` (N, H, W) bool, True where there is one.
    """

    image: Tensor
    mask: Tensor
    padding_mask: Tensor


def collate_padded(items: Sequence[tuple[Tensor, Tensor]], ignore: int) -> PaddedImages:
    """A batch from (image (3, H, W), mask (H, W)) of any sizes, filled up at the ends."""
    images, masks = zip(*items, strict=True)
    image, padding_mask = pad_batch(images)
    mask, _ = pad_batch([m.unsqueeze(0) for m in masks], value=ignore)
    return PaddedImages(image, mask.squeeze(1), padding_mask)  # type: ignore[arg-type]


class FolderData(Dataset[tuple[Tensor, Tensor]]):
    """Items (image (3, H, W) in [0, 1], mask (H, W) long).

    With `size`, random crops of that size, scaled by 0.75 to 1.5 and mirrored, drawn from (seed,
    epoch, index) alone; without it, whole images.
    """

    def __init__(
        self, pairs: list[Pair], ignore: int, size: int | None = None, seed: int = 0
    ) -> None:
        self.pairs, self.ignore, self.size, self.seed = pairs, ignore, size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def fingerprint(self) -> str:
        """Changes when a file comes, goes or changes its size; moving the folder is no change."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(str([(path.name, path.stat().st_size) for path in pair]).encode())
        return digest.hexdigest()

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
    """A random crop: image (3, H, W) to (3, size, size), mask (H, W) to (size, size).

    What lies beyond the border of a smaller image is black and has no class (`ignore`).
    """
    zoom, down, right, mirror = torch.rand(4, generator=generator).tolist()
    shape = tuple(max(1, round(n * 0.75 * 2**zoom)) for n in mask.shape)
    image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
    mask = F.interpolate(mask[None, None].float(), shape, mode="nearest-exact")[0, 0].long()
    border = (0, max(0, size - shape[1]), 0, max(0, size - shape[0]))
    image, mask = F.pad(image, border), F.pad(mask, border, value=ignore)
    top = int(down * (mask.shape[0] - size + 1))
    left = int(right * (mask.shape[1] - size + 1))
    image, mask = (t[..., top : top + size, left : left + size] for t in (image, mask))
    return (image.flip(-1), mask.flip(-1)) if mirror < 0.5 else (image, mask)
