"""torch.compile without graph breaks, for every class of every family and every primitive."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv import functional
from dynaconv.dispatch import BACKENDS, backend, backends
from dynaconv.masking import unpad_batch
from dynaconv.registry import families
from dynaconv.testing import close, primitives
from dynaconv.testing.families import randomized
from dynaconv.testing.features import cases, check_feature
from dynaconv.testing.features.compile import CALLS, compare, compiled, inputs, mark_dynamic
from tests.features.cases import over_families

slow = pytest.mark.slow
# Each class in 2-D, and with a mask in 1-D, causal ones included: the rest is the same code.
planes = [pytest.param(c, a, id=c.__name__) for c, a in cases() if c.rank == 2]
first = [(c, a) for c, a in cases() if c.rank == 1]
causal = [(c, a) for c, a in cases(samples=None) if a.get("causal")]
lines = [pytest.param(c, a, id=c.__name__ + "-causal" * ("causal" in a)) for c, a in first + causal]


@pytest.mark.parametrize(("cls", "arguments"), planes)
def test_compiles(cls, arguments):
    check_feature("compile", cls, arguments)


@pytest.mark.parametrize(("cls", "arguments"), lines)
def test_compiles_with_a_mask(cls, arguments):
    check_feature("compile_mask", cls, arguments)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        pytest.param(c, a, id=c.__name__, marks=() if c.family in ("odconv", "fdconv") else slow)
        for c, a in causal
    ],
)
def test_causal_ones_compile_with_a_mask_in_training(cls, arguments):
    """Batch norms count the real positions only, and no size follows the mask."""
    compare(cls, arguments, masked=True, training=True)


@slow
@over_families("compile", samples=None)
def test_every_sample_compiles(cls, arguments):
    check_feature("compile", cls, arguments)


@slow
@over_families("compile_mask", samples=None)
def test_every_sample_compiles_with_a_mask(cls, arguments):
    check_feature("compile_mask", cls, arguments)


@slow
@over_families("compile")
def test_compiles_twice_at_most_in_training(cls, arguments):
    """Where nobody says that sizes will change, the second call finds it out."""
    compare(cls, arguments, training=True, automatic=True)


# An FFT is then ATen's, and torch says so.
by_inductor = pytest.mark.filterwarnings("ignore:Torchinductor does not support.* complex oper")


@slow
@by_inductor
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("family", [pytest.param(f, id=name) for name, f in families().items()])
def test_inductor(family, rank):
    """In 3-D at one size, in 2-D without changes of layout: see the tests below."""
    cls = next(c for c in reversed(family.all_classes) if c.rank == rank)
    calls = 1 if rank == 3 else len(CALLS)
    with torch._inductor.config.patch(layout_optimization=rank == 3):
        compare(cls, cls.samples(rank)[0], backend="inductor", calls=calls)


@slow
def test_inductor_cannot_lay_out_a_view_of_any_size_for_a_conv2d():
    """torch's own, in training; once it can, `test_inductor` is to leave layouts as they are."""

    def batch_in_groups(x, weight):
        return F.conv2d(x.flatten(0, 1).unsqueeze(0), weight, groups=x.shape[0])

    def tensors(n):
        shapes = (n, 4, 5 + n, 7 + n), (6 * n, 4, 3, 3)
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    with compiled(batch_in_groups, "inductor") as function:
        function(*tensors(2))
        with pytest.raises(torch._inductor.exc.InductorError, match="truth value of Relational"):
            function(*tensors(3))
    torch._dynamo.reset()
    function = torch.compile(batch_in_groups, options={"layout_optimization": False})
    for n in (2, 3):
        close(function(*(given := tensors(n))), batch_in_groups(*given), f"{n} samples")


@slow
def test_inductor_cannot_compile_a_padded_conv3d_of_any_size():
    """torch's own; once it can, `test_inductor` is to ask for all sizes in 3-D too."""
    weight = torch.randn(4, 4, 3, 3, 3)
    with compiled(lambda x: F.conv3d(F.pad(x, [1] * 6), weight), "inductor") as function:
        function(torch.randn(2, 4, 6, 7, 8))
        with pytest.raises(torch._inductor.exc.InductorError, match="Invalid ranges"):
            function(torch.randn(3, 4, 7, 8, 9))


# What training changes ------------------------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
def test_learned_strides_are_read_at_each_call(published):
    options = {"stride": 1.3, "smoothness": 2.5, "published": published}
    layer = dynaconv.LearnedStrideConv2d(4, 6, 3, **options).double()
    x = torch.randn(2, 4, 31, 30, dtype=torch.float64)
    with compiled(layer) as function:
        shapes = set()
        for number in range(3):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                output = function(x)
            close(output, layer(x), f"at strides {layer.strides.tolist()}")
            shapes.add(output.shape)
            with torch.no_grad():
                layer.strides.add_(0.7)
    assert len(shapes) == 3


def test_annealing_does_not_recompile():
    layer = dynaconv.DyConv2d(4, 6, 3).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with compiled(layer) as function:
        for temperature in (30.0, 7.0, 1.0):
            layer.temperature.fill_(temperature)
            with torch._dynamo.config.patch(error_on_recompile=temperature < 30):
                close(function(x), layer(x), f"at temperature {temperature}")


@pytest.mark.parametrize("masked", [False, True])
def test_adaptive_stride_keeps_every_sample_in_a_larger_batch(masked):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "low": 0.7}
    cls = dynaconv.AdaptiveStrideConv2d
    layer = randomized(cls, arguments)
    x, mask = inputs(cls, arguments, 3, 0, masked)
    with compiled(layer) as function:
        made, expected = function(x, mask), layer(x, mask)
    alone = [unpad_batch(*output) for output in (made, expected)]
    for actual, wanted in zip(*alone, strict=True):
        close(actual, wanted, "sample")
    assert made.data.shape[2:] >= expected.data.shape[2:]
    assert not made.data.masked_select(~made.mask.unsqueeze(1)).any()


# Models ----------------------------------------------------------------------------------------


def test_masked_sequential():
    layers = [dynaconv.ODConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.MaxPool2d(2), dynaconv.DeformConv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1)]
    model = dynaconv.MaskedSequential(*layers).double()
    eager, arguments = copy.deepcopy(model), {"in_channels": 3}
    with compiled(model) as function:
        for call, (batch, more) in enumerate(CALLS):
            x, mask = inputs(dynaconv.ODConv2d, arguments, batch, more + 6, True)
            if not call:
                mark_dynamic(x, mask)
            with torch._dynamo.config.patch(error_on_recompile=call > 0):
                output, kept = function(x, mask)
            expected, _ = eager(x, mask)
            assert kept is None
            close(output, expected, f"call {call}")
            gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (output, expected)]
            close(*gradients, f"gradient of call {call}")


# Primitives ------------------------------------------------------------------------------------


def made_by(primitive, index):
    """Calls of the one kind with another batch and other spatial sizes each."""

    def call(rank, batch, more, monkeypatch):
        sizes = tuple(n + more for n in SIZES[rank])
        monkeypatch.setitem(primitives.SIZES, rank, sizes)
        return list(primitives.samples(primitive, rank, batches=(batch,)))[index]

    return call


SIZES = dict(primitives.SIZES)
DOUBLE = {"dtype": torch.float64}


def transposed(rank, batch, more, _):
    x, weight = _input(rank, batch, more), torch.randn(batch, 4, 3, *(3,) * rank, **DOUBLE)
    return {"input": x, "weight": weight}, {"stride": 2, "padding": 1, "output_padding": 1}


def deform_transposed(rank, batch, more, _):
    x, weight = _input(rank, batch, more), torch.randn(4, 3, *(3,) * rank, **DOUBLE)
    offset = torch.randn(batch, rank * 3**rank, *x.shape[2:], **DOUBLE)
    return {"input": x, "offset": offset, "weight": weight}, {"stride": 2, "padding": 1}


def resampled(rank, batch, more, _):
    weight = torch.randn(batch, 4, *[3 + more] * rank, **DOUBLE)
    return {"weight": weight}, {"size": (9,) * rank, "mode": "area"}


def resized(rank, batch, more, _):
    # Below every length: to cut a spectrum, to fill it up and to leave it are graphs of their own.
    return {"input": _input(rank, batch, more)}, {"size": 3}


def resized_by_a_learned_size(rank, batch, more, _):
    size = torch.tensor([3.3, 2.4, 2.8][:rank], **DOUBLE)
    return {"input": _input(rank, batch, more), "size": size}, {"published": True}


def _input(rank, batch, more):
    return torch.randn(batch, 4, *[n + more for n in SIZES[rank]], **DOUBLE)


OTHERS = {
    "conv_transpose_per_sample": transposed,
    "deform_conv_transpose": deform_transposed,
    "resample_kernel": resampled,
    "spectral_resize": resized,
    "spectral_resize learned": resized_by_a_learned_size,
}


def hold(name, rank, maker, monkeypatch):
    """One compilation serves every batch and size, forward and backward."""
    primitive = getattr(functional, name.split()[0])
    tensors, settings = maker(rank, 3, 0, monkeypatch)
    run = lambda *given: primitive(**dict(zip(tensors, given, strict=True)), **settings)
    with compiled(run) as function:
        for call, (batch, more) in enumerate(CALLS):
            given = [t.requires_grad_() for t in maker(rank, batch, more, monkeypatch)[0].values()]
            if not call:
                made = [maker(rank, *c, monkeypatch)[0].values() for c in CALLS]
                shapes = [[tensor.shape for tensor in those] for those in made]
                for tensor, of_calls in zip(given, zip(*shapes, strict=True), strict=True):
                    sizes = enumerate(zip(*of_calls, strict=True))
                    torch._dynamo.mark_dynamic(tensor, [d for d, n in sizes if len(set(n)) > 1])
            results = []
            for way in (function, run):
                with torch._dynamo.config.patch(error_on_recompile=call > 0):
                    output = way(*given)
                gradients = torch.autograd.grad(output.sin().sum(), given)
                results.append([output, *gradients])
            for i, (actual, expected) in enumerate(zip(*results, strict=True)):
                close(actual, expected, f"{name}, {rank}-D, call {call}, result {i}")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", primitives.MAKERS)
def test_primitive_compiles(name, rank, monkeypatch):
    hold(name, rank, made_by(name, 2), monkeypatch)


@pytest.mark.parametrize("rank", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OTHERS)
def test_other_primitive_compiles(name, rank, monkeypatch):
    hold(name, rank, OTHERS[name], monkeypatch)


@pytest.mark.parametrize("name", primitives.MAKERS)
@pytest.mark.parametrize("forced", backends())
def test_primitive_compiles_on_each_backend(name, forced, monkeypatch):
    if name not in next(b for b in BACKENDS if b.name == forced).functions:
        pytest.skip(f"{forced} has no {name}")
    if forced == "triton" and not torch.cuda.is_available():
        pytest.skip("its kernels are traced in tests/backends/test_triton_compiles.py")
    with backend(forced):
        hold(name, 2, made_by(name, 2), monkeypatch)


@slow
@pytest.mark.parametrize("kind", range(14))
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", primitives.MAKERS)
def test_every_kind_of_primitive_compiles(name, rank, kind, monkeypatch):
    hold(name, rank, made_by(name, kind), monkeypatch)


def test_a_graph_break_shows():
    """The checks would see one."""

    class Broken(dynaconv.CondConv2d):
        def compute(self, x, mask):
            torch._dynamo.graph_break()
            return super().compute(x, mask)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compare(Broken, Broken.samples(2)[0])


def test_a_recompilation_shows():
    class Tied(dynaconv.CondConv2d):
        def compute(self, x, mask):
            return super().compute(x, mask) * (2 if x.shape[2] == 9 else 3)

    with pytest.raises(Exception, match=r"dynamic|[Rr]ecompil"):
        compare(Tied, Tied.samples(2)[0])


def test_a_wrong_value_shows():
    class Wrong(dynaconv.CondConv2d):
        def compute(self, x, mask):
            return super().compute(x, mask) * (2 if torch.compiler.is_compiling() else 1)

    with pytest.raises(AssertionError, match="off by"):
        compare(Wrong, Wrong.samples(2)[0])
