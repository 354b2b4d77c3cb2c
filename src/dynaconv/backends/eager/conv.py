"""conv in ATen: torch's own convolution, the same through its other engine, or FFT.

The cost rule takes, for the output and for each gradient, what it expects to be the fastest of

- "direct": torch's convolution or its gradient. In float32 on a CPU it is near the processor's peak
  for kernels of up to some 14 taps a side, and 3 to 30 times slower beyond, where torch's library
  has no fast code; a depthwise kernel's gradient is slow from 5 taps on;
- "flipped": an input's gradient is itself a convolution with the flipped kernel, so that either can
  be computed by the code of the other (stride 1). Depthwise, one of the two is often far faster;
- "fft": n log n a channel, by the best of several plans that cut the input into tiles or do not.

Expected times are linear in the work, with constants fitted to measured times: the tables below,
checked by `benchmarks/conv.py --rule`. They hold for float32; other dtypes use them too. Devices
other than the CPU always get "direct": nothing is measured there.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import log2, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.backends.eager.conv_per_sample import static, static_backward
from dynaconv.backends.operator import GEOMETRY, Operator, few_at_a_time, output_like
from dynaconv.dispatch import under_transform
from dynaconv.shapes import Geometry, surely

# Numbers in the spectra of what is transformed at a time, and in those of kernels.
CHUNK, KERNELS = 2**19, 2**23
# Tiles an output channel from which on a kernel's gradient is summed at once.
MANY = 8
# Fitted to times in float32 on an AMD EPYC (Zen 4) with 2 threads, torch 2.13 with MKL and oneDNN;
# the ratios matter, not the seconds; six entries of DIRECT, and ROUGH, were then set by hand where
# the rule chose badly. FFT effort of a length by its odd factor.
ODD = {1: 1.0, 3: 1.25, 5: 1.25, 7: 1.3, 9: 1.5, 15: 1.5}
# Seconds a call, a stage of a transform and number, a complex product, a number cut into tiles and
# put back, and a step of the loop over channels; without and with `weight`, the kernel's gradient.
FFT = {
    False: (0.00011, 7.2e-11, 3.5e-10, 6.7e-10, 1.1e-5),
    True: (0.0001, 9.4e-11, 3.6e-10, 6.9e-10, 1.2e-5),
}
# Transforms over three dimensions take longer than their number of operations says.
ROUGH = {1: 1.0, 2: 1.0, 3: 1.7}
# Seconds to flip a kernel.
FLIP = 1e-5
# A length, and seconds a call, an output and a product: for shorter kernels, and from there on.
DIRECT = {
    ("output", 1): {
        "depthwise": (8, (5.4e-5, 0.0, 3e-11), (3.7e-5, 3.4e-10, 3e-10)),
        "grouped": (32, (5e-5, 6.1e-10, 1.6e-11), (3.5e-5, 8.1e-10, 8.1e-11)),
        "dense": (16, (2.5e-5, 4.5e-10, 9.8e-12), (8.1e-6, 3.1e-9, 2.7e-11)),
    },
    ("output", 2): {
        "depthwise": (15, (5.1e-5, 2.4e-10, 1.1e-11), (0.0002, 4.4e-8, 2.7e-10)),
        "grouped": (5, (4.6e-5, 0.0, 3.6e-11), (4.5e-5, 1e-9, 1.6e-11)),
        "dense": (15, (4.4e-5, 8.3e-10, 7.9e-12), (0.001, 1e-8, 2.7e-11)),
    },
    ("output", 3): {
        "depthwise": (5, (5.6e-5, 0.0, 3.9e-11), (5.2e-5, 1.1e-9, 7.1e-12)),
        "grouped": (5, (4.5e-5, 0.0, 2.4e-11), (2e-5, 5e-9, 1e-11)),
        "dense": (5, (0.00013, 0.0, 1.2e-11), (2e-5, 3.6e-9, 5.7e-12)),
    },
    ("input", 1): {
        "depthwise": (5, (6.1e-5, 0.0, 9.1e-11), (5.9e-5, 0.0, 2.7e-11)),
        "grouped": (32, (5.6e-5, 7e-10, 1.4e-11), (3.5e-5, 4.2e-9, 1.1e-10)),
        "dense": (16, (2.2e-5, 5.5e-10, 1e-11), (0.0, 1.3e-8, 2.2e-11)),
    },
    ("input", 2): {
        "depthwise": (5, (6.3e-5, 0.0, 3.2e-11), (6.3e-5, 5.6e-12, 1.4e-11)),
        "grouped": (5, (5.5e-5, 0.0, 3.3e-11), (4.9e-5, 1.1e-9, 1.6e-11)),
        "dense": (16, (4.7e-5, 7.2e-10, 8.6e-12), (0.00023, 3.2e-9, 4.1e-11)),
    },
    ("input", 3): {
        "depthwise": (5, (3.6e-5, 0.0, 5.2e-10), (0.0, 1.3e-8, 2.3e-10)),
        "grouped": (5, (5e-5, 0.0, 2.5e-11), (2.6e-5, 4.9e-9, 1e-11)),
        "dense": (5, (0.00019, 0.0, 7.9e-12), (2.8e-5, 2.2e-9, 6.4e-12)),
    },
    ("weight", 1): {
        "depthwise": (5, (5.9e-5, 0.0, 7.7e-11), (3.7e-5, 1.6e-9, 3.2e-10)),
        "grouped": (5, (3.9e-5, 0.0, 1.5e-10), (4e-5, 1e-10, 9e-11)),
        "dense": (15, (2.2e-5, 2.4e-10, 1.3e-11), (1.6e-5, 1e-8, 3e-11)),
    },
    ("weight", 2): {
        "depthwise": (5, (5.5e-5, 0.0, 3.7e-11), (4e-5, 4.3e-9, 4.2e-10)),
        "grouped": (5, (4.2e-5, 0.0, 1.4e-10), (4.9e-5, 0.0, 1.2e-10)),
        "dense": (15, (5.6e-5, 4.6e-10, 9.6e-12), (0.0017, 6.8e-9, 6.3e-11)),
    },
    ("weight", 3): {
        "depthwise": (5, (4.2e-5, 0.0, 3.9e-10), (4.3e-5, 3e-9, 3.1e-10)),
        "grouped": (5, (4.9e-5, 0.0, 9.1e-11), (4.8e-5, 0.0, 8.4e-11)),
        "dense": (5, (0.00013, 0.0, 1.2e-11), (5.1e-5, 4e-10, 7.7e-12)),
    },
}
# What another formulation's expected time must stay below, of direct's: expectations are rough.
SURE = 0.8
# Under torch.compile, the longest kernel that is torch's convolution without a question.
SMALL = 3
# stride, padding and dilation as lists, then groups, as the operator gets them.
Settings = Sequence[Any]


# FFT -------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How FFT cuts its input, a dimension at a time: transform length, outputs a tile, tiles."""

    length: tuple[int, ...]
    step: tuple[int, ...]
    tiles: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """Complex numbers in the spectra of one channel."""
        return prod(self.tiles) * prod(self.length[:-1]) * (self.length[-1] // 2 + 1)


def correlate(
    x: Tensor, w: Tensor, padding: Sequence[int], groups: int, size: Sequence[int], plan: Plan
) -> Tensor:
    """The first `size` positions of a convolution without stride and dilation.

    Circular correlation over n points is right at the first n - K + 1 positions, and at more where
    what wraps around is padding. Channels are summed in the frequency domain.
    """
    x, w = x.unflatten(1, (groups, -1)), w.unflatten(0, (groups, -1))
    outputs = []
    for of_group in few_at_a_time(groups, groups_at_a_time(x, w, plan)):
        blocks = []
        for of_out in few_at_a_time(w.shape[1], outs_at_a_time(w, plan)):
            kernel = spectrum(w[of_group, of_out], plan)
            kernel = torch.complex(kernel.real, -kernel.imag)  # vmap knows no conj_physical
            parts = []
            for part in few_at_a_time(x.shape[0], samples_at_a_time(x, kernel, plan)):
                tiles = spectrum(cut(x[part, of_group], padding, plan), plan)
                parts.append(join(mix(tiles.flatten(3, -2), kernel), size, plan))
            blocks.append(cat(parts, 0))
        outputs.append(cat(blocks, 2))
    return cat(outputs, 1).flatten(1, 2)


def correlate_backward(
    g: Tensor, x: Tensor, padding: Sequence[int], groups: int, size: Sequence[int], plan: Plan
) -> Tensor:
    """The gradient of a kernel of shape `size`: (C_out, C_in / groups, *size)."""
    x, g = x.unflatten(1, (groups, -1)), g.unflatten(1, (groups, -1))
    like = g.new_empty(0).expand(groups, g.shape[2], x.shape[2], 0)
    outputs = []
    for of_group in few_at_a_time(groups, groups_at_a_time(x, like, plan)):
        blocks = []
        for of_out in few_at_a_time(g.shape[2], outs_at_a_time(like, plan)):
            total: Tensor | None = None
            for part in few_at_a_time(x.shape[0], samples_at_a_time(x, like[of_group], plan)):
                ours = spectrum(cut(x[part, of_group], padding, plan), plan).flatten(3, -2)
                theirs = spectrum(pieces(g[part, of_group, of_out], plan), plan).flatten(3, -2)
                total = gather(ours, theirs.conj_physical(), total)
            blocks.append(crop(invert(total, plan), size))  # type: ignore[arg-type]
        outputs.append(cat(blocks, 1))
    return cat(outputs, 0).flatten(0, 1)


def groups_at_a_time(x: Tensor, w: Tensor, plan: Plan) -> int:
    """For x (N, G, C, ...) and w (G, O, C, ...)."""
    kernels = w.shape[1] * w.shape[2] * plan.numbers // prod(plan.tiles)
    tiles = max(w.shape[1:3]) * plan.numbers
    return max(1, min(KERNELS // kernels, CHUNK // tiles))


def outs_at_a_time(w: Tensor, plan: Plan) -> int:
    return max(1, KERNELS * prod(plan.tiles) // (w.shape[2] * plan.numbers))


def samples_at_a_time(x: Tensor, w: Tensor, plan: Plan) -> int:
    return max(1, CHUNK // (w.shape[0] * max(w.shape[1], x.shape[2]) * plan.numbers))


def cut(x: Tensor, padding: Sequence[int], plan: Plan) -> Tensor:
    """Overlapping tiles (N, G, C, *tiles, *length) of x (N, G, C, *L)."""
    pads = []
    for d, (n, b, t) in enumerate(zip(*plan, strict=True)):
        pads.append((padding[d], (t - 1) * b + n - padding[d] - x.shape[3 + d]))
    flat = [p for pair in reversed(pads) for p in pair]
    x = F.pad(x, [max(p, 0) for p in flat])
    if min(flat) < 0:  # afterwards: more may be cut off at one end than was there
        x = F.pad(x, [min(p, 0) for p in flat])
    for d, (n, b, _) in enumerate(zip(*plan, strict=True)):
        x = x.unfold(3 + d, n, b)
    return x


def pieces(g: Tensor, plan: Plan) -> Tensor:
    """Tiles (N, G, O, *tiles, *step) of g (N, G, O, *L) that do not overlap."""
    pads = [(0, t * b - m) for b, t, m in zip(plan.step, plan.tiles, g.shape[3:], strict=True)]
    g = F.pad(g, [p for pair in reversed(pads) for p in pair])
    for d, b in enumerate(plan.step):
        g = g.unfold(3 + d, b, b)
    return g


def spectrum(x: Tensor, plan: Plan) -> Tensor:
    """Its transform over the last dimensions, flat (..., F)."""
    rank = len(plan.length)
    return torch.fft.rfftn(x, s=plan.length, dim=tuple(range(-rank, 0))).flatten(-rank)


def invert(z: Tensor, plan: Plan) -> Tensor:
    """(..., F) -> (..., *length)."""
    rank = len(plan.length)
    z = z.unflatten(-1, (*plan.length[:-1], plan.length[-1] // 2 + 1))
    return torch.fft.irfftn(z, s=plan.length, dim=tuple(range(-rank, 0)))


def mix(tiles: Tensor, kernel: Tensor) -> Tensor:
    """sum_c tiles (N, G, C, T, F) kernel (G, O, C, F): (N, G, O, T, F).

    A loop, because torch has to lay out all spectra anew for a matrix product a frequency.
    """
    term = lambda c: (tiles[:, :, c].unsqueeze(2), kernel[:, :, c].unsqueeze(2))
    first, second = term(0)
    total = first * second
    for c in range(1, tiles.shape[2]):
        # vmap knows no addcmul_.
        more = term(c)
        total = total + more[0] * more[1] if under_transform() else total.addcmul_(*more)
    return total


def gather(ours: Tensor, theirs: Tensor, total: Tensor | None) -> Tensor:
    """total + sum_{n, t} theirs (N, G, O, T, F) ours (N, G, C, T, F): (G, O, C, F)."""
    samples, _, outs, tiles, _ = theirs.shape
    if samples * tiles > MANY * outs:
        each = [(theirs[:, :, o].unsqueeze(2) * ours).sum((0, 3)) for o in range(outs)]
        sums = torch.stack(each, 1)
        return sums if total is None else total + sums
    for n, t in product(range(samples), range(tiles)):
        term = theirs[n, :, :, t].unsqueeze(2), ours[n, :, :, t].unsqueeze(1)
        total = term[0] * term[1] if total is None else total.addcmul_(*term)
    return total  # type: ignore[return-value]


def join(z: Tensor, size: Sequence[int], plan: Plan) -> Tensor:
    """From spectra (N, G, O, T, F) of tiles to outputs (N, G, O, *size)."""
    rank = len(size)
    y = crop(invert(z, plan), plan.step).unflatten(3, plan.tiles)
    order = [3 + d + of for d in range(rank) for of in (0, rank)]
    y = y.permute(0, 1, 2, *order)
    for d in range(rank):
        y = y.flatten(3 + d, 4 + d)
    return crop(y, size)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` positions of the last dimensions."""
    index: tuple = (..., *[slice(n) for n in size])
    return x[index]


def every(x: Tensor, steps: Sequence[int]) -> Tensor:
    """Positions 0, step, 2 step, ... of the last dimensions."""
    index: tuple = (..., *[slice(None, None, step) for step in steps])
    return x[index]


def cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def spread(x: Tensor, steps: Sequence[int]) -> Tensor:
    """x (., ., *L) with steps - 1 zeros between neighbours."""
    for d, step in enumerate(steps):
        if step > 1:
            after = [0, 0] * (x.dim() - 3 - d)
            wide = F.pad(x.unsqueeze(3 + d), [*after, 0, step - 1]).flatten(2 + d, 3 + d)
            x = wide.narrow(2 + d, 0, (x.shape[2 + d] - 1) * step + 1)
    return x


def wide(t: Tensor) -> Tensor:
    """In a dtype that FFT takes."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def swapped(w: Tensor, groups: int) -> Tensor:
    """The kernel whose convolution is the transpose of w's: (C_in, C_out / groups, *K), flipped."""
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return w.flip(list(range(2, w.dim())))


def spans(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))


def fft_output(input: Tensor, weight: Tensor, settings: Settings, plan: Plan) -> Tensor:
    stride, padding, dilation, groups = settings
    w = spread(wide(weight), dilation)
    size = spans(sizes(input.shape, weight.shape, settings), stride)
    y = correlate(wide(input), w, padding, groups, size, plan)
    return every(y, stride).to(input.dtype)


def fft_input(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, plan: Plan
) -> Tensor:
    stride, _, dilation, groups = settings
    w = swapped(spread(wide(weight), dilation), groups)
    gx = correlate(
        spread(wide(grad), stride), w, rest(weight, settings), groups, input.shape[2:], plan
    )
    return gx.to(input.dtype)


def fft_weight(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Settings, plan: Plan
) -> Tensor:
    stride, padding, dilation, groups = settings
    span = spans(weight.shape[2:], dilation)
    gw = correlate_backward(spread(wide(grad), stride), wide(input), padding, groups, span, plan)
    return every(gw, dilation).to(weight.dtype)


# Direct, by the other engine: an input's gradient is a convolution, and the other way round -------


def flipped_output(input: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    _, _, dilation, groups = settings
    w, ones = swapped(weight, groups), [1] * len(dilation)
    pads, zeros = rest(weight, settings), [0] * len(dilation)
    return torch.convolution(input, w, None, ones, pads, dilation, True, zeros, groups)


def flipped_input(grad: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    _, _, dilation, groups = settings
    ones = [1] * len(dilation)
    return static(grad, swapped(weight, groups), (ones, rest(weight, settings), dilation, groups))


def rest(weight: Tensor, settings: Settings) -> list[int]:
    """The padding of the transposed convolution."""
    _, padding, dilation, _ = settings
    return [k - 1 - p for k, p in zip(spans(weight.shape[2:], dilation), padding, strict=True)]


def sizes(input: Sequence[int], weight: Sequence[int], settings: Settings) -> tuple[int, ...]:
    """L_out, from shapes."""
    return Geometry(tuple(weight[2:]), *map(tuple, settings[:3])).output_size(input[2:])


# The rule ----------------------------------------------------------------------------------------


def effort(n: int) -> float:
    """Of FFT over n points, a point: log2 n, more for odd factors."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    return log2(n) * ODD[odd]


@lru_cache(4096)
def fast_length(least: int) -> int:
    """The cheapest transform length of at least `least`."""
    lengths = [odd << a for odd in ODD for a in range(1, 40) if least <= odd << a < 3 * least + 4]
    return min(lengths, key=lambda n: n * effort(n))


def cuts(length: int, span: int, padding: int, out: int) -> list[tuple[int, int, int]]:
    """A few ways to cut a dimension (transform length, step, count): whole, and in tiles."""
    whole = fast_length(max(length + padding, out + span - 1 - padding, out, span))
    tiles = [
        (n, n - span + 1, -(-out // (n - span + 1)))
        for n in [odd << a for odd in (1, 3) for a in range(2, 24)]
        if n < whole and n - span + 1 >= max(1, span // 4)
    ]
    return [(whole, out, 1), *sorted(tiles, key=lambda c: c[0] * c[2] * effort(c[0]))[:3]]


@lru_cache(4096)
def best_plan(
    what: str, input: tuple[int, ...], weight: tuple[int, ...], settings: tuple
) -> tuple[float, Plan]:
    """The cheapest plan for the output or one gradient, from shapes, and its seconds."""
    stride, padding, dilation, groups = settings
    span, length = spans(weight[2:], dilation), input[2:]
    out = spans(sizes(input, weight, settings), stride)
    if what == "input":
        length, out = out, length
        padding = tuple(k - 1 - p for k, p in zip(span, padding, strict=True))
    ways = [cuts(*of) for of in zip(length, span, padding, out, strict=True)]
    plans = [Plan(*zip(*way, strict=True)) for way in product(*ways)]
    channels = input[1] // groups, weight[0] // groups
    if what == "input":
        channels = channels[::-1]
    return min((fft_seconds(what, input[0], groups, *channels, p), p) for p in plans)


def fft_seconds(what: str, batch: int, groups: int, channels: int, outs: int, plan: Plan) -> float:
    """From `channels` to `outs` a group."""
    points, tiles = prod(plan.length), batch * prod(plan.tiles)
    transforms = groups * (tiles * (channels + outs) + channels * outs)
    moved = tiles * groups * outs * points * len(plan.length) * (prod(plan.tiles) > 1)
    loops = min(tiles, MANY * outs) if what == "weight" else channels
    call, stage, term, tile, loop = FFT[what == "weight"]
    return (
        call
        + stage * transforms * points * sum(map(effort, plan.length)) * ROUGH[len(plan.length)]
        + term * tiles * groups * channels * outs * points / 2
        + tile * moved
        + loop * loops
    )


def direct_seconds(
    engine: str, input: tuple[int, ...], weight: tuple[int, ...], settings: tuple
) -> float:
    """Of torch's convolution ("output"), of its gradient of the "input" or of the "weight"."""
    groups = settings[3]
    alone = input[1] == groups == weight[0]
    kind = "depthwise" if alone else "grouped" if groups > 1 else "dense"
    limit, short, long = DIRECT[engine, len(input) - 2][kind]
    call, number, product = long if max(weight[2:]) >= limit else short
    outputs = input[0] * weight[0] * prod(sizes(input, weight, settings))
    return call + number * outputs + product * outputs * prod(weight[1:])


@lru_cache(4096)
def expected(
    what: str, input: tuple[int, ...], weight: tuple[int, ...], settings: tuple
) -> dict[str, float]:
    """Seconds of each formulation of the "output" or the gradient of "input" or "weight"."""
    times = {
        "direct": direct_seconds(what, input, weight, settings),
        "fft": best_plan(what, input, weight, settings)[0],
    }
    other = {"output": "input", "input": "output"}.get(what)
    if other and max(settings[0]) == 1 and can_flip(weight, settings):
        times["flipped"] = FLIP + direct_seconds(other, input, weight, settings)
    return times


def can_flip(weight: Sequence[int], settings: Settings) -> bool:
    """Where the transposed convolution has no negative padding."""
    _, padding, dilation, _ = settings
    span = spans(weight[2:], dilation)
    return all(p < k for p, k in zip(padding, span, strict=True))


def formulation(what: str, input: Tensor, weight: Tensor, settings: Settings) -> str:
    """How to compute the "output", or the gradient of the "input" or the "weight"."""
    if input.device.type != "cpu" or not input.numel():
        return "direct"
    times = expected(what, *frozen(input, weight, settings))
    best = min(times, key=times.__getitem__)
    return best if times[best] < SURE * times["direct"] else "direct"


def plan_for(what: str, input: Tensor, weight: Tensor, settings: Settings) -> Plan:
    return best_plan(what, *frozen(input, weight, settings))[1]


def frozen(input: Tensor, weight: Tensor, settings: Settings) -> tuple[tuple, tuple, tuple]:
    return tuple(input.shape), tuple(weight.shape), (*map(tuple, settings[:3]), settings[3])


# The operator ------------------------------------------------------------------------------------


def output(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    choice = formulation("output", input, weight, settings)
    if choice == "direct":
        return static(input, weight, settings, bias)
    if choice == "flipped":
        y = flipped_output(input, weight, settings)
    else:
        y = fft_output(input, weight, settings, plan_for("output", input, weight, settings))
    return y if bias is None else y + bias.reshape(-1, *[1] * (y.dim() - 2))


def input_gradient(grad: Tensor, input: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    choice = formulation("input", input, weight, settings)
    if choice == "direct":
        return static_backward(grad, input, weight, settings, [True, False])[0]
    if choice == "flipped":
        return flipped_input(grad, weight, settings)
    plan = plan_for("input", input, weight, settings)
    return fft_input(grad, input, weight, settings, plan)


def weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    if formulation("weight", input, weight, settings) == "direct":
        return static_backward(grad, input, weight, settings, [False, True])[1]
    plan = plan_for("weight", input, weight, settings)
    return fft_weight(grad, input, weight, settings, plan)


def _shape(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> tuple:
    return (input.shape[0], weight.shape[0], *sizes(input.shape, weight.shape, settings))


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    if not input.numel():
        return output_like(input, _shape(input, weight, bias, *settings)).zero_()
    return output(input, weight, bias, settings)


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    *settings, mask = rest
    gb = grad.transpose(0, 1).flatten(1).sum(1) if mask[2] else None
    if not grad.numel() or not input.numel():
        return [torch.zeros_like(input), torch.zeros_like(weight), gb]
    gx = input_gradient(grad, input, weight, settings) if mask[0] else None
    gw = weight_gradient(grad, input, weight, settings) if mask[1] else None
    return [gx, gw, gb]


def _plain(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """Plain ATen, differentiable to any order."""
    symbolic = any(isinstance(n, torch.SymInt) for n in (*input.shape, *weight.shape))
    if symbolic or formulation("output", input, weight, settings) != "fft":
        return static(input, weight, settings, bias)
    return output(input, weight, bias, settings)


def _flops(input: tuple, weight: tuple, *rest: Any) -> int:
    """Those of the formula, not of FFT."""
    return 2 * prod(rest[-1]) * prod(weight[1:])


operator = Operator(
    "conv",
    ("input", "weight", "bias?"),
    ("weight", "bias"),
    f"{GEOMETRY}, SymInt groups",
    _forward,
    _backward,
    _plain,
    _shape,
    _flops,
)


def all_direct(input: Tensor, weight: Tensor, settings: Settings) -> bool:
    """Whether torch's convolution is the best there is, for all that will be asked.

    torch.compile has no sizes to ask the rule with: there it is the operator that asks.
    """
    if torch.compiler.is_compiling():
        return input.dim() < 5 and all(surely(taps <= SMALL) for taps in weight.shape[2:])
    wanted = {"output": True, "input": input.requires_grad, "weight": weight.requires_grad}
    if not torch.is_grad_enabled():
        wanted = {"output": True}
    return all(
        formulation(what, input, weight, settings) == "direct"
        for what, is_ in wanted.items()
        if is_
    )


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    settings = (*map(list, geometry[1:]), groups)
    if torch.compiler.is_exporting() or all_direct(input, weight, settings):
        return static(input, weight, settings, bias)
    if under_transform():
        return _plain(input, weight, bias, *settings)
    return operator(input, weight, bias, *settings)
