"""Files written whole or not at all, and checkpoints read without running code in them."""

import csv
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dynaconv.data.errors import InputError
from dynaconv.files import whole
from dynaconv.training.model import Config, RunConfig, build
from dynaconv.training.text_model import TextConfig, build_text

# What a model file calls its kind, and what makes the model again.
FORMATS: dict[str, tuple[type[RunConfig], Callable[[Any], nn.Module]]] = {
    "dynaconv segmentation 1": (Config, build),
    "dynaconv text 1": (TextConfig, build_text),
}


def check_writable(folder: Path) -> None:
    """Makes `folder`; OSError where no file can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The plain values and tensors in a checkpoint.

    Raises:
        InputError: there is no such file, or it holds anything else; no code in it is run.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch's own text advises to load it with its code
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged, or not a checkpoint; nothing in it was run")
    return content


def save_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all; the same content gives the same bytes."""
    # Given a path, torch.save would write the temporary name into the file.
    with whole(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def save_model(path: Path | str, model: nn.Module, config: RunConfig) -> None:
    """Weights and what is needed to build the model again, as plain values and tensors."""
    kind = next(name for name, (kind, _) in FORMATS.items() if type(config) is kind)
    content = {"format": kind, "config": asdict(config), "state": model.state_dict()}
    save_checkpoint(path, content)


def load_model(path: Path | str) -> tuple[Any, Any]:
    """The model in evaluation mode, and its configuration: Config or TextConfig, as its kind is.

    Raises:
        InputError: the file is missing, damaged, or not a model of `dynaconv train`.
    """
    content = read_checkpoint(Path(path))
    kind = content.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        known = " or ".join(map(repr, FORMATS))
        raise InputError(f"{path}: not a model written by `dynaconv train` (expected {known})")
    try:
        config = FORMATS[kind][0](**content["config"])
        model = FORMATS[kind][1](config)
        model.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: does not fit this version of dynaconv ({reason})") from error
    return model.eval(), config


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """pixels (H, W) or (H, W, 3) as a PNG, whole or not at all."""
    with whole(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def save_predictions(
    path: Path, texts: Sequence[str], labels: Sequence[str], shares: Sequence[float]
) -> None:
    """Text, label and its probability a line, as CSV or JSON Lines by the suffix of `path`."""
    names = ("text", "label", "probability")
    lines = zip(texts, labels, shares, strict=True)
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            csv.writer(file).writerows([names, *lines])
        else:
            for line in lines:
                content = json.dumps(dict(zip(names, line, strict=True)), ensure_ascii=False)
                file.write(f"{content}\n")
