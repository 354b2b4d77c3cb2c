"""Whether cost grows in proportion to what is computed, and memory stays near the tensors' own.

Draws docs/linear.png: time against batch, positions, input channels and taps, one of them doubled
at a time. Prints the fitted slopes (1: proportional, less: better than that) and, for each
primitive and direction, what is held at most beyond inputs, output and gradients.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common import Contender, header, keep_freed_memory, megabytes, peak, timed
from dynaconv import functional

PICTURE = Path(__file__).parent.parent / "docs" / "linear.png"
AXES = ("batch", "positions", "channels", "taps")
# The smallest case, and what each axis runs through beside it.
BATCH, CHANNELS, OUT, SIZE, KERNEL = 4, 32, 64, (28, 28), (3, 3)
BATCHES = [4, 8, 16, 32, 64]
SIZES = [(28, 28), (28, 56), (56, 56), (56, 112), (112, 112)]
CHANNEL_COUNTS = [32, 64, 128, 256, 512]
KERNELS = [(3, 3), (3, 7), (7, 7), (7, 13), (13, 13)]
EXPERTS, GROUPS = 4, 4
# Of the memory table: batch, input channels, size, kernel; by rank.
HELD = {
    1: (16, 64, (2048,), (7,)),
    2: (8, 64, (56, 56), (3, 3)),
    3: (2, 64, (16, 24, 24), (3,) * 3),
}
ROUNDS = 9

Call = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def conv(batch: int, channels: int, size: tuple, kernel: tuple) -> Call:
    run = partial(functional.conv, padding="same")
    return run, (torch.randn(batch, channels, *size), torch.randn(OUT, channels, *kernel))


def conv_per_sample(batch: int, channels: int, size: tuple, kernel: tuple) -> Call:
    run = partial(functional.conv_per_sample, padding="same")
    return run, (torch.randn(batch, channels, *size), torch.randn(batch, OUT, channels, *kernel))


def conv_mixture(batch: int, channels: int, size: tuple, kernel: tuple) -> Call:
    weight = torch.randn(EXPERTS, OUT, channels, *kernel)
    given = torch.randn(batch, channels, *size), weight, torch.rand(batch, EXPERTS)
    return partial(functional.conv_mixture, padding="same"), given


def conv_per_position(batch: int, channels: int, size: tuple, kernel: tuple) -> Call:
    run = partial(functional.conv_per_position, padding="same")
    weight = torch.randn(batch, GROUPS, *kernel, *size)
    return run, (torch.randn(batch, channels, *size), weight)


def deform_conv(batch: int, channels: int, size: tuple, kernel: tuple) -> Call:
    def run(x: Tensor, offset: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
        return functional.deform_conv(x, offset, weight, padding="same", modulation=modulation)

    taps = math.prod(kernel)
    offset = torch.randn(batch, taps * len(size), *size)
    weight, modulation = torch.randn(OUT, channels, *kernel), torch.rand(batch, taps, *size)
    return run, (torch.randn(batch, channels, *size), offset, weight, modulation)


PRIMITIVES = (conv, conv_per_sample, conv_mixture, conv_per_position, deform_conv)


# Cost ----------------------------------------------------------------------------------------


def cases(axis: str) -> list[tuple[float, tuple]]:
    """How far along the axis, and the arguments of a primitive above."""
    start = (BATCH, CHANNELS, SIZE, KERNEL)
    values = dict(zip(AXES, (BATCHES, SIZES, CHANNEL_COUNTS, KERNELS), strict=True))[axis]
    place = {"batch": 0, "channels": 1, "positions": 2, "taps": 3}[axis]
    amount = lambda value: math.prod(value) if isinstance(value, tuple) else value
    return [
        (amount(value) / amount(values[0]), (*start[:place], value, *start[place + 1 :]))
        for value in values
    ]


def measure(make: Callable[..., Call], axis: str) -> tuple[list[float], list[list[float]]]:
    """How far along the axis; milliseconds there, forward and with backward."""
    along, given = zip(*cases(axis), strict=True)
    contenders = [Contender(axis, *make(*arguments)) for arguments in given]
    columns = []
    for step in (Contender.forward, Contender.both):
        for contender in contenders:
            timed(step, contender)
        rounds = [[timed(step, c) for c in contenders] for _ in range(ROUNDS)]
        columns.append([statistics.median(column) for column in zip(*rounds, strict=True)])
    return list(along), columns


def slope(along: list[float], ms: list[float]) -> float:
    """Of the straight line through the logarithms."""
    return statistics.linear_regression([*map(math.log, along)], [*map(math.log, ms)]).slope


def costs() -> None:
    """Measures, prints the slopes and draws."""
    keep_freed_memory(True)
    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharex=True, sharey=True)
    print(
        f"\n![time along each axis](linear.png)\n\nSlopes, forward and with backward, from batch "
        f"{BATCH}, {CHANNELS} to {OUT} channels, size {'x'.join(map(str, SIZE))}, "
        f"kernel {KERNEL[0]}:\n"
    )
    print(f"| | {' | '.join(AXES)} |\n|---|{'---:|' * len(AXES)}")
    for make in PRIMITIVES:
        cells = []
        for axis, pair in zip(AXES, zip(*grid, strict=True), strict=True):
            along, columns = measure(make, axis)
            cells.append(", ".join(f"{slope(along, ms):.2f}" for ms in columns))
            for axes, ms in zip(pair, columns, strict=True):
                axes.plot(along, [m / ms[0] for m in ms], "o-", label=make.__name__)
        print(f"| `{make.__name__}` | {' | '.join(cells)} |", flush=True)
    decorate(grid)
    figure.savefig(PICTURE, dpi=100)


def decorate(grid: list) -> None:
    """Logarithmic axes, the guide of slope 1, and what is what."""
    for row, direction in zip(grid, ("forward", "with backward"), strict=True):
        row[0].set_ylabel(f"time {direction}, first = 1")
        for axes, axis in zip(row, AXES, strict=True):
            axes.plot([1, 16], [1, 16], "k--", linewidth=1, label="in proportion")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.set_title(axis if direction == "forward" else "")
    for axes, axis in zip(grid[-1], AXES, strict=True):
        axes.set_xlabel(f"{axis}, first = 1")
    grid[0][0].legend(fontsize="small")


# Memory --------------------------------------------------------------------------------------


def memory() -> None:
    """What is held at most beyond inputs, output and gradients, over these."""
    print("\nMemory held at most beyond inputs, output and gradients, as a ratio to their own:\n")
    print("| | case | own MB | forward | own MB | backward |\n|---|---|---:|---:|---:|---:|")
    for make in PRIMITIVES:
        for rank, (batch, channels, size, kernel) in HELD.items():
            run, tensors = make(batch, channels, size, kernel)
            case = f"{rank}-D, batch {batch}, {channels} channels, {'x'.join(map(str, size))}"
            cells = [f"{own:.0f} | {ratio:.2f}" for own, ratio in held(run, tensors)]
            print(f"| `{make.__name__}` | {case} | {' | '.join(cells)} |", flush=True)


def held(run: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    """The tensors' own MB, and the ratio of what is held beyond; forward and backward."""
    forward = Contender("", run, tensors)
    output = forward.forward()
    own = megabytes(*tensors, output)
    beyond = peak(forward.forward) - megabytes(output)
    leaves = [t.detach().requires_grad_() for t in tensors]
    result, upstream = run(*leaves), torch.ones_like(output)
    backward = lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)
    gradients = megabytes(*tensors)
    return [
        (own, max(beyond, 0) / own),
        (own + gradients, max(peak(backward) - gradients, 0) / (own + gradients)),
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    header(__file__)
    costs()
    memory()
