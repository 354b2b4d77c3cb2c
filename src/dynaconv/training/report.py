"""The demo's report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dynaconv.data.digits import BACKGROUND, CLASS_NAMES, InMemory
from dynaconv.registry import families
from dynaconv.training.demo import IGNORE, Result, predict_all, rows
from dynaconv.training.files import whole
from dynaconv.training.model import STATIC, dynamic_layers
from dynaconv.training.pictures import capture, colours, draw_kernels, frame, plt, show_mask

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1e21; background: #fbfbf9;
       max-width: 1080px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.7em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin-top: 2.2em; }
p.lead { color: #555; margin-top: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em; }
th, td { padding: .38em .8em; text-align: right; border-bottom: 1px solid #e3e3de; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
th { font-weight: 500; color: #666; }
tr.best td.miou { color: #0a6b3d; font-weight: 700; }
img { max-width: 100%; display: block; margin: .8em 0; }
figcaption, .note { color: #555; font-size: .9em; }
"""


def write_report(path: Path, results: list[Result], val: InMemory, about: str) -> None:
    """Writes the report, whole or not at all."""
    picks = varied_scenes(val, 5)
    sections = [
        table_html(results),
        f"<p class=note>{html.escape(about)}</p>",
        section(
            "What they see",
            predictions(results, val, picks),
            "Validation scenes that no model has seen: real digits of other writers on parts of the "
            "photographs that training never shows. One colour a digit, background dark.",
        ),
    ]
    for result in results:
        if result.layer != STATIC:
            sections += kernel_sections(result, val, picks)
    title = "Static and dynamic convolution, side by side"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1>"
        "<p class=lead>The same U-Net, the same start, the same scenes and schedule; only the "
        "convolutions differ. Every number was measured in this run.</p>" + "".join(sections)
    )
    with whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def table_html(results: list[Result]) -> str:
    head, *body = rows(results)
    best = max(range(len(results)), key=lambda i: sum(results[i].miou))
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    for i, line in enumerate(body):
        cells = "".join(
            f"<td{' class=miou' if j == 1 else ''}>{html.escape(c)}</td>" for j, c in enumerate(line)
        )
        lines.append(f"<tr{' class=best' if i == best else ''}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def section(title: str, figure: Figure, caption: str) -> str:
    return (
        f"<h2>{html.escape(title)}</h2><figure style='margin:0'>{image_html(figure)}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def image_html(figure: Figure) -> str:
    """The figure as an inline PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def varied_scenes(val: InMemory, count: int) -> list[int]:
    """Scenes from small objects to large ones."""
    largest = val.sizes.flatten(1).amax(1)
    order = largest.argsort().tolist()
    return [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]


def predictions(results: list[Result], val: InMemory, picks: list[int]) -> Figure:
    """A row a scene: image, truth, and what each model says."""
    columns = ["image", "truth", *[r.layer for r in results]]
    figure, axes = plt.subplots(
        len(picks), len(columns), figsize=(2 * len(columns), 2.08 * len(picks)), squeeze=False
    )
    said = [predict_all(r.models[0], val.images[picks]) for r in results]
    for row, index in enumerate(picks):
        frame(axes[row, 0], columns[0] if row == 0 else "").imshow(val.images[index].permute(1, 2, 0))
        for column, mask in enumerate([val.masks[index], *[s[row] for s in said]], start=1):
            show_mask(axes[row, column], mask, len(CLASS_NAMES), IGNORE, BACKGROUND)
            frame(axes[row, column], columns[column] if row == 0 else "")
    palette = colours(len(CLASS_NAMES))
    handles = [plt.Line2D([], [], marker="s", ls="", color=palette(i), label=str(i)) for i in range(10)]
    figure.legend(handles=handles, loc="lower center", ncol=10, frameon=False, bbox_to_anchor=(0.5, -0.02))
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def kernel_sections(result: Result, val: InMemory, picks: list[int]) -> list[str]:
    """What one model's kernels did: over three scenes, and over all of them."""
    summary = families()[result.layer].summary
    parts = [
        section(
            f"{result.layer}: what the kernels did" if i == 0 else f"{result.layer}, another scene",
            draw_kernels(result.models[0], val.images[index]),
            summary if i == 0 else "",
        )
        for i, index in enumerate((picks[-1], picks[1]))
    ]
    figure = over_scenes(result, val)
    if figure is not None:
        parts.append(section(f"{result.layer}: over all scenes", figure, OVER_SCENES))
    return parts


OVER_SCENES = (
    "One point a validation scene: how a layer's kernel varies with the size of the objects in it. "
    "A flat cloud means that the kernel hardly follows size."
)


def over_scenes(result: Result, val: InMemory, most: int = 60) -> Figure | None:
    """Per scene: the larger branch's share, the offsets' length, or the first expert's share."""
    count = min(most, len(val))
    last = list(dynamic_layers(result.models[0]))[-1]
    sizes, values, label = [], [], ""
    for i in range(count):
        kernels = capture(result.models[0], val.images[i])[last]
        measured = scene_value(kernels)
        if measured is None:
            return None
        value, label = measured
        covered = val.sizes[i][val.sizes[i] > 0]
        if len(covered):
            sizes.append(float(covered.mean()))
            values.append(value)
    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.scatter(sizes, values, s=18, color="#4477aa", alpha=0.75)
    axes.set_xlabel("mean object size in the scene (pixels)")
    axes.set_ylabel(label)
    axes.set_title(f"layer {last}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def scene_value(kernels: dict[str, Tensor]) -> tuple[float, str] | None:
    """One number of a scene's kernels, and its name."""
    if "offset" in kernels:
        return float(kernels["offset"][0].unflatten(0, (-1, 2)).norm(dim=1).mean()), "mean offset (positions)"
    if "coefficients" in kernels:
        shares = kernels["coefficients"][0]
        if shares.dim() == 2:
            return float(shares[-1].mean()), "share of the largest size"
        return float(shares[0]), "share of expert 1"
    if "weight" in kernels:
        return float(torch.linalg.vector_norm(kernels["weight"][0], dim=(1, 2)).mean()), "kernel norm"
    return None
