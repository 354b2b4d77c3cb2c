"""Every family at one task, same start, data and schedule: writes docs/accuracy.md.

    python benchmarks/accuracy.py --data DIR            # DIR as `dynaconv train` takes it
    python benchmarks/accuracy.py --layers odconv,deform_v2 --seeds 3

Two tasks: the demo's scenes of handwritten digits, and the images of --data. Each training is kept
in --out, so that a run goes on where it was stopped; the page tells what is there. --shard 0/2
trains every second one (another process takes 1/2), and --page only times and writes.
"""

import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from dynaconv.analyze import analyze
from dynaconv.data.digits import InMemory
from dynaconv.data.folder import FolderData, check_folder
from dynaconv.files import whole
from dynaconv.registry import families
from dynaconv.training.demo import QUICK, demo_config, make_scenes, median_ms, percent
from dynaconv.training.model import STATIC, Config, build, normalise
from dynaconv.training.task import fit, metric
from dynaconv.training.unet import UNet

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
INTRODUCTION = """# Accuracy of every family

What `python benchmarks/accuracy.py` wrote. One small U-Net (widths {widths}); the named family
replaces its 3x3 convolutions below the stem, or, if it enlarges, the bilinear up-sampling. Same
start, data, order and schedule for all, the options of each at their defaults; nothing is tuned.
The runs are short ({digits} steps on digits{folder}): they show that every family trains, and what
it costs, not what it can reach. Differences of a few points are noise; ± is the standard deviation
over seeds where there are several.

mIoU in percent, over all pixels of the validation images. MMACs and ms: one {size}x{size} image,
this machine, {threads} thread(s), the median of nine turns.
"""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    names = options.layers.split(",") if options.layers else [STATIC, *two_dimensional()]
    if not options.page:
        index, shards = map(int, options.shard.split("/"))
        runs = [(name, seed) for seed in range(options.seeds) for name in names]
        for name, seed in runs[index::shards]:
            for data in ["digits", *([options.data] if options.data else [])]:
                train_once(data, name, seed, options)
    write_page(names, options)


def two_dimensional() -> list[str]:
    return [name for name, family in families().items() if 2 in family.classes]


def train_once(data: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """One training, unless its result is there already."""
    kept = options.out / f"{Path(data).name}-{name}-{seed}.json"
    if kept.exists():
        return
    score, steps = (digits if data == "digits" else partial(folder, Path(data)))(name, seed)
    found = {"task": Path(data).name, "layer": name, "seed": seed, "miou": score, "steps": steps}
    with whole(kept) as temporary:
        temporary.write_text(json.dumps(found))
    print(f"{kept.stem}: {100 * score:.1f}", flush=True)


def digits(name: str, seed: int) -> tuple[float, int]:
    """Validation mIoU on the demo's scenes, and the number of steps."""
    train, val = scenes()
    config = demo_config(name, QUICK, seed)
    model, _ = fit(config, train)
    pairs = list(zip(val.images, val.masks, strict=True))
    return score(model, config, pairs), config.epochs * (len(train) // config.batch)


def scenes() -> tuple[InMemory, InMemory]:
    """The same for every family and seed."""
    with Progress(disable=True) as progress:
        return make_scenes(QUICK, 0, progress)


def folder(root: Path, name: str, seed: int) -> tuple[float, int]:
    """Validation mIoU on images of a folder, class 11 as void if its masks have it."""
    found = check_folder(root, None, 11)
    config = Config(
        layer=name,
        classes=found.classes,
        ignore=11,
        widths=list(QUICK.widths),
        size=96,
        epochs=4,
        lr=3e-3,
        seed=seed,
    )
    model, _ = fit(config, FolderData(found.train, config.ignore, config.size, seed))
    steps = config.epochs * (len(found.train) // config.batch)
    return score(model, config, FolderData(found.val, config.ignore)), steps


def score(model: UNet, config: Config, pairs: Any) -> float:
    """mIoU over (image, mask) pairs, each image whole and by itself."""
    over_all = metric(config)
    with torch.no_grad():
        for i in range(len(pairs)):
            image, mask = pairs[i]
            over_all.update(model(normalise(image.unsqueeze(0))).argmax(1), mask.unsqueeze(0))
    return float(over_all.compute())


def write_page(names: list[str], options: argparse.Namespace) -> None:
    """The table of every result in `options.out`."""
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, int] = {}
    for file in sorted(options.out.glob("*.json")):
        found = json.loads(file.read_text())
        results[found["layer"]][found["task"]].append(found["miou"])
        steps[found["task"]] = found["steps"]
    tasks = sorted(steps, key=lambda task: task != "digits")
    models = {name: build(demo_config(name, QUICK, 0)).eval() for name in names}
    image = torch.rand(1, 3, 64, 64)
    calls = [partial(model, normalise(image)) for model in models.values()]
    times = dict(zip(models, median_ms(calls), strict=True))
    head = ["layer", *[f"{task} mIoU" for task in tasks], "seeds", "parameters", "MMACs", "ms"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, model in models.items():
        cost = analyze(model, normalise(image))
        scores = [percent(results[name][t]) if results[name][t] else "–" for t in tasks]
        seeds = str(max((len(results[name][t]) for t in tasks), default=0))
        costs = [f"{cost.parameters:,}", f"{cost.macs / 1e6:.1f}", f"{times[name]:.1f}"]
        lines.append([f"`{name}`", *scores, seeds, *costs])
    others = "".join(f", {n} on {task}" for task, n in steps.items() if task != "digits")
    settings = {"widths": QUICK.widths, "size": 64, "threads": options.threads}
    text = INTRODUCTION.format(digits=steps.get("digits", 0), folder=others, **settings)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    with whole(PAGE) as temporary:
        temporary.write_text(f"{text}\n{table}\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder with train and val images and masks")
    parser.add_argument("--layers", default="", help="families, by commas; else all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("accuracy"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--page", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
