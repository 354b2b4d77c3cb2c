"""Dynamic convolution, from the command line."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

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

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(highlight=False)
Option, Argument = typer.Option, typer.Argument


def main() -> None:
    """Entry point of the `dynaconv` command."""
    app()


@app.command()
def demo(
    quick: Annotated[bool, Option("--quick", help="A minute instead of six.")] = False,
    layers: Annotated[str, Option(help="Families, separated by commas.")] = "",
    seeds: Annotated[int | None, Option(min=1, help="Trainings of each layer.")] = None,
    seed: Annotated[int, Option(min=0, help="The first seed.")] = 0,
    out: Annotated[Path, Option(help="Where the report and the models go.")] = Path("demo"),
) -> None:
    """Compares static and dynamic U-Nets on embedded real pixels; writes an HTML report."""
    from dynaconv.training.demo import FULL, LAYERS, QUICK, rows, run, with_seeds
    from dynaconv.training.report import write_report

    names = [name.strip() for name in layers.split(",") if name.strip()] or list(LAYERS)
    for name in names:
        _check_layer(name)
    budget = with_seeds(QUICK if quick else FULL, seeds)
    with _progress() as progress:
        results, val = run(names, budget, seed, out, progress)
    _print_table(rows(results))
    about = (
        f"{budget.scenes} training and {budget.val} validation scenes of 64x64 pixels, "
        f"{budget.epochs} epochs, {budget.seeds} training(s) a layer from seed {seed}"
    )
    write_report(out / "report.html", results, val, about)
    console.print(f"{about}\nreport: [bold]{out / 'report.html'}[/]")


@app.command()
def train(
    folder: Annotated[Path, Argument(help="Holds train/images, train/masks, val/images, val/masks.")],
    layer: Annotated[str, Option(help="A family, or 'static'.")] = "odconv",
    classes: Annotated[int | None, Option(min=2, help="Default: as the train masks show.")] = None,
    ignore: Annotated[int, Option(help="The mask value that means no class.")] = 255,
    epochs: Annotated[int, Option(min=1)] = 30,
    batch: Annotated[int, Option(min=1)] = 8,
    lr: Annotated[float, Option(min=1e-8, help="Peak learning rate.")] = 2e-3,
    size: Annotated[int, Option(min=16, help="Height and width of the random crops.")] = 160,
    widths: Annotated[str, Option(help="Channels from full resolution down.")] = "24,48,96,128",
    where: Annotated[str, Option(help="Regular expression: which parts are dynamic.")] = "",
    seed: Annotated[int, Option(min=0)] = 0,
    out: Annotated[Path | None, Option(help="Default: runs/LAYER-SEED.")] = None,
) -> None:
    """Trains a U-Net on your images and masks; goes on from its last checkpoint after a kill."""
    from dynaconv.data.folder import FolderData, FolderError, check_folder
    from dynaconv.training.model import WHERE, Config
    from dynaconv.training.task import Bar, fit

    _check_layer(layer)
    try:
        found = check_folder(folder, classes, ignore)
        channels = [int(w) for w in widths.split(",")]
    except FolderError as error:
        refuse(error)
    except ValueError:
        refuse(f"--widths {widths!r}: give numbers separated by commas")
    out = out or Path("runs") / f"{layer}-{seed}"
    config = Config(
        layer=layer,
        where=where or WHERE,
        classes=found.classes,
        ignore=ignore,
        widths=channels,
        epochs=epochs,
        batch=batch,
        lr=lr,
        size=size,
        seed=seed,
    )
    data = FolderData(found.train, ignore, size, seed)
    with _progress() as progress:
        bar = Bar(progress, progress.add_task(layer, total=None, note=""))
        try:
            _, history = fit(config, data, FolderData(found.val, ignore), out, [bar])
        except ValueError as error:
            refuse(error)
    for line in history:
        console.print(f"epoch {line['epoch']:.0f}: validation mIoU {100 * line['miou']:.1f}")
    console.print(f"model: [bold]{out / 'model.pt'}[/]")


@app.command()
def predict(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    files: Annotated[list[Path], Argument(help="Images of any size.")],
    out: Annotated[Path, Option(help="Folder for masks and overlays.")] = Path("predictions"),
) -> None:
    """Writes for each image a mask of class indices and an overlay."""
    from PIL import Image

    from dynaconv.data.folder import read_image
    from dynaconv.training.demo import predict_all
    from dynaconv.training.files import whole
    from dynaconv.training.pictures import overlay

    model, config = _load(checkpoint)
    images = [_or_refuse(read_image, file) for file in files]  # all are readable before any work
    for file, image in zip(files, images, strict=True):
        mask = predict_all(model, image[None])[0]
        written = []
        for suffix, array in (
            ("mask", mask.byte().numpy()),
            ("overlay", overlay(image, mask, config.classes)),
        ):
            target = out / f"{file.stem}_{suffix}.png"
            with whole(target) as temporary:
                Image.fromarray(array).save(temporary)
            written.append(str(target))
        console.print(f"{file} -> {', '.join(written)}")


@app.command()
def inspect(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    image: Annotated[Path, Argument(help="An image of any size.")],
    out: Annotated[Path, Option(help="The picture.")] = Path("inspect.png"),
    panels: Annotated[int, Option(min=1, help="Dynamic layers to draw.")] = 4,
) -> None:
    """Draws what the kernels of a model do on an image."""
    from dynaconv.data.folder import read_image
    from dynaconv.training.files import whole
    from dynaconv.training.model import dynamic_layers
    from dynaconv.training.pictures import draw_kernels

    model, config = _load(checkpoint)
    if not dynamic_layers(model):
        refuse(f"{checkpoint}: its convolutions are static; there is nothing to look at")
    figure = draw_kernels(model, _or_refuse(read_image, image), panels)
    with whole(out) as temporary:
        figure.savefig(temporary)
    console.print(f"{config.layer} on {image} -> [bold]{out}[/]")


@app.command()
def families() -> None:
    """Lists the families of dynamic convolution."""
    from dynaconv.registry import families as registered

    lines = [["name", "what", "dimensions", "paper"]]
    for family in registered().values():
        ranks = ", ".join(f"{rank}d" for rank in family.ranks)
        lines.append([family.name, family.summary, ranks, family.paper])
    _print_table(lines, numbers=False)


def refuse(message: object) -> NoReturn:
    """Ends the command with what is wrong, exit code 2."""
    Console(stderr=True, highlight=False).print("error:", message, style="red", soft_wrap=True, markup=False)
    raise typer.Exit(2)


def _check_layer(name: str) -> None:
    from dynaconv.registry import family, names

    if name == "static":
        return
    if name not in names():
        refuse(f"--layer {name!r} does not exist; there are static, {', '.join(names())}")
    if 2 not in family(name).classes:
        refuse(f"--layer {name!r} has no 2-D form")


def _load(checkpoint: Path) -> Any:
    from dynaconv.training.files import load_model

    return _or_refuse(load_model, checkpoint)


def _or_refuse(function: Any, path: Path) -> Any:
    """function(path), its ValueError or missing file told without a traceback."""
    try:
        return function(path)
    except (ValueError, FileNotFoundError) as error:
        refuse(error)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
    )


def _print_table(lines: list[list[str]], numbers: bool = True) -> None:
    head, *body = lines
    table = Table()
    for i, title in enumerate(head):
        table.add_column(title, justify="right" if numbers and i else "left")
    for line in body:
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    main()
