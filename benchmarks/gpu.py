"""The primitives on a GPU: time, what the GPU needs at least, and other ways to compute the same.

python benchmarks/gpu.py          # measures, and writes benchmarks/results/DEVICE.json
python benchmarks/gpu.py --only deformable --dtype float32   # of one primitive and dtype: the
                                        # other tables remain as they were
python benchmarks/gpu.py --page   # writes docs/gpu.md from the results that are there
python benchmarks/gpu.py --peers FILE   # a Python file with `involution(x, w, padding)` (2-D) and
                                        # `dynamicconv(x, w, padding)` (1-D), in float32: the CUDA
                                        # kernels of d-li14/involution and of fairseq

Cases are those of the CPU's benchmarks with EIGHT times the batch. All ways run in turns and are
first compared with the reference. A time is the median over rounds, each of enough replays of one
call's CUDA graph to fill some milliseconds: the device's time, without Python's; "called" is that
of forward and backward called from Python. Memory is what a call allocates at most beyond its
arguments.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import conv_mixture
import conv_per_position
import conv_per_sample
import deform_conv
from common import CONVS, Contender, batch_in_groups, on
from dynaconv import functional

EIGHT = 8
ROUNDS, SPAN = 15, 4.0  # rounds, and milliseconds of a round
UNRECORDED = {"torchvision"}  # what a graph does not record
PEERS = ModuleType("peers")  # of --peers
ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md"
INTRODUCTION = """# On a GPU

What `python benchmarks/gpu.py` measured, and `python benchmarks/gpu.py --page` wrote here. Times
are in milliseconds, those of the device alone (replays of a CUDA graph) but for "called", which is
forward and backward called from Python; ratios are over ours. "floor" is what the device needs at
least, the larger of bytes over its copying rate and operations over its matrix rate, both measured
in the same run. The static convolution is cuDNN's fastest (`cudnn.benchmark`), contiguous as ours.
What launches outside of the current stream, as torchvision's deform_conv2d, no graph records: all
its times are of calls from Python, one after another. A table is of the commit that it names: what
later ones changed in a kernel is not in it.
"""
NOTHING = """
No run on a GPU is on record yet. The Triton kernels equal the reference under Triton's interpreter
and compile for sm_80, sm_90 and sm_100 (`tests/backends/test_triton.py`,
`tests/backends/test_triton_compiles.py`); how fast they are has not been measured.
"""


@dataclass
class Row:
    """One way to compute one case; times in milliseconds, memory in MB."""

    name: str
    forward: float | None
    both: float | None
    called: float
    memory: float


@dataclass
class Table:
    title: str
    dtype: str
    note: str = ""
    commit: str = ""
    rows: list[Row] = field(default_factory=list)


# Measuring ---------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Of one call, from a round of enough calls to fill SPAN milliseconds."""
    seconds = elapsed(call, 1, device)
    count = max(1, min(200, int(SPAN / max(seconds, 1e-3))))
    return elapsed(call, count, device)


def elapsed(call: Callable[[], object], count: int, device: str) -> float:
    """Milliseconds a call, over `count` calls in a row."""
    kind = torch.get_device_module(device)
    start, end = (kind.Event(enable_timing=True) for _ in range(2))
    kind.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    kind.synchronize()
    return start.elapsed_time(end) / count


def recorded(contender: Contender, call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call's work on the device alone: a replay of its CUDA graph, if one can be made."""
    if device != "cuda" or contender.name in UNRECORDED:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # tunes and compiles
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def memory(call: Callable[[], object], device: str) -> float:
    """MB that a call allocates at most beyond what was allocated before."""
    kind = torch.get_device_module(device)
    kind.synchronize()
    before = kind.memory_allocated()
    kind.reset_peak_memory_stats()
    call()
    kind.synchronize()
    return (kind.max_memory_allocated() - before) / 2**20


@cache
def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), operations a second of a product."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device=device).to(dtype)
    best = lambda call: min(milliseconds(call, device) for _ in range(5)) / 1e3
    copied = 2 * source.numel() / best(lambda: target.copy_(source))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
    multiplied = 2 * 8192**3 / best(lambda: square @ square)
    torch.backends.cuda.matmul.fp32_precision = before
    return copied, multiplied


def measure(
    title: str, contenders: list[Contender], operations: float, dtype: torch.dtype, device: str
) -> Table:
    """All contenders in turns; the first is ours, and has the floor after it."""
    note = f"Median of {ROUNDS} rounds."
    table = Table(title, str(dtype).removeprefix("torch."), note, commit())
    agree(title, contenders, dtype)
    steps = [
        [recorded(c, c.forward, device), recorded(c, c.both, device), c.both] for c in contenders
    ]
    most = [memory(c.both, device) for c in contenders]
    times: list[list[list[float]]] = [[[] for _ in calls] for calls in steps]
    for _ in range(ROUNDS):
        for calls, columns in zip(steps, times, strict=True):
            for call, column in zip(calls, columns, strict=True):
                column.append(milliseconds(call, device))
    for contender, columns, mb in zip(contenders, times, most, strict=True):
        row = [statistics.median(column) for column in columns]
        table.rows.append(Row(contender.name, *row, mb))
    table.rows.insert(1, floor(contenders[0], operations, dtype, device))
    return table


def agree(title: str, contenders: list[Contender], dtype: torch.dtype) -> None:
    """AssertionError unless all that compute the same give the same."""
    first = contenders[0]
    expected = [t.float() for t in (on("reference", first, torch.float32).forward(),)]
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    for contender in (c for c in contenders if c.check):
        error = (contender.forward().float() - expected[0]).abs().max() / expected[0].abs().max()
        if not error <= tolerance:
            raise AssertionError(f"{title}: {contender.name} is off by {error}")


def floor(ours: Contender, operations: float, dtype: torch.dtype, device: str) -> Row:
    """What the device needs for the bytes of all tensors and for the products."""
    copied, multiplied = rates(dtype, device)
    size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)
    output = ours.forward()
    given, made = size(*ours.tensors), size(output)
    forward = max((given + made) / copied, operations / multiplied)
    backward = max((2 * given + made) / copied, 2 * operations / multiplied)
    both = 1e3 * (forward + backward)
    return Row("floor", 1e3 * forward, both, both, (given + 2 * made) / 2**20)


# Cases -------------------------------------------------------------------------------------------


def random(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, device=device).to(dtype)


def per_position(dtype: torch.dtype, device: str) -> Iterator[Table]:
    make = random(dtype, device)
    for rank, cases in conv_per_position.CASES.items():
        for batch, channels, size, kernel, groups in cases:
            n, shape, pad = EIGHT * batch, [size] * rank, kernel // 2
            x = make(n, channels, *shape)
            w = make(n, groups, *[kernel] * rank, *shape) / kernel**rank
            call = lambda x, w, pad=pad: functional.conv_per_position(x, w, padding=pad)
            contenders = ways(call, (x, w))
            if rank < 3:
                form = lambda x, w, pad=pad: conv_per_position.unfolded(x, w, pad)
                contenders.append(Contender("unfold", form, (x, w)))
            named = {1: "dynamicconv", 2: "involution"}.get(rank, "")
            published = getattr(PEERS, named, None)
            if published and dtype == torch.float32:
                theirs = lambda x, w, pad=pad, published=published: published(x, w, pad)
                contenders.append(Contender(f"{named}'s CUDA kernel", theirs, (x, w)))
            title = f"conv_per_position, {rank}-D, batch {n}, {channels} channels, size {size}, "
            title += f"kernel {kernel}, {groups} groups"
            yield measure(title, contenders, 2 * x.numel() * kernel**rank, dtype, device)


def per_sample(dtype: torch.dtype, device: str) -> Iterator[Table]:
    make = random(dtype, device)
    for rank, cases in conv_per_sample.CASES.items():
        for batch, channels, size, kernel in cases:
            n, pad, taps = EIGHT * batch, kernel // 2, kernel**rank
            x = make(n, channels, *[size] * rank)
            scale = (channels * taps) ** 0.5
            w = make(n, channels, channels, *[kernel] * rank) / scale
            call = lambda x, w, pad=pad: functional.conv_per_sample(x, w, padding=pad)
            groups = lambda x, w, pad=pad: batch_in_groups(x, w, pad)
            contenders = [
                *ways(call, (x, w)),
                static(x, w[0].clone(), pad),
                Contender("batch in groups", groups, (x, w)),
            ]
            title = f"conv_per_sample, {rank}-D, batch {n}, {channels} channels, size {size}, "
            operations = 2 * x.numel() * channels * taps
            yield measure(f"{title}kernel {kernel}", contenders, operations, dtype, device)


def mixture(dtype: torch.dtype, device: str) -> Iterator[Table]:
    make, experts = random(dtype, device), conv_mixture.EXPERTS
    for rank, cases in conv_mixture.CASES.items():
        for batch, channels, size, kernel in cases:
            n, pad, taps = EIGHT * batch, kernel // 2, kernel**rank
            x = make(n, channels, *[size] * rank)
            w = make(experts, channels, channels, *[kernel] * rank) / (channels * taps) ** 0.5
            a = make(n, experts).softmax(1)
            call = lambda x, w, a, pad=pad: functional.conv_mixture(x, w, a, padding=pad)
            groups = lambda x, w, a, pad=pad: conv_mixture.copied(x, w, a, pad)
            contenders = [
                *ways(call, (x, w, a)),
                static(x, w[0].clone(), pad),
                Contender("batch in groups", groups, (x, w, a)),
            ]
            title = f"conv_mixture, {rank}-D, batch {n}, {channels} channels, size {size}, "
            title += f"kernel {kernel}, {experts} experts"
            yield measure(title, contenders, 2 * x.numel() * channels * taps, dtype, device)


def deformable(dtype: torch.dtype, device: str) -> Iterator[Table]:
    make, kernel = random(dtype, device), deform_conv.KERNEL
    for rank, cases in deform_conv.CASES.items():
        for batch, channels, size in cases:
            shape = [size] * rank if isinstance(size, int) else list(size)
            n, taps = EIGHT * batch, kernel**rank
            x, m = make(n, channels, *shape), make(n, taps, *shape).sigmoid()
            offset = make(n, taps * rank, *shape)
            w = make(channels, channels, *[kernel] * rank) / (channels * taps) ** 0.5
            call = lambda x, o, w, m: functional.deform_conv(x, o, w, padding=1, modulation=m)
            contenders = [*ways(call, (x, offset, w, m)), static(x, w, 1)]
            if rank == 2 and deform_conv.deform_conv2d is not None:
                theirs = lambda x, o, w, m: deform_conv.deform_conv2d(x, o, w, padding=1, mask=m)
                contenders.append(Contender("torchvision", theirs, (x, offset, w, m)))
            named = "x".join(map(str, shape))
            title = f"deform_conv, {rank}-D, batch {n}, {channels} channels, size {named}"
            yield measure(title, contenders, 2 * x.numel() * channels * taps, dtype, device)


def ways(call: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Contender]:
    """Ours, the eager form, and torch.compile of that."""
    ours = Contender("dynaconv", call, tensors)
    eager = on("eager", ours, tensors[0].dtype)
    reference = on("reference", ours, tensors[0].dtype)
    compiled = Contender("torch.compile of the formula", torch.compile(reference.run), tensors)
    return [ours, Contender("dynaconv, eager", eager.run, tensors), compiled]


def static(x: Tensor, w: Tensor, pad: int) -> Contender:
    """What the library's own convolution takes with one kernel for all."""
    call = lambda x, w: CONVS[x.dim() - 2](x, w, padding=pad)
    return Contender("static convolution", call, (x, w), check=False)


PRIMITIVES = (per_position, per_sample, mixture, deformable)


# Results -----------------------------------------------------------------------------------------


def run(device: str, dtypes: list[torch.dtype], only: list[str]) -> None:
    """Measures the primitives named; each finished table is written at once: nothing is lost."""
    torch.backends.cudnn.benchmark = True
    for primitive in PRIMITIVES:
        for dtype in dtypes if primitive.__name__ in only else ():
            for table in primitive(dtype, device):
                print("\n".join(text(table)), flush=True)
                keep(table, torch.get_device_module(device).get_device_name())


def keep(table: Table, device: str) -> None:
    """Writes the table to the device's results, in place of the one that it had of the same.

    Results of other versions of torch or Triton are dropped.
    """
    import triton

    path = RESULTS / f"{device.replace(' ', '-')}.json"
    made_by = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(known.get(name) == value for name, value in made_by.items())
    tables = known["tables"] if same else []
    which = [(old["title"], old["dtype"]) for old in tables]
    if (table.title, table.dtype) in which:
        tables[which.index((table.title, table.dtype))] = asdict(table)
    else:
        tables.append(asdict(table))
    write(path, json.dumps({**made_by, "tables": tables}, indent=1))


@cache
def commit() -> str:
    ask = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip()


def text(table: Table) -> list[str]:
    """A table in Markdown: times as they are and over ours, memory."""
    lines = [f"\n**{table.title}, {table.dtype}**\n"]
    lines.append("| | forward | ratio | forward + backward | ratio | called | peak MB |")
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    first = table.rows[0]
    for row in table.rows:
        times = f"{timed(row.forward, first.forward)} | {timed(row.both, first.both)}"
        lines.append(f"| {row.name} | {times} | {row.called:.3f} | {row.memory:.1f} |")
    said = [f"Commit {table.commit}." if table.commit else "", table.note]
    return [*lines, "\n" + " ".join(filter(None, said))]


def timed(mine: float | None, ours: float | None) -> str:
    """A time and its ratio to ours; of torchvision an early table has none."""
    return " | " if mine is None or ours is None else f"{mine:.3f} | {mine / ours:.2f}"


def page() -> str:
    """docs/gpu.md from the files of results."""
    files = sorted(RESULTS.glob("*.json"))
    parts = [INTRODUCTION, *([] if files else [NOTHING])]
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts.append(
            f"\n## {content['device']}\n\ntorch {content['torch']}, triton {content['triton']}. "
            f"Not measured yet: {', '.join(missing(content['tables'])) or 'nothing'}.\n"
        )
        for table in content["tables"]:
            table["rows"] = [Row(**row) for row in table["rows"]]
            parts.append("\n".join(text(Table(**table))) + "\n")
    return "".join(parts)


def missing(tables: list[dict[str, Any]]) -> list[str]:
    """The primitives of which there is no table, each in bfloat16 and float32."""
    there = {(table["title"].split(",")[0], table["dtype"]) for table in tables}
    return [
        f"{name} in {dtype}"
        for name in ("conv_per_position", "conv_per_sample", "conv_mixture", "deform_conv")
        for dtype in ("bfloat16", "float32")
        if (name, dtype) not in there
    ]


def write(path: Path, content: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(content, encoding="utf-8")
    os.replace(new, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", action="store_true", help="writes docs/gpu.md, measures nothing")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    names = [primitive.__name__ for primitive in PRIMITIVES]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="primitives")
    parser.add_argument("--peers", type=Path, help="a file with the CUDA kernels of others")
    options = parser.parse_args()
    if options.peers:
        spec = importlib.util.spec_from_file_location("peers", options.peers)
        spec.loader.exec_module(PEERS)
    if not options.page:
        if not torch.accelerator.is_available():
            sys.exit("there is no GPU; --page writes docs/gpu.md from the results that there are")
        device = torch.accelerator.current_accelerator().type
        run(device, [getattr(torch, name) for name in options.dtype], options.only)
    write(PAGE, page())


if __name__ == "__main__":
    main()
