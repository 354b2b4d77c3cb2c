"""The eager backend against the reference: every formulation, layout, dtype and transform."""

import importlib

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import dynaconv
from dynaconv import dispatch, functional
from dynaconv.testing import TOLERANCE, check_primitive, close, samples
from dynaconv.testing.primitives import MAKERS

# conv on each of its paths, whatever its rule would take.
PRIMITIVES = [name for name in MAKERS if name != "conv"] + ["conv by direct", "conv by fft"]
per_sample, mixture = (
    importlib.import_module(f"dynaconv.backends.eager.{name}")
    for name in ("conv_per_sample", "conv_mixture")
)
convolution = importlib.import_module("dynaconv.backends.eager.conv")
every_primitive = pytest.mark.parametrize("primitive", PRIMITIVES, indirect=True)
every_rank = pytest.mark.parametrize("rank", [1, 2, 3])


@pytest.fixture(autouse=True)
def _on_eager():
    with dispatch.down_from("eager"):
        yield


@pytest.fixture
def primitive(request, monkeypatch):
    """Its name, with the path forced that is named after "by"."""
    name, _, path = request.param.partition(" by ")
    if path:
        monkeypatch.setattr(convolution, "all_direct", lambda *a: False)
        monkeypatch.setattr(convolution, "formulation", lambda *a: path)
    return name


@every_primitive
@every_rank
def test_equals_the_reference(primitive, rank, poisoned):
    assert check_primitive(primitive, "eager", ranks=(rank,)) == 42


@every_primitive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(primitive, dtype, poisoned):
    check_primitive(primitive, "eager", dtype, batches=(3,))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([t, t])[len(t) :],
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
}


@every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(primitive, layout, poisoned):
    check_primitive(primitive, "eager", batches=(2,), change=LAYOUTS[layout])


@pytest.mark.parametrize("name", ["grouped", "loop", "unfold"])
@every_rank
def test_each_formulation_of_conv_per_sample(name, rank, monkeypatch):
    forward = "grouped" if name == "unfold" else name
    monkeypatch.setattr(per_sample, "formulation", lambda *a: forward)
    ungrouped = lambda grad, input, weight, settings: name if settings[3] == 1 else "loop"
    monkeypatch.setattr(per_sample, "weight_formulation", ungrouped)
    monkeypatch.setattr(per_sample, "CHUNK", 1)
    check_primitive("conv_per_sample", "eager", ranks=(rank,), batches=(1, 3))


@pytest.mark.parametrize("name", ["kernels", "outputs"])
@every_rank
def test_each_formulation_of_conv_mixture(name, rank, monkeypatch):
    ungrouped = lambda weight, coefficients, positions, settings: (
        name if settings[3] == 1 and coefficients.dim() == 2 else "kernels"
    )
    monkeypatch.setattr(mixture, "formulation", ungrouped)
    monkeypatch.setattr(mixture, "CHUNK", 1)
    monkeypatch.setattr(mixture, "SHARE", 2)  # the third sample is a chunk of its own
    check_primitive("conv_mixture", "eager", ranks=(rank,), batches=(1, 3))


def test_deform_conv_in_chunks(monkeypatch):
    module = importlib.import_module("dynaconv.backends.eager.deform_conv")
    monkeypatch.setattr(module, "CHUNK", 1)
    check_primitive("deform_conv", "eager", batches=(3,))


@pytest.mark.parametrize("many", [0, 10**9])
@every_rank
def test_conv_in_tiles_and_chunks(rank, many, monkeypatch):
    def tiled(*of):
        whole, *tiles = right(*of)
        return tiles or [whole]

    right = convolution.cuts
    monkeypatch.setattr(convolution, "cuts", tiled)
    monkeypatch.setattr(convolution, "all_direct", lambda *a: False)
    monkeypatch.setattr(convolution, "formulation", lambda *a: "fft")
    for name, value in (("CHUNK", 1), ("KERNELS", 1), ("MANY", many)):
        monkeypatch.setattr(convolution, name, value)
    convolution.best_plan.cache_clear()
    check_primitive("conv", "eager", ranks=(rank,), batches=(1, 3))
    convolution.best_plan.cache_clear()


def test_the_rule_takes_every_formulation():
    rule = lambda x, w, *s: per_sample.formulation(torch.empty(x), torch.empty(w), s)
    assert rule((2, 8, 5, 5), (2, 8, 8, 1, 1), [1, 1], [0, 0], [1, 1], 1) == "matmul"
    assert rule((2, 8, 5, 5), (2, 8, 8, 3, 3), [1, 1], [1, 1], [1, 1], 1) == "grouped"
    assert rule((8, 256, 5, 5), (8, 256, 256, 3, 3), [1, 1], [1, 1], [1, 1], 1) == "loop"
    assert (
        rule((8, 256, 5, 5, 5), (8, 256, 256, 3, 3, 3), [1] * 3, [1] * 3, [1] * 3, 1) == "grouped"
    )
    assert rule((64, 64, 5, 5), (64, 64, 64, 3, 3), [1, 1], [1, 1], [1, 1], 1) == "grouped"
    few = torch.empty(2, 256, 5, 5), torch.empty(2, 256, 5, 5), torch.empty(2, 256, 256, 3, 3)
    assert per_sample.weight_formulation(*few, ([1, 1], [1, 1], [1, 1], 1)) == "unfold"
    mixing = lambda positions, *taps: mixture.formulation(
        torch.empty(4, 8, 8, 1), torch.empty(2, 4, *taps), positions, ([1], [0], [1], 1)
    )
    assert mixing(1) == "outputs"
    assert mixing(99) == "kernels"
    assert mixing(1, 1) == "kernels"


@every_primitive
def test_the_comparison_has_teeth(primitive, monkeypatch):
    eager = next(b for b in dispatch.BACKENDS if b.name == "eager")
    right = eager.functions[primitive]
    for wrong in (
        lambda *a: right(*a) * (1 + 1e-9),
        lambda *a: right(a[0].detach() + (a[0] - a[0].detach()) * 1.01, *a[1:]),
        lambda *a: right(*a)[..., :-1],
    ):
        monkeypatch.setitem(eager.functions, primitive, wrong)
        with pytest.raises((AssertionError, RuntimeError)):
            check_primitive(primitive, "eager", ranks=(2,), batches=(2,))


def small(primitive, rank):
    """One small call, as a function of its tensors."""
    tensors, settings = list(samples(primitive, rank, batches=(2,)))[3]
    names = list(tensors)
    call = lambda *ts: getattr(functional, primitive)(
        **dict(zip(names, ts, strict=True)), **settings
    )
    return call, [t.requires_grad_() for t in tensors.values()]


@every_primitive
@every_rank
def test_gradcheck(primitive, rank):
    call, tensors = small(primitive, rank)
    fast = rank == 3
    assert torch.autograd.gradcheck(call, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@every_primitive
@pytest.mark.parametrize("rank", [1, 2])
def test_opcheck(primitive, rank):
    operator = importlib.import_module(f"dynaconv.backends.eager.{primitive}").operator
    module = importlib.import_module(f"dynaconv.functional.{primitive}")
    cases = list(samples(primitive, rank, batches=(2,)))[2:4]
    for tensors, settings in cases[rank - 1 :]:
        tensors = {name: t.requires_grad_() for name, t in tensors.items()}
        _, arguments = module.prepare(**tensors, **settings)
        captured = []
        forward = operator.forward
        operator.forward = lambda *a, kept=captured, run=forward: (kept.append(a), run(*a))[1]
        try:
            functions = dispatch.BACKENDS[0].functions
            output = functions[primitive](*arguments)
        finally:
            operator.forward = forward
        args = tuple(
            a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in captured[0]
        )
        torch.library.opcheck(operator.forward, args)
        mask = [a is not None for a in args[: operator.count]]
        torch.library.opcheck(operator.backward, (torch.randn_like(output), *args, mask))


# vmap of a gradient goes through the reference, whose windows are views by unfold.
@pytest.mark.filterwarnings("ignore:There is a performance drop.*unfold_backward:UserWarning")
@every_primitive
@pytest.mark.parametrize("rank", [1, 2])
def test_vmap(primitive, rank):
    call, tensors = small(primitive, rank)
    tensors = [t.detach() for t in tensors]
    stacked = [torch.stack([t, 2 * t, t - 1]) for t in tensors]
    for mapped in range(1, 2 ** len(tensors)):
        on = [bool(mapped >> i & 1) for i in range(len(tensors))]
        given = [s if m else t for s, t, m in zip(stacked, tensors, on, strict=True)]
        in_dims = tuple(0 if m else None for m in on)
        each = [[s[i] if m else s for s, m in zip(given, on, strict=True)] for i in range(3)]
        output = torch.func.vmap(call, in_dims)(*given)
        torch.testing.assert_close(output, torch.stack([call(*ts) for ts in each]))
        loss = lambda *ts: call(*ts).sin().sum()
        gradient = torch.func.vmap(torch.func.grad(loss), in_dims)(*given)
        expected = torch.stack([torch.func.grad(loss)(*ts) for ts in each])
        torch.testing.assert_close(gradient, expected)


@every_primitive
def test_vmap_over_the_backward(primitive):
    call, tensors = small(primitive, 2)
    output = call(*tensors)
    upstream = torch.randn(3, *output.shape, dtype=output.dtype)
    backward = lambda u: torch.autograd.grad(output, tensors, u, retain_graph=True)
    batched = torch.func.vmap(backward)(upstream)
    for i in range(3):
        for a, b in zip(batched, backward(upstream[i]), strict=True):
            torch.testing.assert_close(a[i], b)


@every_primitive
def test_compiles_without_a_break_for_any_size(primitive):
    torch._dynamo.reset()
    given, settings = list(samples(primitive, 2, batches=(2,)))[2]
    call = lambda *ts: getattr(functional, primitive)(
        **dict(zip(given, ts, strict=True)), **settings
    )
    count = CompileCounter()
    compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
    for batch in (2, 3, 4):
        tensors, _ = list(samples(primitive, 2, batches=(batch,)))[2]
        ts = [t.requires_grad_() for t in tensors.values()]
        torch.testing.assert_close(compiled(*ts), call(*ts))
        gradients = torch.autograd.grad(compiled(*ts).sin().sum(), ts)
        for a, b in zip(gradients, torch.autograd.grad(call(*ts).sin().sum(), ts), strict=True):
            torch.testing.assert_close(a, b)
    assert count.frame_count == 1


@every_primitive
def test_autocast_casts_data_and_keeps_offsets(primitive):
    for tensors, settings in list(samples(primitive, 2, torch.float32, (2,)))[2:4]:
        with torch.autocast("cpu", torch.bfloat16):
            output = getattr(functional, primitive)(**tensors, **settings)
        assert output.dtype == torch.bfloat16
        expected = getattr(functional, primitive)(**tensors, **settings)
        close(output, expected.double(), primitive, TOLERANCE[torch.bfloat16])


def test_half_data_takes_float32_offsets():
    x = torch.zeros(1, 1, 1, 600, dtype=torch.bfloat16)
    x[..., 513] = 1  # bfloat16 cannot tell 513 from 512
    offset = torch.zeros(1, 2, 1, 600)
    offset[:, 1] = 0.5
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    for name in ("reference", "eager"):
        with dynaconv.backend(name):
            output = functional.deform_conv(x, offset, weight)
        assert output.flatten()[511:515].tolist() == [0, 0.5, 0.5, 0]


@every_primitive
def test_channels_last_stays(primitive):
    tensors, settings = list(samples(primitive, 2))[2]
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    output = getattr(functional, primitive)(**tensors, **settings)
    assert output.is_contiguous(memory_format=torch.channels_last)


@every_primitive
def test_export_takes_the_reference(primitive):
    tensors, settings = list(samples(primitive, 2))[2]

    class Call(nn.Module):
        def forward(self, *ts):
            return getattr(functional, primitive)(**dict(zip(tensors, ts, strict=True)), **settings)

    program = torch.export.export(Call(), tuple(tensors.values()))
    assert "dynaconv" not in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors.values()), Call()(*tensors.values()))


def test_gradients_are_not_computed_for_nothing():
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 6, 4, 3, 3)
    seen = []
    operator = per_sample.operator
    backward = operator.backward
    operator.backward = lambda *a: (seen.append(a[-1]), backward(*a))[1]
    try:
        functional.conv_per_sample(x, w).sum().backward()
    finally:
        operator.backward = backward
    assert seen == [[True, False, False]]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e6, -1e6])
def test_offsets_far_outside_read_zero(value):
    x, w = torch.randn(1, 2, 5, 5), torch.ones(1, 2, 1, 1)
    offset = torch.full((1, 2, 5, 5), value)
    for name in ("reference", "eager"):
        with dynaconv.backend(name):
            assert functional.deform_conv(x, offset, w).abs().max() == 0


def test_nan_is_not_hidden():
    x, w = torch.randn(1, 2, 5, 5), torch.ones(1, 2, 1, 1)
    offset = torch.zeros(1, 2, 5, 5)
    offset[0, 0, 2, 3] = float("nan")
    for name in ("reference", "eager"):
        with dynaconv.backend(name):
            output = functional.deform_conv(x, offset, w)
        assert output.isnan().nonzero().tolist() == [[0, 0, 2, 3]]


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(2, 4, 6, 6), torch.randn(2, 6, 4, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = functional.conv_per_sample(x, w, padding=1)
    forward = 2 * y.numel() * 4 * 9
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == forward


def test_tolerances_are_those_of_the_dtype():
    assert TOLERANCE[torch.float64] < TOLERANCE[torch.float32] < TOLERANCE[torch.float16]
