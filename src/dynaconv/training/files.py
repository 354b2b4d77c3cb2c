"""Files written whole or not at all, and the checkpoint that `predict` and `inspect` read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaconv.training.model import Config, build

FORMAT = "dynaconv segmentation 1"


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_model(path: Path | str, model: nn.Module, config: Config) -> None:
    """Weights and what is needed to build the model again, as plain values and tensors."""
    with whole(path) as temporary:
        content = {"format": FORMAT, "config": asdict(config), "state": model.state_dict()}
        torch.save(content, temporary)


def load_model(path: Path | str) -> tuple[nn.Module, Config]:
    """The model in evaluation mode, and its configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of `dynaconv train`; no code in it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({_first_line(error)})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a model written by `dynaconv train` (expected {FORMAT!r})")
    config = Config(**content["config"])
    model = build(config)
    model.load_state_dict(content["state"])
    return model.eval(), config


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
