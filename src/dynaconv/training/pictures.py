"""Images and masks as pictures."""

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

DARK = (0.13, 0.14, 0.16)
WHITE = (1.0, 1.0, 1.0)
GOLDEN = 0.6180339887


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each of about `width` and `height` inches."""
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9}):
        figure = Figure((width * columns, height * rows), dpi=110, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def frame(axes: Axes, title: str = "") -> Axes:
    """Axes without ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)
    return axes


def show_image(axes: Axes, image: Tensor, alpha: float = 1.0) -> None:
    """image (3, H, W) in [0, 1]; one unit of the axes is one pixel, the corner is (0, 0)."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).clamp(0, 1).numpy()
    axes.imshow(pixels, alpha=alpha, extent=(0, width, height, 0))


def colours(classes: int) -> np.ndarray:
    """A colour for each class, (classes, 3) in [0, 1]: ten well-known ones, then hues apart."""
    known = [to_rgb(f"C{i}") for i in range(min(classes, 10))]
    more = [
        hsv_to_rgb((GOLDEN * i % 1, 0.55 + 0.3 * (i % 2), 0.95 - 0.3 * (i % 3) / 2))
        for i in range(len(known), classes)
    ]
    return np.array([*known, *more])


def paint(mask: Tensor, classes: int, background: int | None = None) -> np.ndarray:
    """mask (H, W) as colours (H, W, 3): the background dark, what has no class white."""
    pixels = colours(classes)[mask.clamp(0, classes - 1).numpy()]
    pixels[((mask < 0) | (mask >= classes)).numpy()] = WHITE
    if background is not None:
        pixels[(mask == background).numpy()] = DARK
    return pixels


def overlay(
    image: Tensor, mask: Tensor, classes: int, background: int | None = None, strength: float = 0.5
) -> np.ndarray:
    """The image (3, H, W) tinted by the mask's colours, (H, W, 3) uint8; the background is not."""
    tint = torch.from_numpy(paint(mask, classes)).float()
    pixels = image.permute(1, 2, 0)
    mixed = (1 - strength) * pixels + strength * tint
    if background is not None:
        mixed = torch.where((mask == background)[..., None], pixels, mixed)
    return (mixed.clamp(0, 1) * 255).round().byte().numpy()
