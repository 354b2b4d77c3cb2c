"""Static against dynamic on real digits over real photographs: trains and measures."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from dynaconv.analyze import analyze
from dynaconv.data.digits import CLASS_NAMES, SIZE_BUCKETS, DigitScenes, InMemory
from dynaconv.training.files import save_model
from dynaconv.training.model import STATIC, Config, normalise, predict
from dynaconv.training.task import Bar, fit, metric
from dynaconv.training.unet import UNet

LAYERS = ("odconv", "deform_v2", "selective_kernel")
IGNORE = 255
SIZE = 64


@dataclass(frozen=True)
class Budget:
    """How much a demo does."""

    scenes: int = 1800
    val: int = 150
    epochs: int = 3
    seeds: int = 2
    widths: tuple[int, ...] = (16, 40, 96)


FULL = Budget()
QUICK = Budget(scenes=800, val=60, epochs=2, seeds=1)


@dataclass
class Result:
    """What one kind of layer reached; a list has one entry a seed.

    `miou` is over all pixels, `by_size` over the squares of digits of a size; `ms` is the time of
    one image with the first model.
    """

    layer: str
    models: list[UNet] = field(default_factory=list)
    miou: list[float] = field(default_factory=list)
    by_size: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in SIZE_BUCKETS}
    )
    parameters: int = 0
    macs: int = 0
    ms: float = 0.0


def run(
    layers: Sequence[str], budget: Budget, seed: int, out: Path, progress: Progress
) -> tuple[list[Result], InMemory]:
    """Trains the static network and each of `layers`, with each seed, on the same scenes.

    Models are kept in `out/models`. Returns the results, static first, and the validation scenes.
    """
    train, val = make_scenes(budget, seed, progress)
    results = [Result(layer) for layer in dict.fromkeys([STATIC, *layers])]
    runs = [
        (
            result,
            s,
            progress.add_task(f"{result.layer}, seed {s}", start=False, total=None, note=""),
        )
        for s in range(seed, seed + budget.seeds)
        for result in results
    ]
    for result, run_seed, task in runs:
        config = demo_config(result.layer, budget, run_seed)
        progress.start_task(task)
        model, _ = fit(config, train, callbacks=[Bar(progress, task)])
        save_model(out / "models" / f"{result.layer}-{run_seed}.pt", model, config)
        measure(result, model, config, val)
        progress.update(task, note=f"mIoU {100 * result.miou[-1]:.1f}")
    for result in results:
        analysis = analyze(result.models[0], normalise(val.images[:1]))
        result.parameters, result.macs = analysis.parameters, analysis.macs
    measure_time(results, val.images[:1])
    return results, val


def make_scenes(budget: Budget, seed: int, progress: Progress) -> tuple[InMemory, InMemory]:
    """Training and validation scenes."""
    task = progress.add_task("making scenes", total=2, note="")
    made = []
    for scenes in (
        DigitScenes("train", budget.scenes, SIZE, seed),
        DigitScenes("val", budget.val, SIZE, seed),
    ):
        made.append(scenes.in_memory())
        progress.advance(task)
    return made[0], made[1]


def demo_config(layer: str, budget: Budget, seed: int) -> Config:
    """One training of the demo."""
    return Config(
        layer=layer,
        classes=len(CLASS_NAMES),
        names=list(CLASS_NAMES),
        ignore=IGNORE,
        widths=list(budget.widths),
        epochs=budget.epochs,
        batch=8,
        lr=3e-3,
        size=SIZE,
        seed=seed,
        background_weight=0.2,
    )


def measure(result: Result, model: UNet, config: Config, val: InMemory) -> None:
    """Adds one model: its mIoU over all pixels, and over the squares of digits of each size."""
    predicted = predict(model, val.images)
    result.models.append(model)
    result.miou.append(float(metric(config)(predicted, val.masks)))
    for name, (low, high) in SIZE_BUCKETS.items():
        inside = (val.sizes >= low) & (val.sizes < high)
        target = val.masks.masked_fill(~inside, IGNORE)
        result.by_size[name].append(float(metric(config)(predicted, target)))


def measure_time(results: list[Result], image: Tensor) -> None:
    """Milliseconds for one image (1, 3, H, W)."""
    times = median_ms([partial(result.models[0], normalise(image)) for result in results])
    for result, ms in zip(results, times, strict=True):
        result.ms = ms


def median_ms(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> list[float]:
    """Milliseconds of each call without gradients: the median, in turn after two warm-ups."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for _ in range(repeats + 2):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[2:]) for taken in times]


def rows(results: list[Result]) -> list[list[str]]:
    """The table: a header, then a line for each layer."""
    table = [["layer", "mIoU %", *SIZE_BUCKETS, "params", "MMACs", "ms/img"]]
    for result in results:
        by_size = [percent([statistics.mean(values)]) for values in result.by_size.values()]
        scores = [percent(result.miou), *by_size]
        cost = [f"{result.parameters:,}", f"{result.macs / 1e6:.1f}", f"{result.ms:.1f}"]
        table.append([result.layer, *scores, *cost])
    return table


def percent(values: Sequence[float]) -> str:
    """The mean in percent and, over several seeds, the standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean}±{100 * statistics.stdev(values):.1f}"
