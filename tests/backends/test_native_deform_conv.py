"""deform_conv in C++ against the reference: values, gradients, and every way a call is cut up."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynaconv
from dynaconv import functional
from dynaconv.backends.native import library
from dynaconv.backends.native.deform_conv import operator
from dynaconv.functional.deform_conv import prepare
from dynaconv.testing import TOLERANCE, check_primitive, close, samples
from tests.backends import native
from tests.backends.native import (
    LAYOUTS,
    channels_last,
    deformed_call,
    needs_the_library,
    on_instruction_set,
)

pytestmark = needs_the_library
every_rank = pytest.mark.parametrize("rank", [1, 2, 3])
LAYOUTS = LAYOUTS | {
    "channels_of_more": lambda t: (
        channels_last(torch.cat([t, t], 1))[:, t.shape[1] :] if t.dim() > 1 else t
    ),
}


def run(name, *call, **choices):
    return native.run(name, "deform_conv", *call, **choices)


def check(tensors, settings, tolerance=TOLERANCE[torch.float64]):
    expected = run("reference", tensors, settings)
    for what, value in run("native", tensors, settings).items():
        close(value, expected[what].double(), f"{what} with {settings}", tolerance)


@every_rank
def test_equals_the_reference(rank, poisoned):
    assert check_primitive("deform_conv", "native", ranks=(rank,)) == 42


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype, poisoned):
    check_primitive("deform_conv", "native", dtype, batches=(3,))
    check_primitive("deform_conv", "native", dtype, batches=(2,), change=channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, poisoned):
    check_primitive("deform_conv", "native", batches=(1, 2), change=LAYOUTS[layout])


@pytest.mark.parametrize("name", ["portable", "avx2"])
def test_each_instruction_set(name):
    on_instruction_set(name, __file__, run_on_one_instruction_set)


def run_on_one_instruction_set(name):
    assert library.instruction_set() in ("portable", name)  # a CPU may have no AVX2
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_primitive("deform_conv", "native", dtype, batches=(2,))
    test_edges_of_tiles_blocks_and_slices()


def test_edges_of_tiles_blocks_and_slices():
    for positions in (1, 13, 14, 15, 97, 98, 99, 112, 113, 195, 196, 197):
        check(*deformed_call(3, 5, (positions,), (3,), padding=1))
    for channels in (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 130):
        check(*deformed_call(channels, 4, (5, 4), (3, 2), batch=1))
        check(*deformed_call(4, channels, (5, 4), (3, 2), batch=3))


@pytest.mark.parametrize(
    "case",
    [
        {"channels": 2, "out_channels": 600, "size": (9,), "kernel": (3,)},  # outputs in parts
        {"channels": 4, "out_channels": 1200, "size": (5,), "kernel": (3,), "groups": 2},
        {"channels": 3, "out_channels": 2, "size": (700,), "kernel": (600,)},  # taps in parts
        {"channels": 70, "out_channels": 3, "size": (30,), "kernel": (20,), "offset_groups": 2},
        {"channels": 96, "out_channels": 6, "size": (5, 5), "kernel": (3, 3), "offset_groups": 3},
        {"channels": 120, "out_channels": 8, "size": (5, 5), "kernel": (3, 3), "groups": 4},
        {"channels": 90, "out_channels": 12, "size": (4, 4), "kernel": (2, 2), "groups": 3},
        {"channels": 40, "out_channels": 80, "size": (5, 5), "kernel": (3, 3), "groups": 40},
        {"channels": 40, "out_channels": 40, "size": (5, 5), "kernel": (3, 3), "groups": 40}
        | {"offset_groups": 20},
        {"channels": 24, "out_channels": 4, "size": (3, 4, 3), "kernel": (3, 3, 3)}
        | {"offset_groups": 24, "padding": 1},
        {"channels": 36, "out_channels": 36, "size": (3, 4), "kernel": (2, 2)}
        | {"offset_groups": 4, "groups": 3},  # neither divides the other
    ],
    ids=lambda case: "-".join(str(v) for v in case.values()),
)
@pytest.mark.parametrize("batch", [1, 3])
def test_many_channels_taps_and_groups(case, batch):
    check(*deformed_call(**case, batch=batch))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@every_rank
def test_any_number_of_threads(threads, rank):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, offset_groups in product((1, 2, 3), (1, 3)):
            size, kernel = (9, 6, 4)[:rank], (3, 3, 2)[:rank]
            channels = 48 * offset_groups
            check(*deformed_call(channels, 5, size, kernel, batch, offset_groups=offset_groups))
    finally:
        torch.set_num_threads(before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_calls(data):
    draw = lambda *range: data.draw(st.integers(*range))
    rank, groups, offset_groups = draw(1, 3), draw(1, 4), draw(1, 4)
    channels = groups * offset_groups * draw(1, 12)
    each = lambda *range: tuple(draw(*range) for _ in range_of_rank)
    range_of_rank = tuple(range(rank))
    kernel, stride, dilation, padding = each(1, 4), each(1, 3), each(1, 3), each(0, 4)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    size = tuple(n + draw(0, 60 if rank == 1 else 9 if rank == 2 else 4) for n in least)
    torch.manual_seed(draw(0, 1000))
    tensors, others = deformed_call(
        channels,
        groups * draw(1, 20),
        size,
        kernel,
        draw(0, 3),
        groups,
        offset_groups,
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    if data.draw(st.booleans()):
        tensors["input"] = channels_last(tensors["input"])
    check(tensors, others)


@every_rank
def test_float32_offsets_with_float64_data(rank):
    tensors, others = deformed_call(20, 6, (9, 6, 4)[:rank], (3, 3, 2)[:rank], padding=1)
    tensors["offset"] = tensors["offset"].float()
    check(tensors, others, TOLERANCE[torch.float32])
    assert run("native", tensors, others)["offset"].dtype == torch.float32


def same_everywhere(tensors, others, upstream=None):
    """NaN and infinity at the same places, too; in gradients either may stand for the other."""
    expected = run("reference", tensors, others, upstream=upstream)
    for what, value in run("native", tensors, others, upstream=upstream).items():
        given, right = value, expected[what]
        if what != "output":
            given, right = (t.where(t.isfinite(), float("nan")) for t in (given, right))
        text = lambda message, what=what: f"{what}: {message}"
        torch.testing.assert_close(given, right, equal_nan=True, msg=text)


FAR = [float("nan"), float("inf"), -float("inf"), 1e6, -1e6, 3e9, -3e9, 1e30]
BORDER = [0.0, -0.0, -1.0, -1.5, -2.0, -0.5, 1.0, 2.5, 3.0, 4.0, 4.5, 5.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_rank
def test_borders_far_offsets_and_nan(rank, dtype):
    sizes = [(5, 4, 3)[:rank], (1, 2, 1)[:rank]]
    for size, value, d in product(sizes, FAR + BORDER, range(rank)):
        tensors, others = deformed_call(3, 2, size, (1,) * rank, 1, dtype=dtype)
        tensors["offset"][:, d, ..., 0] = value
        same_everywhere(tensors, others)
    tensors["offset"].fill_(float("nan"))
    assert run("native", tensors, others)["output"].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["input", "modulation", "weight", "bias", "upstream"])
@pytest.mark.parametrize("channels", [3, 16])
def test_nan_and_infinity_spread_as_in_the_reference(what, value, channels):
    tensors, others = deformed_call(channels, 2, (4, 3), (3, 3), 2, padding=1)
    upstream = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    changed = tensors | {"upstream": upstream}
    changed[what].view(-1)[0] = value
    same_everywhere(tensors, others, upstream)


def test_half_data_takes_float32_offsets():
    x = torch.zeros(1, 1, 1, 600, dtype=torch.bfloat16)
    x[..., 513] = 1  # bfloat16 cannot tell 513 from 512
    offset = torch.zeros(1, 2, 1, 600)
    offset[:, 1] = 0.5
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    with dynaconv.backend("native"):
        output = functional.deform_conv(x, offset, weight)
    assert output.flatten()[511:515].tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("batch", [1, 2])
def test_each_gradient_alone(batch):
    tensors, others = deformed_call(33, 6, (7, 8), (3, 3), batch, padding=1)
    expected = run("reference", tensors, others)
    for name in tensors:
        gradient = run("native", tensors, others, wanted=[name])[name]
        close(gradient, expected[name], name, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [torch.clone, channels_last])
def test_layout_of_output_and_gradients(dtype, change):
    tensors, others = deformed_call(16, 6, (7, 8), (3, 3), 2, padding=1, dtype=dtype)
    tensors["input"] = change(tensors["input"])
    values = run("native", tensors, others)
    for what in ("output", "input"):
        assert values[what].dtype == dtype
        assert values[what].stride() == change(values[what].clone()).stride()


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_call_gives_the_same_bits(batch):
    tensors, others = deformed_call(64, 32, (20, 21), (3, 3), batch, padding=1, dtype=torch.float32)
    first = run("native", tensors, others)
    for _ in range(5):
        for what, value in run("native", tensors, others).items():
            assert torch.equal(value, first[what])


def arguments(rank, modulated):
    tensors, others = deformed_call(
        4, 6, (5, 4, 3)[:rank], (2, 2, 2)[:rank], 2, 2, 2, True, modulated
    )
    _, (*given, geometry, groups) = prepare(**tensors, **others)
    given = [None if t is None else t.requires_grad_() for t in given]
    return given, [*map(list, geometry[1:]), groups]


@pytest.mark.parametrize("modulated", [True, False])
@every_rank
def test_gradcheck(rank, modulated):
    given, rest = arguments(rank, modulated)
    leaves = [t for t in given if t is not None]

    def call(*tensors):
        left = iter(tensors)
        return operator(*[None if t is None else next(left) for t in given], *rest)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=rank == 3)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("modulated", [True, False])
@every_rank
def test_opcheck(rank, modulated):
    given, rest = arguments(rank, modulated)
    grad = torch.randn_like(operator(*given, *rest))
    mask = [t is not None for t in given]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if rank == 1 and modulated:  # slow
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.forward, (*given, *rest), test_utils=checks)
    torch.library.opcheck(operator.backward, (grad, *given, *rest, mask), test_utils=checks)


def test_it_serves_calls_on_the_cpu():
    tensors, others = next(samples("deform_conv", 2, torch.float32))
    text = dynaconv.explain(functional.deform_conv, **tensors, **others)
    assert "native: chosen" in text


@pytest.mark.parametrize("batch", [1, 2])
def test_the_comparison_has_teeth(batch):
    tensors, others = deformed_call(20, 6, (7, 8), (3, 3), batch, padding=1)
    expected = run("reference", tensors, others)
    for what, value in run("native", tensors, others).items():
        with pytest.raises(AssertionError):
            close(value * (1 + 1e-9), expected[what], what, TOLERANCE[torch.float64])
