"""conv_per_position in C++ against the reference: values, gradients, every way a call is cut up."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynaconv
from dynaconv.backends.native import library
from dynaconv.backends.native.conv_per_position import operator
from dynaconv.functional import conv_per_position
from dynaconv.shapes import Geometry
from dynaconv.testing import check_primitive, samples
from tests.backends.native import (
    LAYOUTS,
    channels_last,
    check,
    needs_the_library,
    on_instruction_set,
    random_geometry,
    run,
)

pytestmark = needs_the_library
NAME = "conv_per_position"
every_rank = pytest.mark.parametrize("rank", [1, 2, 3])


def call_of(batch, groups, channels, size, kernel, dtype=torch.float64, **geometry):
    """A fresh random call with `channels` in each group: tensors by name, and settings."""
    defaults = {"stride": 1, "padding": 0, "dilation": 1} | geometry
    fields = [v if isinstance(v, tuple) else (v,) * len(size) for v in defaults.values()]
    output = Geometry(kernel, *fields).output_size(size)
    tensors = {
        "input": torch.randn(batch, groups * channels, *size, dtype=dtype),
        "weight": torch.randn(batch, groups, *kernel, *output, dtype=dtype),
    }
    return tensors, geometry


@every_rank
def test_equals_the_reference(rank, poisoned):
    assert check_primitive(NAME, "native", ranks=(rank,)) == 42


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype, poisoned):
    check_primitive(NAME, "native", dtype, batches=(3,))
    check_primitive(NAME, "native", dtype, batches=(2,), change=channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, poisoned):
    check_primitive(NAME, "native", batches=(1, 2), change=LAYOUTS[layout])


def check_edges(dtype):
    """One more and one less than vectors, blocks of positions and runs of taps hold."""
    for width in range(1, 36):
        check(NAME, *call_of(1, 1, 8, (width,), (3,), dtype, padding=1))
        check(NAME, *call_of(1, 2, 2, (width,), (3,), dtype, padding=1))
    for taps in range(1, 18):
        check(NAME, *call_of(2, 1, 9, (20,), (taps,), dtype, padding=8))
    for channels in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 130):
        check(NAME, *call_of(1, 2, channels, (5, 7), (3, 2), dtype, padding=1))
        check(NAME, *call_of(1, 1, channels, (9,), (3,), dtype, padding=1, stride=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(dtype, poisoned):
    check_edges(dtype)


@pytest.mark.parametrize("name", ["portable", "avx2"])
def test_each_instruction_set(name):
    on_instruction_set(name, __file__, run_on_one_instruction_set)


def run_on_one_instruction_set(name):
    assert library.instruction_set() in ("portable", name)  # a CPU may have no AVX2
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_primitive(NAME, "native", dtype, batches=(2,))
        check_primitive(NAME, "native", dtype, batches=(2,), change=channels_last)
    check_edges(torch.float32)


CASES = [
    (1, 1, 20, (150, 150), (7, 7), {"padding": 3}),  # boxes of rows
    (1, 1, 2, (150, 150), (7, 7), {"padding": 3}),
    (1, 1, 70, (1500,), (31,), {"padding": 15}),  # boxes along a row
    (1, 1, 200, (9, 40), (9, 9), {"padding": 4}),  # channels in chunks
    (2, 1, 16, (20, 20, 20), (3, 5, 3), {"padding": (1, 2, 1)}),
    (2, 3, 3, (20, 12, 20), (3, 5, 3), {"padding": (1, 2, 1)}),
    (1, 1, 16, (61, 67), (5, 5), {"stride": 2, "padding": 2}),
    (1, 2, 3, (61, 67), (5, 5), {"stride": (2, 3), "padding": 2, "dilation": (1, 2)}),
    (2, 1, 8, (30,), (4,), {"stride": 5, "padding": 1}),  # gaps that no tap sees
    (2, 2, 1, (30,), (4,), {"stride": 5, "padding": 1}),
    (2, 1, 8, (2, 2), (2, 2), {"stride": 7, "padding": 9}),  # most windows see only zeros
    (2, 1, 8, (3,), (3,), {"padding": 40, "dilation": 30}),
    (2, 3, 1, (3,), (3,), {"padding": 40, "dilation": 30}),
    (2, 1, 1, (1, 1, 1), (3, 3, 3), {"padding": 1}),
    (2, 2, 8, (4, 5), (11, 13), {"padding": (5, 6)}),  # a kernel larger than the input
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ways_to_cut(case, layout, poisoned):
    *sizes, geometry = case
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors, given = call_of(*sizes, dtype, **geometry)
        if layout == "channels_last":  # and weights as a layer's 1x1 convolution makes them
            tensors = {
                "input": channels_last(tensors["input"]),
                "weight": positions_first(tensors["weight"], len(sizes[3])),
            }
        check(NAME, tensors, given)


def positions_first(weight, rank):
    """The same with the taps of a position next to each other in memory."""
    order = [0, *range(2 + rank, 2 + 2 * rank), *range(1, 2 + rank)]
    back = [order.index(d) for d in range(weight.dim())]
    return weight.permute(order).contiguous().permute(back)


@st.composite
def random_calls(draw):
    size, kernel, geometry = random_geometry(draw)
    sizes = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    return sizes, size, kernel, geometry, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(call=random_calls())
def test_random_shapes(call):
    sizes, size, kernel, geometry, last, positions = call
    tensors, given = call_of(*sizes, size, kernel, **geometry)
    if last:
        tensors["input"] = channels_last(tensors["input"])
    if positions:
        tensors["weight"] = positions_first(tensors["weight"], len(size))
    check(NAME, tensors, given)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "weight", "upstream"])
def test_what_is_not_finite_goes_where_the_formula_takes_it(where, value, channels):
    tensors, given = call_of(1, 1, channels, (5, 19), (3, 3), padding=1)
    upstream = torch.randn_like(tensors["input"])
    (tensors | {"upstream": upstream})[where].flatten()[-30] = value
    expected = run("reference", NAME, tensors, given, upstream=upstream)
    for what, actual in run("native", NAME, tensors, given, upstream=upstream).items():
        torch.testing.assert_close(actual, expected[what], equal_nan=True)


@pytest.mark.parametrize("channels", [2, 16])
def test_the_same_from_run_to_run(channels):
    tensors, given = call_of(3, 2, channels, (33, 35), (5, 5), torch.float32, padding=2)
    first, second = (run("native", NAME, tensors, given) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_only_what_is_asked_for():
    tensors, given = call_of(2, 2, 4, (6, 6), (3, 3), padding=1)
    for wanted in (["input"], ["weight"]):
        check(NAME, tensors, given, wanted=wanted)


def test_gradients_in_the_layout_of_what_they_belong_to():
    x = channels_last(torch.randn(2, 8, 6, 7)).requires_grad_()
    w = torch.randn(2, 2, 3, 3, 6, 7, requires_grad=True)
    with dynaconv.backend("native"):
        y = conv_per_position(x, w, padding=1)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert w.grad.is_contiguous()


@every_rank
def test_gradcheck_and_opcheck(rank):
    tensors, given = list(samples(NAME, rank, batches=(2,)))[4]
    leaves = [t.requires_grad_() for t in tensors.values()]
    call = lambda x, w: conv_per_position(x, w, **given)
    with dynaconv.backend("native"):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    ones = [1] * rank
    small = torch.randn(2, 4, *[5] * rank), torch.randn(2, 2, *[3] * rank, *[5] * rank)
    arguments = (*[t.requires_grad_() for t in small], ones, ones, ones)
    torch.library.opcheck(operator.forward, arguments)
    mask = list(itertools.repeat(True, 2))
    torch.library.opcheck(operator.backward, (torch.randn(small[0].shape), *arguments, mask))


def test_a_call_is_counted():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        tensors, given = call_of(2, 2, 4, (6, 6), (3, 3), padding=1)
        run("native", NAME, tensors, given)
    assert counter.get_total_flops() == 3 * 2 * math.prod((2, 8, 6, 6, 3, 3))
