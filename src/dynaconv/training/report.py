"""The demo's report: one HTML file with everything in it."""

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dynaconv.data.digits import BACKGROUND, CLASS_NAMES, SIZE_BUCKETS, InMemory
from dynaconv.files import whole
from dynaconv.registry import families
from dynaconv.training.demo import Result, percent, rows
from dynaconv.training.kernel_pictures import Kernels, captions, capture, draw_kernels
from dynaconv.training.model import STATIC, predict
from dynaconv.training.pictures import colours, frame, paint, panels, show_image

TITLE = "Static and dynamic convolution, side by side"
LEAD = (
    "The task: give each pixel of a picture a class, one of ten handwritten digits or background. "
    "Digits are 8 to 56 pixels wide and turned at random, so that no single kernel size or "
    "orientation fits them all. Each row is the same small U-Net with the same start, scenes and "
    "schedule; only the kind of its convolutions differs."
)
TABLE_NOTE = (
    "mIoU: intersection over union of predicted and true pixels, mean over classes, 100 is "
    "perfect. small, medium, large: the same within the squares of digits {sizes} pixels wide. "
    "± is the standard deviation over seeds. params: numbers to learn. MMACs: millions of "
    "multiply-accumulates an image. ms/img: time on this machine, one image at a time."
)
SCENES_NOTE = (
    "Validation scenes, from small digits to large: no model has seen these digits or these parts "
    "of the photographs. One colour a digit, background dark."
)
KERNELS_NOTE = (
    "A dynamic layer makes its kernel from the image that it sees. The pictures show what it made "
    "in layers from the first to the deepest, in two scenes: one with large digits, one with small."
)
OVER_SCENES_NOTE = (
    "One point a validation scene: how the kernel of the deepest layer varies with the size of "
    "the digits. A flat cloud means that it hardly follows size."
)
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1e21; background: #fbfbf9;
       max-width: 1080px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.8em; margin-bottom: .2em; }
h2 { font-size: 1.3em; margin-top: 2.4em; border-top: 1px solid #ddd; padding-top: 1em; }
h3 { font-size: 1em; margin: 1.6em 0 0; }
p { max-width: 46em; } p.best { font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95em; }
th, td { padding: .38em .8em; text-align: right; border-bottom: 1px solid #e3e3de; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
th { font-weight: 500; color: #666; }
tr.best td { background: #eaf4ec; }
img { max-width: 100%; display: block; margin: .8em 0; }
.note { color: #555; font-size: .9em; } li { max-width: 50em; }
"""


def write_report(path: Path, results: list[Result], val: InMemory, about: str) -> None:
    """Writes the report, whole or not at all."""
    picks = varied_scenes(val, 5)
    sizes = ", ".join(f"{low:.0f}-{min(high, 56):.0f}" for low, high in SIZE_BUCKETS.values())
    parts = [
        paragraph(LEAD),
        paragraph(verdict(results), "best"),
        table_html(rows(results), best_of({r.layer: r.miou for r in results})),
        paragraph(TABLE_NOTE.format(sizes=sizes), "note"),
        paragraph(f"This run: {about}.", "note"),
        "<h2>What they see</h2>",
        paragraph(SCENES_NOTE),
        image_html(predictions(results, val, picks), "scenes, truth and predictions"),
        "<h2>What the kernels did</h2>",
        paragraph(KERNELS_NOTE),
    ]
    for result in results:
        if result.layer != STATIC:
            parts += kernel_section(result, val, [picks[-1], picks[0]])
    write_page(path, TITLE, parts)


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """A page of its title and parts in HTML, whole or not at all."""
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    page = f"<!doctype html><html lang=en>{head}<h1>{title}</h1>{''.join(parts)}</html>"
    with whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def verdict(results: list[Result]) -> str:
    """Who won, whoever it was."""
    return won("mIoU", {result.layer: result.miou for result in results})


def won(score: str, reached: dict[str, list[float]]) -> str:
    """Which layer reached the highest `score`."""
    best = best_of(reached)
    static = f"{score} {percent(reached[STATIC])}"
    if best == STATIC:
        return f"In this run the static convolutions won: {static}."
    said = f"{score} {percent(reached[best])}"
    return f"In this run {best} did best: {said}, static convolutions {percent(reached[STATIC])}."


def best_of(reached: dict[str, list[float]]) -> str:
    """The layer of the highest scores."""
    return max(reached, key=lambda layer: sum(reached[layer]))


def table_html(lines: list[list[str]], best: str = "") -> str:
    """A head and its lines; the line that begins with `best` is marked."""
    head, *body = lines
    marked = [_line(head, "th"), *[_line(line, "td", line[0] == best) for line in body]]
    return f"<table>{''.join(marked)}</table>"


def _line(cells: list[str], tag: str, best: bool = False) -> str:
    inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{' class=best' if best else ''}>{inside}</tr>"


def paragraph(text: str, kind: str = "") -> str:
    """Text as HTML."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def image_html(figure: Figure, alt: str) -> str:
    """The figure as an inline PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"


def varied_scenes(val: InMemory, count: int) -> list[int]:
    """Indices of scenes, from small objects to large ones."""
    order = val.sizes.flatten(1).amax(1).argsort(stable=True).tolist()
    return [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]


def predictions(results: list[Result], val: InMemory, picks: list[int]) -> Figure:
    """A row a scene: image, truth, and what the first model of each layer says."""
    classes = len(CLASS_NAMES)
    said = [predict(result.models[0], val.images[picks]) for result in results]
    titles = ["truth", *[result.layer for result in results]]
    figure, axes = panels(len(picks), 1 + len(titles), 1.9, 1.9)
    for row, index in enumerate(picks):
        show_image(frame(axes[row, 0], "" if row else "image"), val.images[index])
        masks = [val.masks[index], *[masks[row] for masks in said]]
        for cell, title, mask in zip(axes[row, 1:], titles, masks, strict=True):
            frame(cell, "" if row else title).imshow(
                paint(mask, classes, BACKGROUND), interpolation="nearest"
            )
    handles = [
        Line2D([], [], marker="s", markersize=9, linestyle="", color=colour, label=name)
        for name, colour in zip(CLASS_NAMES[:BACKGROUND], colours(BACKGROUND), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=10, frameon=False)
    return figure


def kernel_section(result: Result, val: InMemory, picks: list[int]) -> list[str]:
    """What the kernels of a result's first model did: in the scenes `picks`, and over all."""
    model = result.models[0]
    kernels = next(iter(capture(model, val.images[0]).values()))
    items = "".join(f"<li>{html.escape(caption)}</li>" for caption in captions(kernels))
    summary = families()[result.layer].summary
    parts = [f"<h3>{html.escape(f'{result.layer}: {summary}')}</h3><ul class=note>{items}</ul>"]
    alt = f"kernels of {result.layer}"
    parts += [image_html(draw_kernels(model, val.images[i], most=3), alt) for i in picks]
    parts += [image_html(over_scenes(result, val), f"{alt} over all scenes")]
    return [*parts, paragraph(OVER_SCENES_NOTE, "note")]


def over_scenes(result: Result, val: InMemory, most: int = 60) -> Figure:
    """A point a scene: mean size of its objects, and one number of the deepest layer's kernel."""
    sizes, values, label = [], [], ""
    for image, size in zip(val.images[:most], val.sizes[:most], strict=True):
        name, kernels = list(capture(result.models[0], image).items())[-1]
        value, label = one_number(kernels)
        if size.any():
            sizes.append(float(size[size > 0].mean()))
            values.append(value)
    figure, axes = panels(1, 1, 6.5, 3.4)
    axes[0, 0].scatter(sizes, values, s=18, color="#4477aa", alpha=0.75)
    axes[0, 0].set(xlabel="mean size of the digits in the scene (pixels)", ylabel=label, title=name)
    axes[0, 0].spines[["top", "right"]].set_visible(False)
    return figure


def one_number(kernels: Kernels) -> tuple[float, str]:
    """A number that tells one scene's kernel from another's, and what it is."""
    for key in ("size", "stride"):
        if key in kernels:
            return float(kernels[key].mean()), f"mean {key} (positions)"
    if "offset" in kernels:
        pairs = kernels["offset"].unflatten(1, (-1, 2))
        return float(pairs.norm(dim=2).mean()), "mean offset (positions)"
    if "coefficients" in kernels and kernels["coefficients"].dim() == 3:
        return float(kernels["coefficients"][0, -1].mean()), "share of the largest size"
    if "coefficients" in kernels:
        return float(kernels["coefficients"][0, 0]), "weight of expert 1"
    if "gate" in kernels:
        return float(kernels["gate"].mean()), "share of positions computed"
    if "regions" in kernels:
        return float((kernels["regions"] == 0).float().mean()), "share of region 1"
    name, values = next(iter(kernels.items()))
    return float(values.float().square().mean().sqrt()), f"size of {name} (root mean square)"
