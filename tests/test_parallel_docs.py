"""The scripts of docs/parallel.md run on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_docs import ROOT, blocks

SCRIPTS = blocks(ROOT / "docs" / "parallel.md", "python")


def torchrun(folder, script, *arguments):
    path = Path(folder) / "train.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*command, *arguments, str(path)]


@pytest.mark.parametrize(("place", "file"), [(0, "last.pt"), (1, "model.pt")])
def test_scripts_run(tmp_path, place, file):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        torchrun(tmp_path, SCRIPTS[place]),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / file)
