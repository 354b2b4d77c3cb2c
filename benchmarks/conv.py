"""Kernels of any size: dynaconv's rule, torch's convolution, and each path."""

import importlib
import statistics
import sys
import time
from itertools import product

import torch
from torch import Tensor

from common import (
    CONVS,
    Contender,
    compare,
    forced,
    header,
    keep_freed_memory,
    main,
    timed,
)
from dynaconv import backend
from dynaconv.functional import conv

ours = importlib.import_module("dynaconv.backends.eager.conv")
# batch, channels, groups, size, kernel
CASES = {
    2: [
        (1, 16, 16, 224, 31),
        (8, 16, 16, 56, 13),
        (8, 64, 64, 56, 7),
        (1, 16, 1, 56, 31),
        (8, 64, 1, 56, 3),
    ],
    1: [(1, 16, 16, 16384, 511), (1, 16, 16, 16384, 4095), (8, 16, 1, 1024, 255)],
    3: [(1, 16, 16, 32, 7), (1, 16, 16, 32, 15)],
}


def largest() -> None:
    """The case where torch takes so long that it is timed once, and forward alone."""
    batch, channels, size, kernel = 1, 16, 224, 112
    x = torch.randn(batch, channels, size, size)
    w = torch.randn(channels, 1, kernel, kernel) / kernel
    call = lambda f: f(x, w, padding=kernel // 2, groups=channels)
    times = [timed(call, conv) for _ in range(8)][1:]
    start = time.perf_counter()
    expected = call(CONVS[2])
    torchs = 1e3 * (time.perf_counter() - start)
    error = ((call(conv) - expected).abs().max() / expected.abs().max()).item()
    print(
        f"\n2-D, batch {batch}, {channels} channels depthwise, size {size}, kernel {kernel}, "
        f"forward: dynaconv {statistics.median(times):.1f} ms (median of {len(times)}), F.conv2d "
        f"{torchs:.0f} ms (once), ratio {torchs / statistics.median(times):.0f}; "
        f"difference {error:.1g}"
    )


class ByFFT(Contender):
    """With FFT for the output and every gradient, whatever the rule would take."""

    def forward(self) -> Tensor:
        with (
            backend("eager"),
            forced(ours, formulation=lambda *a: "fft", all_direct=lambda *a: False),
        ):
            return super().forward()

    def both(self) -> tuple[Tensor, ...]:
        with (
            backend("eager"),
            forced(ours, formulation=lambda *a: "fft", all_direct=lambda *a: False),
        ):
            return super().both()


def run(batch: int, channels: int, groups: int, size: int, kernel: int, rank: int) -> None:
    x = torch.randn(batch, channels, *[size] * rank)
    w = torch.randn(channels, channels // groups, *[kernel] * rank)
    w /= (channels // groups * kernel**rank) ** 0.5
    settings = {"padding": kernel // 2, "groups": groups}
    chosen = lambda x, w: conv(x, w, **settings)
    torchs = lambda x, w: CONVS[rank](x, w, **settings)
    contenders = [
        Contender(f"F.conv{rank}d", torchs, (x, w)),
        Contender("dynaconv", chosen, (x, w)),
        ByFFT("dynaconv, FFT", chosen, (x, w)),
    ]
    kind = {1: "dense", channels: "depthwise"}.get(groups, f"{groups} groups")
    title = f"{rank}-D, batch {batch}, {channels} channels {kind}, size {size}, kernel {kernel}"
    compare(title, contenders, Contender("float64", torchs, (x.double(), w.double())))


GRID = {
    1: ((64, 256, 1024, 4096, 16384), (3, 7, 15, 31, 63, 127, 255, 511, 1023, 4095)),
    2: ((14, 28, 56, 112, 224), (3, 5, 7, 9, 13, 17, 25, 31, 51, 111)),
    3: ((8, 16, 32), (3, 5, 7, 9, 15)),
}
# A path is not timed that the rule expects to take this many seconds and times the best one's.
HOPELESS, TIMES = 0.03, 4


def rule(ranks: tuple[int, ...]) -> None:
    """The cost rule over a grid: how much slower its choice is than the best path, worst first."""
    keep_freed_memory(True)
    lines = []
    for rank in ranks:
        lengths, kernels = GRID[rank]
        for size, kernel, batch, groups in product(lengths, (*kernels, None), (1, 8), (16, 4, 1)):
            taps = size - 1 if kernel is None else kernel
            if (taps >= size and kernel is not None) or batch * size**rank > 2**18:
                continue
            lines.append(line(rank, batch, 16, groups, size, taps))
    print("\n| case | forward | with backward | output | input's gradient | kernel's gradient |")
    print("|---|---:|---:|---|---|---|")
    for forward, both, text in sorted(lines, reverse=True, key=lambda entry: max(entry[:2])):
        print(f"| {text.format(f'{forward:.2f}', f'{both:.2f}')} |")
    for name, column in (("forward", 0), ("with backward", 1)):
        within = sum(entry[column] <= 1.1 for entry in lines)
        print(f"\n{name}: within 1.1 of the best path in {within} of {len(lines)} cases")


def line(
    rank: int, batch: int, channels: int, groups: int, size: int, kernel: int
) -> tuple[float, float, str]:
    """The choice's time over the best path's, forward and with backward, and the line's text."""
    x = torch.randn(batch, channels, *[size] * rank)
    w = torch.randn(channels, channels // groups, *[kernel] * rank)
    settings = ([1] * rank, [kernel // 2] * rank, [1] * rank, groups)
    g = torch.randn(ours.sizes(x.shape, w.shape, settings)).expand(batch, channels, *[-1] * rank)
    g = g.contiguous()
    parts = [part(what, g, x, w, settings) for what in ("output", "input", "weight")]
    (mine, best, _), *_ = parts
    both = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    kind = {1: "dense", channels: "depthwise"}.get(groups, f"{groups} groups")
    case = f"{rank}-D, batch {batch}, {kind}, size {size}, kernel {kernel}"
    return mine / best, both, f"{case} | {{}} | {{}} | {' | '.join(p[2] for p in parts)}"


def part(what: str, g: Tensor, x: Tensor, w: Tensor, settings: tuple) -> tuple[float, float, str]:
    """Milliseconds of the choice and of the best path, and what is shown."""
    call = {
        "output": lambda: ours.output(x, w, None, settings),
        "input": lambda: ours.input_gradient(g, x, w, settings),
        "weight": lambda: ours.weight_gradient(g, x, w, settings),
    }[what]
    choice = ours.formulation(what, x, w, settings)
    expected = ours.expected(what, *ours.frozen(x, w, settings))
    limit = max(HOPELESS, TIMES * min(expected.values()))
    times: dict[str, list[float]] = {n: [] for n, t in expected.items() if t <= limit}
    for _ in range(6):
        for name, column in times.items():
            with backend("eager"), forced(ours, formulation=lambda *a, n=name: n):
                column.append(timed(lambda run: run(), call))
    best = {name: min(column[1:]) for name, column in times.items()}
    fastest = min(best, key=best.__getitem__)
    better = "" if fastest == choice else f" ({fastest})"
    ratio = best[choice] / best[fastest]
    return best[choice], best[fastest], f"{choice} {ratio:.2f}{better}"


if __name__ == "__main__":
    if "--rule" in sys.argv:
        header(__file__)
        rule(tuple(int(a) for a in sys.argv[2:]) or tuple(GRID))
    else:
        main(__file__, CASES, run)
        largest()
