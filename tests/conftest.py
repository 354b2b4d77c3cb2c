"""Fresh memory is poisoned for the whole suite, so that an unwritten output shows."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels then run on the CPU


def _poison(tensor):
    if (
        tensor.is_floating_point()
        and not torch.compiler.is_compiling()
        and tensor.device.type in ("cpu", "cuda")
    ):
        with torch.no_grad():
            tensor.fill_(float("nan"))
    return tensor


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty, empty_like and new_empty give NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, **k: _poison(plain(*a, **k)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
