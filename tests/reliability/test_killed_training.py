"""A training killed over and over ends with the weights of one that was let be."""

import csv
import multiprocessing
import random
import signal
import time

import pytest
import torch

from dynaconv.data.phrases import make_texts
from dynaconv.training.files import load_model, read_checkpoint
from tests.data.folders import make_folder
from tests.reliability.trainings import train

KILLS = 20
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.reliability.trainings"])


class Run:
    """Trainings into one folder, in processes of their own."""

    def __init__(self, arguments, out):
        self.arguments, self.out = [*map(str, arguments), "--out", str(out)], out

    def start(self):
        started = processes.Event()
        process = processes.Process(target=train, args=(self.arguments, started))
        process.start()
        assert started.wait(60)
        return process

    def finish(self):
        """Seconds that it took."""
        process, begin = self.start(), time.monotonic()
        process.join(120)
        assert process.exitcode == 0
        return time.monotonic() - begin

    def kill(self, seconds, while_writing):
        """SIGKILL after some time, or then as soon as a file is half written; whether it hit."""
        process, begin = self.start(), time.monotonic()
        end = begin + seconds
        while process.is_alive() and (time.monotonic() < end or while_writing):
            if time.monotonic() >= end and self.temporaries():
                break
            if time.monotonic() - begin > 120:
                break
            time.sleep(0.0005)
            self.check_readable()
        process.kill()
        process.join(60)
        return process.exitcode == -signal.SIGKILL

    def temporaries(self):
        return sorted(self.out.glob(".*")) if self.out.exists() else []

    def check_readable(self):
        """What has its name is whole, at any time."""
        if (self.out / "last.ckpt").exists():
            assert "state_dict" in read_checkpoint(self.out / "last.ckpt")
        if (self.out / "model.pt").exists():
            load_model(self.out / "model.pt")

    def epoch(self):
        if not (self.out / "last.ckpt").exists():
            return 0
        return read_checkpoint(self.out / "last.ckpt")["epoch"] + 1

    def weights(self):
        return load_model(self.out / "model.pt")[0].state_dict()


def check_killed(arguments, tmp_path, kills):
    undisturbed = Run(arguments, tmp_path / "undisturbed")
    seconds = undisturbed.finish()
    chance = random.Random(0)
    hits, half, folders, reached = 0, 0, 0, []
    while hits < kills:
        folders += 1
        run = Run(arguments, tmp_path / f"killed{folders}")
        assert folders < kills, "trainings end before they are killed"
        while hits < kills:
            before = len(run.temporaries())
            hit = run.kill(chance.uniform(0, seconds / 3), while_writing=chance.random() < 0.5)
            run.check_readable()
            if not hit:
                break
            hits += 1
            half += len(run.temporaries()) > before
            reached.append(run.epoch())
        run.finish()
        assert sorted(p.name for p in run.out.iterdir()) == ["last.ckpt", "model.pt"]
        expected = undisturbed.weights()
        for name, value in run.weights().items():
            assert torch.equal(value, expected[name]), f"{name} differs after {hits} kills"
    print(f"{hits} kills at epochs {reached} in {folders} runs, {half} with a half-written file")
    assert half or kills < KILLS, "no kill hit a file that was being written"


def image_arguments(tmp_path, epochs):
    data = make_folder(tmp_path / "data")
    return [data, "--widths", "4,8", "--size", "16", "--batch", "2", "--epochs", epochs]


def text_arguments(tmp_path, epochs):
    made, path = make_texts("train", 12), tmp_path / "texts.csv"
    rows = [r for r in zip(made.texts, made.labels, strict=True) if r[1] in ("de", "es", "fi")]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    small = ["--channels", "8", "--blocks", "2", "--kernel", "3", "--batch", "4"]
    return [path, *small, "--epochs", epochs]


def test_killed_twice(tmp_path):
    check_killed(image_arguments(tmp_path, 20), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [image_arguments, text_arguments])
def test_killed_at_twenty_moments(arguments, tmp_path):
    check_killed(arguments(tmp_path, 40), tmp_path, KILLS)
