"""conv_per_sample and conv_mixture in C++ against the reference: every way a call is cut up."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv import functional
from dynaconv.backends.native import library
from dynaconv.testing import check_primitive, close, samples
from tests.backends import native as native_kernels
from tests.backends.native import (
    FORMATS,
    LAYOUTS,
    channels_last,
    needs_the_library,
    on_instruction_set,
    random_geometry,
    run,
)

pytestmark = needs_the_library
PRIMITIVES = ["conv_per_sample", "conv_mixture"]
every_primitive = pytest.mark.parametrize("primitive", PRIMITIVES)
every_rank = pytest.mark.parametrize("rank", [1, 2, 3])
native = {p: importlib.import_module(f"dynaconv.backends.native.{p}") for p in PRIMITIVES}


def always(monkeypatch):
    """Whatever the rule would take, and on few channels too, the C++ kernels compute it."""
    for name in ("MANY", "FEW"):
        monkeypatch.setattr(native["conv_per_sample"], name, 10**9)


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    always(monkeypatch)


@pytest.fixture
def no_library_calls(monkeypatch):
    """Fails where the eager operators compute anything."""

    def refuse(*args):
        raise AssertionError("left to library calls")

    for module in native.values():
        monkeypatch.setattr(module.eager, "_forward", refuse)
        monkeypatch.setattr(module.eager, "_backward", refuse)


def call_of(
    primitive,
    batch,
    channels,
    outs,
    size,
    kernel,
    experts=3,
    by_tap=False,
    dtype=torch.float64,
    **rest,
):
    """A fresh random call: tensors by name, and settings."""
    kernels = batch if primitive == "conv_per_sample" else experts
    tensors = {
        "input": torch.randn(batch, channels, *size),
        "weight": torch.randn(kernels, outs, channels, *kernel),
        "bias": torch.randn(kernels, outs),
    }
    if primitive == "conv_mixture":
        tensors["coefficients"] = torch.randn(batch, experts, *(kernel if by_tap else ()))
        tensors["bias"] = torch.randn(outs) if by_tap else tensors["bias"]
    return {name: t.to(dtype) for name, t in tensors.items()}, rest


def check(primitive, *args, **kwargs):
    native_kernels.check(primitive, *call_of(primitive, *args, **kwargs))


@every_primitive
@every_rank
def test_equals_the_reference(primitive, rank, poisoned):
    assert check_primitive(primitive, "native", ranks=(rank,)) == 42


@every_primitive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(primitive, dtype, poisoned):
    check_primitive(primitive, "native", dtype, batches=(3,))
    check_primitive(primitive, "native", dtype, batches=(2,), change=channels_last)


@every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(primitive, layout, poisoned):
    check_primitive(primitive, "native", batches=(1, 2), change=LAYOUTS[layout])


@pytest.mark.parametrize("name", ["portable", "avx2"])
def test_each_instruction_set(name):
    on_instruction_set(name, __file__, run_on_one_instruction_set)


def run_on_one_instruction_set(name):
    assert library.instruction_set() in ("portable", name)  # a CPU may have no AVX2
    always(pytest.MonkeyPatch())
    torch.manual_seed(0)
    for primitive in PRIMITIVES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            check_primitive(primitive, "native", dtype, batches=(2,))
        for dtype in (torch.float32, torch.float64):
            check_edges(primitive, dtype)


def check_edges(primitive, dtype):
    """One more and one less than vectors, tiles, blocks and groups of samples hold."""
    for width in range(1, 32):
        check(primitive, 2, 3, 5, (width,), (3,), padding=1, dtype=dtype)
    for channels in (1, 4, 7, 8, 9, 13, 14, 15, 16, 17, 28, 29, 31, 32, 33, 63, 64, 65, 130):
        check(primitive, 2, 3, channels, (5,), (3,), padding=1, dtype=dtype)
        check(primitive, 1, channels, 6, (3, 4), (3, 2), padding=1, dtype=dtype)
    for batch in (1, 3, 4, 5, 9, 31, 32, 33, 70):
        check(primitive, batch, 3, 17, (4,), (2,), dtype=dtype)


@every_primitive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(primitive, dtype, poisoned, no_library_calls):
    check_edges(primitive, dtype)


CASES = [
    (2, 150, 40, (7, 7), (3, 3), {"padding": 1}),  # channels read in pieces
    (2, 40, 150, (14, 14), (3, 3), {"padding": 1}),
    (2, 90, 5, (500,), (5,), {"padding": 2}),  # the kernels' gradient in parts
    (40, 20, 70, (14, 14), (3, 3), {"padding": 1}),  # more samples than mix together
    (3, 20, 20, (9, 10), (5, 5), {"padding": 2}),
    (3, 20, 20, (33,), (5,), {"padding": 2}),
    (2, 20, 20, (4, 5, 6), (3, 3, 3), {"padding": 1}),
    (2, 5, 20, (3, 4, 5), (5, 3, 5), {"padding": 2}),
    (2, 20, 20, (15, 13), (3, 3), {"stride": 2, "padding": 1}),
    (2, 20, 20, (15, 16), (3, 5), {"stride": (3, 4), "padding": (2, 4), "dilation": (2, 3)}),
    (2, 20, 20, (30,), (4,), {"stride": 5, "padding": 1}),  # gaps that no tap sees
    (2, 3, 4, (2, 2), (2, 2), {"stride": 7, "padding": 9}),  # most windows see only zeros
    (2, 3, 4, (3,), (3,), {"padding": 40, "dilation": 30}),
    (2, 1, 1, (1, 1, 1), (3, 3, 3), {"padding": 1}),
]


@every_primitive
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ways_to_cut(primitive, case, poisoned, no_library_calls):
    *sizes, settings = case
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for experts, by_tap in ((1, False), (2, True), (5, False), (5, True)):
            check(primitive, *sizes, experts=experts, by_tap=by_tap, dtype=dtype, **settings)


@st.composite
def random_calls(draw):
    size, kernel, geometry = random_geometry(draw)
    sizes = draw(st.integers(1, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    return sizes, size, kernel, geometry


@every_primitive
@settings(max_examples=60, deadline=None)
@given(call=random_calls(), experts=st.integers(1, 6), by_tap=st.booleans())
def test_random_shapes(primitive, call, experts, by_tap):
    sizes, size, kernel, geometry = call
    check(primitive, *sizes, size, kernel, experts=experts, by_tap=by_tap, **geometry)


@every_primitive
def test_the_rule(primitive, monkeypatch):
    """Many positions a channel, and groups, are left to library calls."""
    monkeypatch.undo()
    serves = native[primitive].serves
    rule = lambda channels, size, kernel, groups=1, dtype=None: serves(
        torch.empty(2, channels, *size, dtype=dtype),
        torch.empty(2, 2 * channels, channels, *kernel),
        (2, 2 * channels, *size),
        ([1, 1], [1, 1], [1, 1], groups),
    )
    assert rule(512, (7, 7), (3, 3))
    assert rule(128, (28, 28), (3, 3))
    assert not rule(64, (56, 56), (3, 3))
    assert not rule(512, (7, 7), (3, 3), groups=2)
    assert rule(512, (7, 7), (1, 1))
    assert rule(512, (7, 7), (3, 3), dtype=torch.bfloat16)
    assert not rule(256, (14, 14), (3, 3), dtype=torch.bfloat16)
    assert not rule(256, (14, 14), (1, 1))
    assert not rule(512, (0, 7), (3, 3))


def small(primitive, rank):
    """One small call, as a function of its tensors."""
    tensors, settings = list(samples(primitive, rank, batches=(2,)))[2]
    names = list(tensors)
    call = lambda *ts: getattr(functional, primitive)(
        **dict(zip(names, ts, strict=True)), **settings
    )
    return call, [t.requires_grad_() for t in tensors.values()]


@every_primitive
@every_rank
def test_gradcheck(primitive, rank, no_library_calls):
    call, tensors = small(primitive, rank)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=rank == 3)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@every_primitive
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(primitive, bias):
    tensors, settings = call_of(primitive, 2, 3, 4, (5, 6), (3, 2), stride=2, padding=1)
    if not bias:
        del tensors["bias"]
    prepare = importlib.import_module(f"dynaconv.functional.{primitive}").prepare
    _, (*given, geometry, groups) = prepare(**tensors, **settings)
    if primitive == "conv_mixture" and bias:
        given[3] = given[2] @ given[3]
    given = [t if t is None else t.detach().requires_grad_() for t in given]
    operator = native[primitive].operator
    torch.library.opcheck(operator.forward, (*given, *map(list, geometry[1:]), groups))


@every_primitive
def test_vmap(primitive):
    call, tensors = small(primitive, 2)
    stacked = [torch.stack([t, 2 * t, t - 1]).detach() for t in tensors]
    output = torch.func.vmap(call)(*stacked)
    each = torch.stack([call(*ts) for ts in zip(*stacked, strict=True)])
    torch.testing.assert_close(output, each)


@every_primitive
def test_same_result_each_time_and_with_each_number_of_threads(primitive):
    call = call_of(primitive, 6, 40, 70, (7, 9), (3, 3), padding=1, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run("native", primitive, *call))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for what, value in result.items():
            if what != "bias" and not (primitive == "conv_mixture" and what == "coefficients"):
                assert torch.equal(value, results[0][what]), what


@every_primitive
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_the_formula(primitive, value, no_library_calls):
    for place in ((0, 1, 0, 0), (1, 2, 3, 2), (1, 0, 5, 4)):
        tensors, settings = call_of(primitive, 2, 3, 20, (6, 5), (3, 3), padding=1)
        tensors["input"][place] = value
        expected = run("reference", primitive, tensors, settings)
        for what, actual in run("native", primitive, tensors, settings).items():
            assert torch.equal(actual.isfinite(), expected[what].isfinite()), what


@every_primitive
@every_rank
def test_layout_stays(primitive, rank):
    tensors, settings = call_of(primitive, 2, 6, 8, (6,) * rank, (3,) * rank, padding=1)
    tensors["input"] = channels_last(tensors["input"]).requires_grad_()
    output = getattr(functional, primitive)(**tensors, **settings)
    (gradient,) = torch.autograd.grad(output.sum(), tensors["input"])
    format = FORMATS.get(rank + 2, torch.contiguous_format)
    assert output.is_contiguous(memory_format=format)
    assert gradient.is_contiguous(memory_format=format)


@every_primitive
def test_each_gradient_alone(primitive, no_library_calls, poisoned):
    tensors, settings = call_of(primitive, 3, 6, 8, (6, 5), (3, 3), padding=1)
    expected = run("reference", primitive, tensors, settings)
    for name in tensors:
        gradient = run("native", primitive, tensors, settings, wanted=[name])[name]
        close(gradient, expected[name], name)
