"""Pictures of what the kernels of a model did along a text.

They go by the names and shapes of what `DynamicConv.kernels` returns, as `kernel_pictures` does.
"""

import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dynaconv.data.text import encode, index_of, normal
from dynaconv.files import whole
from dynaconv.training.kernel_pictures import (
    BLUE,
    Ground,
    colour_scale,
    draw_bars,
    draw_number,
    draw_shape,
    draw_shares,
    draw_table,
    draw_tiles,
    spread,
)
from dynaconv.training.kernel_pictures import MEANINGS as IN_IMAGES
from dynaconv.training.model import dynamic_layers, kernels_of
from dynaconv.training.text_model import TextConfig, TextNet

# Characters of a text that are drawn; the kernels are those of the whole text.
MOST_CHARACTERS = 100
# What the pictures of single numbers are drawn over: nothing.
NOWHERE = Ground(torch.zeros(3, 1, 1), (1, 1), ())
MEANINGS = {key: said.replace("image", "text") for key, said in IN_IMAGES.items()} | {
    "weight": (
        "above each character the kernel, or a factor on each of its taps, that the layer made "
        "for that place, from before to after (of several heads the one that changes most); red "
        "is negative, blue positive."
    ),
    "small_weight": "above each character the smaller of the layer's two kernels.",
    "update": "the part of the kernel that the layer made for that place.",
    "kernel": (
        "the kernel that is used on this text, a row each from an input channel to an output "
        "channel."
    ),
    "channel_filter": (
        "the kernel of each channel (a row), made from this text; at a character it is combined "
        "with the weight made there."
    ),
    "local": "a factor on each weight of the kernel, made from this text.",
    "shares": (
        "a row for each expert: its share in the kernel that is used on this text, at each tap, "
        "the mean over channels."
    ),
    "bands": (
        "a row for each band of frequencies, from high to low: how much it counts at each "
        "character."
    ),
    "gate": "1 where the layer computes, 0 where it leaves the convolution out.",
    "regions": "the text in parts by number: every part has a kernel of its own.",
    "offset": (
        "for each tap (from before to after) and character, how many places to the right of its "
        "regular place it looks; negative is left (of several heads the one that changes most)."
    ),
    "modulation": (
        "for each tap (from before to after) and character, how much it counts (of several heads "
        "the one that changes most)."
    ),
    "coefficients": "the weight of each expert kernel, or size, in what is used on this text.",
    "size": "the extent of the kernel in characters.",
    "scale": "how many times as far the kernel reaches as at the start.",
    "stride": "the step of the kernel in characters.",
    "center_scale": (
        "how much a character counts by itself instead of through the taps, a row for each "
        "channel group."
    ),
    "switch": "how much the kernel of the smaller dilation counts at each character.",
    "positions": "where the taps lie in the kernel, in characters from its centre.",
}
# Kernels of the whole text.
KERNELS = ("channel_filter", "kernel", "local", "shares")


@dataclass(frozen=True)
class Along:
    """What a panel is drawn along: the text, and the taps of the layer's kernel."""

    text: str
    taps: int


# Draws values (no batch dimension) and returns what their numbers say.
Drawer = Callable[[Axes, Tensor, Along], str]


def draw_text_kernels(model: TextNet, config: TextConfig, text: str, most: int = 4) -> Figure:
    """For up to `most` layers a panel for each quantity, the characters along it; explained."""
    text = normal(text)
    found = kernels_of(model, encode(text, index_of(config.characters))[None])
    layers = dynamic_layers(model)
    shown = [(name, key) for name in spread(list(found), most) for key in found[name]]
    width, height = 2.5 + 0.15 * max(30, min(len(text), MOST_CHARACTERS)), 2.1
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9}):
        figure = Figure((width, height * len(shown) + 0.8), dpi=110, layout="constrained")
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, (name, key) in zip(panels, shown, strict=True):
            values = view(key, found[name][key][0].float())
            along = Along(text, layers[name].kernel_size[0])
            said = drawer(key, values)(axes, values, along)
            axes.set_title(f"{name}, {key}: {said}")
    lines = dict.fromkeys(caption(key, found[name][key][0]) for name, key in shown)
    told = "\n".join(textwrap.fill(line, int(width * 14)) for line in lines)
    figure.supxlabel(told, fontsize=9, x=0.02, ha="left")
    return figure


def caption(key: str, values: Tensor) -> str:
    """What a newcomer sees in the panel of a quantity, a sentence."""
    if key == "weight" and values.dim() == 3 and values.shape[1] == 1:
        return f"{key}: the kernel of each head or channel, the same at every character of a text."
    # Of each output channel, or the one of a kernel's size.
    meant = "filter" if key == "scale" and values.numel() > 1 else key
    return f"{key}: {MEANINGS.get(meant, 'what the layer made of this text.')}"


def save_text_picture(path: Path, figure: Figure) -> None:
    """The figure as a PNG, whole or not at all."""
    with any_characters(), whole(path) as temporary:
        figure.savefig(temporary, format="png")


@contextmanager
def any_characters() -> Iterator[None]:
    """Characters that the font lacks are drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def drawer(key: str, values: Tensor) -> Drawer:
    """The picture for a quantity, by its name where that says more than its shape."""
    if values.numel() == 1:
        return _anywhere(draw_number)
    if key in KERNELS and values.dim() > 1:
        return draw_heads
    if key in TABLES and values.dim() > 1:
        return _anywhere(TABLES[key])
    if key in ("offset", "modulation") and values.dim() == 2:
        return draw_of_taps
    if key == "regions" and values.dim() == 2:
        return draw_regions
    if values.dim() == 3:
        return draw_heads if values.shape[1] == 1 else draw_per_character
    if values.dim() == 2:
        return draw_along
    return _anywhere(draw_bars if values.dim() == 1 else draw_shape)


# Other quantities of the whole text that have several dimensions.
TABLES: dict[str, Callable[[Axes, Tensor, Ground], str]] = {
    "attention": draw_table,
    "bias_shares": draw_shares,
    "coefficients": draw_shares,
    "phi": draw_tiles,
    "positions": lambda axes, values, ground: draw_bars(axes, values.flatten(), ground),
}


def view(key: str, values: Tensor) -> Tensor:
    """What is drawn of a quantity: of shares, which are many, the mean over channels."""
    return values.mean(1) if key == "shares" else values


def _anywhere(draw: Callable[[Axes, Tensor, Ground], str]) -> Drawer:
    return lambda axes, values, along: draw(axes, values, NOWHERE)


def draw_per_character(axes: Axes, values: Tensor, along: Along) -> str:
    """values (heads, K, L): the kernels of the head that changes most along the text."""
    change = values.std(2, correction=0).norm(dim=1)
    head = int(change.argmax())
    axes.set_ylabel("tap")
    said = _map(axes, values[head], along)
    _name_taps(axes.set_yticks, values.shape[1])
    return f"head {head + 1} of {values.shape[0]}, {said}" if len(values) > 1 else said


def draw_of_taps(axes: Axes, values: Tensor, along: Along) -> str:
    """values (heads * K, L): a number for each tap at each character."""
    taps = along.taps if values.shape[0] % along.taps == 0 else values.shape[0]
    return draw_per_character(axes, values.unflatten(0, (-1, taps)), along)


def draw_along(axes: Axes, values: Tensor, along: Along) -> str:
    """values (n, L): n numbers at each character, as a line where n is 1."""
    if values.shape[0] > 1:
        return _map(axes, values, along)
    return _plot(axes, values, along, ".-")


def draw_regions(axes: Axes, values: Tensor, along: Along) -> str:
    """values (1, L), whole numbers: a point at each character, for numbers have no order."""
    _plot(axes, values, along, "o")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return f"{len(values.unique())} in use"


def _plot(axes: Axes, values: Tensor, along: Along, style: str) -> str:
    """values (1, L), however long, along the characters of the text."""
    places = (torch.arange(values.shape[1]) + 0.5) * len(along.text) / values.shape[1] - 0.5
    axes.plot(places.tolist(), values[0].tolist(), style, color=BLUE)
    axes.spines[["top", "right"]].set_visible(False)
    _name_characters(axes, along.text)
    return _range(values)


def draw_heads(axes: Axes, values: Tensor, along: Along) -> str:
    """values (..., K): a row a kernel, the same all along the text."""
    rows, taps = values.flatten(0, -2), values.shape[-1]
    said = _show(axes, rows, (-0.5, taps - 0.5))
    axes.set(xlabel="tap", ylabel="kernel")
    _name_taps(axes.set_xticks, taps)
    heads = range(0, rows.shape[0], max(1, rows.shape[0] // 4))
    axes.set_yticks(heads, [str(head + 1) for head in heads])
    return f"the same everywhere, {said}"


def _map(axes: Axes, values: Tensor, along: Along) -> str:
    """values (n, L) as colours, the first row on top, along the characters of the text."""
    said = _show(axes, values, (-0.5, len(along.text) - 0.5))
    _name_characters(axes, along.text)
    return said


def _show(axes: Axes, values: Tensor, across: tuple[float, float]) -> str:
    """values (rows, columns) as colours: from 0 up, or around 0 where some are negative."""
    style, _ = colour_scale(values)
    extent = (*across, values.shape[0] - 0.5, -0.5)
    drawn = axes.imshow(
        values.numpy(), aspect="auto", extent=extent, interpolation="nearest", **style
    )
    axes.figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
    return _range(values)


def _range(values: Tensor) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _name_taps(set_ticks: Callable, taps: int) -> None:
    """Ticks that count from the middle tap."""
    places = range(0, taps, max(1, taps // 5))
    set_ticks(
        places, [f"{i - (taps - 1) // 2:+d}" if i != (taps - 1) // 2 else "0" for i in places]
    )


def _name_characters(axes: Axes, text: str) -> None:
    """The characters of the text as ticks, spaces visible."""
    shown = text[:MOST_CHARACTERS]
    names = ["·" if not c.isprintable() or c.isspace() else c for c in shown]
    axes.set_xticks(range(len(shown)), names, parse_math=False)
    axes.set_xlim(-0.5, len(shown) - 0.5)
