"""Pictures of what the kernels of a model did on an image.

They go by the names and shapes of what `DynamicConv.kernels` returns, not by family, so that a
new family has its pictures at once.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log10, prod, sqrt
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dynaconv.training.model import dynamic_layers, kernels, kernels_of, look, normalise
from dynaconv.training.pictures import frame, paint, panels, show_image
from dynaconv.training.unet import UNet

Kernels = dict[str, Tensor]
BLUE = "#4477aa"
SHARES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
ARROWS = 12  # arrows along a side
KERNELS = 5  # per-position kernels along a side
TILES = 16  # small matrices in a panel
BARS_WITH_NUMBERS = 6
TAPS_WITH_NUMBERS = 25


@dataclass(frozen=True)
class Ground:
    """What a panel is drawn over: `image` (3, H, W), and its size once padded for the model.

    `window` is the layer's kernel size, `seen` the size of the map that the layer gets; where
    that is not known, lengths are in positions of the map that is drawn.
    """

    image: Tensor
    padded: tuple[int, int]
    window: tuple[int, ...]
    seen: tuple[int, ...] = ()

    def cell(self, positions: Tensor) -> tuple[float, float]:
        """Height and width in pixels of a position of a map (..., h, w)."""
        height, width = positions.shape[-2:]
        return self.padded[0] / height, self.padded[1] / width

    def pixels(self, lengths: Tensor) -> tuple[float, float]:
        """Height and width in pixels of (2,) lengths in positions of the layer's map."""
        high, wide = self.step(self.padded)
        return float(lengths[0]) * high, float(lengths[1]) * wide

    def step(self, size: tuple[int, ...]) -> tuple[float, float]:
        """Height and width in pixels of a position of the layer's map, else of one of `size`."""
        height, width = self.seen or size
        return self.padded[0] / height, self.padded[1] / width


# Draws values (no batch dimension) and returns what their numbers say.
Drawer = Callable[[Axes, Tensor, Ground], str]


def capture(model: UNet, image: Tensor) -> dict[str, Kernels]:
    """For one image (3, H, W): what each dynamic layer made of its kernel, by layer name."""
    return kernels_of(model, normalise(image)[None])


def draw_kernels(model: UNet, image: Tensor, most: int = 4) -> Figure:
    """The image (3, H, W), and for up to `most` layers a column with a panel for each quantity."""
    return _draw(model, image, most)[0]


def _draw(model: UNet, image: Tensor, most: int) -> tuple[Figure, Kernels]:
    """The figure of `draw_kernels`, and of each quantity in it what the first layer made."""
    both = look(
        model, lambda layer, x: (kernels(layer, *x), x[0].shape[-2:]), normalise(image)[None]
    )
    found, layers = {name: made for name, (made, _) in both.items()}, dynamic_layers(model)
    chosen = spread(list(found), most)
    keys = list(dict.fromkeys(key for name in chosen for key in found[name]))
    keys.sort(key=lambda key: key != "coefficients")  # first what tells most
    shape = min(1.6, max(0.6, image.shape[1] / image.shape[2]))
    figure, axes = panels(len(keys), 1 + len(chosen), 2.7, 2.5 * shape + 0.5)
    for cell in axes.flat:
        cell.axis("off")
    show_image(frame(axes[0, 0], "input"), image)
    height, width = model.pad(image[None]).shape[-2:]
    for column, name in enumerate(chosen, start=1):
        ground = Ground(image, (height, width), layers[name].kernel_size, tuple(both[name][1]))
        for row, key in enumerate(k for k in keys if k in found[name]):
            cell = axes[row, column]
            cell.axis("on")
            values = view(key, found[name][key][0].float())
            said = drawer(key, values, ground)(cell, values, ground)
            cell.set_title(f"{name}\n{key}: {said}" if row == 0 else f"{key}: {said}")
    made = [found[name] for name in reversed(chosen)]
    return figure, {key: layer[key] for key in keys for layer in made if key in layer}


def draw_with_captions(model: UNet, image: Tensor, most: int = 4) -> Figure:
    """`draw_kernels` with an explanation under it."""
    figure, first = _draw(model, image, most)
    width = int(figure.get_figwidth() * 14)
    lines = [textwrap.fill(text, width) for text in captions(first)]
    figure.supxlabel("\n".join(lines), fontsize=9, x=0.02, ha="left")
    return figure


def spread(names: list[str], most: int) -> list[str]:
    """Up to `most` names, evenly from first to last."""
    if len(names) <= most:
        return names
    steps = max(1, most - 1)
    return [names[round(i * (len(names) - 1) / steps)] for i in range(most)]


def view(key: str, values: Tensor) -> Tensor:
    """What is drawn of a quantity, where its shape alone would mislead."""
    return VIEWS.get(key, lambda same: same)(values)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channel_filter": lambda filters: filters.flatten(0, -3),
    # The mean over taps that share 1 would be the same everywhere.
    "modulation": lambda factors: factors.amax(0, keepdim=True),
    "shares": lambda shares: shares.mean(1),
}


def drawer(key: str, values: Tensor, ground: Ground) -> Drawer:
    """The picture for a quantity, by its name where that says more than its shape."""
    if key == "offset" and values.dim() == 3 and values.shape[0] % 2 == 0:
        return draw_offsets
    if key in ("spatial", "mask") and values.numel() == prod(ground.window):
        return draw_taps
    if key in PAIRS and values.shape == (2,):
        return PAIRS[key]
    if (key, values.dim()) in BY_NAME:
        return BY_NAME[key, values.dim()]
    if values.numel() == 1:
        return draw_number
    return BY_DIMENSIONS.get(values.dim(), draw_shape)


def captions(kernels: Kernels) -> list[str]:
    """What a newcomer sees in the panels of a layer's quantities, a sentence each."""
    return [f"{key}: {_caption(key, kernels)}" for key in kernels]


def _caption(key: str, kernels: Kernels) -> str:
    dimensions = kernels[key].dim() - 1
    if key == "coefficients" and dimensions == 2:
        return (
            "for every output channel (left to right, sorted), how much of it comes from each "
            "kernel size; branch 1 is the smallest. Chosen anew for each image."
        )
    if key == "weight" and dimensions == 4:
        return MEANINGS["kernel"]
    if key == "scale" and "phi" in kernels:
        return MEANINGS["filter"]
    return MEANINGS.get(key, "what the layer made of this image.")


MEANINGS = {
    "offset": (
        "each arrow starts at an output position and shows where the kernel's most displaced tap "
        "looks instead of its regular place. Arrows are enlarged as the title says; lengths in "
        "the title are in positions of the layer's feature map."
    ),
    "modulation": "at each position, how much the tap counts that counts most there.",
    "coefficients": "the weight of each expert kernel in the kernel that is used on this image.",
    "weight": (
        "the kernel, or a factor on each of its taps, that the layer made for that very place in "
        "the image (first channel group); where colours go below 0, red is negative, blue "
        "positive."
    ),
    "small_weight": (
        "the smaller of the two kernels that the layer made for that very place (first channel "
        "group)."
    ),
    "update": "the part of the kernel that the layer made for that very place (first head).",
    "kernel": (
        "the kernel that is used on this image: its first parts, each from an input channel to an "
        "output channel; where colours go below 0, red is negative, blue positive."
    ),
    "channel_filter": (
        "the kernels of the first channels, made from this image; at a position each is combined "
        "with the weight made there."
    ),
    "channel": "a factor on each input channel, made from this image; the line is their mean.",
    "filter": "a factor on each output channel, made from this image; the line is their mean.",
    "spatial": "a factor on each tap of the kernel, made from this image.",
    "local": "a factor on each weight of the kernel, made from this image; its first parts.",
    "bands": (
        "a map for each band of frequencies, from high to low (left to right and down): how much "
        "it counts at each position."
    ),
    "shares": (
        "a kernel for each expert: its share in the kernel that is used on this image, at each "
        "tap, the mean over channels."
    ),
    "bias_shares": "for every output channel, each expert's share in the bias.",
    "attention": (
        "how much of each cell of the warehouse (left to right) is in each part of the kernel "
        "(top to bottom); red is negative, blue positive."
    ),
    "phi": "the matrix, made from this image, that mixes the layer's few latent channels.",
    "gate": "the image where the layer computes, dark where it leaves the convolution out.",
    "regions": "the image in parts, a colour each: every part has a kernel of its own.",
    "size": (
        "how far the kernel reaches, in positions of the layer's feature map: a box for the whole "
        "image, or a map over it, bright where the kernel is large."
    ),
    "scale": "how many times as far the kernel reaches in height and width as at the start.",
    "stride": "the step of the kernel in height and width; a dot is where an output looks.",
    "center_scale": (
        "how much a position counts by itself instead of through the taps, the mean over channel "
        "groups."
    ),
    "switch": "how much the kernel of the smaller dilation counts at each position.",
    "positions": "where the taps lie in the kernel, in positions from its centre (rows, columns).",
    "mask": "how much each tap of the largest kernel counts.",
    "low_channel": "a factor on each input channel for the kernel's mean part.",
    "low_filter": "a factor on each output channel for the kernel's mean part.",
    "high_channel": "a factor on each input channel for the rest of the kernel.",
    "high_filter": "a factor on each output channel for the rest of the kernel.",
}


def draw_offsets(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (pairs * 2, h, w): at some positions the longest of the (row, column) offsets."""
    shifts = values.unflatten(0, (-1, 2))
    length = shifts.norm(dim=1)
    longest = length.argmax(0).expand(1, 2, -1, -1)
    arrow = shifts.gather(0, longest)[0]
    rows, columns = (_places(n, ARROWS) for n in values.shape[1:])
    (high, wide), (down, across) = ground.cell(values), ground.step(values.shape[1:])
    dy, dx = arrow[0][rows][:, columns] * down, arrow[1][rows][:, columns] * across
    y, x = torch.meshgrid((rows + 0.5) * high, (columns + 0.5) * wide, indexing="ij")
    spacing = min(ground.padded[0] / len(rows), ground.padded[1] / len(columns))
    enlarged = _enlargement(torch.hypot(dy, dx), spacing)
    show_image(frame(axes), ground.image, alpha=0.5)
    head: dict[str, Any] = {"width": 0.007, "headwidth": 3.5, "headlength": 4, "headaxislength": 4}
    scale: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1 / enlarged}
    axes.quiver(*(part.numpy() for part in (x, y, dx, dy)), color="#b3001b", **scale, **head)
    _to_image(axes, ground)
    return f"mean {length.mean():.2f}, max {length.max():.2f}\narrows x{enlarged:g}"


def _enlargement(lengths: Tensor, spacing: float) -> float:
    """A round factor, 1 or more, that makes most arrows about as long as the space between them."""
    typical = float(lengths.flatten().quantile(0.9))
    wanted = 1.3 * spacing / typical if typical > 0 else 1
    if wanted <= 1:
        return 1
    power = 10.0 ** floor(log10(wanted))
    return max(step * power for step in (1, 1.5, 2, 3, 5, 7) if step * power <= wanted)


def draw_per_position(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (G, kh, kw, h, w): the kernel of the first group at some places of the image."""
    height, width = ground.image.shape[1:]
    show_image(frame(axes), ground.image, alpha=0.45)
    high, wide = ground.cell(values)
    count = min(KERNELS, *values.shape[-2:])
    middles = (torch.arange(count) + 0.5) / count
    rows, columns = (middles * height / high).long(), (middles * width / wide).long()
    kernels = values[0][:, :, rows][..., columns]
    style, said = colour_scale(kernels)
    for i in range(count):
        for j in range(count):
            top, left = (i + 0.15) * height / count, (j + 0.15) * width / count
            extent = (left, left + 0.7 * width / count, top + 0.7 * height / count, top)
            axes.imshow(kernels[:, :, i, j].numpy(), extent=extent, zorder=2, **style)
    _to_image(axes, ground)
    return f"{kernels.shape[0]}x{kernels.shape[1]}, {count}x{count} places\ncolours {said}"


def colour_scale(values: Tensor) -> tuple[dict[str, Any], str]:
    """Colours from 0 up, or around 0 where some are negative, and their range in words."""
    limit = float(values.abs().flatten().quantile(0.99)) or float(values.abs().max()) or 1.0
    if values.min() < 0:
        return {"cmap": "RdBu", "vmin": -limit, "vmax": limit}, f"to ±{limit:.2g}"
    return {"cmap": "Blues", "vmin": 0, "vmax": limit}, f"0 to {limit:.2g}"


def draw_map(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (c, h, w): the mean over c, as a map over the image."""
    mean = values.mean(0)
    height, width = ground.padded
    drawn = frame(axes).imshow(mean.numpy(), cmap="viridis", extent=(0, width, height, 0))
    _to_image(axes, ground)
    _colour_bar(axes, drawn)
    return f"{mean.min():.2f} to {mean.max():.2f}"


def draw_over(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (1, h, w): a map that lets the image through."""
    height, width = ground.padded
    show_image(frame(axes), ground.image)
    extent = (0, width, height, 0)
    drawn = axes.imshow(values[0].numpy(), cmap="plasma", alpha=0.65, extent=extent)
    _to_image(axes, ground)
    _colour_bar(axes, drawn)
    return f"{values.min():.1f} to {values.max():.1f} positions"


def draw_gate(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (1, h, w) from 0 to 1: the image, dark where they are 0."""
    height, width = ground.padded
    show_image(frame(axes), ground.image)
    dark: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "extent": (0, width, height, 0)}
    off = 1 - values[0].numpy()
    axes.imshow(0 * off, alpha=0.8 * off, **dark)
    _to_image(axes, ground)
    return f"on at {values.mean():.0%} of positions"


def draw_regions(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (1, h, w), whole numbers: a colour each over the image."""
    height, width = ground.padded
    region = values[0].long()
    found, counts = region.unique(return_counts=True)
    show_image(frame(axes), ground.image)
    colours = paint(region, int(region.max()) + 1)
    axes.imshow(colours, alpha=0.6, extent=(0, width, height, 0))
    _to_image(axes, ground)
    return f"{len(found)}, largest {counts.max() / counts.sum():.0%}"


def draw_extent(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (2,): a box of so many positions of the layer's map in height and width."""
    image, pixels = ground.image, ground.pixels(values)
    show_image(frame(axes), image, alpha=0.6)
    top, left = (image.shape[1] - pixels[0]) / 2, (image.shape[2] - pixels[1]) / 2
    box: dict[str, Any] = {"facecolor": "none", "edgecolor": "#b3001b", "linewidth": 2}
    axes.add_patch(Rectangle((left, top), pixels[1], pixels[0], **box))
    return f"{values[0]:.1f} x {values[1]:.1f} positions"


def draw_steps(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (2,): a dot at every step of so many positions of the layer's map."""
    high, wide = ground.pixels(values)
    show_image(frame(axes), ground.image, alpha=0.6)
    rows = torch.arange(0.5, ground.image.shape[1], max(high, 1.0))
    columns = torch.arange(0.5, ground.image.shape[2], max(wide, 1.0))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    size = min(6.0, (0.35 * min(high, wide)) ** 2)  # dots stay apart
    axes.scatter(x.flatten().numpy(), y.flatten().numpy(), s=size, color="#b3001b")
    _to_image(axes, ground)
    return f"{values[0]:.2f} x {values[1]:.2f}"


def draw_positions(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (taps, 2): a point for each tap at its row and column."""
    axes.scatter(values[:, 1].numpy(), values[:, 0].numpy(), s=24, color=BLUE)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.margins(0.2)
    span = values.amax(0) - values.amin(0) + 1
    return f"{len(values)} taps\nover {span[0]:.1f} x {span[1]:.1f}"


def draw_taps(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (kh * kw,): a number in each tap of the kernel."""
    taps = values.reshape(ground.window)
    low, high = float(values.min()), float(values.max())
    # Only the lighter half of the colours, so that the numbers stay readable.
    frame(axes).imshow(taps.numpy(), cmap="Blues", vmin=low, vmax=2 * high - low + 1e-6)
    if taps.numel() > TAPS_WITH_NUMBERS:
        return f"{low:.2f} to {high:.2f}"
    for row, line in enumerate(taps.tolist()):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    return f"{low:.2f} to {high:.2f}"


def draw_bars(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (n,): a bar each; where there are many, as deviations from their mean."""
    places = range(1, len(values) + 1)
    if len(values) <= BARS_WITH_NUMBERS:
        axes.bar_label(axes.bar(places, values.numpy(), width=0.7, color=BLUE), fmt="%.2f")
        axes.set_xticks(places)
    else:
        mean = float(values.mean())
        axes.bar(places, (values - mean).numpy(), bottom=mean, width=0.8, color=BLUE)
        axes.axhline(mean, color="black", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02, y=0.15)
    axes.set_box_aspect(1)
    axes.spines[["top", "right"]].set_visible(False)
    return f"{values.min():.2f} to {values.max():.2f}"


def draw_shares(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (B, C): for each channel its values stacked, channels sorted by the first."""
    ordered = values[:, values[0].argsort(descending=True)]
    bottom = torch.zeros(values.shape[1])
    for branch, share in enumerate(ordered):
        style: dict[str, Any] = {
            "width": 1.0,
            "color": SHARES[branch % len(SHARES)],
            "label": f"branch {branch + 1}",
        }
        axes.bar(range(values.shape[1]), share.numpy(), bottom=bottom.numpy(), **style)
        bottom = bottom + share
    axes.set_xlabel("channel, sorted")
    axes.margins(0)
    axes.set_box_aspect(1)
    axes.legend(loc="lower left", fontsize=7, framealpha=0.9)
    return "mean " + " / ".join(f"{share:.2f}" for share in values.mean(1).tolist())


def draw_kernel(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (C_out, C_in, kh, kw): the first ones from an input to an output channel."""
    return draw_tiles(axes, values.flatten(0, 1), ground)


def draw_tiles(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (n, a, b): the first matrices side by side, from left to right and down."""
    shown = values[:TILES]
    columns = ceil(sqrt(len(shown)))
    height, gap = values.shape[1] / values.shape[2], 0.05
    style, _ = colour_scale(shown)
    for i, tile in enumerate(shown):
        row, column = divmod(i, columns)
        top, bottom = row * height + gap, (row + 1) * height - gap
        extent = (column + gap, column + 1 - gap, bottom, top)
        drawn = axes.imshow(tile.numpy(), extent=extent, **style)
    frame(axes).set(xlim=(0, columns), ylim=(ceil(len(shown) / columns) * height, 0))
    axes.axis("off")
    _colour_bar(axes, drawn)
    first = f"{len(shown)} of {len(values)}\n" if len(values) > TILES else ""
    return f"{first}{shown.min():.2f} to {shown.max():.2f}"


def draw_table(axes: Axes, values: Tensor, ground: Ground) -> str:
    """values (rows, columns) as colours."""
    style, _ = colour_scale(values)
    _colour_bar(axes, frame(axes).imshow(values.numpy(), aspect="auto", **style))
    axes.set_box_aspect(1)
    return f"{values.min():.2f} to {values.max():.2f}"


def draw_number(axes: Axes, values: Tensor, ground: Ground) -> str:
    """One value."""
    axes.axis("off")
    axes.text(0.5, 0.5, f"{values.item():.3g}", ha="center", va="center", fontsize=24)
    return f"{values.item():.3g}"


def draw_shape(axes: Axes, values: Tensor, ground: Ground) -> str:
    """The distribution of values of any other shape."""
    axes.hist(values.flatten().numpy(), bins=30, color=BLUE)
    axes.set_box_aspect(1)
    axes.set_yticks([])
    return f"{values.numel()} values, mean {values.mean():.2f}"


BY_DIMENSIONS: dict[int, Drawer] = {
    1: draw_bars,
    2: draw_table,
    3: draw_map,
    4: draw_kernel,
    5: draw_per_position,
}

# Of so many dimensions.
BY_NAME: dict[tuple[str, int], Drawer] = {
    ("bands", 3): draw_tiles,
    ("bias_shares", 2): draw_shares,
    ("channel_filter", 3): draw_tiles,
    ("coefficients", 2): draw_shares,
    ("gate", 3): draw_gate,
    ("phi", 3): draw_tiles,
    ("positions", 2): draw_positions,
    ("regions", 3): draw_regions,
    ("shares", 3): draw_tiles,
    ("size", 3): draw_over,
}
# Quantities of a whole image, a number each for height and width.
PAIRS: dict[str, Drawer] = {"size": draw_extent, "stride": draw_steps}


def _places(count: int, most: int) -> Tensor:
    """Up to `most` indices at equal distances within range(count)."""
    step = ceil(count / most)
    return torch.arange((count - 1) % step // 2, count, step)


def _to_image(axes: Axes, ground: Ground) -> None:
    """Cuts away what lies in the model's own padding."""
    axes.set_xlim(0, ground.image.shape[2])
    axes.set_ylim(ground.image.shape[1], 0)


def _colour_bar(axes: Axes, drawn: AxesImage) -> None:
    axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
