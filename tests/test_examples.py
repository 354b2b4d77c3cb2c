"""Each example runs at its small size and prints what it measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_is_one_for_each_kind():
    assert {path.stem for path in EXAMPLES} == {
        "adaptive_size",
        "adaptive_stride",
        "learned_size",
        "learned_stride",
        "region_size",
        "shape_size",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_runs(path):
    # One thread each: where several processes share a machine, more are slower.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4
    assert any(character.isdigit() for character in done.stdout)
    assert "nan" not in done.stdout
