"""What a launch keeps for later calls, with stand-ins for Triton's kernels."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton

from dynaconv.backends.triton import launch


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("kept", grid, args[1:]))


class Kernel:
    """One with the parameters (out, n, WIDE, TILE): tuned to TILE = 4 unless it is plain."""

    arg_names = ("out", "n", "WIDE", "TILE")

    def __init__(self, tuned=True):
        self.log = []
        if tuned:
            self.best_config = SimpleNamespace(kwargs={"TILE": 4})

    def __getitem__(self, grid):
        def run(out, n, **constants):
            self.log.append(("learned", n, constants))
            return Compiled(self.log)

        return run


@pytest.fixture(autouse=True)
def _inside_an_operator(monkeypatch):
    """Where nothing is traced, and nothing is known yet."""
    monkeypatch.setattr(launch, "KNOWN", {})
    monkeypatch.setattr(launch, "is_wrap_triton_enabled", lambda: False)


def grid(tile):
    return (tile["TILE"] * 2,)


def test_the_second_call_is_the_compiled_kernel_with_all_arguments():
    kernel = Kernel()
    for _ in range(2):
        launch.Launch(kernel)[grid](torch.zeros(3), 5, WIDE=True)
    assert kernel.log == [("learned", 5, {"WIDE": True}), ("kept", (8, 1, 1), (5, True, 4))]


def test_a_kernel_without_tuning_and_with_a_plain_grid():
    kernel = Kernel(tuned=False)
    for _ in range(2):
        launch.Launch(kernel)[(2, 3)](torch.zeros(3), 5, WIDE=False, TILE=16)
    assert kernel.log[1] == ("kept", (2, 3, 1), (5, False, 16))


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3), 6, True),
        (torch.zeros(3), 5, False),
        (torch.zeros(3, dtype=torch.float64), 5, True),
        (torch.zeros(4)[1:], 5, True),  # elsewhere in 16 bytes
    ],
)
def test_another_call_is_learned(other):
    kernel = Kernel()
    for out, n, wide in ((torch.zeros(3), 5, True), other):
        launch.Launch(kernel)[grid](out, n, WIDE=wide)
    assert [entry[0] for entry in kernel.log] == ["learned", "learned"]


def test_another_kernel_is_learned():
    kernels = [Kernel(), Kernel()]
    for kernel in kernels:
        launch.Launch(kernel)[grid](torch.zeros(3), 5, WIDE=True)
    assert [kernel.log[0][0] for kernel in kernels] == ["learned", "learned"]


@pytest.mark.parametrize(
    ("rows", "left"),
    [(1, [32]), (33, [32, 64]), (64, [32, 64]), (100, [32, 64, 128]), (10**6, [32, 64, 128, 256])],
)
def test_tiles_that_are_tried_are_filled(rows, left):
    """More than half of each, or it is the shortest."""
    configs = [triton.Config({"ROWS": n, "POSITIONS": 64}) for n in (32, 64, 128, 256)]
    fits = launch.fitting(ROWS="rows", POSITIONS="bound")["prune_configs_by"]["early_config_prune"]
    kept = fits(configs, {"rows": rows, "bound": 4}, EXPERTS=0)
    assert [config.kwargs["ROWS"] for config in kept] == left


def test_what_is_undone_is_not_pruned():
    options = launch.fitting(ROWS="rows")
    launch.tuned([{"ROWS": 32}], ["rows"], **options)
    with pytest.raises(ValueError, match="can't undo"):
        launch.tuned([{"ROWS": 32}], ["rows"], reset_to_zero=["out"], **options)


def test_what_is_known_stays_small(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 3)
    kernel = Kernel()
    for n in range(10):
        launch.Launch(kernel)[grid](torch.zeros(3), n, WIDE=True)
    assert len(launch.KNOWN) <= 3
