"""Images and masks from files of any common format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dynaconv.data.errors import InputError

MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


def read_image(path: Path | str) -> Tensor:
    """(3, H, W) in [0, 1], upright as its EXIF data says, without its alpha channel.

    Raises:
        InputError: names the file and why it cannot be read.
    """
    return _read(path, "image", _colours).permute(2, 0, 1)


def read_mask(path: Path | str) -> Tensor:
    """(H, W) long of class indices; of a palette image the indices, not the colours.

    Raises:
        InputError: names the file and why it cannot be read.
    """
    return _read(path, "mask", _indices)


def _read(path: Path | str, kind: str, convert: Callable[[Image.Image], np.ndarray]) -> Tensor:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return torch.from_numpy(convert(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a readable {kind} (unknown format)") from None
    except Exception as error:  # decoders raise nearly anything on bad bytes
        raise InputError(f"{path}: not a readable {kind} ({error})") from None


def _colours(image: Image.Image) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; give 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # Pillow's conversion to RGB clips these at 255
        grey = np.asarray(image).astype(np.float32) / 65535
        return np.repeat(grey.clip(0, 1)[..., None], 3, axis=2)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _indices(image: Image.Image) -> np.ndarray:
    """(H, W) int64."""
    if image.mode not in MASK_MODES:
        raise ValueError(f"a mask has a single channel of class indices, this one is {image.mode}")
    return np.asarray(image).astype(np.int64)
