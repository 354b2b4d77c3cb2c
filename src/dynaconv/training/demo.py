"""Static against dynamic on real digits over real photographs: trains, measures, reports."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from dynaconv.analyze import Analysis, analyze
from dynaconv.data.digits import BACKGROUND, CLASS_NAMES, SIZE_BUCKETS, DigitScenes, InMemory
from dynaconv.training.files import save_model
from dynaconv.training.model import STATIC, Config, normalise
from dynaconv.training.task import Bar, fit, metric

LAYERS = ("odconv", "deform_v2", "selective_kernel")
IGNORE = 255


@dataclass(frozen=True)
class Budget:
    """How much a demo does."""

    scenes: int = 1200
    val: int = 150
    epochs: int = 8
    seeds: int = 2
    widths: tuple[int, ...] = (16, 32, 64, 96)


FULL = Budget()
QUICK = Budget(scenes=240, val=40, epochs=3, seeds=1, widths=(8, 16, 32))


@dataclass
class Result:
    """What one kind of layer reached: per seed the mIoU, in all and by object size."""

    layer: str
    miou: list[float] = field(default_factory=list)
    by_size: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    models: list[nn.Module] = field(default_factory=list)
    analysis: Analysis | None = None
    ms: float = 0.0

    def spread(self, values: Sequence[float] | None = None) -> str:
        """Mean and, over several seeds, standard deviation, in percent."""
        values = self.miou if values is None else values
        mean = f"{100 * statistics.mean(values):.1f}"
        return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def run(
    layers: Sequence[str], budget: Budget, seed: int, out: Path, progress: Progress
) -> tuple[list[Result], InMemory]:
    """Trains each layer with each seed on the same scenes; results in the order given."""
    making = progress.add_task("making scenes", total=2, note="")
    train = DigitScenes("train", budget.scenes, seed=seed).in_memory()
    progress.advance(making)
    val = DigitScenes("val", budget.val, seed=seed).in_memory()
    progress.advance(making)
    kinds = [STATIC, *[name for name in layers if name != STATIC]]
    results = [Result(name) for name in kinds]
    runs = [(r, s) for s in range(seed, seed + budget.seeds) for r in results]
    tasks = [
        progress.add_task(f"{r.layer}, seed {s}", total=None, start=False, note="") for r, s in runs
    ]
    for (result, run_seed), task in zip(runs, tasks, strict=True):
        config = _config(result.layer, budget, run_seed)
        progress.start_task(task)
        start = time.perf_counter()
        model, _ = fit(config, train, None, callbacks=[Bar(progress, task)])
        result.seconds.append(time.perf_counter() - start)
        save_model(out / "models" / f"{result.layer}-{run_seed}.pt", model, config)
        result.models.append(model)
        _measure(result, model, config, val)
        progress.update(task, note=f"mIoU {100 * result.miou[-1]:.1f} in {result.seconds[-1]:.0f} s")
    for result in results:
        result.analysis = analyze(result.models[0], normalise(val.images[:1]))
    _time(results, val.images[:1])
    return results, val


def _config(layer: str, budget: Budget, seed: int) -> Config:
    return Config(
        layer=layer,
        classes=len(CLASS_NAMES),
        names=list(CLASS_NAMES),
        ignore=IGNORE,
        widths=list(budget.widths),
        epochs=budget.epochs,
        batch=8,
        lr=2e-3,
        size=64,
        seed=seed,
        background_weight=0.3,
    )


def predict_all(model: nn.Module, images: Tensor) -> Tensor:
    """Classes (N, H, W) of images (N, 3, H, W)."""
    with torch.no_grad():
        parts = [model.eval()(normalise(x)).argmax(1) for x in images.split(25)]
    return torch.cat(parts)


def _measure(result: Result, model: nn.Module, config: Config, val: InMemory) -> None:
    """mIoU over all pixels, and over the pixels in the squares of digits of each size."""
    predicted = predict_all(model, val.images)
    result.miou.append(float(metric(config)(predicted, val.masks)))
    for name, (low, high) in SIZE_BUCKETS.items():
        inside = (val.sizes >= low) & (val.sizes < high)
        target = val.masks.masked_fill(~inside, IGNORE)
        value = float(metric(config)(predicted, target))
        result.by_size.setdefault(name, []).append(value)


def _time(results: list[Result], image: Tensor, repeats: int = 9) -> None:
    """Milliseconds for one image, models in turn, the median."""
    times: dict[str, list[float]] = {r.layer: [] for r in results}
    x = normalise(image)
    with torch.no_grad():
        for i in range(repeats + 2):
            for r in results:
                start = time.perf_counter()
                r.models[0](x)
                if i >= 2:
                    times[r.layer].append(1e3 * (time.perf_counter() - start))
    for r in results:
        r.ms = statistics.median(times[r.layer])


def rows(results: list[Result]) -> list[list[str]]:
    """The table: a header, then a line for each layer."""
    sizes = [f"mIoU {name}" for name in SIZE_BUCKETS]
    table = [["layer", "mIoU %", *sizes, "parameters", "MMACs", "ms/image", "s/training"]]
    for r in results:
        if r.analysis is None:
            continue
        table.append(
            [
                r.layer,
                r.spread(),
                *[r.spread(r.by_size[name]) for name in SIZE_BUCKETS],
                f"{r.analysis.parameters:,}",
                f"{r.analysis.macs / 1e6:.1f}",
                f"{r.ms:.1f}",
                f"{statistics.mean(r.seconds):.0f}",
            ]
        )
    return table


def with_seeds(budget: Budget, seeds: int | None) -> Budget:
    return budget if seeds is None else replace(budget, seeds=seeds)


__all__ = ["BACKGROUND", "FULL", "LAYERS", "QUICK", "Budget", "Result", "rows", "run"]
