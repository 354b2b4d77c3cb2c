"""freeze: static convolutions where kernels hardly vary, measured errors, reasons for the rest."""

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.layers.base import DynamicConv
from dynaconv.layers.upsampler import Upsampler
from dynaconv.static.form import LeastSquares, StaticForm
from dynaconv.testing import close
from dynaconv.testing.families import SIZES, example, randomized, static_conv
from dynaconv.testing.features import cases

SIX = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
# They are no static convolution, whatever their kernels do.
SIZES_OF_THEIR_OWN = ("learned_stride",)
CLASSES = {cls: arguments for cls, arguments in cases(1) if not issubclass(cls, Upsampler)}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def exact_starts(cls):
    """(conv, layer) of convolutions that the class can start from: dense, depthwise, strided."""
    arguments = CLASSES[cls]
    static = cls.as_static(arguments, SIZES[cls.rank])
    options = {k: v for k, v in arguments.items() if k not in static}
    depthwise = {"in_channels": 4, "out_channels": 4, "groups": 4}
    for change in ({}, depthwise, {"stride": 2}, depthwise | {"stride": 3, "padding": 0}):
        conv = static_conv(cls, arguments | change)
        try:
            yield conv, cls.from_conv(conv, **options)
        except ValueError:
            continue


def varying(factor=1.0, channels=6, **options):
    """A CondConv whose routing follows the input, the more the larger the factor; and batches."""
    layer = randomized(dynaconv.CondConv2d, {"in_channels": 4, "out_channels": channels} | options)
    with torch.no_grad():
        layer.routing.weight.mul_(factor)
    return layer, list(torch.randn(6, 3, 4, 9, 10).double())


def relative(given, expected):
    """|given - expected| / |expected| over lists of tensors."""
    off = torch.cat([(g - e).flatten() for g, e in zip(given, expected, strict=True)])
    whole = torch.cat([e.flatten() for e in expected])
    return (off.norm() / whole.norm()).item()


@every_class
def test_an_exact_start_becomes_its_convolution_again(cls):
    x = example(cls, CLASSES[cls], batch=8)
    for conv, layer in exact_starts(cls):
        static, report = dynaconv.freeze(layer, x[:, : conv.in_channels])
        if cls.family in SIZES_OF_THEIR_OWN:
            assert static.family == cls.family
            assert "size of its own" in report.layers[0].reason
            continue
        assert type(static) is type(conv), report
        fresh = torch.randn_like(x)[:, : conv.in_channels]
        close(static(fresh), conv(fresh), cls.__name__, 1e-8)
        # The kernel of one that follows the input's size is another one on impulses.
        assert report.layers[0].reason == "its mean kernel" or cls.family == "shapeconv"
        assert (static.bias is None) == (conv.bias is None)
        assert static.groups == conv.groups


@pytest.mark.parametrize("name", ["odconv", "involution", "deform_v2"])
@pytest.mark.parametrize(
    "place",
    [
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": (2, 1), "dilation": 2},
        {"padding": "same", "kernel_size": (2, 3), "padding_mode": "replicate"},
        {"padding": "same", "kernel_size": 2},
        {"padding": "valid", "stride": 3},
    ],
    ids=lambda place: "-".join(map(str, place.values())),
)
def test_every_place_of_the_windows(name, place):
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4} | place)
    layer, x = dynaconv.convert(conv, to=name).model, torch.randn(8, 4, 9, 10)
    static, _ = dynaconv.freeze(layer, x)
    assert static.padding == conv.padding
    assert static.padding_mode == conv.padding_mode
    close(static(x), conv(x), name, 1e-5)


def test_least_squares_is_the_least():
    """Its kernel is what a plain solver finds over the windows of the batches that count."""
    layer = randomized(dynaconv.DeformConv2d, SIX)
    batches = list(torch.randn(6, 3, 4, 9, 10).double())
    static, report = dynaconv.freeze(layer, batches, tolerance=10)
    assert "least squares over 1,080 windows" in report.layers[0].reason
    seen = torch.cat([b for i, b in enumerate(batches) if i % 4 != 1])
    rows = nn.functional.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    target = layer(seen).flatten(2).transpose(1, 2).flatten(0, 1)
    solution = torch.linalg.lstsq(rows, target).solution
    close(static.weight.flatten(1), solution[:-1].t(), "kernel", 1e-7)
    close(static.bias, solution[-1], "bias", 1e-7)


@every_class
def test_windows_are_what_the_convolution_sees(cls):
    """Windows times a kernel, and a bias, are the static convolution that is made of both."""
    for conv, layer in exact_starts(cls):
        if cls.family in SIZES_OF_THEIR_OWN:
            continue
        x = torch.randn(2, conv.in_channels, *SIZES[cls.rank]).double()
        form = StaticForm(layer, tuple(x.shape[2:]))
        weight, bias = torch.randn(form.kernel_shape).double(), torch.randn(conv.out_channels)
        windows = form.windows(x).unflatten(1 + cls.rank, (form.groups, -1)).flatten(2 + cls.rank)
        kernels = weight.unflatten(0, (form.groups, -1)).flatten(2)
        output = torch.einsum("n...gd,god->n...go", windows, kernels).flatten(-2) + bias
        close(form.make(weight, bias)(x), output.movedim(-1, 1), cls.__name__)


def test_what_windows_do_not_span_stays():
    """Least squares from a kernel on: input channel 1 is never seen, so its taps stay."""
    form = StaticForm(randomized(dynaconv.DyConv2d, SIX), (9, 10))
    start = (torch.randn(form.kernel_shape).double(), torch.randn(6).double())
    x = torch.randn(4, 4, 9, 10).double()
    x[:, 1] = 0
    squares = LeastSquares(form)
    squares.add(x, form.make(*(torch.randn_like(part) for part in start))(x))
    weight, _ = squares.solve(start)
    assert torch.equal(weight[:, 1], start[0][:, 1])
    assert not torch.isclose(weight[:, 0], start[0][:, 0]).any()
    weight, _ = squares.solve()
    assert not weight[:, 1].any()
    with pytest.raises(ValueError, match="no windows were added"):
        LeastSquares(form).solve()


def test_large_kernels_are_left_to_the_mean(monkeypatch):
    monkeypatch.setattr("dynaconv.static.study.LARGEST", 36)  # of 37 unknowns
    layer, batches = varying(kernel_size=3)
    _, report = dynaconv.freeze(layer, batches)
    assert "the error of its mean kernel is above" in report.layers[0].reason
    layer = dynaconv.ShapeConv2d(**SIX | {"kernel_size": 0.5}).double()
    _, report = dynaconv.freeze(layer, batches)
    assert report.layers[0].reason == "101 unknowns a channel are too many for least squares"


def test_taps_beyond_their_grid():
    """Positions that were learned: the kernel spans the extent, whatever its dilation was."""
    options = {"dilation": 2, "padding": 2, "interpolation": "linear"}
    layer = randomized(dynaconv.DCLSConv2d, SIX | options)
    x = torch.randn(4, 4, 9, 10).double()
    static, report = dynaconv.freeze(layer, x)
    assert static.kernel_size == (5, 5)
    assert report.layers[0].error < 1e-12


def test_few_windows_leave_the_mean_kernel():
    """Three windows for a kernel of 288 weights: it is right on other inputs all the same."""
    layer = randomized(dynaconv.ODConv2d, {"in_channels": 32, "out_channels": 8, "kernel_size": 3})
    with torch.no_grad():
        layer.attention.fc.weight.mul_(0.1)
    static, _ = dynaconv.freeze(layer, torch.randn(4, 32, 3, 3).double(), tolerance=10)
    fresh = torch.randn(4, 32, 9, 9).double()
    assert relative([static(fresh)], [layer(fresh)]) < 0.05


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.03, 1.0])
def test_the_report_says_what_one_measures(tolerance):
    layer, batches = varying(kernel_size=3, padding=1)
    head = randomized(dynaconv.DyConv2d, {"in_channels": 6, "out_channels": 5, "kernel_size": 1})
    model = nn.Sequential(layer, nn.ReLU(), head)
    everything, _ = dynaconv.freeze(model, batches, tolerance=10)
    static, report = dynaconv.freeze(model, batches, tolerance)
    held_out, others = [batches[1], batches[5]], [batches[i] for i in (0, 2, 3, 4)]
    for row, i in zip(report.layers, (0, 2), strict=True):
        assert row.name == str(i)
        for error, part in ((row.error, held_out), (row.seen, others)):
            seen = [model[:i](x) for x in part]
            measured = relative([everything[i](x) for x in seen], [model[i](x) for x in seen])
            assert error == pytest.approx(measured, rel=1e-9)
        assert row.frozen == (row.error <= tolerance) == isinstance(static[i], nn.Conv2d)
        assert ("above the tolerance" in row.reason) != row.frozen
        assert f"error {row.error:.2g}" in str(report)
    whole = relative([static(x) for x in held_out], [model(x) for x in held_out])
    assert report.error == pytest.approx(whole, rel=1e-9)
    coefficients = torch.cat([layer.kernels(x)["coefficients"] for x in others])
    size, off = report.layers[0].varies["coefficients"]
    assert size == pytest.approx(coefficients.square().mean().sqrt().item())
    spread = (coefficients - coefficients.mean(0)).square().mean().sqrt().item()
    assert off == pytest.approx(spread)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, static)]
    assert report.parameters == tuple(count)


def test_what_varies_by_position_is_averaged_over_positions():
    layer = randomized(dynaconv.Involution2d, CLASSES[dynaconv.Involution2d])
    x = torch.randn(2, 4, 9, 10).double()
    _, report = dynaconv.freeze(layer, [x, x])
    weight = layer.kernels(x)["weight"]
    size, off = report.layers[0].varies["weight"]
    assert size == pytest.approx(weight.square().mean().sqrt().item())
    spread = (weight - weight.mean((0, 4, 5), keepdim=True)).square().mean().sqrt().item()
    assert off == pytest.approx(spread)


def test_a_kernel_that_mixes_no_channels_becomes_depthwise():
    layer = randomized(dynaconv.Involution2d, CLASSES[dynaconv.Involution2d])
    with torch.no_grad():
        layer.span.weight.zero_()
    static, _ = dynaconv.freeze(layer, torch.randn(4, 4, 9, 10).double())
    assert (layer.groups, static.groups) == (1, 4)


def test_kernels_that_vary_are_kept():
    steady, batches = varying(0.01, kernel_size=3, padding=1)
    wild, _ = varying(30.0, 4, kernel_size=3, padding=1)
    model = nn.Sequential(wild, steady)
    static, report = dynaconv.freeze(model, batches)
    assert [row.frozen for row in report.layers] == [False, True]
    assert "1 of 2 dynamic layers became static at tolerance 0.01" in str(report)
    assert isinstance(static[0], dynaconv.CondConv2d)
    assert static[0] is not wild
    assert report.layers[0].varies["coefficients"][1] > 0.1


def test_the_model_stays_as_it_is_unless_inplace():
    layer, batches = varying(0.01, kernel_size=3)
    model = nn.Sequential(layer, nn.Dropout(0.5)).train()
    model[1].eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    frozen, report = dynaconv.freeze(model, batches)
    assert model[0] is layer
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not layer._forward_hooks
    assert isinstance(frozen[0], nn.Conv2d)
    assert frozen[0].training
    again, same = dynaconv.freeze(model, batches, inplace=True)
    assert again is model
    assert isinstance(model[0], nn.Conv2d)
    assert (same.error, same.parameters) == (report.error, report.parameters)


def test_one_layer_at_two_places_stays_one():
    layer, batches = varying(0.01, 4, kernel_size=3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    static, report = dynaconv.freeze(model, batches)
    assert [row.name for row in report.layers] == ["0", "2"]
    assert static[0] is static[2]
    first = [torch.relu(layer(batches[i])) for i in (1, 5)]
    inputs = [batches[1], batches[5], *first]
    error = relative([static[0](x) for x in inputs], [layer(x) for x in inputs])
    assert report.layers[0].error == pytest.approx(error, rel=1e-9)


def test_where():
    layer, batches = varying(0.01, 4, kernel_size=3)
    other, _ = varying(0.01, 4, kernel_size=3)
    model = nn.ModuleDict({"a": layer, "b": other})
    model.forward = lambda x: model["b"](model["a"](x))
    for where in ("a", lambda name, layer: name == "a", dynaconv.select(name="a")):
        static, report = dynaconv.freeze(model, batches, where=where)
        assert [row.name for row in report.layers] == ["a"]
        assert isinstance(static["b"], DynamicConv)


class Called(nn.Module):
    """A layer and how it is called."""

    def __init__(self, layer, call=lambda layer, x: layer(x)):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


def ones(x):
    return torch.ones(len(x), *x.shape[2:], dtype=torch.bool)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "call", "text"),
    [
        (dynaconv.CARAFE2d(4, 6), None, "enlarges by windows"),
        (dynaconv.LearnedStrideConv2d(**SIX), None, "a size of its own"),
        (dynaconv.AdaptiveStrideConv2d(**SIX), lambda f, x: f(x).data, "returns a Padded"),
        (hooked(dynaconv.DyConv2d(**SIX)), None, "hooks, which would be lost"),
        (dynaconv.DyConv2d(**SIX), lambda f, x: x, "inputs did not reach it"),
        (dynaconv.DyConv2d(**SIX), lambda f, x: f(x, ones(x)), "padding mask, which nn.Conv2d"),
        (dynaconv.PACConv2d(**SIX), lambda f, x: f(x, guide=x), "more than its input: guide"),
        (dynaconv.PACConv2d(**SIX), lambda f, x: f(x, None, x), "more than its input: a third"),
        (dynaconv.DyConv2d(**SIX), lambda f, x: f(x / 0), "not finite"),
        (
            dynaconv.ShapeConv2d(**SIX | {"kernel_size": 0.4}),
            lambda f, x: (f(x), f(x[..., :4, :])),
            "its kernel is (4, 4) or (2, 4) by the input",
        ),
        (
            dynaconv.ShapeConv2d(**SIX | {"padding": 0}, reference=(50, 50)),
            None,
            "leaves out the border",
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_kept_with_the_reason(layer, call, text):
    model = Called(layer, call) if call else Called(layer)
    kept, report = dynaconv.freeze(model.double(), torch.randn(4, 4, 9, 10).double())
    (row,) = report.layers
    assert type(kept.layer) is type(layer)
    assert not row.frozen
    assert text in row.reason
    assert f"layer: {layer.family}, kept, {row.reason}" in str(report)
    assert row.error is None


def test_a_causal_layer_is_kept():
    layer = dynaconv.DyConv1d(4, 6, 3, causal=True)
    _, report = dynaconv.freeze(layer, torch.randn(4, 4, 9))
    assert "pads before the input only" in report.layers[0].reason


def test_a_layer_that_only_seen_batches_reach_is_kept():
    layer, batches = varying(0.01, kernel_size=3, padding=1)
    model = Called(layer, lambda f, x: f(x) if x[0, 0, 0, 0] > 0 else x)
    for i, batch in enumerate(batches):
        batch[0, 0, 0, 0] = -1 if i % 4 == 1 else 1
    _, report = dynaconv.freeze(model, batches)
    (row,) = report.layers
    assert (row.reason, row.error) == ("no batch that is held out reached it", None)


def test_padded_batches():
    """Only real positions count, and what lies in the padding does not."""
    layer, _ = varying(0.3, kernel_size=3, padding=1, stride=2)
    model = dynaconv.MaskedSequential(layer, nn.ReLU())
    samples = [torch.randn(4, 5 + i % 4, 9 - i % 3).double() for i in range(12)]
    padded = [dynaconv.pad_batch(samples[i : i + 3], value=100.0) for i in range(0, 12, 3)]
    static, report = dynaconv.freeze(model, padded, tolerance=1)
    alone = [x.unsqueeze(0) for x in samples]
    order = [alone[i] for batch in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)) for i in batch]
    error = relative([static[0](x) for x in order[3:6]], [layer(x) for x in order[3:6]])
    assert report.layers[0].error == pytest.approx(error, rel=1e-9)
    outputs = [model(*batch).data for batch in padded[1:2]]
    whole = relative([static(*batch).data for batch in padded[1:2]], outputs)
    assert report.error == pytest.approx(whole, rel=1e-9)


def test_layers_that_share_kernels():
    """Freezing one leaves the other, which mixes the same cells, as it was."""
    model = nn.Sequential(*(dynaconv.KernelWarehouseConv2d(4, 4, 3, padding=1) for _ in range(2)))
    dynaconv.share_kernels(model)
    dynaconv.anneal(model, 0)
    x = torch.randn(4, 4, 9, 10)
    static, _ = dynaconv.freeze(model, x, where="0")
    close(static(x), model(x), "one of two", 1e-5)
    assert isinstance(static[1], dynaconv.KernelWarehouseConv2d)
    parent = nn.Conv2d(4, 4, 3, padding=1)
    child = dynaconv.KernelDNAConv2d(4, 4, 3, padding=1).derive_from(parent)
    static, _ = dynaconv.freeze(nn.Sequential(child, parent), x, tolerance=1)
    assert static[0].weight is not static[1].weight
    assert torch.equal(static[1].weight, parent.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = dynaconv.ODConv2d.from_conv(conv).to(dtype)
    static, report = dynaconv.freeze(layer, torch.randn(4, 4, 9, 10).to(dtype), tolerance=0.02)
    assert static.weight.dtype == dtype
    assert report.layers[0].frozen


def test_inputs_of_every_kind():
    layer, batches = varying(0.01, kernel_size=3)
    _, report = dynaconv.freeze(layer, batches)
    for inputs in ([(b,) for b in batches], [{"input": b} for b in batches], iter(batches)):
        assert dynaconv.freeze(layer, inputs)[1] == report
    unbatched, _ = dynaconv.freeze(layer, list(torch.randn(8, 4, 9, 10).double()))
    assert isinstance(unbatched, nn.Conv2d)
    # Of a tensor of 6 samples the third and fourth are held out.
    x = torch.cat(batches[:2])
    whole, report = dynaconv.freeze(layer, x)
    error = relative([whole(x[2:4])], [layer(x[2:4])])
    assert report.layers[0].error == pytest.approx(error, rel=1e-9)


def test_refusals():
    layer, batches = varying(kernel_size=3)
    for inputs, count in (([], 0), (batches[:1], 1), (batches[0][:1], 1), (batches[0][:0], 0)):
        with pytest.raises(ValueError, match=f"inputs hold {count} batches; give two or more"):
            dynaconv.freeze(layer, inputs)
    with pytest.raises(TypeError, match="a batch of inputs is a str; give a tensor, a tuple"):
        dynaconv.freeze(layer, ["a", "b"])
    with pytest.raises(ValueError, match="tolerance=-1 must be at least 0"):
        dynaconv.freeze(layer, batches, -1)
    with pytest.raises(ValueError, match="Conv2d has no dynamic layer"):
        dynaconv.freeze(nn.Conv2d(4, 4, 3), batches)
    with pytest.raises(ValueError, match="no dynamic layer that `where` selects"):
        dynaconv.freeze(layer, batches, where="nothing")
