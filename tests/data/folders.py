"""Small data sets on disk, drawn from the embedded digits."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dynaconv.data.digits import DigitScenes


def save_mask(path, values):
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def save_image(path, pixels):
    """pixels (3, H, W) in [0, 1]."""
    array = (torch.as_tensor(pixels).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(path)


def make_folder(root: Path, train: int = 3, val: int = 2, size: int = 24) -> Path:
    """Scenes as a folder that `dynaconv train` takes: classes 0 (none), 1 (ink)."""
    for split, count in (("train", train), ("val", val)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i, scene in enumerate(DigitScenes(split, count, size)):
            save_image(root / split / "images" / f"{i}.png", scene.image)
            save_mask(root / split / "masks" / f"{i}.png", scene.mask < 10)
    return root
