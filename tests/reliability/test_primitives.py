"""Any arguments of any primitive on any backend: right, or refused by name."""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dynaconv import functional
from dynaconv.dispatch import backends, down_from
from dynaconv.testing.tolerance import TOLERANCE
from tests.reliability import broken
from tests.reliability.calls import MAKERS, Call, calls, plain
from tests.reliability.judge import QUIET, count, outcome, parameters

QUICK, SLOW = 12, 600
# Primitives that one way of computing serves are there once.
ONE_WAY = ("conv_transpose_per_sample", "deform_conv_transpose", "conv_on_grid")
ONE_WAY += ("resample_kernel", "spectral_resize")
# Triton's interpreter has tests of its own: here it would serve nothing.
WAYS = [b for b in backends() if b != "triton" or torch.cuda.is_available()]
SERVED = [(n, b) for n in MAKERS for b in WAYS if n not in ONE_WAY or b == "reference"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Coordinates may be finer than the data.
COORDINATES = ("offset", "positions", "size")


def laid_out(data, call):
    """The call in a dtype, each tensor in a layout of its own."""
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = lambda: broken.LAYOUTS[data.draw(st.sampled_from(list(broken.LAYOUTS)))]
    cast = lambda name, t: t.to(torch.promote_types(dtype, torch.float32) if fine(name) else dtype)
    fine = lambda name: name in COORDINATES
    tensors = {n: None if t is None else layout()(cast(n, t)) for n, t in call.tensors.items()}
    return Call(call.name, tensors, call.settings), dtype


def check_result(name, result, expected, dtype, coarsest, added):
    """`added` is the size of what a resized kernel's few values are sums of, and may cancel."""
    assert result.shape == expected.shape, f"{name}: {result.shape}, expected {expected.shape}"
    assert result.dtype == dtype, f"{name}: {result.dtype}, expected {dtype}"
    if not result.numel():
        return
    scale = expected.abs().max().clamp(min=1e-3)
    scale = torch.maximum(scale, added) if name == "resample_kernel" else scale
    error = (result.detach().double() - expected).abs().max() / scale
    assert error <= 10 * TOLERANCE[coarsest], f"{name} in {dtype} is off by {error:.3g}"


def run(data, name, backend):
    function, names = getattr(functional, name), parameters(getattr(functional, name))
    call, dtype = laid_out(data, data.draw(calls(name)))
    changed = break_some(data, call)
    with down_from(backend):
        result, refusal = outcome(function, call.arguments, names, f"{name} on {backend}")
    if refusal is not None:
        assert changed, f"a right call is refused: {refusal}"
        if len(changed) == 1 and not broken.plausible(call.settings.get(changed[0], 1)):
            assert changed[0] in str(refusal), f"{changed[0]} is broken, and the text is {refusal}"
        return
    count(f"{name} on {backend}", "computed")
    event("computed")
    if not torch.is_tensor(result) or result.is_meta:
        return
    dtype = next(t.dtype for t in call.tensors.values() if torch.is_tensor(t))
    # A size in float32 makes a mask of that precision.
    size = call.settings.get("size")
    coarse = torch.is_tensor(size) and size.dtype == torch.float32 and dtype == torch.float64
    first = next(t for t in call.tensors.values() if torch.is_tensor(t))
    added = first.detach().double().abs().max() if first.numel() else torch.zeros(())
    check_result(name, result, plain(call), dtype, torch.float32 if coarse else dtype, added)
    count(f"{name} on {backend}", "checked")
    check_gradients(call, result)


def check_gradients(call, result):
    """Finite, where something wants them."""
    leaves = [t for t in call.tensors.values() if torch.is_tensor(t) and t.requires_grad]
    if not leaves or not result.requires_grad:
        return
    found = torch.autograd.grad(result.sum(), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, found, strict=True):
        assert gradient is not None
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()


def break_some(data, call):
    """Breaks 0 to 2 arguments in place; their names."""
    many = data.draw(st.sampled_from([0, 1, 1, 1, 2]))
    names = data.draw(st.permutations(list(call.arguments)))[:many]
    for name in names:
        if name in call.settings:
            call.settings[name] = data.draw(st.sampled_from(broken.SCALARS))
            continue
        tensor = call.tensors[name]
        ways = {} if tensor is None else broken.of_tensor(tensor)
        way = data.draw(st.sampled_from([*ways, "nothing alike"]))
        if way == "nothing alike":
            call.tensors[name] = data.draw(st.sampled_from(broken.NO_TENSORS))
            continue
        changed = broken.made(ways[way])
        if changed is None:
            return names[: names.index(name)]
        call.tensors[name] = changed
    return names


@pytest.mark.parametrize(("name", "backend"), SERVED)
def test_some(name, backend):
    @settings(max_examples=QUICK, derandomize=True, **QUIET)
    @given(st.data())
    def check(data):
        run(data, name, backend)

    check()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), SERVED)
def test_many(name, backend):
    @settings(max_examples=SLOW, derandomize=True, **QUIET)
    @given(st.data())
    def check(data):
        run(data, name, backend)

    check()
