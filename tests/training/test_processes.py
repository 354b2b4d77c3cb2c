"""Training on two processes: who takes which samples, and what a killed process does to a run."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler

from dynaconv.data.errors import InputError
from dynaconv.data.phrases import make_texts
from dynaconv.data.text import Buckets
from dynaconv.training.files import load_model
from dynaconv.training.processes import Part, check_devices
from tests.data.folders import make_folder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The variable lets processes that torchrun restarts find each other: see docs/parallel.md.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
slow = pytest.mark.slow
needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")


@pytest.mark.parametrize(
    "batches",
    [
        BatchSampler(range(12), 4, drop_last=True),
        BatchSampler(range(11), 4, drop_last=False),
        Buckets(range(1, 13), 4, seed=0),
    ],
)
def test_parts_make_up_the_batches(monkeypatch, batches):
    parts = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        part = Part(batches)
        assert len(part) == len(batches)
        assert part.sampler is batches.sampler  # which Lightning tells the epoch
        parts.append(list(part))
    for whole, *both in zip(batches, *parts, strict=True):
        assert sorted(whole) == sorted(both[0] + both[1])
        assert abs(len(both[0]) - len(both[1])) <= 1


def test_every_process_has_a_sample(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    assert list(Part(BatchSampler([5, 6], 3, drop_last=False))) == [[5]]


def test_refusals(monkeypatch):
    with pytest.raises(InputError, match="--batch 5 cannot be dealt out evenly to --devices 2"):
        check_devices(2, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--devices 2: there are 1 GPUs"):
        check_devices(2, 4)


def command(data, out, *options, launcher=(sys.executable,)):
    given = [*launcher, "-m", "dynaconv.cli", "train", str(data), "--devices", "2"]
    return [*given, "--batch", "4", *options, "--out", str(out)]


def train(given):
    done = subprocess.run(given, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(first, second):
    states = [load_model(out / "model.pt")[0].state_dict() for out in (first, second)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "folder", train=9)


IMAGES = ["--widths", "4,8", "--size", "16", "--epochs", "60"]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(command(folder, out, *IMAGES)).count("after 60 epochs") == 1
    return out


def children(process):
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(pid) for part in lists for pid in part.read_text().split())


def kill_in_training(process, out, victim):
    """SIGKILL for victim(process) once there is a checkpoint, before the end."""
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(victim(process), signal.SIGKILL)
    assert not (out / "model.pt").exists()


@slow
@needs_proc
@pytest.mark.parametrize("worker", [0, 1])
def test_torchrun_restarts_from_the_checkpoint(folder, undisturbed, tmp_path, worker):
    out = tmp_path / "restarted"
    launcher = (*TORCHRUN, "--max-restarts", "1")
    given = command(folder, out, *IMAGES, launcher=launcher)
    with subprocess.Popen(given, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        kill_in_training(process, out, lambda process: children(process)[worker])
        assert process.wait(400) == 0
    assert same(out, undisturbed)


@slow
@needs_proc
@pytest.mark.parametrize(
    "victim", [lambda process: process.pid, lambda process: children(process)[0]]
)
def test_the_command_ends_and_goes_on(folder, undisturbed, tmp_path, victim):
    out = tmp_path / "resumed"
    given = command(folder, out, *IMAGES)
    with subprocess.Popen(given, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        kill_in_training(process, out, victim)
        assert process.wait(120) != 0
    train(given)
    assert same(out, undisturbed)


@slow
def test_texts(tmp_path):
    texts = tmp_path / "texts.csv"
    made = make_texts("train", 12)
    with open(texts, "w", newline="", encoding="utf-8") as file:
        rows = zip(made.texts, made.labels, strict=True)
        csv.writer(file).writerows([("text", "label"), *rows])
    options = ["--channels", "8", "--blocks", "2", "--kernel", "3", "--epochs", "2"]
    outs = [tmp_path / name for name in ("own", "torchrun")]
    for out, launcher in zip(outs, ((sys.executable,), TORCHRUN), strict=True):
        assert "validation accuracy" in train(command(texts, out, *options, launcher=launcher))
    assert same(*outs)
