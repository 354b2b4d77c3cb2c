"""Two processes that wait for work together, as two workers of a training do."""

import atexit
import functools
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
# Seconds after which an answer does not come any more: processes wait for each other.
PATIENCE = 120


class Processes:
    """WORLD processes of one gloo group, started once for many calls."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            arguments = (rank, str(Path(self._folder.name) / "group"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """function(*args) in every process; both have to find it by its name.

        Raises:
            AssertionError: it raised in one, or one gave no answer; the processes are gone then.
        """
        for end in self._ends:
            end.send((function, args))
        waiting = list(self._ends)
        while waiting:
            there = wait(waiting, PATIENCE)
            failed = [] if there else ["no answer: the processes wait for each other"]
            for end in [end for end in waiting if end in there]:
                waiting.remove(end)
                failed += _failure(end)
            if failed:
                self.close()
                raise AssertionError(failed[0])

    def close(self) -> None:
        """Ends the processes; the next call of `processes` starts new ones."""
        processes.cache_clear()
        for process, end in zip(self._processes, self._ends, strict=True):
            process.kill()
            process.join()
            end.close()
        self._folder.cleanup()


@functools.cache
def processes() -> Processes:
    """The processes of this session, started at the first call."""
    started = Processes()
    atexit.register(started.close)
    return started


def _failure(end: Connection) -> list[str]:
    """What the process at the other end says went wrong; nothing if nothing did."""
    try:
        text = end.recv()
    except EOFError:
        text = "a process died"
    return [] if text is None else [text]


def _serve(rank: int, file: str, end: Connection) -> None:
    """The life of a process: joins the group, then does what comes through the pipe."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            return
        try:
            function(*args)
            end.send(None)
        except Exception:
            end.send(f"process {rank}: {traceback.format_exc()}")
