"""Families whose kernel size follows each region: formula, published outputs, properties."""

from itertools import pairwise, product
from math import pi

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.masking import mask_from_sizes
from dynaconv.testing import close
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check, with_norm
from tests.slow import interpolated, slow_conv

ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def conv_nd(rank, *args, **kwargs):
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](*args, **kwargs).double()


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


def linear(layer, vectors):
    return vectors @ layer.weight.T + layer.bias


# Formulas as slow loops --------------------------------------------------------------------


def standardised(weight, gamma, beta):
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (flat.shape[1] - 1) + 1e-5).sqrt()
    return (gamma.flatten(1) * centred / deviation + beta.flatten(1)).reshape(weight.shape)


def mirrored(q, length):
    """q, walked back from the border as often as it crosses it."""
    while not 0 <= q < length:
        q = -q if q < 0 else 2 * (length - 1) - q
        q = 0 if length == 1 else q
    return q


def pooled(x, centre):
    """Mean of x (C, *L) over 5 positions a dimension around `centre`."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for shift in product(range(-2, 3), repeat=len(centre)):
        place = [
            mirrored(c + s, length) for c, s, length in zip(centre, shift, x.shape[1:], strict=True)
        ]
        total += x[(slice(None), *place)]
    return total / 5 ** len(centre)


@everywhere
@pytest.mark.parametrize("aws", [True, False])
def test_switchable_atrous(rank, geometry, aws):
    layer, x, loop = make("switchable_atrous", rank, geometry, aws=aws)
    weight = layer.weight.detach()
    if aws:
        layer.weight_gamma.uniform_(0.5, 1.5)
        layer.weight_beta.normal_(0, 0.3)
        weight = standardised(weight, layer.weight_gamma, layer.weight_beta)
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    x_ = x + per_channel(linear(layer.pre_context, x.flatten(2).mean(2)), rank)
    x_ = x_.detach()
    small = slow_conv(x_, lambda n, q: weight, **loop)
    changed = (weight + layer.weight_diff).detach()
    far = {"padding": (p + d * (k - 1),) * rank, "dilation": (3 * d,) * rank}
    large = slow_conv(x_, lambda n, q: changed, **loop | far)
    switch = torch.zeros(2, 1, *small.shape[2:], dtype=x.dtype)
    for n, q in product(range(2), product(*map(range, small.shape[2:]))):
        mean = pooled(x_[n], [i * s - p + d * (k - 1) // 2 for i in q])
        switch[(n, 0, *q)] = (layer.switch.weight.flatten() @ mean + layer.switch.bias).detach()
    u = switch * small + (1 - switch) * large + per_channel(layer.bias, rank)
    expected = u + per_channel(linear(layer.post_context, u.flatten(2).mean(2)), rank)
    close(layer.kernels(x)["switch"], switch, "switch")
    close(layer(x), expected, "SAC")


def low_pass(x, band):
    """x (N, C, *L) with the frequencies f that lie in a box of 1 / band of the spectrum."""
    y = x.to(torch.complex128)
    for d, length in enumerate(x.shape[2:]):
        start, stop = (round(length / 2 + side * length / (2 * band)) for side in (-1, 1))
        kept = torch.tensor([float(i - length // 2) for i in range(start, stop)])
        index = torch.arange(length).double()
        phase = 2 * pi / length * kept.double() * (index[:, None, None] - index[None, :, None])
        projection = torch.polar(torch.ones_like(phase), phase).sum(2) / length
        y = torch.einsum("...m,nm->...n", y.movedim(2 + d, -1), projection).movedim(-1, 2 + d)
    return y.real


def selected(select, x):
    """FreqSelect: every band times its weight."""
    rank = x.dim() - 2
    loop = dict.fromkeys(("stride", "padding", "dilation"), (1,) * rank)
    gates = []
    for conv in select.convs:
        weight, bias = conv.weight.detach(), conv.bias.detach()
        logits = slow_conv(x, lambda n, p, w=weight: w, kernel=(3,) * rank, **loop)
        gates.append(2 * torch.sigmoid(logits + per_channel(bias, rank)))
    lows = [x, *(low_pass(x, band) for band in select.bands)]
    gates += [1.0] * (len(lows) - len(gates))
    highs = [above - below for above, below in pairwise(lows)]
    return sum(gate * part for gate, part in zip(gates, [*highs, lows[-1]], strict=True))


def factors(ratio, x):
    hidden = x.flatten(2).mean(2) @ ratio.squeeze.fc.weight.T
    hidden = ratio.squeeze.bn(hidden).clamp(min=0)
    heads = (linear(fc, hidden) for fc in (ratio.channel_fc, ratio.filter_fc))
    return [2 * torch.sigmoid(logits).detach() for logits in heads]


OPTIONS = [
    {"offset_groups": 2},
    {"zero_dilation": True, "gate_scale": 1.5, "low_band": True, "adapt_high": False},
    {"dilation_bound": 3.0, "adapt_low": False, "bands": (2, 3)},
    {"adapt_low": False, "adapt_high": False, "bands": ()},
]


@everywhere
@pytest.mark.parametrize("options", OPTIONS, ids=["groups", "paper", "bound", "plain"])
def test_adaptive_dilation(rank, geometry, options):
    layer, x, loop = make("adaptive_dilation", rank, geometry, **options)
    with torch.no_grad():  # dilations that leave the input now and then
        layer.offset_conv.weight *= 2
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    x_ = (selected(layer.select, x) if layer.select else x).detach()
    undilated = {"padding": (p - (d - 1) * (k - 1) // 2,) * rank, "dilation": (1,) * rank}

    def generated(conv):
        weight = conv.weight.detach()
        made = slow_conv(x_, lambda n, q: weight, **loop | undilated | {"groups": 1})
        return made + per_channel(conv.bias.detach(), rank)

    o = generated(layer.offset_conv)
    dilation = d * (1 + o).clamp(min=0) if layer.zero_dilation else 1 + d * o.abs()
    if layer.dilation_bound:
        room = layer.dilation_bound - d
        dilation = d + room * torch.tanh((dilation - d) / room)
    modulation = layer.gate_scale * torch.sigmoid(generated(layer.modulation_conv))
    modulation = modulation.unflatten(1, (-1, *loop["kernel"]))
    # (o, c) -> the input channel that weight[o, c] reads
    per_group, into = 6 // geometry["groups"], 4 // geometry["groups"]
    channel_of = torch.tensor([[i // per_group * into + c for c in range(into)] for i in range(6)])

    def kernel_of(n):
        mean = layer.weight.detach().flatten(2).mean(2)
        parts = [per_channel(mean, rank), layer.weight.detach() - per_channel(mean, rank)]
        for i, ratio in enumerate((layer.low, layer.high)):
            if ratio is not None:
                channel, filter = (v[n] for v in factors(ratio, x_))
                parts[i] = parts[i] * per_channel(channel[channel_of] * filter[:, None], rank)
        return sum(parts)

    kernels = [kernel_of(n) for n in range(2)]

    def read(n, q, tap, position):
        groups = x_[n].chunk(layer.offset_groups)
        seen = []
        for g, channels in enumerate(groups):
            apart = dilation[(n, g, *q)].item()
            place = [
                i * s - p + d * (k - 1) / 2 + apart * (t - (k - 1) / 2)
                for i, t in zip(q, tap, strict=True)
            ]
            seen.append(modulation[(n, g, *tap, *q)] * interpolated(channels, place))
        return torch.cat(seen)

    expected = slow_conv(x_, lambda n, q: kernels[n], **loop, read=read)
    close(layer(x), expected + per_channel(layer.bias.detach(), rank), "FADC")
    size = (dilation.mean(1, keepdim=True) * (k - 1) + 1).detach()
    close(layer.kernels(x)["size"], size, "size")


# Published outputs -------------------------------------------------------------------------


@cases("switchable_atrous")
def test_published_switchable_atrous(case):
    config = {key: value for key, value in case["config"].items() if key != "training"}
    names = {f"switch.{key}": f"switch.{key}" for key in ("weight", "bias")}
    for key in ("pre_context", "post_context"):
        names |= {f"{key}.{end}": f"{key}.{end}" for end in ("weight", "bias")}
    names |= {key: key for key in ("weight", "weight_diff", "weight_gamma", "weight_beta")}
    check(dynaconv.SwitchableAtrousConv2d(**config), case, names)


@cases("adaptive_dilation")
def test_published_adaptive_dilation(case):
    config = case["config"]
    part, dilation = config.get("kernel_decompose", "both"), config.get("dilation", 1)
    select = config.get("fs_cfg", {"k_list": [2, 4, 8], "lowfreq_att": False})
    bands = select["k_list"] if select else ()
    layer = dynaconv.AdaptiveDilationConv2d(
        config["in_channels"],
        config["out_channels"],
        config["kernel_size"],
        config.get("stride", 1),
        dilation,  # half padding
        dilation,
        config.get("groups", 1),
        config.get("bias", True),
        "replicate" if config.get("padding_mode", "repeat") == "repeat" else "zeros",
        zero_dilation=config.get("use_zero_dilation", False),
        offset_groups=config.get("deform_groups", 1),
        adapt_low=part in ("both", "low"),
        adapt_high=part in ("both", "high"),
        bands=bands,
        low_band=bool(select) and select["lowfreq_att"],
    )
    names = {"weight": "weight"} | ({"bias": "bias"} if layer.bias is not None else {})
    pairs = {"offset_conv": "conv_offset", "modulation_conv": "conv_mask"}
    for i in range(len(layer.select.convs) if bands else 0):
        pairs[f"select.convs.{i}"] = f"FS.freq_weight_conv_list.{i}"
    published = {"low": "OMNI_ATT1", "high": "OMNI_ATT2"} if part == "both" else {part: "OMNI_ATT"}
    for ours, theirs in published.items() if part else ():
        names[f"{ours}.squeeze.fc.weight"] = f"{theirs}.fc.weight"
        names |= with_norm({f"{ours}.squeeze.bn": f"{theirs}.bn"})
        pairs |= {f"{ours}.{fc}": f"{theirs}.{fc}" for fc in ("channel_fc", "filter_fc")}
    for ours, theirs in pairs.items():
        names |= {f"{ours}.{key}": f"{theirs}.{key}" for key in ("weight", "bias")}
    assert set(names.values()) == set(case["state"])
    check(layer, case, names)


# Properties --------------------------------------------------------------------------------


@ranks
@pytest.mark.parametrize("geometry", [(3, 1, 1, 1), (2, 2, 1, 1), (3, 2, 0, 2), (5, 1, 2, 1)])
def test_the_switch_chooses_between_two_static_convolutions(rank, geometry):
    k, s, p, d = geometry
    torch.manual_seed(rank)
    options = {"aws": False, "pre_context": False, "post_context": False}
    layer = cls_of("switchable_atrous", rank)(4, 6, k, s, p, d, 2, **options).double()
    x = torch.randn(2, 4, *(length + 4 for length in SIZES[rank]), dtype=torch.float64)
    for choice, factor in ((1, 1), (0, 3)):
        grown = p + (factor - 1) * d * (k - 1) // 2
        static = conv_nd(rank, 4, 6, k, s, grown, factor * d, 2)
        static.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        nn.init.constant_(layer.switch.bias, choice)
        close(layer(x), static(x), f"SAC with S = {choice}")
        size = layer.kernels(x)["size"]
        assert (size == factor * d * (k - 1) + 1).all()


@ranks
@pytest.mark.parametrize(("k", "d", "constant"), [(3, 1, 2), (3, 2, 5), (3, 3, 1), (2, 1, 3)])
def test_constant_dilation_is_a_static_convolution(rank, k, d, constant):
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *(length + 2 for length in SIZES[rank]), dtype=torch.float64)
    static = conv_nd(rank, 4, 6, k, 2, constant * (k - 1) // 2 + 1, constant, 2)
    layer = cls_of("adaptive_dilation", rank)(
        4, 6, k, 2, d * (k - 1) // 2 + 1, d, 2, zero_dilation=True, gate_scale=2.0, bands=(2, 4)
    ).double()
    with torch.no_grad():
        layer.init_from(static)
        layer.bias.copy_(static.bias)
    nn.init.constant_(layer.offset_conv.bias, constant / d - 1)
    close(layer(x), static(x), "FADC at one dilation")
    close(
        layer.kernels(x)["size"], torch.full_like(layer(x)[:, :1], constant * (k - 1) + 1), "size"
    )


@pytest.mark.parametrize("name", ["switchable_atrous", "adaptive_dilation"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": (2, 4), "padding": "valid", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 2, "padding": (1, 2), "padding_mode": "circular"},
        {"kernel_size": 3, "padding": "same", "padding_mode": "replicate", "dilation": 2},
    ],
)
def test_any_geometry_starts_as_the_static_convolution(name, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **geometry).double()
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    layer = cls_of(name, 2).from_conv(conv)
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    moving = layer.switch if name == "switchable_atrous" else layer.offset_conv
    assert moving.weight.grad.any(), "what chooses the size cannot learn"


def test_the_dilation_starts_as_published():
    layer = dynaconv.AdaptiveDilationConv2d(4, 6, 3, padding=3, dilation=3).double()
    size = layer.kernels(torch.randn(2, 4, 9, 9, dtype=torch.float64))["size"]
    epsilon = (size - 1) / 2 / 3 - 1
    close(epsilon, torch.full_like(epsilon, 1e-4), "epsilon", 1e-2)  # a float32 bias


@ranks
def test_the_dilation_is_bounded(rank):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *SIZES[rank])
    cls = cls_of("adaptive_dilation", rank)
    layer = cls(4, 6, 3, padding=1, bands=(), adapt_low=False, adapt_high=False)
    nn.init.constant_(layer.offset_conv.bias, 1e30)
    centre = 0.5 * torch.einsum("oc,nc...->no...", layer.weight[(..., *(1,) * rank)], x)
    expected = centre + per_channel(layer.bias, rank)
    close(layer(x), expected.double(), "only the central tap is left", 1e-5)
    bounded = cls(4, 6, 3, padding=1, dilation_bound=4.0)
    nn.init.constant_(bounded.offset_conv.bias, 1e30)
    assert (bounded.kernels(x)["size"] == 9).all()
    assert bounded(x).isfinite().all()


@ranks
@pytest.mark.parametrize("name", ["switchable_atrous", "adaptive_dilation"])
def test_samples_of_one_position_in_a_padded_batch(rank, name):
    """Where a border reflects, and which spectrum there is, are each sample's own."""
    torch.manual_seed(rank)
    layer, x, _ = make(
        name, rank, {"kernel_size": 3, "padding": 1, "stride": 1, "dilation": 1, "groups": 1}
    )
    full = list(SIZES[rank])
    sizes = [[1] * rank, [2] * (rank - 1) + [full[-1]], [2] * rank, full]
    x = torch.cat([x, x.flip(0)])
    output = layer(x, mask_from_sizes(torch.tensor(sizes), full))
    for n, size in enumerate(sizes):
        block = (slice(n, n + 1), slice(None), *(slice(length) for length in size))
        close(output[block], layer(x[block]), f"a sample of size {size}")


def test_refusals():
    sac, fadc = dynaconv.SwitchableAtrousConv2d, dynaconv.AdaptiveDilationConv2d
    conv = nn.Conv2d(4, 6, 3)
    for text, call in (
        ("no size to switch", lambda: sac(4, 6, 1)),
        ("same on both sides", lambda: sac(4, 6, 2, rate=2)),
        ("rate=1", lambda: sac(4, 6, 3, rate=1)),
        ("no dilation", lambda: fadc(4, 6, 1)),
        ("offset_groups=3", lambda: fadc(4, 6, 3, offset_groups=3)),
        ("offset_groups=0", lambda: fadc(4, 6, 3, offset_groups=0)),
        ("dilation_bound=2", lambda: fadc(4, 6, 3, dilation=2, dilation_bound=2)),
        ("epsilon=0", lambda: fadc(4, 6, 3, epsilon=0)),
        (r"bands\[1\]=0.5", lambda: fadc(4, 6, 3, bands=(2, 0.5))),
        ("zero_dilation=True starts", lambda: fadc.from_conv(conv, zero_dilation=False)),
    ):
        with pytest.raises(ValueError, match=text):
            call()
