"""Static against dynamic on real phrases of 22 languages: trains and measures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress

from dynaconv.data.phrases import LANGUAGES, LENGTH_BUCKETS, make_texts
from dynaconv.data.text import TextData, Texts, encode, index_of, pad_texts
from dynaconv.training.demo import median_ms, percent
from dynaconv.training.files import save_model
from dynaconv.training.model import STATIC
from dynaconv.training.task import Bar
from dynaconv.training.text_model import TextConfig, TextNet, logits
from dynaconv.training.text_task import accuracy, fit_text

LAYERS = ("lightconv", "dynamic_lightconv", "dyconv")
# Texts of all lengths in a padded batch, to compare with each text alone.
TOGETHER = 32


@dataclass(frozen=True)
class TextBudget:
    """How much a demo does; `texts` and `val` are those of each language."""

    texts: int = 400
    val: int = 60
    epochs: int = 3
    seeds: int = 2
    channels: int = 64
    blocks: int = 2
    kernel: int = 7


FULL = TextBudget()
QUICK = TextBudget(texts=150, val=30, epochs=2, seeds=1)


@dataclass
class TextResult:
    """What one kind of layer reached; a list has one entry a seed.

    `ms` is the time of one text of middle length with the first model; `agree` the share of texts
    that the first model gives the same label alone as among longer ones, `difference` the largest
    one between the logits.
    """

    layer: str
    models: list[TextNet] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    by_length: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in LENGTH_BUCKETS}
    )
    parameters: int = 0
    ms: float = 0.0
    agree: float = 0.0
    difference: float = 0.0


def run(
    layers: Sequence[str], budget: TextBudget, seed: int, out: Path, progress: Progress
) -> tuple[list[TextResult], TextConfig, Texts]:
    """Trains the static network and each of `layers`, with each seed, on the same texts.

    Models are kept in `out/models`. Returns the results, static first, the first configuration,
    and the validation texts.
    """
    train, val = make_texts("train", budget.texts, seed), make_texts("val", budget.val, seed)
    results = [TextResult(layer) for layer in dict.fromkeys([STATIC, *layers])]
    first = demo_config(STATIC, budget, seed, train)
    held_out = text_data(first, val)
    for run_seed in range(seed, seed + budget.seeds):
        for result in results:
            config = demo_config(result.layer, budget, run_seed, train)
            title = f"{result.layer}, seed {run_seed}"
            bar = Bar(progress, progress.add_task(title, total=None, note=""))
            model, _ = fit_text(config, text_data(config, train), callbacks=[bar])
            save_model(out / "models" / f"text-{result.layer}-{run_seed}.pt", model, config)
            measure(result, model, config, val, held_out)
            progress.update(bar.task, note=f"accuracy {100 * result.accuracy[-1]:.1f}")
    for result in results:
        model = result.models[0]
        result.parameters = sum(p.numel() for p in model.parameters())
        result.agree, result.difference = agreement(model, first, val.texts)
    measure_time(results, first, val.texts)
    return results, first, val


def demo_config(layer: str, budget: TextBudget, seed: int, train: Texts) -> TextConfig:
    """One training of the demo."""
    return TextConfig(
        layer=layer,
        labels=list(LANGUAGES),
        characters="".join(sorted(set().union(*train.texts))),
        channels=budget.channels,
        blocks=budget.blocks,
        kernel=budget.kernel,
        epochs=budget.epochs,
        batch=64,
        lr=8e-3,
        seed=seed,
    )


def text_data(config: TextConfig, texts: Texts) -> TextData:
    """Texts as a model of this configuration takes them."""
    return TextData(texts.texts, texts.labels, config.characters, config.labels)


def measure(
    result: TextResult, model: TextNet, config: TextConfig, val: Texts, data: TextData
) -> None:
    """Adds one model: its accuracy over all texts, and over those of each length."""
    output, targets = logits(model, config, val.texts), torch.tensor(data.targets)
    lengths = torch.tensor(data.lengths())
    result.models.append(model)
    result.accuracy.append(float(accuracy(config)(output, targets)))
    for name, (low, high) in LENGTH_BUCKETS.items():
        inside = (lengths >= low) & (lengths < high)
        result.by_length[name].append(float(accuracy(config)(output[inside], targets[inside])))


def agreement(model: TextNet, config: TextConfig, texts: Sequence[str]) -> tuple[float, float]:
    """Each text alone against the same among others of all lengths, in padded batches.

    Returns:
        The share of texts with the same label, and the largest difference between logits.
    """
    index = index_of(config.characters)
    tokens = [encode(text, index) for text in texts]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    same, largest = 0, 0.0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), TOGETHER):
            part = [tokens[i] for i in order[start : start + TOGETHER]]
            together = model(*pad_texts(part))
            alone = torch.cat([model(one[None]) for one in part])
            same += int((together.argmax(1) == alone.argmax(1)).sum())
            largest = max(largest, float((together - alone).abs().max()))
    return same / len(texts), largest


def measure_time(results: list[TextResult], config: TextConfig, texts: Sequence[str]) -> None:
    """Milliseconds for one text of middle length."""
    middle = sorted(texts, key=len)[len(texts) // 2]
    tokens = encode(middle, index_of(config.characters))[None]
    times = median_ms([partial(result.models[0], tokens) for result in results])
    for result, ms in zip(results, times, strict=True):
        result.ms = ms


def rows(results: list[TextResult]) -> list[list[str]]:
    """The table: a header, then a line for each layer."""
    table = [["layer", "accuracy %", *LENGTH_BUCKETS, "params", "ms/text"]]
    for result in results:
        by_length = [percent([statistics.mean(values)]) for values in result.by_length.values()]
        cost = [f"{result.parameters:,}", f"{result.ms:.1f}"]
        table.append([result.layer, percent(result.accuracy), *by_length, *cost])
    return table


def promise(results: list[TextResult], texts: int) -> list[list[str]]:
    """The table of the texts alone against the same in padded batches."""
    table = [["alone and in a padded batch", "same label", "largest difference of logits"]]
    for result in results:
        share = f"{result.agree * texts:.0f} of {texts}"
        table.append([result.layer, share, f"{result.difference:.1e}"])
    return table
