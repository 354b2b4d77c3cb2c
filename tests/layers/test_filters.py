"""Filters made whole (DFN, DDF): formula, published outputs, properties."""

from itertools import product

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check
from tests.slow import slow_conv, value_at

ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


def linear(layer, vectors):
    return vectors @ layer.weight.flatten(1).T + layer.bias


# Formulas as slow loops --------------------------------------------------------------------


def same_conv(conv, x):
    """A dense convolution of odd size, zeros beyond the input, as loops."""
    rank, kernel = x.dim() - 2, conv.weight.shape[2:]
    one = (1,) * rank
    loop = {"kernel": tuple(kernel), "stride": one, "dilation": one}
    loop["padding"] = tuple(k // 2 for k in kernel)
    made = slow_conv(x, lambda n, p: conv.weight.detach(), **loop)
    return made + per_channel(conv.bias.detach(), rank)


def centre(p, geometry):
    """Where the window of output position p has its centre, for kernels of any size."""
    k, s, pad, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    return [q * s - pad + d * (k - 1) // 2 for q in p]


def cell_mean(x, corner, stride):
    """Mean of x (C, *L) over the cell from `corner` on, as much of it as lies inside."""
    rank = x.dim() - 1
    places = [
        [c + s for c, s in zip(corner, shift, strict=True)]
        for shift in product(range(stride), repeat=rank)
    ]
    inside = [q for q in places if all(0 <= i < n for i, n in zip(q, x.shape[1:], strict=True))]
    return sum((value_at(x, q) for q in inside), torch.zeros_like(x.flatten(1)[:, 0])) / max(
        len(inside), 1
    )


@everywhere
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
def test_dfn(rank, geometry, local, shared, softmax):
    channels = (4, 4) if shared else (4, 6)
    options = {"local": local, "shared": shared, "softmax": softmax, "hidden": (3, 5)}
    layer, x, loop = make("dfn", rank, geometry, channels, **options)
    h = x
    for conv in layer.network:
        h = same_conv(conv, h)
        h = torch.where(h > 0, h, 0.01 * h)
    groups = geometry["groups"]
    filters, depth = (groups, 1) if shared else (6, 4 // groups)

    def kernel_at(n, p):
        seen = h[n].flatten(1).mean(1)
        if local:
            seen = cell_mean(h[n], centre(p, geometry), geometry["stride"])
        made = linear(layer.head, seen).detach().reshape(filters, -1)
        if softmax:
            made = torch.exp(made) / torch.exp(made).sum(1, keepdim=True)
        made = made.reshape(filters, depth, *loop["kernel"])
        return made.repeat_interleave(4 // groups, 0) if shared else made

    expected = slow_conv(x, kernel_at, **loop | ({"groups": 4} if shared else {}))
    close(layer(x), expected + per_channel(layer.bias, rank), "DFN")


def normalised(taps, norm):
    """FilterNorm of taps (filters, taps)."""
    centred = taps - taps.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (taps.shape[1] - 1)).sqrt()
    std = norm.scale if norm.std is None else norm.std
    mean = 0 if norm.mean is None else norm.mean
    return (std * centred / (deviation + 1e-10) + mean).detach()


def channel_filter(branch, x):
    """f (C, taps) for the sample x (C_in, *L)."""
    hidden = linear(branch.squeeze, x.flatten(1).mean(1)).clamp(min=0)
    made = linear(branch.excite, hidden)
    return normalised(made.reshape(-1, branch.shape[1]), branch.channel_norm)


def spatial_filter(branch, x, place, gather):
    """s (heads, taps) at a place of the sample x (C_in, *L)."""
    features = value_at(x, place)
    if gather is not None:
        weight, features = gather.weight.squeeze(1), gather.bias
        for k in product(*map(range, weight.shape[1:])):
            seen = value_at(x, [q + i - 1 for q, i in zip(place, k, strict=True)])
            features = features + weight[(slice(None), *k)] * seen
    made = linear(branch.spatial, features)
    return normalised(made.reshape(branch.shape), branch.spatial_norm)


def decoupled(branch, x, place, combine, kernel, gather=None):
    """The kernels (C, 1, *K) at a place of the sample x."""
    f, s = channel_filter(branch, x), spatial_filter(branch, x, place, gather)
    s = s.repeat_interleave(len(f) // len(s), 0)
    return (s * f if combine == "mul" else s + f).reshape(-1, 1, *kernel)


def projected(layer, x):
    """x through the 1x1 convolution that fits the channel numbers."""
    groups, weight = layer.groups, layer.project.weight.detach().flatten(1)
    parts = zip(weight.chunk(groups), x.chunk(groups, 1), strict=True)
    return torch.cat([torch.einsum("oc,nc...->no...", w, part) for w, part in parts], 1)


DDF_OPTIONS = [
    {"se_ratio": 1.5},
    {"combine": "add", "heads": 3, "se_ratio": 1.5},
    {"affine": True, "heads": 2, "se_ratio": 2, "nonlinearity": "linear"},
]
ddf_options = pytest.mark.parametrize("options", DDF_OPTIONS, ids=["plain", "add", "affine"])


@everywhere
@ddf_options
def test_ddf(rank, geometry, options):
    layer, x, loop = make("ddf", rank, geometry, **options)
    combine = options.get("combine", "mul")

    def kernel_at(n, p):
        place = centre(p, geometry)
        return decoupled(layer.branches, x[n], place, combine, loop["kernel"])

    expected = slow_conv(projected(layer, x), kernel_at, **loop | {"groups": 6})
    close(layer(x), expected + per_channel(layer.bias, rank), "DDF")


@ranks
@ddf_options
@pytest.mark.parametrize("gather_size", [1, 3])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (2, 3)])
def test_ddf_up(rank, options, gather_size, kernel, stride):
    torch.manual_seed(rank)
    cls = cls_of("ddf_up", rank)
    strides = (stride, 1, 2)[:rank]
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": kernel, "stride": strides}
    layer = randomized(cls, arguments | {"groups": 2, "gather_size": gather_size} | options)
    x = torch.randn(2, 4, *(n - 1 for n in SIZES[rank]), dtype=torch.float64)
    values, combine = projected(layer, x), options.get("combine", "mul")
    shape = (kernel,) * rank
    expected = torch.zeros(
        2, 6, *(n * s for n, s in zip(x.shape[2:], strides, strict=True))
    ).double()
    for i, place in enumerate(product(*map(range, strides))):
        gather = layer.branches[i].gather
        for n, p in product(range(2), product(*map(range, x.shape[2:]))):
            weight = decoupled(layer.branches[i], x[n], p, combine, shape, gather)[:, 0]
            total = torch.zeros(6, dtype=torch.float64)
            for k in product(*map(range, shape)):
                position = [q + j - (kernel - 1) // 2 for q, j in zip(p, k, strict=True)]
                total += weight[(slice(None), *k)] * value_at(values[n], position)
            target = [q * s + j for q, s, j in zip(p, strides, place, strict=True)]
            expected[(n, slice(None), *target)] = total
    close(layer(x), expected + per_channel(layer.bias, rank), "DDF-Up")


# Published outputs -------------------------------------------------------------------------


@cases("dynamic_filter")
def test_published_dfn(case):
    config = case["config"]
    *size, depth = config["filter_size"]
    channels = config["channels"]
    layer = dynaconv.DynamicFilterConv2d(
        channels,
        channels if config["grouping"] else 1,
        size,
        padding="same",
        bias=False,
        local=True,
        softmax=config["softmax"],
        shared=config["grouping"],
        hidden=tuple(config["hidden"]),
        network_size=config["network_size"],
    )
    assert depth == layer.depth
    last = len(config["hidden"])
    names = {}
    for i in range(last + 1):
        ours = "head" if i == last else f"network.{i}"
        names |= {f"{ours}.weight": f"{i}.W", f"{ours}.bias": f"{i}.b"}
    assert set(names.values()) == set(case["state"])
    check(layer, case, names)


def branch_names(ours, spatial, channel, affine):
    """Keys of one pair of branches, ours to the published."""
    pairs = {"squeeze": f"{channel}.1", "excite": f"{channel}.3", "spatial": f"{spatial}.0"}
    ends = ("weight", "bias")
    names = {f"{ours}.{key}.{end}": f"{pairs[key]}.{end}" for key in pairs for end in ends}
    names[f"{ours}.channel_norm.std"] = f"{channel}.4.std"
    if affine:
        names[f"{ours}.channel_norm.mean"] = f"{channel}.4.mean"
        names |= {f"{ours}.spatial_norm.{end}": f"{spatial}.1.{end}" for end in ("std", "mean")}
    return names


@cases("ddf")
def test_published_ddf(case):
    config = case["config"]
    channels, kernel = config["in_channels"], config.get("kernel_size", 3)
    options = {"combine": config.get("kernel_combine", "mul"), "affine": config["affine"]}
    options |= {key: config[key] for key in ("se_ratio", "nonlinearity") if key in config}
    options |= {"heads": config.get("head", 1), "bias": False}
    if config["class"] == "DDFPack":
        stride, dilation = config.get("stride", 1), config.get("dilation", 1)
        geometry = (channels, channels, kernel, stride, dilation * (kernel // 2), dilation)
        layer = dynaconv.DDFConv2d(*geometry, **options)
        names = branch_names("branches", "spatial_branch", "channel_branch", config["affine"])
    else:
        factor, bare = config.get("scale_factor", 2), "joint_channels" in config
        options["gather_size"] = 1 if bare else config.get("dw_kernel_size", 3)
        layer = dynaconv.DDFUpsample2d(channels, channels, kernel, factor, **options)
        names = {}
        for i in range(factor**2):
            spatial, channel = f"spatial_branch.{i}", f"channel_branch.{i}"
            after = spatial if bare else f"{spatial}.1"
            names |= branch_names(f"branches.{i}", after, channel, False)
            if not bare:
                ends = ("weight", "bias")
                names |= {f"branches.{i}.gather.{end}": f"{spatial}.0.{end}" for end in ends}
    assert set(names.values()) == set(case["state"])
    check(layer, case, names)


# Properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 1, "padding": "valid"},
    ],
)
def test_dfn_starts_as_any_convolution(local, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **geometry).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    layer = dynaconv.DynamicFilterConv2d.from_conv(conv, local=local, hidden=(6,))
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    assert layer.head.weight.grad.any(), "what generates the filters cannot learn"


@pytest.mark.parametrize("local", [False, True])
def test_shared_dfn_starts_as_a_depthwise_convolution(local):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, 2, 1, groups=4).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    layer = dynaconv.DynamicFilterConv2d.from_conv(conv, local=local, shared=True)
    close(layer(x), conv(x), "from_conv")


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_ddf_starts_as_any_depthwise_convolution(combine, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, groups=4, **geometry).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    layer = dynaconv.DDFConv2d.from_conv(conv, combine=combine)
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    for norm in (layer.branches.spatial_norm, layer.branches.channel_norm):
        assert norm.std.grad.any(), "what follows the input cannot learn"


def test_dfn_starts_with_the_output_of_a_convolution():
    """Without softmax the first outputs are neither vanishing nor huge."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 12, 12)
    expected = nn.Conv2d(32, 32, 3)(x).std()
    for local in (False, True):
        layer = dynaconv.DynamicFilterConv2d(32, 32, 3, local=local, softmax=False)
        assert 0.5 < layer(x).std() / expected < 2


@ranks
def test_softmax_filters_keep_constants(rank):
    torch.manual_seed(rank)
    x = torch.full((2, 3, *SIZES[rank]), 2.5, dtype=torch.float64)
    for local, shared in product((False, True), (False, True)):
        options = {"local": local, "shared": shared, "softmax": True, "bias": False}
        layer = randomized(
            cls_of("dfn", rank),
            {"in_channels": 3, "out_channels": 3, "kernel_size": 2, **options},
        )
        close(layer(x), torch.full_like(layer(x), 2.5), "a mean of constants")


@ranks
def test_one_place_of_ddf_up_is_ddf(rank):
    torch.manual_seed(rank)
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "se_ratio": 1.0}
    up = randomized(cls_of("ddf_up", rank), arguments | {"stride": 2, "gather_size": 1})
    plain = randomized(cls_of("ddf", rank), arguments | {"padding": 1, "nonlinearity": "linear"})
    x = torch.randn(2, 4, *SIZES[rank], dtype=torch.float64)
    for i, place in enumerate(product((0, 1), repeat=rank)):
        plain.branches.load_state_dict(up.branches[i].state_dict())
        plain.bias = up.bias
        every_other = (slice(None), slice(None), *(slice(j, None, 2) for j in place))
        close(up(x)[every_other], plain(x), f"place {place}")
        weight = up.kernels(x)["weight"]
        at_place = (*[slice(None)] * (2 + rank), *(slice(j, None, 2) for j in place))
        close(weight[at_place], plain.kernels(x)["weight"], f"kernels at place {place}")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_ddf_up_pads_as_told(mode):
    torch.manual_seed(0)
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 5, "se_ratio": 1.0}
    layer = randomized(dynaconv.DDFUpsample2d, arguments | {"padding_mode": mode})
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    whole = layer.convolve(x, **layer.generate(x, None))
    zeros = randomized(dynaconv.DDFUpsample2d, arguments)
    zeros.load_state_dict(layer.state_dict())
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode=mode)
    made = layer.generate(x, None)
    wide = {"weight": nn.functional.pad(made["weight"], (2, 2, 2, 2))}
    expected = zeros.convolve(padded, **made | wide)[..., 4:-4, 4:-4]
    close(whole, expected, mode)
    assert (whole - zeros(x)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ddf_of_nothing_is_finite(dtype):
    """Taps that are all alike have no deviation."""
    layer = dynaconv.DDFConv2d(8, 8, 3, padding=1).to(dtype)
    for conv in (layer.branches.spatial, layer.branches.excite):
        nn.init.zeros_(conv.bias)
        nn.init.zeros_(conv.weight)
    x = torch.randn(2, 8, 5, 6, dtype=dtype, requires_grad=True)
    output = layer(x)
    close(output, per_channel(layer.bias, 2).expand_as(output), "bias alone", 0)
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_refusals():
    dfn, ddf, up = dynaconv.DynamicFilterConv2d, dynaconv.DDFConv2d, dynaconv.DDFUpsample2d
    dense, depthwise = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 4, 3, groups=4)
    for text, call in (
        ("hidden=", lambda: dfn(4, 6, 3, hidden=())),
        (r"hidden\[1\]=0", lambda: dfn(4, 6, 3, hidden=(3, 0))),
        ("network_size=0", lambda: dfn(4, 6, 3, network_size=0)),
        ("shared=True filters each", lambda: dfn(4, 6, 3, shared=True)),
        ("give softmax=False", lambda: dfn.from_conv(dense, softmax=True)),
        ("depthwise", lambda: dfn.from_conv(nn.Conv2d(4, 4, 3), shared=True)),
        ("no causal form", lambda: dynaconv.DynamicFilterConv1d(4, 6, 3, causal=True)),
        ("combine='times'", lambda: ddf(4, 4, 3, combine="times")),
        ("heads=3", lambda: ddf(4, 4, 3, heads=3)),
        ("heads=0", lambda: ddf(4, 4, 3, heads=0)),
        ("se_ratio=0", lambda: up(4, 4, 3, se_ratio=0)),
        ("gather_size=2", lambda: up(4, 4, 3, gather_size=2)),
        ("gather_size=0", lambda: up(4, 4, 3, gather_size=0)),
        ("one tap", lambda: ddf(4, 4, 1)),
        ("give affine=True", lambda: ddf.from_conv(depthwise, affine=False)),
        ("mixes no channels", lambda: ddf.from_conv(dense)),
        ("no causal form", lambda: dynaconv.DDFConv1d(4, 4, 3, causal=True)),
        ("windows that are centred", lambda: up(4, 4, 3, dilation=2)),
    ):
        with pytest.raises(ValueError, match=text):
            call()
