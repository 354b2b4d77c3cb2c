"""A training in a process of its own, which starts at once: what it needs is loaded before."""

import os

import torch

from dynaconv.cli import app
from dynaconv.training import task, text_task  # noqa: F401 - loaded before the fork


def train(arguments, started):
    """`dynaconv train`, silently; `started` is set when it begins."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    started.set()
    app(["train", *arguments])
