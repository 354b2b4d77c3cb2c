"""Up-samplers that follow the content: formula, published outputs, properties."""

from itertools import product
from math import floor, prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv.layers.interleave import interleave
from dynaconv.masking import mask_from_sizes
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.layers.test_formulas import per_channel
from tests.layers.test_golden import cases, check
from tests.slow import interpolated, value_at

SIZES = {1: (7,), 2: (4, 5), 3: (3, 2, 4)}
FACTORS = [2, 3, (2, 3, 1)]
ranks = pytest.mark.parametrize("rank", [1, 2, 3])
everywhere = pytest.mark.parametrize(
    ("rank", "stride"),
    [
        pytest.param(r, f if isinstance(f, int) else f[:r], id=f"{r}d-{i}")
        for r, (i, f) in product((1, 2, 3), enumerate(FACTORS))
    ],
)


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


def make(name, rank, in_channels, out_channels, **arguments):
    torch.manual_seed(rank)
    given = {"in_channels": in_channels, "out_channels": out_channels, **arguments}
    layer = randomized(cls_of(name, rank), given)
    return layer, torch.randn(2, in_channels, *SIZES[rank], dtype=torch.float64)


def pointwise(conv, x, groups=1):
    """A 1x1 convolution of x (C, *L) as a matrix for each group."""
    parts = zip(conv.weight.flatten(1).chunk(groups), x.chunk(groups), strict=True)
    made = torch.cat([torch.tensordot(w, part, 1) for w, part in parts])
    return made if conv.bias is None else made + per_channel(conv.bias, x.dim() - 1)


def every(*sizes):
    return product(*map(range, sizes))


# Formulas as slow loops --------------------------------------------------------------------


def reassembly_weights(layer, x, cell, sub, dilation):
    """Softmax over the taps, (G, prod(K)), for the sub-position `sub` of x (C, *L) at `cell`."""
    compressed = pointwise(layer.channel_compressor, x)
    encoder = layer.content_encoder
    logits = encoder.bias.clone()
    for tap in every(*encoder.weight.shape[2:]):
        place = [
            c + dilation * (t - n // 2)
            for c, t, n in zip(cell, tap, encoder.weight.shape[2:], strict=True)
        ]
        logits += encoder.weight[(..., *tap)] @ value_at(compressed, place)
    logits = logits.reshape(layer.groups, prod(layer.kernel_size), *layer.stride)
    exponentials = torch.exp(logits[(..., *sub)])
    return exponentials / exponentials.sum(1, keepdim=True)


@everywhere
@pytest.mark.parametrize("case", ["plain", "grouped", "projected"])
@torch.no_grad()
def test_carafe(rank, stride, case):
    channels = (4, 6) if case == "projected" else (4, 4)
    groups, dilation = (1, 1) if case == "plain" else (2, 2)
    options = {"compressed_channels": 3, "encoder_dilation": dilation, "groups": groups}
    kernel = 3 if case == "plain" else (5, 1, 3)[:rank]
    layer, x = make("carafe", rank, *channels, kernel_size=kernel, stride=stride, **options)
    kernels, output = layer.kernels(x)["weight"], layer(x)
    size = [n * s for n, s in zip(SIZES[rank], layer.stride, strict=True)]
    expected = torch.zeros(2, channels[1], *size, dtype=x.dtype)
    for n, q in product(range(2), every(*size)):
        cell = [i // s for i, s in zip(q, layer.stride, strict=True)]
        sub = [i % s for i, s in zip(q, layer.stride, strict=True)]
        weights = reassembly_weights(layer, x[n], cell, sub, dilation)
        seen = x[n] if layer.project is None else pointwise(layer.project, x[n], groups)
        for i, tap in enumerate(every(*layer.kernel_size)):
            place = [c + t - k // 2 for c, t, k in zip(cell, tap, layer.kernel_size, strict=True)]
            value = value_at(seen, place).reshape(groups, -1)
            expected[(n, slice(None), *q)] += (weights[:, i, None] * value).flatten()
        given = kernels[n].flatten(1, rank)[(..., *q)]
        close(given, weights, "the kernels shown")
    close(output, expected + per_channel(layer.bias, rank), "CARAFE")


def offsets(layer, x, q):
    """(G, D), first dimension first, for the output position q of x (C, *L)."""
    rank, stride = layer.rank, layer.stride
    cell = tuple(i // s for i, s in zip(q, stride, strict=True))
    sub = tuple(i % s for i, s in zip(q, stride, strict=True))
    features = x[(slice(None), *cell)]
    if layer.style == "pl":
        features = features.reshape(-1, *stride)[(slice(None), *sub)]
    scope = 0.25
    made = pointwise(layer.offset, features.reshape(-1, *(1,) * rank)).flatten()
    if layer.scope is not None:
        scope = torch.sigmoid(layer.scope.weight.flatten(1) @ features) / 2
    made = scope * made
    if layer.style == "lp":
        made = made.reshape(-1, *stride)[(slice(None), *sub)]
    return made.reshape(rank, -1).flip(0).T


@everywhere
@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize("dyscope", [False, True])
@torch.no_grad()
def test_dysample(rank, stride, style, dyscope):
    count = prod(stride) if isinstance(stride, tuple) else stride**rank
    channels = 2 * count if style == "pl" else 6
    out_channels = channels if dyscope else 4
    options = {"style": style, "dyscope": dyscope, "offset_groups": 2}
    layer, x = make("dysample", rank, channels, out_channels, stride=stride, **options)
    layer.offset.weight.mul_(5)  # points beyond the border now and then
    shown, output = layer.kernels(x)["offset"], layer(x)
    size = [n * s for n, s in zip(SIZES[rank], layer.stride, strict=True)]
    expected = torch.zeros(2, out_channels, *size, dtype=x.dtype)
    beyond = 0
    for n, q in product(range(2), every(*size)):
        shift = offsets(layer, x[n], q)
        close(shown[(n, slice(None), *q)], shift.flatten(), "the offsets shown")
        seen = x[n] if layer.project is None else pointwise(layer.project, x[n])
        values = []
        for g, part in enumerate(seen.chunk(2)):
            place = [
                (i + 0.5) / s - 0.5 + o
                for i, s, o in zip(q, layer.stride, shift[g].tolist(), strict=True)
            ]
            inside = [
                min(max(p, 0.0), length - 1.0) for p, length in zip(place, SIZES[rank], strict=True)
            ]
            beyond += place != inside
            values.append(interpolated(part, inside))
        expected[(n, slice(None), *q)] = torch.cat(values)
    assert beyond > 0
    close(output, expected + per_channel(layer.bias, rank), "DySample")


# Published outputs -------------------------------------------------------------------------


def carafe(config):
    return dynaconv.CARAFE2d(
        config["channels"],
        config["channels"],
        config.get("up_kernel", 5),
        config["scale_factor"],
        groups=config.get("up_group", 1),
        bias=False,
        compressed_channels=config["compressed_channels"],
        encoder_kernel=config.get("encoder_kernel", 3),
        encoder_dilation=config.get("encoder_dilation", 1),
    )


@cases("carafe")
def test_published_carafe(case):
    layer = carafe(case["config"])
    assert set(layer.state_dict()) == set(case["state"])
    check(layer, case, {key: key for key in case["state"]})


@cases("dysample")
def test_published_dysample(case):
    config = case["config"]
    layer = dynaconv.DySample2d(
        config["in_channels"],
        config["in_channels"],
        stride=config["scale"],
        bias=False,
        style=config["style"],
        offset_groups=config["groups"],
        dyscope=config["dyscope"],
    )
    names = {key: key for key in case["state"] if key != "init_pos"}
    assert set(layer.state_dict()) == set(names)
    check(layer, case, names)


# Properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_interleave_is_pixel_shuffle(factor):
    x = torch.randn(2, 3 * factor**2, 4, 5)
    assert torch.equal(interleave(x, (factor, factor)), F.pixel_shuffle(x, factor))


@everywhere
@pytest.mark.parametrize("options", [{}, {"style": "pl", "dyscope": True}], ids=["lp", "pl"])
def test_dysample_starts_as_linear_upsampling(rank, stride, options):
    factors = stride if isinstance(stride, tuple) else (stride,) * rank
    mode, channels = ["linear", "bilinear", "trilinear"][rank - 1], 4 * prod(factors)
    static = nn.Upsample(scale_factor=tuple(map(float, factors)), mode=mode)
    layer = cls_of("dysample", rank).from_upsample(static, channels, **options).double()
    x = torch.randn(2, channels, *SIZES[rank], dtype=torch.float64)
    close(layer(x), static(x), "from_upsample")
    layer(x).square().sum().backward()
    assert layer.offset.weight.grad.any()
    assert not layer.kernels(x)["offset"].any()


@ranks
def test_fresh_layers_are_near_their_static_start(rank):
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *(n + 1 for n in SIZES[rank]), dtype=torch.float64)
    mode = ["linear", "bilinear", "trilinear"][rank - 1]
    fresh = cls_of("dysample", rank)(4, 4, stride=2).double()
    assert fresh.offset_groups == 4
    close(fresh(x), F.interpolate(x, scale_factor=2, mode=mode), "near linear", 5e-3)
    kernels = cls_of("carafe", rank)(4, 4, 3, stride=2).double().kernels(x)["weight"]
    assert kernels.shape == (2, 1, *(3,) * rank, *(2 * n for n in x.shape[2:]))
    assert (kernels * 3**rank - 1).abs().max() < 0.3, "not near the mean"


@ranks
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_carafe_with_constant_weights_is_a_static_convolution(rank, padding_mode):
    """One kernel for each sub-position, whatever the content."""
    torch.manual_seed(rank)
    layer = cls_of("carafe", rank)(3, 3, 3, padding_mode=padding_mode).double()
    x = torch.randn(2, 3, *(n + 1 for n in SIZES[rank]), dtype=torch.float64)
    nn.init.zeros_(layer.content_encoder.weight)
    nn.init.normal_(layer.content_encoder.bias)
    kernels = torch.softmax(layer.content_encoder.bias.reshape(3**rank, 2**rank), 0).T
    conv_cls = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1]
    conv = conv_cls(1, 2**rank, 3, padding=1, bias=False, padding_mode=padding_mode).double()
    conv.weight = nn.Parameter(kernels.reshape(conv.weight.shape).detach())
    made = torch.cat([conv(x[:, c : c + 1]) for c in range(3)], 1)
    close(layer(x), interleave(made, (2,) * rank), "CARAFE with constant weights")


@ranks
def test_carafe_on_a_circle_has_no_border(rank):
    """Encoder and reassembly both pad around: a turned input gives the turned output."""
    layer, x = make("carafe", rank, 4, 4, kernel_size=3, stride=2, padding_mode="circular")
    over = list(range(2, 2 + rank))
    turned = layer(x.roll([1] * rank, over))
    close(turned, layer(x).roll([2] * rank, over), "a turned input")


@ranks
@pytest.mark.parametrize("name", ["carafe", "dysample"])
def test_samples_of_one_position_in_a_padded_batch(rank, name):
    """Where the border lies is each sample's own."""
    layer, x = make(name, rank, 4, 4, stride=(3, 2, 2)[:rank])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(4)
    full = list(SIZES[rank])
    sizes = [[1] * rank, [2] * (rank - 1) + [full[-1]], [2] * rank, full]
    x = torch.cat([x, x.flip(0)])
    mask = mask_from_sizes(torch.tensor(sizes), full)
    output = layer(x.masked_fill(~mask.unsqueeze(1), float("nan")), mask)
    for n, size in enumerate(sizes):
        alone = layer(x[(slice(n, n + 1), slice(None), *(slice(length) for length in size))])
        ends = [length * s for length, s in zip(size, layer.stride, strict=True)]
        block = (slice(n, n + 1), slice(None), *(slice(end) for end in ends))
        close(output[block], alone, f"a sample of size {size}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_places_keep_their_digits_in_half_precision(dtype, autocast):
    """At position 3000 half precision knows no halves."""
    layer = dynaconv.DySample1d(1, 1, stride=2)
    nn.init.zeros_(layer.offset.weight)
    x = torch.arange(4000).remainder(2).reshape(1, 1, -1)
    if autocast:
        with torch.autocast("cpu", dtype):
            output = layer(x.float())
            assert layer.kernels(x.float())["offset"].dtype == torch.float32
    else:
        output = layer.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    expected = F.interpolate(x.double(), scale_factor=2, mode="linear")
    close(output, expected, "places", 5e-3)


def test_any_size_of_the_output_position():
    """The last output position lies in the last cell, floor(q / stride)."""
    layer, x = make("carafe", 1, 2, 2, kernel_size=1, stride=3)
    output = layer(x) - per_channel(layer.bias, 1)
    expected = torch.stack([x[..., floor(q / 3)] for q in range(21)], -1)
    close(output, expected, "one tap repeats the input")


def test_refusals():
    carafe, dysample = dynaconv.CARAFE2d, dynaconv.DySample2d
    start = dysample.from_upsample
    for text, call in (
        ("kernel_size=.4, 4. must be odd", lambda: carafe(4, 4, 4)),
        ("encoder_kernel=.2,. must be odd", lambda: carafe(4, 4, encoder_kernel=2)),
        ("compressed_channels=0", lambda: carafe(4, 4, compressed_channels=0)),
        ("leave padding=0", lambda: carafe(4, 4, padding=1)),
        ("leave padding=0", lambda: dysample(4, 4, dilation=2)),
        ("kernel_size=.3, 3.: one point", lambda: dysample(4, 4, 3)),
        ("style='xy'", lambda: dysample(4, 4, style="xy")),
        ("offset_groups=3", lambda: dysample(4, 4, offset_groups=3)),
        ("offset_groups=0", lambda: dysample(4, 4, offset_groups=0)),
        ("4 sub-positions", lambda: dysample(6, 4, style="pl")),
        ("padding_mode='reflect'", lambda: dysample(4, 4, padding_mode="reflect")),
        ("mode='bilinear'", lambda: start(nn.Upsample(scale_factor=2), 4)),
        ("whole number", lambda: start(nn.Upsample(scale_factor=1.5, mode="bilinear"), 4)),
        ("whole number", lambda: start(nn.Upsample(size=8, mode="bilinear"), 4)),
        (
            "not as",
            lambda: start(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), 4),
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
