"""Dynamic convolution, from the command line."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

if TYPE_CHECKING:  # loaded within the commands, so that the others start at once
    from dynaconv.training.model import Config

NEEDS = ("typer", "rich", "lightning", "torchmetrics", "matplotlib", "PIL", "sklearn")
_missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
if _missing:
    sys.exit(f"dynaconv: {', '.join(_missing)} missing; run: pip install 'dynaconv[app]'")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table  # noqa: E402

from dynaconv.data.errors import InputError  # noqa: E402

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Option, Argument = typer.Option, typer.Argument


def main() -> None:
    """Entry point of the `dynaconv` command."""
    app()


@contextmanager
def told() -> Iterator[None]:
    """Tells a refusal, or a file that cannot be written, and ends with exit code 2."""
    try:
        yield
    except InputError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def refuse(message: str) -> NoReturn:
    """Ends the command with what is wrong, exit code 2."""
    console = Console(stderr=True, highlight=False)
    console.print("error:", message, style="red", soft_wrap=True, markup=False)
    raise typer.Exit(2)


@app.command()
@told()
def demo(
    quick: Annotated[bool, Option("--quick", help="A minute instead of six.")] = False,
    layers: Annotated[str, Option(help="Families, separated by commas. Default: three.")] = "",
    seeds: Annotated[int | None, Option(min=1, help="Trainings of each layer.")] = None,
    seed: Annotated[int, Option(min=0, help="The first seed.")] = 0,
    out: Annotated[Path, Option(help="Where the report and the models go.")] = Path("demo"),
) -> None:
    """Compares static and dynamic U-Nets on embedded real pixels; writes an HTML report."""
    from dynaconv.training.demo import FULL, LAYERS, QUICK, SIZE, rows, run
    from dynaconv.training.files import check_writable
    from dynaconv.training.report import write_report

    names = [name.strip() for name in layers.split(",") if name.strip()] or list(LAYERS)
    for name in names:
        _check_layer(name, "--layers")
    check_writable(out)
    budget = QUICK if quick else FULL
    budget = replace(budget, seeds=seeds or budget.seeds)
    with _progress() as progress:
        results, val = run(names, budget, seed, out, progress)
    _print_table(*rows(results))
    about = (
        f"{budget.scenes} training and {budget.val} validation scenes of {SIZE}x{SIZE} pixels, "
        f"{budget.epochs} epochs, {budget.seeds} training(s) of each layer from seed {seed}"
    )
    write_report(out / "report.html", results, val, about)
    _say(about)
    _say(f"report: {out / 'report.html'}")


@app.command()
@told()
def train(
    folder: Annotated[
        Path, Argument(help="Holds train/images, train/masks, val/images, val/masks.")
    ],
    layer: Annotated[str, Option(help="A family, or 'static'.")] = "odconv",
    classes: Annotated[int | None, Option(min=2, help="Default: as the train masks show.")] = None,
    ignore: Annotated[int, Option(help="The mask value that means no class.")] = 255,
    epochs: Annotated[int, Option(min=1)] = 30,
    batch: Annotated[int, Option(min=1)] = 8,
    lr: Annotated[float, Option(min=1e-8, help="Peak learning rate.")] = 2e-3,
    size: Annotated[int, Option(min=16, help="Height and width of the random crops.")] = 160,
    widths: Annotated[str, Option(help="Channels from half resolution down.")] = "32,64,96,128",
    where: Annotated[str, Option(help="Regular expression: which parts are dynamic.")] = "",
    seed: Annotated[int, Option(min=0)] = 0,
    out: Annotated[Path | None, Option(help="Default: runs/LAYER-SEED.")] = None,
) -> None:
    """Trains a U-Net on your images and masks; goes on from its last checkpoint after a kill."""
    from dynaconv.data.folder import FolderData, check_folder
    from dynaconv.training.files import check_writable
    from dynaconv.training.model import WHERE, Config
    from dynaconv.training.task import Bar, fit

    _check_layer(layer, "--layer")
    out = out or Path("runs") / f"{layer}-{seed}"
    config = Config(
        layer=layer,
        where=where or WHERE,
        classes=classes or 2,
        ignore=ignore,
        widths=_numbers("--widths", widths),
        epochs=epochs,
        batch=batch,
        lr=lr,
        size=size,
        seed=seed,
    )
    _check_model(config)
    check_writable(out)
    with _console().status("reading every image and mask once"):
        found = check_folder(folder, classes, ignore)
    config = replace(config, classes=found.classes)
    _say(f"{len(found.train)} train and {len(found.val)} val images, {found.classes} classes")
    data = FolderData(found.train, ignore, size, seed)
    with _progress() as progress:
        bar = Bar(progress, progress.add_task(layer, total=None, note=""))
        _, history = fit(config, data, FolderData(found.val, ignore), out, [bar])
    best = max(history, key=lambda line: line["miou"])
    _say(
        f"validation mIoU {100 * history[-1]['miou']:.1f} after {epochs} epochs, "
        f"the best {100 * best['miou']:.1f} after {best['epoch']:.0f}"
    )
    _say(f"model: {out / 'model.pt'}")


@app.command()
@told()
def predict(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    files: Annotated[list[Path], Argument(help="Images of any size.")],
    out: Annotated[Path, Option(help="Folder for masks and overlays.")] = Path("predictions"),
) -> None:
    """Writes for each image a mask of class indices and an overlay."""
    import numpy as np

    from dynaconv.data.images import read_image
    from dynaconv.training.files import check_writable, load_model, save_picture
    from dynaconv.training.model import predict as classes_of
    from dynaconv.training.pictures import overlay

    model, config = load_model(checkpoint)
    outputs = _outputs(files, out)
    for file in outputs:
        read_image(file)  # all are readable before the first is predicted
    check_writable(out)
    for file, (mask_file, overlay_file) in outputs.items():
        image = read_image(file)
        mask = classes_of(model, image[None])[0]
        kind = np.uint8 if config.classes <= 256 else np.uint16
        save_picture(mask_file, mask.numpy().astype(kind))
        save_picture(overlay_file, overlay(image, mask, config.classes, config.background))
        _say(f"{file} -> {mask_file}, {overlay_file}")


@app.command()
@told()
def inspect(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    image: Annotated[Path, Argument(help="An image of any size.")],
    out: Annotated[Path, Option(help="The picture, a PNG.")] = Path("inspect.png"),
    most: Annotated[int, Option("--layers", min=1, help="Dynamic layers to draw.")] = 4,
) -> None:
    """Draws what the kernels of a model do on an image."""
    from dynaconv.data.images import read_image
    from dynaconv.training.files import load_model, whole
    from dynaconv.training.kernel_pictures import draw_with_captions
    from dynaconv.training.model import dynamic_layers

    model, config = load_model(checkpoint)
    if not dynamic_layers(model):
        raise InputError(f"{checkpoint}: its convolutions are static; there is nothing to look at")
    figure = draw_with_captions(model, read_image(image), most)
    with whole(out) as temporary:
        figure.savefig(temporary, format="png")
    _say(f"{config.layer} on {image} -> {out}")


@app.command()
def families() -> None:
    """Lists the families of dynamic convolution."""
    from dynaconv.registry import families as registered

    lines = [
        [family.name, family.summary, ", ".join(f"{rank}-D" for rank in family.ranks)]
        for family in registered().values()
    ]
    _print_table(["name", "what", "dimensions"], *lines, numbers=False)


def _check_layer(name: str, option: str) -> None:
    from dynaconv.registry import family, names

    if name == "static":
        return
    if name not in names():
        raise InputError(
            f"{option} {name!r} does not exist; there are static, {', '.join(names())}"
        )
    if 2 not in family(name).classes:
        raise InputError(f"{option} {name!r} has no 2-D form")


def _check_model(config: "Config") -> None:
    """Refuses widths or a place for the dynamic layers that make no model."""
    from dynaconv.training.model import build

    try:
        re.compile(config.where)
        build(config)
    except re.error as error:
        raise InputError(f"--where {config.where!r} is no regular expression: {error}") from None
    except ValueError as error:
        raise InputError(f"--layer, --widths and --where make no model: {error}") from None


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: give whole numbers separated by commas") from None


def _outputs(files: list[Path], out: Path) -> dict[Path, tuple[Path, Path]]:
    """For each file its mask and overlay; refused where one would overwrite another or an input."""
    outputs: dict[Path, tuple[Path, Path]] = {}
    owners: dict[Path, Path] = {file.resolve(): file for file in files}
    for file in dict.fromkeys(files):
        outputs[file] = out / f"{file.stem}_mask.png", out / f"{file.stem}_overlay.png"
        for target in outputs[file]:
            other = owners.setdefault(target.resolve(), file)
            if other != file or target.resolve() == file.resolve():
                raise InputError(
                    f"{target}: the output for {file} would overwrite that of, or the image, "
                    f"{other}; give another --out"
                )
    return outputs


def _console() -> Console:
    return Console(highlight=False)


def _say(text: str) -> None:
    _console().print(text, soft_wrap=True, markup=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=_console(),
    )


def _print_table(head: list[str], *lines: list[str], numbers: bool = True) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)  # fits 80 columns
    for i, title in enumerate(head):
        table.add_column(title, justify="right" if numbers and i else "left", no_wrap=numbers)
    for line in lines:
        table.add_row(*line)
    _console().print(table)


if __name__ == "__main__":
    main()
