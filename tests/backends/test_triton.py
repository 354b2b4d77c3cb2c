"""The Triton kernels against the reference: on a GPU, or in the interpreter where there is none."""

import dataclasses
import importlib
from functools import partial
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynaconv
from dynaconv import dispatch, functional
from dynaconv.dispatch import Problem
from dynaconv.shapes import Geometry
from dynaconv.testing import TOLERANCE, close, samples
from tests.backends.native import LAYOUTS, check, deformed_call, random_geometry

pytest.importorskip("triton")
from dynaconv.backends.triton.launch import KNOWN, far
from tests.backends.watch import watched

PRIMITIVES = ["conv_per_position", "conv_per_sample", "conv_mixture", "deform_conv"]
every_primitive = pytest.mark.parametrize("primitive", PRIMITIVES)
every_rank = pytest.mark.parametrize("rank", [1, 2, 3])
slowly = partial(pytest.param, marks=pytest.mark.slow)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes in float64, and has no bfloat16.
EXACT = torch.float32 if GPU else torch.float64
HALF = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
# NumPy, in which the interpreter computes, warns of what inf and NaN are meant to give.
quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
pytestmark = [quiet, *([pytest.mark.gpu] if GPU else [])]


@pytest.fixture(autouse=True)
def _watched():
    """What the interpreter lets pass and a GPU does not: addresses outside of tensors, races."""
    if GPU:
        yield
    else:
        with watched():
            yield


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def module(primitive):
    return importlib.import_module(f"dynaconv.backends.triton.{primitive}")


KERNELS = [k for name in PRIMITIVES for k in vars(module(name)).values() if hasattr(k, "configs")]


@pytest.fixture(autouse=True)
def _untuned(request, monkeypatch):
    """Every kernel in one configuration, the first or the test's `index`: to try all takes long."""
    index = getattr(request.node, "callspec", None)
    index = 0 if index is None else index.params.get("index", 0)
    KNOWN.clear()
    for kernel in KERNELS if index is not None else ():
        monkeypatch.setattr(kernel, "configs", [kernel.configs[index % len(kernel.configs)]])


def compare(primitive, tensors, options, **choices):
    """AssertionError unless Triton gives the reference's output and gradients."""
    there = {name: t.to(DEVICE) for name, t in tensors.items()}
    check(primitive, there, options, backend="triton", **choices)


def taps(primitive, rank, tensors):
    shape = tensors["weight"].shape
    return prod(shape[2 : 2 + rank] if primitive == "conv_per_position" else shape[-rank:])


@every_primitive
@every_rank
def test_equals_the_reference(primitive, rank, poisoned):
    most = 9 if primitive == "deform_conv" else 27
    calls = [
        call
        for call in samples(primitive, rank, EXACT, (2,))
        if GPU or taps(primitive, rank, call[0]) <= most
    ]
    if not GPU and rank == 3:
        calls = calls[1::3]  # the others in the slow suite
    assert len(calls) >= 2
    for tensors, options in calls:
        compare(primitive, tensors, options)


@pytest.mark.slow
@every_primitive
def test_equals_the_reference_in_3d(primitive):
    for tensors, options in samples(primitive, 3, EXACT, (1,)):
        if GPU or taps(primitive, 3, tensors) <= 27:
            compare(primitive, tensors, options)


@every_primitive
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_other_dtypes(primitive, dtype, poisoned):
    for call in list(samples(primitive, 2, dtype, (2,)))[2:8:3]:
        compare(primitive, *call)


@pytest.mark.parametrize("index", range(1, 15))
@pytest.mark.parametrize("primitive", [p for p in PRIMITIVES if GPU or p != "deform_conv"])
def test_every_configuration(primitive, index):
    compare(primitive, *list(samples(primitive, 2, EXACT, (2,)))[5])


@pytest.mark.skipif(not GPU, reason="there is nothing to tune in the interpreter")
@every_primitive
@pytest.mark.parametrize("index", [None])
def test_the_fastest_configuration(primitive, index):
    compare(primitive, *list(samples(primitive, 1, EXACT, (2,)))[3])


@every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(primitive, layout):
    for tensors, options in list(samples(primitive, 2, EXACT, (2,)))[4:6]:
        compare(primitive, {name: LAYOUTS[layout](t) for name, t in tensors.items()}, options)


@every_primitive
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(primitive, batch):
    compare(primitive, *list(samples(primitive, 1, EXACT, (batch,)))[2])


def per_sample(channels, out_channels, size, kernel, batch=2, **options):
    tensors = {
        "input": torch.randn(batch, channels, *size, dtype=EXACT),
        "weight": torch.randn(batch, out_channels, channels, *kernel, dtype=EXACT),
        "bias": torch.randn(batch, out_channels, dtype=EXACT),
    }
    return tensors, options


@pytest.mark.parametrize(
    "call",
    [
        per_sample(70, 3, (5,), (1,)),  # channels, in tiles of 64
        per_sample(3, 130, (5,), (1,)),
        per_sample(3, 2, (150,), (3,)),
        per_sample(5, 3, (9, 16), (2, 2), stride=2),
        per_sample(64, 64, (5, 4), (2, 3), stride=2, padding=1),  # tiles that channels fill
        per_sample(3, 2, (5, 3, 4), (2, 1, 2), stride=(1, 2, 1), padding=(1, 1, 2)),
        per_sample(2, 3, (3, 7, 3), (1, 2, 3), dilation=(1, 2, 1), padding=1),
    ],
)
def test_per_sample_over_the_edges_of_tiles(call):
    tensors, options = call
    compare("conv_per_sample", tensors, options)
    experts = tensors.pop("weight").transpose(0, 1)[:, :1].transpose(0, 1)
    tensors |= {
        "weight": torch.cat([experts, -2 * experts, experts + 1]),
        "coefficients": torch.randn(2, 3, dtype=EXACT),
        "bias": tensors["bias"][0],
    }
    compare("conv_mixture", tensors, options)


@pytest.mark.parametrize("rank", [1, 2, slowly(3)])
@pytest.mark.parametrize("times", [0, slowly(10**9)])
@pytest.mark.parametrize("index", [0, slowly(3)])
def test_kernels_as_they_lie_and_laid_out(rank, times, index, monkeypatch):
    monkeypatch.setattr(module("conv_per_sample"), "LARGE", times)
    monkeypatch.setattr(module("conv_per_sample"), "FOLDED", times)
    for call in list(samples("conv_per_sample", rank, EXACT, (2,)))[1:9:3]:
        compare("conv_per_sample", *call)


def test_kernels_as_they_lie_over_the_edges_of_tiles(monkeypatch):
    monkeypatch.setattr(module("conv_per_sample"), "LARGE", 0)
    monkeypatch.setattr(module("conv_per_sample"), "FOLDED", 0)
    compare("conv_per_sample", *per_sample(2, 3, (5, 4, 6), (2, 2, 3), stride=(1, 2, 1)))
    compare("conv_per_sample", *per_sample(18, 5, (9, 8), (2, 3), stride=2, padding=1))
    compare("conv_per_sample", *per_sample(3, 130, (5,), (3,), padding=2, dilation=2))


@pytest.mark.parametrize(("channels", "size"), [(40, (5,)), (6, (150,)), (2, (9, 16))])
def test_per_position_over_the_edges_of_tiles(channels, size):
    tensors = {
        "input": torch.randn(2, channels, *size, dtype=EXACT),
        "weight": torch.randn(2, 2, *[3] * len(size), *size, dtype=EXACT),
    }
    compare("conv_per_position", tensors, {"padding": 1})


LINES = [  # channels of a group, size, kernel
    (5, (3, 6), (1, 3)),
    (16, (14,), (13,)),  # taps that are written out in parts
    (20, (2, 9), (3, 2)),  # channels over the edge of a tile
    (1, (3, 3, 4), (2, 1, 2)),
]


@pytest.mark.parametrize("index", [0, *(slowly(i) for i in range(1, 18))])
@pytest.mark.parametrize(("channels", "size", "kernel"), LINES)
def test_per_position_along_lines(index, channels, size, kernel):
    """Four positions side by side, or one, in every configuration."""
    geometry = Geometry(kernel, *[(n,) * len(size) for n in (1, 1, 1)])
    tensors = {
        "input": torch.randn(2, 3 * channels, *size, dtype=EXACT),
        "weight": torch.randn(2, 3, *kernel, *geometry.output_size(size), dtype=EXACT),
    }
    compare("conv_per_position", tensors, {"padding": 1})


DEFORMED = {
    "wide": {"channels": 70, "out_channels": 3, "size": (5,)},
    "tall": {"channels": 3, "out_channels": 140, "size": (5,)},
    "long": {"channels": 3, "out_channels": 2, "size": (90,)},
    "high": {"channels": 3, "out_channels": 2, "size": (19, 5)},  # strips of lines
    "deep": {"channels": 2, "out_channels": 2, "size": (2, 10, 2), "groups": 2},
    "filled": {"channels": 64, "out_channels": 64, "size": (3, 2)},
    "depthwise": {"channels": 40, "out_channels": 40, "size": (5, 4), "groups": 40}
    | {"offset_groups": 4},
    "multiplied": {"channels": 6, "out_channels": 18, "size": (5, 4), "groups": 6},
    "uneven": {"channels": 12, "out_channels": 6, "size": (4,), "groups": 3, "offset_groups": 4},
    "uneven the other way": {"channels": 12, "out_channels": 8, "size": (4,), "groups": 4}
    | {"offset_groups": 3},
}


@pytest.mark.parametrize("case", DEFORMED)
@pytest.mark.parametrize("parts", [1, 3])
def test_deform_conv_with_many_channels_groups_and_parts(case, parts, monkeypatch):
    kernels = module("deform_conv")
    monkeypatch.setattr(kernels, "EACH", 1 if parts > 1 else 10**6)
    monkeypatch.setattr(kernels, "BUSY", 10**6 if parts > 1 else 1)
    monkeypatch.setattr(kernels, "MOST", parts)
    if parts > 1:  # and a sample at a time, its positions in as many parts as they can be
        monkeypatch.setattr(kernels, "COLUMNS", 1)
        monkeypatch.setattr(kernels, "LEAST", 1)
        monkeypatch.setattr(kernels, "NEAR", 4 * torch.finfo(EXACT).bits)  # 32 channels
    compare(
        "deform_conv",
        *deformed_call(**DEFORMED[case], kernel=(2,) * len(DEFORMED[case]["size"]), dtype=EXACT),
    )


@pytest.mark.parametrize("choice", ["outputs", "tiles", "kernels"])
@pytest.mark.parametrize("by_tap", [False, True])
def test_what_is_mixed(choice, by_tap, monkeypatch):
    monkeypatch.setattr(module("conv_mixture"), "OUTPUTS", 10**6 * (choice == "outputs"))
    monkeypatch.setattr(module("conv_mixture"), "TILE", 10**6 * (choice == "tiles"))
    for tensors, options in list(samples("conv_mixture", 2, EXACT, (2,)))[2:6]:
        if (tensors["coefficients"].dim() > 2) == by_tap:
            compare("conv_mixture", tensors, options)


def test_many_samples_and_experts(monkeypatch):
    """More than a tile of either, and kernels of more numbers than one has."""
    monkeypatch.setattr(module("conv_mixture"), "OUTPUTS", 0)
    tensors = {
        "input": torch.randn(70, 3, 5, dtype=EXACT),
        "weight": torch.randn(17, 30, 3, 3, dtype=EXACT),
        "coefficients": torch.randn(70, 17, dtype=EXACT),
    }
    compare("conv_mixture", tensors, {"padding": 1})


def random_per_position(size, kernel, options):
    output = Geometry(kernel, *options.values()).output_size(size)
    tensors = {
        "input": torch.randn(2, 6, *size, dtype=EXACT),
        "weight": torch.randn(2, 3, *kernel, *output, dtype=EXACT),
    }
    return tensors, options


def random_mixture(size, kernel, options):
    tensors, options = per_sample(2, 3, size, kernel, **options)
    coefficients = torch.randn(2, 2, dtype=EXACT)
    return tensors | {"bias": torch.randn(2, 3, dtype=EXACT), "coefficients": coefficients}, options


RANDOM = {
    "conv_per_position": random_per_position,
    "conv_per_sample": lambda size, kernel, options: per_sample(2, 3, size, kernel, **options),
    "conv_mixture": random_mixture,
    "deform_conv": lambda size, kernel, options: deformed_call(
        4, 6, size, kernel, groups=2, dtype=EXACT, **options
    ),
}


@every_primitive
def test_random_calls(primitive):
    few = 3 if primitive == "deform_conv" else 8  # each takes seconds

    @settings(max_examples=25 if GPU else few, deadline=None)
    @given(st.data())
    def check_one(data):
        compare_random(primitive, data)

    check_one()


def compare_random(primitive, data):
    size, kernel, options = random_geometry(lambda strategy: data.draw(strategy))
    if not GPU and prod(kernel) > 9:
        kernel = tuple(min(k, 2) for k in kernel)
    tensors, options = RANDOM[primitive](size, kernel, options)
    compare(primitive, tensors, options)


def test_offsets_far_outside_read_zero():
    x, w = torch.randn(1, 2, 5, 5), torch.ones(1, 2, 1, 1)
    for value in (float("inf"), -float("inf"), 1e6, -1e6):
        offset = torch.full((1, 2, 5, 5), value)
        with dynaconv.backend("triton"):
            output = functional.deform_conv(*(t.to(DEVICE) for t in (x, offset, w)))
        assert output.abs().max() == 0


def test_nan_is_not_hidden():
    x, w = torch.randn(1, 2, 5, 5), torch.ones(1, 2, 1, 1)
    offset = torch.zeros(1, 2, 5, 5)
    offset[0, 0, 2, 3] = float("nan")
    with dynaconv.backend("triton"):
        output = functional.deform_conv(*(t.to(DEVICE) for t in (x, offset, w)))
    assert output.isnan().nonzero().tolist() == [[0, 0, 2, 3]]


FAR_STEP = 2**30 + 8


def far_apart(tensor, fill=0.0):
    """The tensor's samples so far apart that 32 bits do not reach the third; memory untouched."""
    memory = torch.empty(2 * FAR_STEP + tensor[0].numel(), dtype=tensor.dtype, device=DEVICE)
    steps = (FAR_STEP, *tensor[:1].contiguous().stride()[1:])
    apart = memory.as_strided(tensor.shape, steps)
    return apart.copy_(tensor)


def probe(primitive):
    """Three samples of one element: what comes out is small whole numbers."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16).reshape(3, 1, 1)
    one = torch.ones(3, 1, 1, 1, dtype=torch.float16)
    others = {
        "conv_per_position": {"weight": one},
        "conv_per_sample": {"weight": one},
        "conv_mixture": {"weight": one[:1], "coefficients": one[:, 0, 0]},
        "deform_conv": {"weight": one[0], "offset": torch.zeros(3, 1, 1)},
    }
    return {"input": x, **others[primitive]}, {}


@pytest.mark.skipif(GPU, reason="the interpreter shows it without so much memory")
@every_primitive
def test_addresses_beyond_32_bits(primitive):
    """With 32 bits the third sample lies outside of the memory: the process ends."""
    tensors, options = probe(primitive)
    apart = tensors | {"input": far_apart(tensors["input"])}
    assert far(apart["input"])
    assert not far(tensors["input"])
    with dynaconv.backend("triton"):
        output = getattr(functional, primitive)(**apart, **options)
    assert torch.equal(output, tensors["input"])  # every kernel here is one tap of 1


def test_the_choice_needs_no_gpu():
    problem = Problem(
        "deform_conv", 2, (("input", (2, 4, 5, 5)),), torch.float16, "cuda", False, True,
        exporting=False, transformed=False,
    )  # fmt: skip
    assert "triton: chosen" in dispatch.report(problem)
    for change, reason in (
        ({"device": "cpu"}, "for GPUs"),
        ({"exporting": True}, "torch.export"),
        ({"transformed": True}, "torch.func"),
        ({"primitive": "conv"}, "has no conv"),
    ):
        told = dispatch.report(dataclasses.replace(problem, **change))
        assert f"triton: {reason}" in told
    torch.use_deterministic_algorithms(True)
    try:
        assert "triton: adds up gradients" in dispatch.report(problem)
    finally:
        torch.use_deterministic_algorithms(False)


@every_primitive
def test_double_backward(primitive):
    for tensors, options in list(samples(primitive, 1, EXACT, (2,)))[2:3]:
        leaves = [t.to(DEVICE).requires_grad_() for t in tensors.values()]
        call = lambda *ts, names=tuple(tensors), kept=options: getattr(functional, primitive)(
            **dict(zip(names, ts, strict=True)), **kept
        )
        seconds = {}
        for name in ("triton", "reference"):
            with dynaconv.backend(name):
                gradients = torch.autograd.grad(
                    call(*leaves).sin().sum(), leaves, create_graph=True
                )
                total = sum(g.square().sum() for g in gradients)
                seconds[name] = torch.autograd.grad(total, leaves)
        for a, b in zip(seconds["triton"], seconds["reference"], strict=True):
            close(a, b, f"second gradient of {primitive}", 10 * TOLERANCE[EXACT])
