"""Dynamic convolution, from the command line."""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:  # loaded within the commands, so that the others start at once
    from dynaconv.training.model import Config, RunConfig
    from dynaconv.training.task import Bar, History
    from dynaconv.training.text_model import TextConfig, TextNet
    from dynaconv.training.unet import UNet

NEEDS = ("typer", "rich", "lightning", "torchmetrics", "matplotlib", "PIL", "sklearn", "babel")
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
IMAGES: dict[str, Any] = {"rich_help_panel": "For images"}
TEXTS: dict[str, Any] = {"rich_help_panel": "For texts"}


class Kind(StrEnum):
    """What a network learns from."""

    IMAGES = "images"
    TEXT = "text"


class Deform(StrEnum):
    """What deformable convolutions become in an ONNX file."""

    OPERATOR = "operator"
    STANDARD = "standard"


RANKS = {Kind.IMAGES: 2, Kind.TEXT: 1}


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
    task: Annotated[Kind, Option(help="What the networks learn.")] = Kind.IMAGES,
    quick: Annotated[bool, Option("--quick", help="A minute instead of several.")] = False,
    layers: Annotated[str, Option(help="Families, separated by commas. Default: three.")] = "",
    seeds: Annotated[int | None, Option(min=1, help="Trainings of each layer.")] = None,
    seed: Annotated[int, Option(min=0, help="The first seed.")] = 0,
    out: Annotated[Path, Option(help="Where the report and the models go.")] = Path("demo"),
) -> None:
    """Compares static and dynamic networks on embedded real pixels, or phrases; writes a page."""
    from dynaconv.training.files import check_writable

    names = [name.strip() for name in layers.split(",") if name.strip()]
    for name in names:
        _check_layer(name, "--layers", RANKS[task])
    check_writable(out)
    (_demo_images if task is Kind.IMAGES else _demo_text)(names, quick, seeds, seed, out)


def _demo_images(names: list[str], quick: bool, seeds: int | None, seed: int, out: Path) -> None:
    from dynaconv.training.demo import FULL, LAYERS, QUICK, SIZE, rows, run
    from dynaconv.training.report import write_report

    budget = QUICK if quick else FULL
    budget = replace(budget, seeds=seeds or budget.seeds)
    with _progress() as progress:
        results, val = run(names or LAYERS, budget, seed, out, progress)
    _print_table(*rows(results))
    about = (
        f"{budget.scenes} training and {budget.val} validation scenes of {SIZE}x{SIZE} pixels, "
        f"{budget.epochs} epochs, {budget.seeds} training(s) of each layer from seed {seed}"
    )
    write_report(out / "report.html", results, val, about)
    _say(about)
    _say(f"report: {out / 'report.html'}")


def _demo_text(names: list[str], quick: bool, seeds: int | None, seed: int, out: Path) -> None:
    from dynaconv.data.phrases import LANGUAGES
    from dynaconv.training.text_demo import FULL, LAYERS, QUICK, promise, rows, run
    from dynaconv.training.text_report import write_text_report

    budget = QUICK if quick else FULL
    budget = replace(budget, seeds=seeds or budget.seeds)
    with _progress() as progress:
        results, config, val = run(names or LAYERS, budget, seed, out, progress)
    _print_table(*rows(results))
    _say("")
    _print_table(*promise(results, len(val)))
    about = (
        f"{budget.texts} training and {budget.val} validation texts of each of {len(LANGUAGES)} "
        f"languages, {budget.epochs} epochs, {budget.seeds} training(s) of each layer from seed "
        f"{seed}"
    )
    write_text_report(out / "text.html", results, config, val, about)
    _say(about)
    _say(f"page: {out / 'text.html'}")


@app.command()
@told()
def train(
    data: Annotated[
        Path,
        Argument(
            help="A folder with train/images, train/masks, val/images, val/masks; or a CSV or "
            "JSON Lines file with text and label."
        ),
    ],
    layer: Annotated[str, Option(help="A family, or 'static'.")] = "odconv",
    epochs: Annotated[int | None, Option(min=1, help="Default: 30; texts 10.")] = None,
    batch: Annotated[int | None, Option(min=1, help="Default: 8; texts 32.")] = None,
    lr: Annotated[float, Option(min=1e-8, help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, Option(min=0)] = 0,
    out: Annotated[Path | None, Option(help="Default: runs/LAYER-SEED.")] = None,
    classes: Annotated[
        int | None, Option(min=2, help="Default: as the train masks show.", **IMAGES)
    ] = None,
    ignore: Annotated[
        int | None, Option(help="The mask value that means no class. Default: 255.", **IMAGES)
    ] = None,
    size: Annotated[
        int | None,
        Option(min=0, help="Side of the crops, 0: whole images, padded. Default: 160.", **IMAGES),
    ] = None,
    widths: Annotated[
        str | None, Option(help="Channels from half size down. Default: 32,64,96,128.", **IMAGES)
    ] = None,
    where: Annotated[
        str | None, Option(help="Regular expression: which parts are dynamic.", **IMAGES)
    ] = None,
    val: Annotated[
        Path | None, Option(help="File of validation texts. Default: a tenth of FILE.", **TEXTS)
    ] = None,
    channels: Annotated[int | None, Option(min=1, help="Default: 64.", **TEXTS)] = None,
    blocks: Annotated[int | None, Option(min=1, help="Default: 3.", **TEXTS)] = None,
    kernel: Annotated[int | None, Option(min=1, help="Taps, odd. Default: 5.", **TEXTS)] = None,
) -> None:
    """Trains on your images and masks, or texts; goes on from its last checkpoint after a kill."""
    from dynaconv.data.text import is_text

    out = out or Path("runs") / f"{layer}-{seed}"
    shared = _given(layer=layer, epochs=epochs, batch=batch, lr=lr, seed=seed)
    images = _given(classes=classes, ignore=ignore, size=size, widths=widths, where=where)
    texts = _given(val=val, channels=channels, blocks=blocks, kernel=kernel)
    kind, foreign = (Kind.TEXT, images) if is_text(data) else (Kind.IMAGES, texts)
    _check_layer(layer, "--layer", RANKS[kind])
    if foreign:
        options = ", ".join(f"--{name}" for name in foreign)
        raise InputError(f"{options}: not for {kind.value}, which {data} holds")
    if kind is Kind.TEXT:
        _train_texts(data, texts.pop("val", None), out, shared | texts)
    else:
        _train_images(data, classes, out, shared | images)


def _train_images(folder: Path, classes: int | None, out: Path, options: dict[str, Any]) -> None:
    from dynaconv.data.folder import FolderData, check_folder
    from dynaconv.training.files import check_writable
    from dynaconv.training.model import Config, build
    from dynaconv.training.task import fit

    if "widths" in options:
        options["widths"] = _numbers("--widths", options["widths"])
    config = Config(**{"classes": 2} | options)
    if 0 < config.size < 16:
        raise InputError(f"--size {config.size}: give 16 or more, or 0 for whole images")
    try:
        re.compile(config.where)
        build(config)
    except re.error as error:
        raise InputError(f"--where {config.where!r} is no regular expression: {error}") from None
    except ValueError as error:
        raise InputError(f"--layer, --widths and --where make no model: {error}") from None
    check_writable(out)
    with _console().status("reading every image and mask once"):
        found = check_folder(folder, classes, config.ignore)
    config = replace(config, classes=found.classes)
    _say(f"{len(found.train)} train and {len(found.val)} val images, {found.classes} classes")
    train = FolderData(found.train, config.ignore, config.size or None, config.seed)
    held_out = FolderData(found.val, config.ignore)
    _train(config, out, "mIoU", lambda bars: fit(config, train, held_out, out, bars)[1])


def _train_texts(path: Path, val: Path | None, out: Path, options: dict[str, Any]) -> None:
    from dynaconv.data.text import TextData, check_texts
    from dynaconv.training.files import check_writable
    from dynaconv.training.text_model import TextConfig, build_text
    from dynaconv.training.text_task import fit_text

    check_writable(out)
    found = check_texts(path, val)
    config = TextConfig(**options, labels=found.labels, characters=found.characters)
    try:
        build_text(config)
    except ValueError as error:
        raise InputError(
            f"--layer, --channels, --blocks and --kernel make no model: {error}"
        ) from None
    _say(
        f"{len(found.train)} train and {len(found.val)} val texts, {len(found.labels)} labels, "
        f"{len(found.characters)} characters"
    )
    if found.repeated:
        _say(f"note: {found.repeated} of the val texts are train texts too")
    train, held_out = (
        TextData(part.texts, part.labels, found.characters, found.labels)
        for part in (found.train, found.val)
    )
    _train(config, out, "accuracy", lambda bars: fit_text(config, train, held_out, out, bars)[1])


def _train(
    config: "RunConfig", out: Path, score: str, fit: "Callable[[list[Bar]], History]"
) -> None:
    """Trains under a bar, and tells the score."""
    from dynaconv.training.task import Bar

    with _progress() as progress:
        bar = Bar(progress, progress.add_task(config.layer, total=None, note=""))
        history = fit([bar])
    key = score.lower()
    best = max(history, key=lambda line: line[key])
    _say(
        f"validation {score} {100 * history[-1][key]:.1f} after {config.epochs} epochs, "
        f"the best {100 * best[key]:.1f} after {best['epoch']:.0f}"
    )
    _say(f"model: {out / 'model.pt'}")


@app.command()
@told()
def predict(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    files: Annotated[
        list[Path] | None, Argument(help="Images of any size; or one CSV or JSON Lines file.")
    ] = None,
    text: Annotated[
        list[str] | None, Option(help="A text to label; may be given several times.")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for masks and overlays, or file of labels. Default: predictions."),
    ] = None,
) -> None:
    """Writes for each image a mask and an overlay, or for each text its label."""
    from dynaconv.training.files import load_model
    from dynaconv.training.text_model import TextConfig

    model, config = load_model(checkpoint)
    if isinstance(config, TextConfig):
        _predict_texts(model, config, files or [], text or [], out)
    elif text:
        raise InputError(f"--text: {checkpoint} is a model of images")
    elif not files:
        raise InputError("give an image")
    else:
        _predict_images(model, config, files, out or Path("predictions"))


def _predict_images(model: "UNet", config: "Config", files: list[Path], out: Path) -> None:
    import numpy as np

    from dynaconv.data.images import read_image
    from dynaconv.training.files import check_writable, save_picture
    from dynaconv.training.model import predict as classes_of
    from dynaconv.training.pictures import overlay

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


def _predict_texts(
    model: "TextNet", config: "TextConfig", files: list[Path], texts: list[str], out: Path | None
) -> None:
    from dynaconv.data.text import READERS, check_text, read_texts
    from dynaconv.training.files import check_writable, save_predictions
    from dynaconv.training.text_model import label

    if len(files) + bool(texts) != 1:
        raise InputError("give one file of texts, or --text")
    for text in texts:
        check_text("--text", text)
    if texts:
        for text, name, share in zip(texts, *label(model, config, texts), strict=True):
            _say(f"{name}  {share:.3f}  {text}")
        return
    out = out or Path(f"predictions{files[0].suffix.lower()}")
    read = read_texts(files[0], labelled=False)
    if out.suffix.lower() not in READERS:
        raise InputError(f"--out {out}: give a file that ends in {', '.join(READERS)}")
    if out.resolve() == files[0].resolve():
        raise InputError(f"--out {out}: would overwrite the texts")
    check_writable(out.parent)
    save_predictions(out, read.texts, *label(model, config, read.texts))
    _say(f"{len(read)} texts of {files[0]} -> {out}")


@app.command()
@told()
def inspect(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    image: Annotated[Path | None, Argument(help="An image of any size.")] = None,
    text: Annotated[str | None, Option(help="A text, for a model of texts.")] = None,
    out: Annotated[Path, Option(help="The picture, a PNG.")] = Path("inspect.png"),
    most: Annotated[int, Option("--layers", min=1, help="Dynamic layers to draw.")] = 4,
) -> None:
    """Draws what the kernels of a model do on an image, or along a text."""
    from dynaconv.training.files import load_model
    from dynaconv.training.model import dynamic_layers
    from dynaconv.training.text_model import TextConfig

    model, config = load_model(checkpoint)
    if not dynamic_layers(model):
        raise InputError(f"{checkpoint}: its convolutions are static; there is nothing to look at")
    if isinstance(config, TextConfig):
        if text is None or image is not None:
            raise InputError(f"{checkpoint}: is a model of texts; give --text TEXT, no file")
        _inspect_text(model, config, text, out, most)
    else:
        if image is None or text is not None:
            raise InputError(f"{checkpoint}: is a model of images; give an image, no --text")
        _inspect_image(model, image, out, most)
    _say(f"{config.layer} on {image or text} -> {out}")


def _inspect_image(model: "UNet", image: Path, out: Path, most: int) -> None:
    from dynaconv.data.images import read_image
    from dynaconv.files import whole
    from dynaconv.training.kernel_pictures import draw_with_captions

    figure = draw_with_captions(model, read_image(image), most)
    with whole(out) as temporary:
        figure.savefig(temporary, format="png")


def _inspect_text(model: "TextNet", config: "TextConfig", text: str, out: Path, most: int) -> None:
    from dynaconv.data.text import check_text
    from dynaconv.training.text_pictures import draw_text_kernels, save_text_picture

    check_text("--text", text)
    save_text_picture(out, draw_text_kernels(model, config, text, most))


@app.command()
@told()
def export(
    checkpoint: Annotated[Path, Argument(help="The model.pt of a training.")],
    out: Annotated[Path, Argument(help="The file, e.g. model.onnx.")],
    deform: Annotated[
        Deform, Option(help="ONNX's DeformConv, or standard operators for runtimes without it.")
    ] = Deform.OPERATOR,
) -> None:
    """Writes a model as an ONNX file, for batches and sizes of any kind."""
    from dynaconv.export import export_onnx
    from dynaconv.training.deployed import deployed
    from dynaconv.training.files import load_model

    model, example, metadata = deployed(*load_model(checkpoint))
    try:
        with _console().status("exporting, and comparing"):
            written = export_onnx(model, example, out, deform=deform.value, metadata=metadata)
    except (ImportError, ValueError) as error:
        raise InputError(f"{checkpoint}: {error}") from None
    _say(str(written))


@app.command()
@told()
def families(
    channels: Annotated[str, Option(help="Input and output channels of a convolution.")] = "64,64",
    kernel: Annotated[int, Option(min=1, help="Its kernel size.")] = 3,
    size: Annotated[int, Option(min=1, help="Height and width (or length) of its input.")] = 56,
    rank: Annotated[int, Option("--dimensions", min=1, max=3)] = 2,
    markdown: Annotated[bool, Option("--markdown", help="As a page.")] = False,
) -> None:
    """Lists the families: what follows the input, and what each costs beyond a convolution."""
    from dynaconv.catalogue import catalogue, page
    from dynaconv.layers.base import conv_nd

    given = _numbers("--channels", channels)
    if len(given) != 2 or min(given) < 1:
        raise InputError(f"--channels {channels!r}: give input and output channels, e.g. 64,64")
    entries = catalogue(conv_nd(rank, *given, kernel, padding=kernel // 2), size)
    if markdown:
        typer.echo(page(entries), nl=False)
        return
    lines = []
    for entry in entries:
        name, _, what, forms, parameters, macs, _ = entry.cells()
        lines.append([name, f"{what} ({forms})", parameters, macs])
    _print_table(["name", "what follows the input", "parameters", "MACs"], *lines, wraps=1)
    _say(f"Beyond nn.Conv{rank}d({given[0]}, {given[1]}, {kernel}) on {size} positions a dimension")


def _check_layer(name: str, option: str, rank: int) -> None:
    from dynaconv.registry import family, names

    if name == "static":
        return
    if name not in names():
        raise InputError(
            f"{option} {name!r} does not exist; there are static, {', '.join(names())}"
        )
    if rank not in family(name).classes:
        raise InputError(f"{option} {name!r} has no {rank}-D form")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


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


def _print_table(head: list[str], *lines: list[str], wraps: int | None = None) -> None:
    """A name and numbers a line; the column `wraps` is text that may be broken."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)  # fits 80 columns
    for i, title in enumerate(head):
        left = i in (0, wraps)
        table.add_column(title, justify="left" if left else "right", no_wrap=i != wraps)
    for line in lines:
        table.add_row(*line)
    _console().print(table)


if __name__ == "__main__":
    main()
