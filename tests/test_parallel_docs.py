"""The scripts of docs/parallel.md run on two processes."""

import os
import signal
import subprocess
import time

import pytest
import torch

from tests.test_docs import ROOT, blocks
from tests.training.test_processes import ENVIRONMENT, TORCHRUN, children, needs_proc

SCRIPTS = blocks(ROOT / "docs" / "parallel.md", "python")


@pytest.mark.parametrize(("place", "file"), [(0, "last.pt"), (1, "model.pt")])
def test_scripts_run(tmp_path, place, file):
    (tmp_path / "train.py").write_text(SCRIPTS[place])
    streams = {"capture_output": True, "text": True}
    command = [*TORCHRUN, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, timeout=300, **streams)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / file)


@pytest.mark.slow
@needs_proc
def test_the_script_goes_on_where_a_killed_process_left_it(tmp_path):
    """Two runs of 200 steps, one of them disturbed: the same weights."""
    states = []
    for restarts in (0, 1):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPTS[0].replace("STEPS = 20", "STEPS = 200"))
        command = [*TORCHRUN, "--max-restarts", str(restarts), "train.py"]
        quiet = {"stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **quiet) as process:
            while restarts and not (folder / "last.pt").exists():
                assert process.poll() is None
                time.sleep(0.01)
            if restarts:
                os.kill(children(process)[1], signal.SIGKILL)
            assert process.wait(400) == 0
        states.append(torch.load(folder / "last.pt"))
    first, second = states
    assert first["step"] == second["step"] == 200
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
