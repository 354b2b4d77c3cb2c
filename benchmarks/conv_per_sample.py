"""One kernel a sample: each formulation, what people copy, and the static convolution."""

import importlib
import sys
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (
    CONVS,
    Contender,
    batch_in_groups,
    compare,
    forced,
    header,
    keep_freed_memory,
    main,
    on_eager,
    on_reference,
    timed,
)
from dynaconv import backend
from dynaconv.functional import conv_per_sample

ours = importlib.import_module("dynaconv.backends.eager.conv_per_sample")
# batch, channels, size, kernel
CASES = {
    2: [(8, 64, 56, 3), (16, 128, 28, 3), (32, 256, 14, 3), (32, 512, 7, 3), (16, 256, 14, 1)],
    1: [(16, 256, 512, 3), (16, 512, 64, 5)],
    3: [(4, 32, 16, 3)],
}


def looped(x: Tensor, w: Tensor, padding: int) -> Tensor:
    conv = CONVS[x.dim() - 2]
    return torch.cat([conv(x[i : i + 1], w[i], padding=padding) for i in range(len(x))])


def unfolded(x: Tensor, w: Tensor, padding: int) -> Tensor:
    """2-D only."""
    columns = F.unfold(x, tuple(w.shape[3:]), padding=padding)
    return torch.bmm(w.flatten(2), columns).unflatten(2, x.shape[2:])


def with_formulation(name: str, x: Tensor, w: Tensor, padding: int) -> Tensor:
    choose = lambda *a: name
    forward = "grouped" if name == "unfold" else name
    rules = {"formulation": lambda *a: forward, "weight_formulation": choose}
    with backend("eager"), forced(ours, **rules):
        return conv_per_sample(x, w, padding=padding)


def run(batch: int, channels: int, size: int, kernel: int, rank: int) -> None:
    x = torch.randn(batch, channels, *[size] * rank)
    w = torch.randn(batch, channels, channels, *[kernel] * rank) / (channels * kernel**rank) ** 0.5
    pad = kernel // 2
    static = lambda x, w: CONVS[rank](x, w, padding=pad)
    chosen = Contender("dynaconv", lambda x, w: conv_per_sample(x, w, padding=pad), (x, w))

    contenders = [
        Contender("static convolution", static, (x, w[0].clone()), check=False),
        chosen,
        *on_eager(chosen),
        Contender("copied: batch in groups", lambda x, w: batch_in_groups(x, w, pad), (x, w)),
        Contender("copied: loop", lambda x, w: looped(x, w, pad), (x, w)),
        *(
            [Contender("copied: unfold and bmm", lambda x, w: unfolded(x, w, pad), (x, w))]
            if rank == 2
            else []
        ),
        *[
            Contender(f"eager, {name}", lambda x, w, n=name: with_formulation(n, x, w, pad), (x, w))
            for name in ours.BACKWARD
            if kernel == 1 or name != "matmul"
        ],
    ]
    title = f"{rank}-D, batch {batch}, {channels} channels, size {size}, kernel {kernel}"
    compare(title, contenders, on_reference(chosen, torch.float64))


GRID = {
    2: (
        (32, 56),
        (64, 56),
        (64, 14),
        (128, 28),
        (128, 7),
        (256, 14),
        (256, 7),
        (512, 7),
        (512, 14),
    ),
    1: ((64, 512), (64, 64), (256, 512), (256, 64), (512, 64)),
    3: ((32, 16), (64, 8), (128, 8), (256, 4)),
}


def rule() -> None:
    """The cost rule over a grid: how much slower its choice is than the best formulation."""
    keep_freed_memory(True)
    print("\n| case | output | input's gradient | kernels' gradient |\n|---|---|---|---|")
    for rank, batch in product(GRID, (4, 16, 64)):
        for channels, size in GRID[rank]:
            x = torch.randn(batch, channels, *[size] * rank)
            if batch * channels**2 * 3**rank > 2**26:
                continue  # more than 256 MB of kernels
            w = torch.randn(batch, channels, channels, *[3] * rank)
            cells = [cell(*part) for part in parts(x, w, ([1] * rank,) * 3 + (1,))]
            case = f"{rank}-D, batch {batch}, {channels} channels, size {size}"
            print(f"| {case} | {' | '.join(cells)} |", flush=True)


def parts(x: Tensor, w: Tensor, settings: tuple) -> list[tuple[str, dict]]:
    """For output, gradient of x and gradient of w: the rule's choice, and all formulations."""
    y = torch.randn_like(x)
    direct, weight = ours.formulation(x, w, settings), ours.weight_formulation(y, x, w, settings)
    names = ("grouped", "loop")
    forward = {n: lambda n=n: ours.FORWARD[n](x, w, None, settings) for n in names}
    back = lambda n, mask: lambda: ours.BACKWARD[n](y, x, w, settings, mask)
    by_input = {n: back(n, [True, False]) for n in names}
    by_weight = {n: back(n, [False, True]) for n in (*names, "unfold")}
    return [(direct, forward), (direct, by_input), (weight, by_weight)]


def cell(choice: str, ways: dict) -> str:
    """The choice, and its time over the best one's."""
    rounds = [{n: timed(lambda run: run(), run) for n, run in ways.items()} for _ in range(6)]
    best = {n: min(r[n] for r in rounds[1:]) for n in ways}
    return f"{choice} {best[choice] / min(best.values()):.2f}"


if __name__ == "__main__":
    if "--rule" in sys.argv:
        header(__file__)
        rule()
    else:
        main(__file__, CASES, run)
