"""Pictures of what the kernels did: offsets, per-position kernels, coefficients, gates, sizes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import DynamicConv
from dynaconv.training.model import dynamic_layers, normalise

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

ARROWS = 14
plt.rcParams.update(
    {"font.size": 9, "axes.titlesize": 9, "figure.dpi": 110, "savefig.bbox": "tight"}
)


def colours(classes: int) -> ListedColormap:
    """One colour a class; the last (background) of a digit scene is grey."""
    base = plt.get_cmap("tab20" if classes > 11 else "tab10")(np.linspace(0, 1, 20 if classes > 11 else 10))
    table = [base[i % len(base)] for i in range(classes)]
    return ListedColormap(table)


def show_mask(axes: Axes, mask: Tensor, classes: int, ignore: int, background: int | None) -> None:
    """Classes as colours; what is ignored stays white, the background dark."""
    pixels = colours(classes)(mask.clamp(0, classes - 1).numpy())
    pixels[(mask == ignore).numpy()] = (1, 1, 1, 1)
    if background is not None:
        pixels[(mask == background).numpy()] = (0.13, 0.14, 0.16, 1)
    axes.imshow(pixels, interpolation="nearest")


def frame(axes: Axes, title: str = "") -> Axes:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)
    return axes


def capture(model: nn.Module, image: Tensor) -> dict[str, dict[str, Tensor]]:
    """For one image (3, H, W): what each dynamic layer made of its kernel, by layer name."""
    layers, found = dynamic_layers(model), {}
    hooks = []
    for name, layer in layers.items():
        def keep(module: nn.Module, inputs: tuple, name: str = name) -> None:
            found[name] = module.kernels(*inputs)  # type: ignore[operator]

        hooks.append(layer.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model.eval()(normalise(image)[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def draw_kernels(model: nn.Module, image: Tensor, most: int = 4) -> Figure:
    """One panel a dynamic layer (the first `most` with something to show), over the image."""
    found, layers = capture(model, image), dynamic_layers(model)
    chosen = spread(list(found), most)
    figure, axes = plt.subplots(1, 1 + len(chosen), figsize=(3 * (1 + len(chosen)), 3.1), squeeze=False)
    frame(axes[0, 0], "image").imshow(image.permute(1, 2, 0).clamp(0, 1))
    for axis, name in zip(axes[0, 1:], chosen, strict=True):
        draw_layer(axis, layers[name], found[name], image)
        axis.set_title(f"{name}\n{axis.get_title()}")
    return figure


def spread(names: list[str], most: int) -> list[str]:
    """Up to `most` names, evenly from first to last."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)] if most > 1 else names[:1]


def draw_layer(axes: Axes, layer: DynamicConv, kernels: dict[str, Tensor], image: Tensor) -> None:
    """The picture that fits what the layer has: the first of DRAWERS whose key is there."""
    for key, draw in DRAWERS.items():
        if key in kernels:
            draw(axes, layer, kernels, image)
            return
    frame(axes, "nothing to draw: " + ", ".join(kernels)).axis("off")


def draw_offsets(axes: Axes, layer: DynamicConv, kernels: dict[str, Tensor], image: Tensor) -> None:
    """Where the taps went: at some positions the tap furthest displaced, as an arrow."""
    offset = kernels["offset"][0]
    height, width = offset.shape[1:]
    shifts = offset.unflatten(0, (-1, prod(layer.kernel_size), 2)).mean(0)  # (K, 2, h, w)
    length = shifts.norm(dim=1)
    furthest = length.argmax(0)[None, None].expand(1, 2, -1, -1)
    arrow = shifts.gather(0, furthest)[0]
    scale = image.shape[1] / height, image.shape[2] / width
    rows = torch.linspace(0, height - 1, min(ARROWS, height)).round().long()
    cols = torch.linspace(0, width - 1, min(ARROWS, width)).round().long()
    dy, dx = (arrow[d][rows][:, cols] * scale[d] for d in (0, 1))
    frame(axes, f"offsets: mean {length.mean():.2f}, max {length.max():.2f} positions")
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1), alpha=0.55)
    y, x = (rows + 0.5) * scale[0], (cols + 0.5) * scale[1]
    axes.quiver(
        *torch.meshgrid(x, y, indexing="xy"), dx, dy, length[:, rows][:, :, cols].amax(0),
        angles="xy", scale_units="xy", scale=1, cmap="autumn", width=0.007,
    )
    axes.set_xlim(0, image.shape[2])
    axes.set_ylim(image.shape[1], 0)


def draw_positions(axes: Axes, layer: DynamicConv, kernels: dict[str, Tensor], image: Tensor) -> None:
    """A kernel for each position: drawn at some, over the image."""
    weight = kernels["weight"][0].mean(0)  # (kh, kw, h, w)
    kh, kw, height, width = weight.shape
    count = min(6, height, width)
    rows = torch.linspace(height / count / 2, height - height / count / 2, count).long()
    cols = torch.linspace(width / count / 2, width - width / count / 2, count).long()
    limit = float(weight.abs().quantile(0.99)) or 1.0
    frame(axes, f"{kh}x{kw} kernels at {count * count} positions")
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1), alpha=0.5)
    cell = image.shape[1] / count, image.shape[2] / count
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            x, y = (j + 0.18) * cell[1], (i + 0.18) * cell[0]
            extent = (x, x + 0.64 * cell[1], y + 0.64 * cell[0], y)
            axes.imshow(weight[:, :, row, col], cmap="RdBu", vmin=-limit, vmax=limit, extent=extent)
    axes.set_xlim(0, image.shape[2])
    axes.set_ylim(image.shape[1], 0)


def draw_spatial(axes: Axes, layer: DynamicConv, kernels: dict[str, Tensor], image: Tensor) -> None:
    """The attention of each tap, and the shares of the experts beside it."""
    spatial = kernels["spatial"][0].reshape(layer.kernel_size)
    shares = kernels.get("coefficients")
    title = "attention of each tap"
    if shares is not None:
        title += "\nexperts " + " ".join(f"{s:.2f}" for s in shares[0].tolist())
    frame(axes, title)
    drawn = axes.imshow(spatial, cmap="viridis")
    plt.colorbar(drawn, ax=axes, fraction=0.046)


def draw_coefficients(axes: Axes, layer: DynamicConv, kernels: dict[str, Tensor], image: Tensor) -> None:
    """The share of each expert, or of each branch (by channel)."""
    shares = kernels["coefficients"][0]
    if shares.dim() == 1:
        axes.bar(range(len(shares)), shares.tolist(), color="#4477aa")
        axes.set_xticks(range(len(shares)))
        axes.set_xlabel("expert")
        axes.set_title("coefficients")
    else:
        axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axes.set_yticks(range(len(shares)), [f"size {b + 1}" for b in range(len(shares))])
        axes.set_xlabel("channel")
        axes.set_title("chosen sizes: " + " / ".join(f"{s:.2f}" for s in shares.mean(1).tolist()))


Drawer = Callable[[Axes, DynamicConv, dict[str, Tensor], Tensor], None]
DRAWERS: dict[str, Drawer] = {
    "offset": draw_offsets,
    "weight": draw_positions,
    "spatial": draw_spatial,
    "coefficients": draw_coefficients,
}


def overlay(image: Tensor, mask: Tensor, classes: int, strength: float = 0.5) -> np.ndarray:
    """The image (3, H, W) under the mask's colours, (H, W, 3) uint8."""
    tint = torch.from_numpy(colours(classes)(mask.numpy())[..., :3]).float()
    mixed = (1 - strength) * image.permute(1, 2, 0) + strength * tint
    return (mixed.clamp(0, 1) * 255).round().byte().numpy()


def resize(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (H, W) at another size, by nearest pixel."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].long()
