"""Files that are not what they should be: nothing in them is run, each is refused by its name."""

import os
import pickle
import re
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dynaconv.cli import app
from dynaconv.data.errors import InputError
from dynaconv.training.files import load_model, read_checkpoint, save_model
from dynaconv.training.model import Config, build
from dynaconv.training.task import resumable
from dynaconv.training.text_model import TextConfig, build_text
from tests.data.folders import make_folder

SMALL = Config(layer="odconv", widths=[4, 8], classes=3)
TEXT = TextConfig(layer="dynamic_lightconv", labels=["a", "b"], characters="abc", channels=8)


class Evil:
    """As a pickle: makes a folder when it is loaded with its code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil_files(folder, trap):
    """Files of every format that torch.load knows, each with the trap."""
    torch.save({"format": Evil(trap)}, folder / "zip.pt")
    torch.save({"state": Evil(trap)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(Evil(trap)))
    torch.save(Evil(trap), folder / "bare.pt")
    with zipfile.ZipFile(folder / "inner.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"format": Evil(trap)}))
        file.writestr("archive/version", "3")
    return ["zip.pt", "old.pt", "pickle.pt", "bare.pt", "inner.pt"]


def refused(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    return path


def test_no_entry_runs_what_a_file_holds(tmp_path, image):
    trap, run = tmp_path / "trap", tmp_path / "run"
    data = make_folder(tmp_path / "data")
    run.mkdir()
    for name in evil_files(tmp_path, trap):
        evil = tmp_path / name
        for read in (read_checkpoint, load_model):
            with pytest.raises(InputError, match="nothing in it was run"):
                read(evil)
        (run / "last.ckpt").write_bytes(evil.read_bytes())
        for command in (
            ["predict", evil, image],
            ["inspect", evil, image, "--out", tmp_path / "a.png"],
            ["train", data, "--widths", "4,8", "--size", "16", "--out", run],
        ):
            assert "nothing in it was run" in " ".join(refused(*command).split())
        assert not trap.exists(), name
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert trap.exists(), "the trap does not work"


def damaged(tmp_path):
    """A name and a file for each way of not being a checkpoint."""
    save_model(tmp_path / "good.pt", build(SMALL), SMALL)
    good = (tmp_path / "good.pt").read_bytes()
    generator = np.random.default_rng(0)
    contents = {"empty": b"", "text": "wörter".encode("latin-1"), "png": b"\x89PNG\r\n\x1a\n" * 9}
    contents |= {f"cut {i}": good[: len(good) * i // 7] for i in range(1, 7)}
    contents["zeros"] = bytes(len(good))
    contents["noise"] = generator.bytes(999)
    contents["safetensors"] = (2).to_bytes(8, "little") + b"{}"
    contents["bomb"] = (2**62).to_bytes(8, "little") + b"{}"
    for i in range(20):
        spoiled = bytearray(good)
        spoiled[int(generator.integers(len(good)))] ^= 255
        contents[f"flipped {i}"] = bytes(spoiled)
    for name, content in contents.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        yield name, path


def test_damaged_files(tmp_path, image):
    """What is not whole is refused; a flipped bit in a weight cannot be told from a weight."""
    for name, path in damaged(tmp_path):
        if name.startswith("flipped"):
            with suppress(InputError):
                load_model(path)
        else:
            with pytest.raises(InputError, match=re.escape(str(path))):
                load_model(path)
    (tmp_path / "folder.pt").mkdir()
    odd = tmp_path / os.fsdecode(b"\xff\xfe.pt")
    odd.write_bytes(b"garbage")
    for path in (tmp_path / "folder.pt", tmp_path / "none.pt", odd):
        with pytest.raises(InputError, match=r"no such checkpoint|damaged"):
            load_model(path)
    assert "no such checkpoint" in refused("predict", tmp_path / "folder.pt", image)
    assert "damaged" in refused("predict", odd, image)


ABSURD = (
    *({"widths": [10**9, 10**9]}, {"widths": [20_000, 20_000]}, {"widths": [-1, 4]}),
    *({"widths": []}, {"widths": "48"}, {"widths": [4.0, 8.0]}, {"widths": None}),
    *({"widths": [2**62, 2**62]}, {"widths": [10**30, 4]}, {"widths": [4, 8] * 40}),
    *({"classes": 10**10}, {"classes": -3}, {"classes": "3"}, {"classes": None}, {"classes": 0}),
    *({"layer": 5}, {"layer": "nowhere"}, {"layer": None}, {"layer": "../../etc/passwd"}),
    *({"options": []}, {"options": {"experts": 10**9}}, {"options": {"experts": -1}}),
    *({"options": {"reduction": 1e308}}, {"options": {"reduction": float("nan")}}),
    *({"options": {"kernel_size": 9}}, {"options": {"device": "cuda"}}, {"options": {"no": 1}}),
    *({"names": 5}, {"names": [1]}, {"where": "("}, {"where": 5}, {"where": "nothing"}),
    *({"seed": "x"}, {"seed": -(2**70)}, {"lr": "high"}, {"epochs": None}, {"tomorrow": 1}),
)
ABSURD_TEXTS = (
    *({"channels": 10**9}, {"channels": 30_000}, {"channels": -1}, {"channels": "8"}),
    *({"blocks": 10**9}, {"blocks": 10**6}, {"blocks": 0}, {"blocks": 1.5}),
    *({"kernel": 10**9 + 1}, {"kernel": 2}, {"kernel": None}, {"labels": 5}, {"labels": [1, 2]}),
    *({"labels": ["a"] * 9}, {"characters": 5}, {"characters": "a" * 10**6}, {"characters": None}),
    *({"options": {"heads": 0}}, {"options": {"heads": 10**9}}),
)


def with_config(path, model, config, change):
    save_model(path, model, config)
    content = torch.load(path, weights_only=True)
    content["config"] |= change
    torch.save(content, path)


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_configurations(tmp_path, change, small_memory):
    path = tmp_path / "model.pt"
    with_config(path, build(SMALL), SMALL, change)
    with small_memory(), pytest.raises(InputError, match=r"model\.pt: does not fit"):
        load_model(path)


@pytest.mark.parametrize("change", ABSURD_TEXTS, ids=lambda c: str(c)[:40])
def test_absurd_configurations_of_texts(tmp_path, change, small_memory):
    path = tmp_path / "model.pt"
    with_config(path, build_text(TEXT), TEXT, change)
    with small_memory(), pytest.raises(InputError, match=r"model\.pt: does not fit"):
        load_model(path)


STATES = (
    *(None, 5, [], "state", {}, {1: torch.ones(1)}, {"stem.0.weight": 5}, {"stem": None}),
    {"stem.0.weight": torch.ones(1).expand(10**6, 10**6)},
)


@pytest.mark.parametrize("state", STATES, ids=lambda s: str(type(s)))
def test_absurd_states(tmp_path, state, small_memory):
    path = tmp_path / "model.pt"
    save_model(path, build(SMALL), SMALL)
    content = torch.load(path, weights_only=True)
    for contents in (content | {"state": state}, content | {"config": state}, {"format": state}):
        torch.save(contents, path)
        with small_memory(), pytest.raises(InputError, match=r"model\.pt: "):
            load_model(path)


def test_weights_that_take_no_place_are_refused(tmp_path, small_memory):
    """A file of a few kilobytes that claims to hold a model of gigabytes."""
    path = tmp_path / "model.pt"
    save_model(path, build(SMALL), SMALL)
    content = torch.load(path, weights_only=True)
    huge = Config(layer="static", widths=[5_000, 5_000])
    content["config"] |= {"layer": "static", "widths": huge.widths}
    content["state"] = {"stem.0.weight": torch.ones(1).expand(5_000, 5_000)}
    torch.save(content, path)
    assert path.stat().st_size < 10**5
    with small_memory(), pytest.raises(InputError, match="makes a tensor of shape"):
        load_model(path)


@pytest.mark.parametrize("content", [{}, {"identity": 5}, {"identity": {}}, {"identity": None}])
def test_a_checkpoint_that_lacks_its_parts_is_not_resumed(tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt: damaged"):
        resumable(tmp_path, {"data": "x"})
