"""Calls of every primitive that are right, drawn by hypothesis, and its formula in plain torch."""

from dataclasses import dataclass, field
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from dynaconv import backend, functional
from dynaconv.functional.spectral_resize import spectral_resize
from dynaconv.shapes import LARGEST, resolve_padding

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass
class Call:
    """Of a primitive: its tensors, and everything else."""

    name: str
    tensors: dict
    settings: dict = field(default_factory=dict)

    @property
    def arguments(self):
        return self.tensors | self.settings


class Draw:
    """Numbers from hypothesis, tensors from one seed of it."""

    def __init__(self, draw):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def int(self, low, high):
        return self.draw(st.integers(low, high))

    def ints(self, low, high, rank):
        return tuple(self.int(low, high) for _ in range(rank))

    def one(self, *choices):
        return self.draw(st.sampled_from(choices))

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


@st.composite
def calls(draw, name):
    return MAKERS[name](Draw(draw))


def geometry(d, rank, kernel):
    """stride, padding and dilation, and an input size that the kernel fits into."""
    dilation = tuple(d.one(1, 2, *far(d, k == 1)) for k in kernel)
    padding = d.one("valid", "same", None, None, None)
    stride = (1,) * rank if padding == "same" else d.ints(1, 3, rank)
    padding = d.ints(0, 2, rank) if padding is None else padding
    sides = (0,) * rank if isinstance(padding, str) else padding
    span = [b * (k - 1) + 1 for k, b in zip(kernel, dilation, strict=True)]
    size = tuple(max(1, s - 2 * p) + d.int(0, 3) for s, p in zip(span, sides, strict=True))
    if padding != "same" and far(d, True):
        stride = (LARGEST,) * rank
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    for key, value in settings.items():
        if not isinstance(value, str) and len(set(value)) == 1:
            settings[key] = d.one(value, list(value), value[0], value[:1])
    return size, settings


def far(d, possible):
    """The largest number, now and then, where one is possible."""
    return (LARGEST,) if possible and d.int(0, 9) == 9 else ()


def channels(d):
    """groups, input and output channels."""
    groups = d.int(1, 2)
    return groups, groups * d.int(1, 2), groups * d.int(1, 2)


def output_size(size, kernel, settings):
    arguments = [settings[key] for key in ("stride", "padding", "dilation")]
    x, resolved = resolve_padding(torch.empty(1, 1, *size), kernel, *arguments)
    return resolved.output_size(x.shape[2:])


def conv(d):
    rank = d.int(1, 3)
    kernel, (groups, inputs, outputs) = d.ints(1, 3, rank), channels(d)
    if rank == 1 and d.int(0, 4) == 4:
        kernel = (d.int(50, 90),)  # by FFT
    size, settings = geometry(d, rank, kernel)
    x, w = d.randn(d.int(0, 3), inputs, *size), d.randn(outputs, inputs // groups, *kernel)
    bias = d.randn(outputs) if d.int(0, 1) else None
    return Call("conv", {"input": x, "weight": w, "bias": bias}, settings | {"groups": groups})


def conv_per_sample(d):
    call = conv(d)
    batch, w = len(call.tensors["input"]), call.tensors["weight"]
    bias = d.one(None, d.randn(len(w)), d.randn(batch, len(w)))
    tensors = call.tensors | {"weight": d.randn(batch, *w.shape), "bias": bias}
    return Call("conv_per_sample", tensors, call.settings)


def conv_mixture(d):
    call = conv(d)
    batch, w, experts = len(call.tensors["input"]), call.tensors["weight"], d.int(1, 3)
    by_tap = d.int(0, 1)
    bias = d.one(None, d.randn(len(w)), d.randn(len(w) if by_tap else experts, len(w)))
    if by_tap and bias is not None:
        bias = d.randn(len(w))
    tensors = {
        "input": call.tensors["input"],
        "weight": d.randn(experts, *w.shape),
        "coefficients": d.randn(batch, experts, *(w.shape[2:] if by_tap else ())),
        "bias": bias,
    }
    return Call("conv_mixture", tensors, call.settings)


def conv_per_position(d):
    rank = d.int(1, 3)
    kernel, (groups, inputs, _) = d.ints(1, 3, rank), channels(d)
    size, settings = geometry(d, rank, kernel)
    batch = d.int(0, 3)
    weight = d.randn(batch, groups, *kernel, *output_size(size, kernel, settings))
    return Call(
        "conv_per_position", {"input": d.randn(batch, inputs, *size), "weight": weight}, settings
    )


def deform_conv(d):
    call = conv(d)
    x, w = call.tensors["input"], call.tensors["weight"]
    kernel, rank = tuple(w.shape[2:]), w.dim() - 2
    places = output_size(x.shape[2:], kernel, call.settings)
    groups = d.one(*[g for g in (1, 2) if x.shape[1] % g == 0])
    taps = groups * prod(kernel)
    # Never whole numbers: there gradients jump.
    offset = ((8 * d.randn(len(x), taps * rank, *places)).round() / 4 + 1 / 8).clamp(-100, 100)
    modulation = d.randn(len(x), taps, *places) if d.int(0, 1) else None
    tensors = call.tensors | {"offset": offset, "modulation": modulation}
    return Call("deform_conv", tensors, call.settings)


def transposed(d, per_sample):
    rank, batch = d.int(1, 3), d.int(0, 3)
    kernel, (groups, inputs, outputs) = d.ints(1, 3, rank), channels(d)
    size = d.ints(1, 4, rank)
    stride = tuple(d.one(1, 2, 3, *far(d, length == 1)) for length in size)
    dilation = d.ints(1, 2, rank)
    span = [b * (k - 1) + 1 for k, b in zip(kernel, dilation, strict=True)]
    padding = tuple(d.int(0, (s - 1) // 2) for s in span)
    extra = tuple(d.int(0, min(max(s, b), 4) - 1) for s, b in zip(stride, dilation, strict=True))
    settings = {"stride": stride, "padding": padding, "output_padding": extra}
    settings |= {"groups": groups, "dilation": dilation}
    many = (batch,) if per_sample else ()
    tensors = {
        "input": d.randn(batch, inputs, *size),
        "weight": d.randn(*many, inputs, outputs // groups, *kernel),
        "bias": d.one(None, d.randn(outputs), d.randn(*many, outputs)),
    }
    return Call("conv_transpose_per_sample", tensors, settings)


def deform_conv_transpose(d):
    call = transposed(d, per_sample=False)
    x, w = call.tensors["input"], call.tensors["weight"]
    outputs = w.shape[1] * call.settings["groups"]
    groups, rank = d.one(*[g for g in (1, 2) if outputs % g == 0]), w.dim() - 2
    taps = groups * prod(w.shape[2:])
    offset = (8 * d.randn(len(x), taps * rank, *x.shape[2:])).round() / 4 + 1 / 8
    modulation = d.randn(len(x), taps, *x.shape[2:]) if d.int(0, 1) else None
    tensors = call.tensors | {"offset": offset, "modulation": modulation}
    return Call("deform_conv_transpose", tensors, call.settings)


def conv_on_grid(d):
    rank, batch = d.int(1, 3), d.int(0, 3)
    kernel, (groups, inputs, outputs) = d.ints(1, 3, rank), channels(d)
    tensors = {
        "input": d.randn(batch, inputs, *d.ints(1, 5, rank)),
        "weight": d.randn(outputs, inputs // groups, *kernel),
        "bias": d.one(None, d.randn(outputs)),
    }
    positions = [2 * d.randn(batch, d.int(1, 4), k) + 1 for k in kernel]
    return Call("conv_on_grid", tensors, {"positions": positions, "groups": groups})


def resample_kernel(d):
    rank = d.int(1, 3)
    size, mode = d.ints(1, 6, rank), d.one("area", "pinv")
    weight = d.randn(d.int(0, 2), d.int(1, 2), *d.ints(1, 5, rank))
    return Call("resample_kernel", {"weight": weight}, {"size": size, "mode": mode})


def spectral(d):
    rank = d.int(1, 3)
    shape = d.ints(1, 6, rank)
    x = d.randn(d.int(0, 2), d.int(1, 2), *shape)
    smoothness = d.one(4.0, 1, 0.5)
    if d.int(0, 1):
        size = torch.tensor(d.ints(1, 8, rank), dtype=torch.float64) + d.one(0, 0.3)
        settings = {"published": bool(d.int(0, 1)), "smoothness": smoothness}
        return Call("spectral_resize", {"input": x}, {"size": size} | settings)
    return Call(
        "spectral_resize", {"input": x}, {"size": d.ints(1, 8, rank), "smoothness": smoothness}
    )


MAKERS = {
    "conv": conv,
    "conv_per_sample": conv_per_sample,
    "conv_mixture": conv_mixture,
    "conv_per_position": conv_per_position,
    "deform_conv": deform_conv,
    "conv_transpose_per_sample": lambda d: transposed(d, per_sample=True),
    "deform_conv_transpose": deform_conv_transpose,
    "conv_on_grid": conv_on_grid,
    "resample_kernel": resample_kernel,
    "spectral_resize": spectral,
}


# Formulas in float64 ------------------------------------------------------------------------


def plain(call):
    """The primitive's formula in float64 on contiguous copies of the arguments."""
    copy = lambda t: t.detach().double().resolve_neg().clone() if torch.is_tensor(t) else t
    tensors = {key: copy(t) for key, t in call.tensors.items()}
    settings = {
        key: [copy(t) for t in value] if isinstance(value, list | range) else copy(value)
        for key, value in call.settings.items()
    }
    formula = FORMULAS.get(call.name)
    if formula is None:
        with backend("reference"):
            return getattr(functional, call.name)(**tensors, **settings)
    return formula(**tensors, **settings)


def plain_conv(input, weight, bias, **settings):
    return CONVS[input.dim() - 2](input, weight, bias, **settings)


def plain_per_sample(input, weight, bias, **settings):
    function = CONVS[input.dim() - 2]
    return each(function, input, weight, bias, weight.shape[1], settings)


def each(function, input, weight, bias, outputs, settings):
    """function on each sample with its own kernel and bias."""
    if not len(input):
        kernel = weight.new_zeros(weight.shape[1:])
        return function(input, kernel, None, **settings)
    biases = [bias if bias is None or bias.dim() == 1 else bias[n] for n in range(len(input))]
    return torch.cat(
        [function(input[n : n + 1], weight[n], biases[n], **settings) for n in range(len(input))]
    )


def plain_mixture(input, weight, coefficients, bias, **settings):
    rank = input.dim() - 2
    factor = coefficients if coefficients.dim() > 2 else coefficients[(..., *[None] * rank)]
    kernels = (factor[:, :, None, None] * weight).sum(1)
    if bias is not None and bias.dim() == 2:
        bias = coefficients @ bias
    return plain_per_sample(input, kernels, bias, **settings)


def plain_per_position(input, weight, stride=1, padding=0, dilation=1):
    rank = input.dim() - 2
    kernel, places = weight.shape[2 : 2 + rank], weight.shape[2 + rank :]
    x, resolved = resolve_padding(input, tuple(kernel), stride, padding, dilation)
    x = F.pad(x, [p for pad in reversed(resolved.padding) for p in (pad, pad)])
    channels = input.shape[1] // weight.shape[1]
    total = 0
    for tap in product(*map(range, kernel)):
        part = x
        for d, k in enumerate(tap):
            step = resolved.stride[d]
            start = k * resolved.dilation[d]
            index = torch.arange(places[d]) * step + start
            part = part.index_select(2 + d, index)
        total = total + part * weight[(slice(None), slice(None), *tap)].repeat_interleave(
            channels, 1
        )
    return total


def plain_transpose(input, weight, bias, **settings):
    function, outputs = TRANSPOSES[input.dim() - 2], weight.shape[2] * settings["groups"]
    return each(function, input, weight, bias, outputs, settings)


def plain_on_grid(input, positions, weight, bias, groups):
    rank = input.dim() - 2
    values = input
    for d, t in enumerate(positions):
        points = torch.arange(input.shape[2 + d], dtype=torch.float64)
        hat = (1 - (t.flatten(1).unsqueeze(2) - points).abs()).clamp(min=0)
        values = torch.einsum("n...l,nsl->n...s", values.movedim(2 + d, -1), hat).movedim(-1, 2 + d)
    return CONVS[rank](values, weight, bias, weight.shape[2:], groups=groups)


def plain_spectral(input, size, smoothness=4.0, published=False):
    return spectral_resize(input, size, smoothness, published)


FORMULAS = {
    "conv": plain_conv,
    "conv_per_sample": plain_per_sample,
    "conv_mixture": plain_mixture,
    "conv_per_position": plain_per_position,
    "conv_transpose_per_sample": plain_transpose,
    "conv_on_grid": plain_on_grid,
}
