"""LightConv and DynamicLightConv: formula, published results, causality, sentences, decoding."""

from itertools import product

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv import DynamicLightConv1d, LightConv1d, mask_from_sizes
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.layers.test_formulas import everywhere, make, per_channel
from tests.layers.test_golden import GOLDEN, cases, check
from tests.slow import slow_conv, value_at

KINDS = [LightConv1d, DynamicLightConv1d]
CAUSAL_CASES = [
    case
    for case in torch.load(GOLDEN / "lightconv.pt", weights_only=True)["cases"]
    if "_causal_" in case["name"]
]
CAUSAL = [
    (LightConv1d, {"heads": 2}),
    (LightConv1d, {"heads": 3, "weight_softmax": False, "out_channels": 9}),
    (DynamicLightConv1d, {"heads": 2, "dilation": 3}),
    (DynamicLightConv1d, {"heads": 6, "weight_softmax": False, "weight_bias": True}),
    (DynamicLightConv1d, {"heads": 3, "renorm_padding": True, "out_channels": 9}),
    (DynamicLightConv1d, {"heads": 3, "renorm_padding": True, "dilation": 2}),
]
causal = pytest.mark.parametrize(
    ("cls", "options"), CAUSAL, ids=[f"{c.__name__}-{i}" for i, (c, _) in enumerate(CAUSAL)]
)


def causal_layer(cls, options):
    arguments = {"in_channels": 6, "out_channels": 6, "kernel_size": 4, "causal": True}
    return randomized(cls, arguments | options)


# The published layers -----------------------------------------------------------------------------


def published(case):
    """Our layer for a recorded case, and our parameters' names -> the published ones."""
    config = case["config"]
    taps, channels = config["kernel_size"], config["input_size"]
    dynamic = config["module"] == "DynamicConv1dTBC"
    place = {"causal": True} if config["padding_l"] == taps - 1 else {"padding": "same"}
    options = {"heads": config["num_heads"], "weight_softmax": config["weight_softmax"]}
    if dynamic:
        options["renorm_padding"] = config.get("renorm_padding", False)
        options["weight_bias"] = config["bias"]
    bias = config.get("conv_bias", False) if dynamic else config["bias"]
    cls = DynamicLightConv1d if dynamic else LightConv1d
    layer = cls(channels, channels, taps, bias=bias, **place, **options)
    return layer, {("bias" if key == "conv_bias" else key): key for key in case["state"]}


@cases("lightconv")
def test_published(case):
    layer, names = published(case)
    check(layer, case, names)


# The formula as loops -----------------------------------------------------------------------------


def shares(logits, part):
    """A softmax of the logits whose part is True, as the formula reads; zero elsewhere."""
    e = torch.exp(logits) * torch.tensor(part)
    return e / e.sum()


def projected(layer, x):
    """The 1x1 convolution, channel group by channel group."""
    if layer.project is None:
        return x
    groups = zip(
        x.chunk(layer.groups, 1), layer.project.weight.flatten(1).chunk(layer.groups), strict=True
    )
    return torch.cat([torch.einsum("nc...,oc->no...", v, w) for v, w in groups], 1).detach()


def for_channels(taps, channels, kernel):
    """Kernels (heads, prod(K)) as those of channels, (C, 1, *K)."""
    rows = [taps[c * len(taps) // channels] for c in range(channels)]
    return torch.stack(rows).detach().reshape(channels, 1, *kernel)


@everywhere
@pytest.mark.parametrize("softmax", [True, False])
def test_lightconv(rank, geometry, softmax):
    layer, x, loop = make("lightconv", rank, geometry, heads=3, weight_softmax=softmax)
    taps = layer.weight.flatten(1)
    if softmax:
        taps = torch.stack([shares(row, [True] * len(row)) for row in taps])
    kernel = for_channels(taps, 6, loop["kernel"])
    expected = slow_conv(projected(layer, x), lambda n, p: kernel, **loop | {"groups": 6})
    close(layer(x), expected + per_channel(layer.bias, rank), "LightConv")


def cell_mean(x, p, kernel, stride, padding, dilation):
    """The mean of x (C, *L) over the stride cell that starts at the centre of window p."""
    starts = [
        q * s - pad + d * (k - 1) // 2
        for q, k, s, pad, d in zip(p, kernel, stride, padding, dilation, strict=True)
    ]
    cell = product(*(range(q, q + s) for q, s in zip(starts, stride, strict=True)))
    seen = [place for place in cell if inside(place, x)]
    return sum((value_at(x, q) for q in seen), torch.zeros(len(x)).double()) / max(len(seen), 1)


def inside(place, x):
    return all(0 <= q < length for q, length in zip(place, x.shape[1:], strict=True))


@everywhere
@pytest.mark.parametrize("form", ["softmax", "plain", "renorm"])
def test_dynamic_lightconv(rank, geometry, form):
    options = {"weight_softmax": form != "plain", "renorm_padding": form == "renorm"}
    layer, x, loop = make("dynamic_lightconv", rank, geometry, heads=2, weight_bias=True, **options)
    weight, bias = layer.weight_linear.weight.flatten(1), layer.weight_linear.bias
    kernel, (stride, padding, dilation) = (
        loop["kernel"],
        (loop[key] for key in ("stride", "padding", "dilation")),
    )

    def kernel_at(n, p):
        logits = weight @ cell_mean(x[n], p, kernel, stride, padding, dilation) + bias
        logits = logits.reshape(2, -1)
        if form == "plain":
            return for_channels(logits, 6, kernel)
        part = [
            form == "softmax"
            or inside(
                [p[d] * stride[d] - padding[d] + k[d] * dilation[d] for d in range(rank)], x[n]
            )
            for k in product(*map(range, kernel))
        ]
        return for_channels(torch.stack([shares(row, part) for row in logits]), 6, kernel)

    expected = slow_conv(projected(layer, x), kernel_at, **loop | {"groups": 6})
    close(layer(x), expected + per_channel(layer.bias, rank), "DynamicLightConv")


@causal
def test_causal_formula(cls, options):
    """A causal output is that of x behind dilation * (K - 1) zeros, its kernel made at p."""
    layer, x = causal_layer(cls, options), torch.randn(2, 6, 9).double()
    kernels, values, d = layer.kernels(x)["weight"], projected(layer, x), layer.dilation[0]
    expected = torch.zeros(2, layer.out_channels, 9).double()
    for n, c, p, k in product(range(2), range(layer.out_channels), range(9), range(4)):
        head, q = c * layer.heads // layer.out_channels, p - (3 - k) * d
        tap = kernels[n, head, k, p] if cls is DynamicLightConv1d else kernels[n, head, 0, k]
        expected[n, c, p] += tap.detach() * (values[n, c, q] if q >= 0 else 0)
    close(layer(x), expected + per_channel(layer.bias, 1), cls.__name__)


# Properties ---------------------------------------------------------------------------------------


@causal
def test_the_future_does_not_change_the_past(cls, options):
    layer, x = causal_layer(cls, options), torch.randn(2, 6, 11).double()
    for p in range(1, 11):
        changed = x.clone()
        changed[..., p:] = torch.randn(2, 6, 11 - p).double()
        before, after = layer(x), layer(changed)
        assert before.shape == (2, layer.out_channels, 11)
        assert torch.equal(before[..., :p], after[..., :p])
        assert not torch.isclose(before[..., p], after[..., p]).any()


@causal
@pytest.mark.parametrize("length", [1, 2, 15])
def test_steps_give_what_forward_gives(cls, options, length):
    """Also for sentences shorter than the kernel; the state never outgrows it."""
    layer, x = causal_layer(cls, options), torch.randn(3, 6, length).double()
    state, outputs = None, []
    for t in range(length):
        output, state = layer.step(x[..., t], state)
        outputs.append(output)
        assert state.window.shape == (3, layer.in_channels, min(t + 1, layer.past + 1))
    close(torch.stack(outputs, 2), layer(x), f"{cls.__name__}, step by step")


@pytest.mark.parametrize("case", CAUSAL_CASES, ids=[c["name"] for c in CAUSAL_CASES])
def test_steps_give_what_is_published(case):
    layer, names = published(case)
    layer = layer.double().eval()
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    layer.load_state_dict({n: case["state"][names[n]].reshape(s) for n, s in shapes.items()})
    past, outputs = None, []
    for x in case["inputs"]["input"].unbind(2):
        output, past = layer.step(x, past)
        outputs.append(output)
    close(torch.stack(outputs, 2), case["output"], case["name"])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("renorm", [False, True])
def test_a_softmax_kernel_sums_to_one_over_all_taps(rank, renorm):
    x = torch.randn(2, 4, *(5, 6, 4)[:rank]).double()
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "heads": 2}
    over = tuple(range(2, 2 + rank))
    cls = dynaconv.families()["dynamic_lightconv"].classes[rank]
    weight = randomized(cls, arguments | {"renorm_padding": renorm}).kernels(x)["weight"]
    assert weight.shape == (2, 2, *(3,) * rank, *x.shape[2:])
    assert (weight >= 0).all()
    close(weight.sum(over), torch.ones(2, 2, *x.shape[2:]).double(), "taps of DynamicLightConv")
    corner = weight[(0, 0, *(0,) * rank, *(0,) * rank)]  # reads before the input in each dimension
    assert (corner == 0) == renorm
    light = randomized(dynaconv.families()["lightconv"].classes[rank], arguments)
    weight = light.kernels(x)["weight"]
    assert weight.shape == (2, 2, 1, *(3,) * rank)
    close(weight.flatten(2).sum(2), torch.ones(2, 2).double(), "taps of LightConv")


@pytest.mark.parametrize(
    ("cls", "options"),
    [(cls, {}) for cls in KINDS] + [(DynamicLightConv1d, {"renorm_padding": True})],
)
@pytest.mark.parametrize("place", [{"causal": True}, {"padding": "same"}, {"padding": 3}])
@pytest.mark.parametrize("kernel", [2, 7])
def test_a_sentence_in_any_batch(cls, options, place, kernel):
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": kernel, "heads": 2}
    layer = randomized(cls, arguments | place | options)
    lengths = [1, 3, 6, 13]
    mask = mask_from_sizes(lengths, (13,))
    x = torch.randn(4, 4, 13).double().masked_fill(~mask.unsqueeze(1), float("inf"))
    output, real = layer(x, mask), layer.output_mask(mask).sum(1).tolist()
    for n, length in enumerate(lengths):
        alone = layer(x[n : n + 1, :, :length])
        assert alone.shape[2] == real[n]
        close(output[n : n + 1, :, : real[n]], alone, f"a sentence of {length}")


def test_windows_beyond_the_input_give_the_bias():
    """Under renorm_padding their softmax has no tap to fall on."""
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "padding": 3, "heads": 2}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = randomized(DynamicLightConv1d, arguments | {"renorm_padding": True}).to(dtype)
        x = torch.randn(2, 4, 5).to(dtype).requires_grad_()
        output = layer(x)
        output.sum().backward()
        assert torch.equal(output[..., 0], layer.bias.expand(2, 4))
        assert x.grad.isfinite().all()
        assert layer.weight_linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["lightconv", "dynamic_lightconv"])
def test_dropout_in_training_only(rank, name):
    """A pulse reads one tap a position: it is gone, or 1 / (1 - p) times itself, head by head."""
    arguments = {"in_channels": 6, "out_channels": 6, "kernel_size": 5, "padding": 2, "heads": 2}
    cls = dynaconv.families()[name].classes[rank]
    layer = randomized(cls, arguments | {"weight_dropout": 0.25, "bias": False})
    x = torch.zeros(40, 6, *(5,) * rank).double()
    x[(slice(None), slice(None), *(2,) * rank)] = 1
    plain = layer(x)
    assert torch.equal(plain, layer(x))
    dropped = layer.train()(x)
    kept = dropped != 0
    assert plain.all()
    close(dropped, torch.where(kept, plain / 0.75, 0), name)
    heads = kept.unflatten(1, (2, 3))
    assert torch.equal(heads, heads[:, :, :1].expand_as(heads))  # one kernel a head
    assert not torch.equal(kept[:, 0], kept[:, 3])
    assert not torch.equal(kept[0], kept[1])
    count, share = heads[:, :, 0].numel(), heads[:, :, 0].double().mean().item()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / count) ** 0.5


@pytest.mark.parametrize("cls", KINDS)
def test_a_dropped_kernel_is_differentiated_as_it_was_drawn(cls):
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "heads": 2}
    layer = randomized(cls, arguments | {"weight_dropout": 0.5}).train()

    def seeded(x):
        torch.manual_seed(1)
        return layer(x)

    x = torch.randn(2, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(seeded, x)


# Exact starts and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["lightconv", "dynamic_lightconv"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_starts_as_a_depthwise_convolution(rank, name, padding):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 4, 3, padding=padding, groups=4).double()
    layer = dynaconv.families()[name].classes[rank].from_conv(conv)
    x = torch.randn(2, 4, *(6, 5, 4)[:rank]).double()
    close(layer(x), conv(x), name)
    layer.train()(x).square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize(
    ("conv", "options", "text"),
    [
        ({"groups": 4}, {"weight_softmax": True}, "sum to 1"),
        ({"groups": 4}, {"heads": 2}, "heads=2"),
        ({"groups": 2}, {}, "depthwise"),
        ({"groups": 4, "out_channels": 8}, {}, "4 to 8 channels"),
        ({"groups": 4}, {"causal": True}, "before the input only"),
    ],
)
def test_what_cannot_start_exactly(cls, conv, options, text):
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    with pytest.raises(ValueError, match=text):
        cls.from_conv(nn.Conv1d(**arguments | conv), **options)


def test_an_exact_start_needs_the_generators_bias():
    with pytest.raises(ValueError, match="give weight_bias=True"):
        DynamicLightConv1d.from_conv(nn.Conv1d(4, 4, 3, groups=4), weight_bias=False)


@pytest.mark.parametrize("name", ["lightconv", "dynamic_lightconv"])
@pytest.mark.parametrize(
    ("rank", "options", "text"),
    [
        (2, {"causal": True}, "causal=True is for 1-D"),
        (3, {"causal": True}, "causal=True is for 1-D"),
        (1, {"causal": True, "padding": 2}, "leave padding=0"),
        (1, {"causal": True, "padding": "same"}, "leave padding=0"),
        (1, {"causal": True, "padding_mode": "circular"}, "leave padding=0"),
        (1, {"causal": True, "stride": 2}, "needs stride 1"),
        (1, {"heads": 0}, "heads=0 must be at least 1"),
        (2, {"heads": 4}, "heads=4 does not divide 6"),
        (1, {"weight_dropout": -0.1}, "weight_dropout=-0.1"),
        (1, {"weight_dropout": 1.0}, "weight_dropout=1.0 must be below 1"),
    ],
)
def test_refused_options(name, rank, options, text):
    with pytest.raises(ValueError, match=text):
        dynaconv.families()[name].classes[rank](6, 6, 3, **options)


@pytest.mark.parametrize("options", [{"weight_softmax": False}, {"padding_mode": "reflect"}])
def test_renorm_padding_needs_a_softmax_and_zeros(options):
    with pytest.raises(ValueError, match="leaves taps beyond the input out"):
        DynamicLightConv1d(4, 4, 3, padding=1, renorm_padding=True, **options)


@pytest.mark.parametrize("cls", KINDS)
def test_refused_steps(cls):
    with pytest.raises(ValueError, match="step needs causal=True"):
        cls(4, 4, 3, padding="same").step(torch.randn(2, 4))
    for shape in ((2, 5), (2, 4, 1), (4,)):
        with pytest.raises(ValueError, match="give \\(N, 4\\)"):
            cls(4, 4, 3, causal=True).step(torch.randn(shape))
