"""Time and peak memory of several ways to compute the same, side by side in one run.

Every contender is first compared with the float64 reference: no number is printed for a result
that is wrong. Then all of them run once a round, in turns; a ratio is taken within a round, so that
a slow moment of the machine hits both of its sides, and the median over the rounds is printed.
Peak memory is what the process holds at most during a call beyond what it held before.
"""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv import backend, explain
from dynaconv.backends.native.library import instruction_set

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ROUNDS, SECONDS = 7, 1.0
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Contender:
    """One way to compute: `run(*tensors)`; the gradients are those of all tensors.

    check=False marks a baseline that computes something else, such as the static convolution.
    """

    name: str
    run: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    check: bool = True

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run(*self.tensors)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients."""
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        output = self.run(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output))


@dataclass
class Line:
    """What was measured of one contender: milliseconds, ratios to the baseline, MB."""

    name: str
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    memory: tuple[float, float] = (float("nan"), float("nan"))

    def ratios(self, base: "Line") -> tuple[float, float]:
        """Forward, and with backward: the median over the rounds of time over the base's."""
        pairs = (self.forward, base.forward), (self.both, base.both)
        forward, both = (
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in pairs
        )
        return forward, both


@dataclass
class Floor:
    """What has to be moved and computed at least, each as (bytes, operations)."""

    forward: tuple[float, float]
    backward: tuple[float, float]

    def line(self, beside: Line, output: Tensor, tensors: Sequence[Tensor]) -> Line:
        """The time that the machine needs for that, and the memory of the results."""
        copied, multiplied = machine()
        ms = [1e3 * max(b / copied, n / multiplied) for b, n in (self.forward, self.backward)]
        output_mb, gradients_mb = megabytes(output), megabytes(*tensors)
        memory = output_mb, 2 * output_mb + gradients_mb
        columns = [ms[0]] * len(beside.forward), [sum(ms)] * len(beside.both)
        return Line("roofline", *columns, memory)


@cache
def machine() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), operations a second of a product."""
    source, square = torch.randn(2**26), torch.randn(2048, 2048)
    target = torch.empty_like(source)
    seconds = lambda run: statistics.median(timed(lambda f: f(), run) for _ in range(9)) / 1e3
    copied = 2 * 4 * source.numel() / seconds(lambda: target.copy_(source))
    return copied, 2 * 2048**3 / seconds(lambda: square @ square)


def megabytes(*tensors: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def compare(
    title: str,
    contenders: list[Contender],
    reference: Contender,
    tolerance: float = 1e-4,
    floor: Floor | None = None,
) -> None:
    """Checks, times and prints; the first contender is what the ratios refer to."""
    check(title, contenders, reference, tolerance)
    keep_freed_memory(True)
    lines = [Line(c.name) for c in contenders]
    steps = (lambda c: c.forward()), (lambda c: c.both())
    for step, column in zip(steps, ("forward", "both"), strict=True):
        rounds(contenders, step, [getattr(line, column) for line in lines])
    for contender, line in zip(contenders, lines, strict=True):
        line.memory = peak(contender.forward), peak(contender.both)
    if floor:
        first = contenders[0]
        lines.insert(1, floor.line(lines[0], first.forward(), first.tensors))
    show(title, lines)
    if floor:
        above = lines[0].ratios(lines[1])
        copied, multiplied = machine()
        print(
            f"\n{lines[0].name}: {above[0]:.2f} times the roofline forward, {above[1]:.2f} with "
            f"backward (copying {copied / 1e9:.0f} GB/s, matrix product "
            f"{multiplied / 1e9:.0f} GFLOP/s)"
        )


def on_reference(ours: Contender, dtype: torch.dtype = torch.float32) -> Contender:
    """The same on the reference backend."""
    return on("reference", ours, dtype)


def on_eager(ours: Contender) -> list[Contender]:
    """The same on the eager backend, unless that is what serves anyway."""
    if "eager: chosen" in explain(ours.forward):
        return []
    return [on("eager", ours, torch.float32)]


def on(name: str, ours: Contender, dtype: torch.dtype) -> Contender:
    def run(*tensors: Tensor) -> Tensor:
        with backend(name):
            return ours.run(*tensors)

    return Contender(f"dynaconv, {name}", run, [t.to(dtype) for t in ours.tensors])


def check(title: str, contenders: list[Contender], reference: Contender, tolerance: float) -> None:
    """AssertionError unless what is checked has the reference's values and gradients."""
    expected = (reference.forward(), *reference.both())
    for contender in (c for c in contenders if c.check):
        for what, value in zip(expected, (contender.forward(), *contender.both()), strict=True):
            error = (value.double() - what).abs().max() / what.abs().max().clamp(min=1e-6)
            if not error <= tolerance:
                raise AssertionError(f"{title}: {contender.name} is wrong, relative error {error}")


def rounds(contenders: list[Contender], step: Callable, columns: list[list[float]]) -> None:
    """Milliseconds of `step` for each contender, one entry a round."""
    spent = [timed(step, c) for c in contenders]  # warm-up
    count = max(ROUNDS, min(101, int(1e3 * SECONDS / max(sum(spent), 1e-3))))
    for _ in range(count):
        for contender, column in zip(contenders, columns, strict=True):
            column.append(timed(step, contender))


def timed(step: Callable, contender: Contender) -> float:
    start = time.perf_counter()
    step(contender)
    return 1e3 * (time.perf_counter() - start)


def peak(call: Callable[[], Any], warm: bool = True) -> float:
    """MB that the process holds at most during the call, beyond what it held before.

    warm=False: the same call was made before, and need not be made once more.
    """
    if not CLEAR.exists():
        return float("nan")
    keep_freed_memory(False)
    if warm:
        call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # sets the high-water mark to what is held now
    before = status("VmRSS")
    call()
    held = status("VmHWM") - before
    keep_freed_memory(True)
    return held / 1024


def keep_freed_memory(keep: bool) -> None:
    """Whether freed blocks up to 32 MB stay with the process, as in a long run, or go back."""
    if CLEAR.exists():
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, (1 << 25) if keep else (1 << 16))  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 26) if keep else (1 << 17))  # M_TRIM_THRESHOLD


def status(key: str) -> int:
    """A figure of this process in kB."""
    return next(int(s.split()[1]) for s in STATUS.read_text().splitlines() if s.startswith(key))


def show(title: str, lines: list[Line]) -> None:
    """A Markdown table that reads as plain text too."""
    base = lines[0]
    print(f"\n**{title}**\n")
    width = max(len(line.name) for line in lines)
    print(
        f"| {'':{width}} | forward ms | ratio | forward + backward ms | ratio "
        "| peak MB | with backward |"
    )
    print(f"|{'-' * (width + 2)}|---:|---:|---:|---:|---:|---:|")
    for line in lines:
        cells = [f"{line.name:{width}}"]
        for mine, ratio in zip((line.forward, line.both), line.ratios(base), strict=True):
            cells += [f"{statistics.median(mine):10.2f}", f"{ratio:5.2f}"]
        cells += [f"{value:7.1f}" for value in line.memory]
        print(f"| {' | '.join(cells)} |", flush=True)


def batch_in_groups(x: Tensor, w: Tensor, padding: int, stride: int = 1) -> Tensor:
    """One kernel w[n] a sample as most published layers do it: the batch folded into groups."""
    folded = x.reshape(1, -1, *x.shape[2:])
    y = CONVS[x.dim() - 2](folded, w.flatten(0, 1), None, stride, padding, groups=len(x))
    return y.reshape(len(x), -1, *y.shape[2:])


def main(script: str, cases: dict[int, list[tuple]], run: Callable[..., None]) -> None:
    """Runs every case, given by rank."""
    header(script)
    for rank, given in cases.items():
        for case in given:
            run(*case, rank)


def header(script: str) -> None:
    """What the numbers below depend on."""
    print(f"## {Path(script).stem}\n")
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32.")
    print(f"C++ kernels: {instruction_set() or 'not built'}.")
    print("Ratios are to the first line of each table, median over rounds taken in turns.")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextmanager
def forced(module: ModuleType, **choices: Callable) -> Iterator[None]:
    """Replaces functions of a module, such as its cost rule."""
    kept = {name: getattr(module, name) for name in choices}
    for name, value in choices.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
