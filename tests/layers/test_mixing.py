"""DynamicShortConv, SKAConv, IDConv and ContMixConv: formula, published results, own rules."""

from itertools import product
from math import ceil, prod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dynaconv
from dynaconv import mask_from_sizes
from dynaconv.layers.contmix import conv_inside
from dynaconv.layers.regions import region_means
from dynaconv.layers.ska import masked_group_norm
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check, with_norm
from tests.layers.test_lightconv import cell_mean, projected
from tests.slow import slow_conv, value_at

ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def places(size):
    return product(*map(range, size))


def pointwise(conv, x):
    """A 1x1 convolution, written out."""
    y = torch.einsum("oc,nc...->no...", conv.weight.flatten(1), x)
    return y if conv.bias is None else y + per_channel(conv.bias, x.dim() - 2)


# The published layers -----------------------------------------------------------------------------


def short_layout(config, key, tensor):
    """A published tensor in our layout: taps from the past to the present, last."""
    channels, width = config["channels"], config["width"]
    if key == "linear.weight":
        return tensor.reshape(-1, width, channels).flip(1)
    if key == "static_w":
        return tensor.flip(0).T
    if key == "proj_out":
        return tensor.reshape(-1, width, channels).flip(1).permute(2, 1, 0)
    return tensor


@cases("shortconv")
def test_shortconv_published(case):
    config = case["config"]
    layer = dynaconv.DynamicShortConv1d(
        config["channels"],
        config["channels"],
        config["width"],
        bias=False,
        causal=True,
        heads=config.get("heads"),
        low_rank=config.get("low_rank"),
        residual=config["residual"],
    )
    nn.init.zeros_(layer.weight)
    ours = {"static_w": "weight", "linear.weight": "up.weight"}
    ours |= {"proj_in.weight": "down.weight", "proj_out": "up.weight"}
    for tensors, start in ((case["state"], ""), (case["grads"], "weight:")):
        for key in ours:
            if start + key in tensors:
                tensors[start + key] = short_layout(config, key, tensors[start + key])
    check(layer, case, {ours[key]: key for key in case["state"]})


@cases("ska")
def test_ska_published(case):
    config = case["config"]
    dim, residual = config["dim"], config.get("residual", False)
    layer = dynaconv.SKAConv2d(
        dim,
        dim,
        config["sks"],
        padding="same",
        bias=False,
        group_channels=config["groups"],
        perception_size=config["lks"],
        residual=residual,
    )
    start = "lkp." if residual else ""
    convs = {"reduce": "cv1.c", "large": "cv2.c", "mix": "cv3.c"}
    names = {f"{ours}.weight": f"{start}{theirs}.weight" for ours, theirs in convs.items()}
    for ours, theirs in (("logits", "cv4"), ("norm", "norm")):
        names |= {f"{ours}.{key}": f"{start}{theirs}.{key}" for key in ("weight", "bias")}
    names |= with_norm({f"norms.{i}": f"{start}cv{i + 1}.bn" for i in range(3)})
    check(layer, case, names | (with_norm({"out_norm": "bn"}) if residual else {}))


@cases("idconv")
def test_idconv_published(case):
    config = case["config"]
    layer = dynaconv.IDConv2d(
        config["dim"],
        config["dim"],
        config["kernel_size"],
        padding="same",
        groups=config["dim"],
        bias=config["bias"],
        experts=config["num_groups"],
        reduction=config["reduction_ratio"],
    )
    names = {"weight": "weight", "reduce.weight": "proj.0.conv.weight"}
    names |= {f"span.{key}": f"proj.1.{key}" for key in ("weight", "bias")}
    names |= {"bias": "bias"} if config["bias"] else {}
    check(layer, case, names | with_norm({"bn": "proj.0.bn"}))


@cases("contmix")
def test_contmix_published(case):
    config = case["config"]
    layer = dynaconv.ContMixConv2d(
        config["dim"],
        config["dim"],
        config["kernel_size"],
        padding="same",
        bias=False,
        heads=2 * config["num_heads"],
        small_size=config["smk_size"],
    )
    theirs = {"query": "weight_query.{}", "key": "weight_key.{}", "value": "weight_value.{}"}
    theirs["fuse"] = "fusion_proj.{}"
    names = {f"proj.{key}": f"weight_proj.{key}" for key in ("weight", "bias")}
    names |= {f"position_bias.{i}": f"rpb{i + 1}" for i in range(2)}
    for ours, key in theirs.items():
        conv, norm = (1, 2) if ours == "key" else (0, 1)  # the key's first is the pooling
        names |= {f"{ours}.weight": key.format(conv) + ".weight"}
        names |= with_norm({f"{ours}_norm": key.format(norm)})
    check(layer, case, names)


# The formulas as loops ----------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("heads", "low_rank", "residual"), [(3, None, True), (None, 2, False)])
def test_shortconv(rank, geometry, heads, low_rank, residual):
    options = {"heads": heads, "low_rank": low_rank, "residual": residual}
    layer, x, loop = make("dynamic_shortconv", rank, geometry, **options)
    kernel = loop["kernel"]
    own = tuple((k - 1) // 2 for k in kernel)

    def kernel_at(n, p):
        features = cell_mean(x[n], p, kernel, loop["stride"], loop["padding"], loop["dilation"])
        if low_rank:
            features = layer.down.weight.flatten(1) @ features
        update = (layer.up.weight.flatten(1) @ features).reshape(-1, *kernel)
        rows = [update[c * len(update) // 6] + layer.weight[c, 0] for c in range(6)]
        total = torch.stack(rows).detach()
        total[(slice(None), *own)] += float(residual)
        return total.unsqueeze(1)

    expected = slow_conv(projected(layer, x), kernel_at, **loop | {"groups": 6})
    close(layer(x), expected + per_channel(layer.bias, rank), "DynamicShortConv")
    shown, (first, *_) = layer.kernels(x)["weight"], places(layer(x).shape[2:])
    at = shown[(0, ..., *first)]
    close(at, kernel_at(0, first).squeeze(1), "the kernel that is shown")


@everywhere
def test_ska(rank, geometry):
    options = {"group_channels": 2, "perception_size": 5}
    layer, x, loop = make("ska", rank, geometry, **options)
    size, kernel = layer(x).shape[2:], loop["kernel"]
    features = layer.norms[0](pointwise(layer.reduce, x)).clamp(min=0).detach()
    large = layer.large.weight.detach()
    wide = {"kernel": (5,) * rank, "stride": (1,) * rank, "dilation": (1,) * rank}
    wide |= {"padding": (2,) * rank, "groups": large.shape[0]}
    features = layer.norms[1](slow_conv(features, lambda n, p: large, **wide)).detach()
    kernels = []
    for sample in features:
        place = (kernel, loop["stride"], loop["padding"], loop["dilation"])
        cells = torch.stack([cell_mean(sample, p, *place) for p in places(size)], 1)[None]
        hidden = layer.norms[2](layer.mix.weight.flatten(1) @ cells).clamp(min=0)
        logits = layer.logits.weight.flatten(1) @ hidden + layer.logits.bias[:, None]
        logits = logits.reshape(layer.kernel_groups, -1)
        mean, variance = logits.mean(1, keepdim=True), logits.var(1, unbiased=False, keepdim=True)
        logits = ((logits - mean) / (variance + 1e-5).sqrt()).reshape(-1, prod(size))
        logits = logits * layer.norm.weight[:, None] + layer.norm.bias[:, None]
        kernels.append(logits.detach().reshape(layer.kernel_groups, *kernel, *size))

    def kernel_at(n, p):
        rows = [kernels[n][(c % layer.kernel_groups, ..., *p)] for c in range(6)]
        return torch.stack(rows).unsqueeze(1)

    assert layer.kernel_groups == (3 if geometry["groups"] == 1 else 2)
    expected = slow_conv(projected(layer, x), kernel_at, **loop | {"groups": 6})
    close(layer(x), expected + per_channel(layer.bias, rank), "SKAConv")


def slow_regions(x, regions):
    """x (C, *L) -> (C, *regions), each the mean over its block."""
    y = torch.zeros(len(x), *regions, dtype=x.dtype)
    for r in places(regions):
        bounds = zip(r, regions, x.shape[1:], strict=True)
        block = [slice(i * n // m, ceil((i + 1) * n / m)) for i, m, n in bounds]
        y[(slice(None), *r)] = x[(slice(None), *block)].flatten(1).mean(1)
    return y


@everywhere
def test_idconv(rank, geometry):
    layer, x, loop = make("idconv", rank, geometry, experts=3, reduction=2)

    def shares(pooled):
        hidden = F.gelu(layer.bn(pointwise(layer.reduce, pooled)))
        e = torch.exp(pointwise(layer.span, hidden).unflatten(1, (3, 6)))
        return (e / e.sum(1, keepdim=True)).detach()

    taps = shares(torch.stack([slow_regions(s, loop["kernel"]) for s in x]))
    whole = shares(torch.stack([slow_regions(s, (1,) * rank) for s in x])).flatten(2)
    kernels = [
        sum(taps[n, e].unsqueeze(1) * layer.weight[e] for e in range(3)).detach() for n in range(2)
    ]
    bias = torch.stack([sum(whole[n, e] * layer.bias[e] for e in range(3)) for n in range(2)])
    expected = slow_conv(x, lambda n, p: kernels[n], **loop) + per_channel(bias, rank)
    close(layer(x), expected, "IDConv")


@ranks
@pytest.mark.parametrize("position_bias", [True, False])
def test_contmix(rank, position_bias):
    torch.manual_seed(rank)
    large, small, heads = (5, 5, 3)[:rank], 3, 2
    arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": large, "padding": "same"}
    arguments |= {"heads": heads, "small_size": small, "regions": 2}
    cls = dynaconv.families()["contmix"].classes[rank]
    layer = randomized(cls, arguments | {"position_bias": position_bias})
    x = torch.randn(2, 4, *{1: (9,), 2: (5, 6), 3: (5, 6, 4)}[rank]).double()
    regions = torch.stack([slow_regions(s, (2,) * rank) for s in x])
    query = layer.query_norm(pointwise(layer.query, x))
    key = layer.key_norm(pointwise(layer.key, regions))
    value = layer.value_norm(pointwise(layer.value, x)).detach()
    mixed = torch.zeros_like(value)
    for n, p, g in product(range(2), list(places(x.shape[2:])), range(heads)):
        # one channel of query and key a head, so that s = (4 / heads)^-1/2
        likeness = query[(n, g, *p)] * key[n, g].flatten() * (4 / heads) ** -0.5
        logits = layer.proj.weight.flatten(1) @ likeness + layer.proj.bias
        for half, kernel in enumerate(((small,) * rank, large)):
            first = 0 if half == 0 else small**rank
            start = [
                min(max(q - k // 2, 0), length - k)
                for q, k, length in zip(p, kernel, x.shape[2:], strict=True)
            ]
            scores, seen = [], []
            for tap, k in enumerate(places(kernel)):
                place = [s + i for s, i in zip(start, k, strict=True)]
                score = logits[first + tap]
                if position_bias:
                    away = [q - o + n_k - 1 for q, o, n_k in zip(place, p, kernel, strict=True)]
                    score = score + layer.position_bias[half][(g, *away)]
                scores.append(score)
                seen.append(value_at(value[n], place)[half * 4 + g * 2 : half * 4 + g * 2 + 2])
            e = torch.exp(torch.stack(scores))
            channels = slice(half * 4 + g * 2, half * 4 + g * 2 + 2)
            mixed[(n, channels, *p)] = ((e / e.sum()) @ torch.stack(seen)).detach()
    expected = layer.fuse_norm(pointwise(layer.fuse, mixed))
    close(layer(x), expected + per_channel(layer.bias, rank), "ContMixConv")


# What they rest on --------------------------------------------------------------------------------


@ranks
def test_region_means(rank):
    x = torch.randn(3, 2, *SIZES[rank]).double()
    pool = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d][rank - 1]
    regions = (3, 4, 2)[:rank]
    close(region_means(x, None, regions), pool(x, regions), "regions of whole samples")
    sizes = torch.tensor([SIZES[rank], [n - 1 for n in SIZES[rank]], [2] * rank])
    mask = mask_from_sizes(sizes, SIZES[rank])
    means = region_means(x.masked_fill(~mask.unsqueeze(1), 0), mask, regions)
    for n, size in enumerate(sizes.tolist()):
        alone = x[(n, slice(None), *map(slice, size))]
        close(means[n], slow_regions(alone, regions), f"regions of sample {n}")


def test_masked_group_norm():
    norm = nn.GroupNorm(2, 6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, mask = torch.randn(2, 6, 5).double(), mask_from_sizes([5, 3], (5,))
    close(masked_group_norm(norm, x, mask)[:1], norm(x[:1]), "a whole sample")
    close(masked_group_norm(norm, x, mask)[1:, :, :3], norm(x[1:, :, :3]), "a short sample")


def test_windows_stay_inside():
    """Over ones, kernels that sum to 1 give 1 at the border too."""
    weight = torch.softmax(torch.randn(2, 1, 15, 6, 7).double(), 2).unflatten(2, (5, 3))
    ones = torch.ones(2, 4, 6, 7).double()
    close(conv_inside(ones, weight), ones, "windows inside")


# Their own rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"heads": 2}, {"low_rank": None, "heads": 3, "out_channels": 9}, {"dilation": 2}],
    ids=["low_rank", "headwise", "dilated"],
)
def test_shortconv_decodes(options):
    arguments = {"in_channels": 6, "out_channels": 6, "kernel_size": 4, "causal": True}
    layer = randomized(dynaconv.DynamicShortConv1d, arguments | options)
    x, state, outputs = torch.randn(2, 6, 9).double(), None, []
    for token in x.unbind(2):
        output, state = layer.step(token, state)
        outputs.append(output)
    close(torch.stack(outputs, 2), layer(x), "token by token")
    changed = torch.cat([x[..., :5], torch.randn(2, 6, 4).double()], 2)
    close(layer(changed)[..., :5], layer(x)[..., :5], "what comes later", 0)


def test_shortconv_starts_static():
    layer = dynaconv.DynamicShortConv1d(6, 6, 4, causal=True, residual=True).double()
    x = torch.randn(2, 6, 9).double()
    static = F.conv1d(F.pad(x, (3, 0)), layer.weight, layer.bias, groups=6)
    close(layer(x), static + x, "update 0 at the start")


@ranks
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dynamic_shortconv", {"low_rank": 3}),
        ("dynamic_shortconv", {"low_rank": None, "heads": 2, "residual": False}),
        ("ska", {}),
        ("idconv", {}),
    ],
)
def test_from_depthwise(name, options, rank):
    cls = dynaconv.families()[name].classes[rank]
    conv = cls.static[rank](8, 8, 3, 2, 1, groups=8).double()
    x = torch.randn(2, 8, *SIZES[rank]).double()
    close(cls.from_conv(conv, **options)(x), conv(x), f"{name} from a depthwise convolution")


@ranks
def test_idconv_from_any(rank):
    cls = dynaconv.families()["idconv"].classes[rank]
    conv = cls.static[rank](4, 6, 3, 2, 1, groups=2).double()
    x = torch.randn(2, 4, *SIZES[rank]).double()
    close(cls.from_conv(conv)(x), conv(x), "IDConv from a convolution")


def test_all_padded():
    """A padded batch may be longer than its longest sample."""
    arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 5, "padding": 2, "heads": 2}
    layer = randomized(dynaconv.ContMixConv1d, arguments)
    x, mask = torch.randn(2, 4, 12).double(), mask_from_sizes([9, 3], (12,))
    output = layer(x, mask)
    assert output.shape == (2, 8, 12)
    assert not output.masked_select(~mask.unsqueeze(1)).any()
    for n, length in enumerate((9, 3)):
        close(output[n, :, :length], layer(x[n, :, :length]), f"sample {n}")
        kernels = layer.kernels(x, mask)["weight"][n]
        if length > 5:
            alone = layer.kernels(x[n : n + 1, :, :length])["weight"][0]
            close(kernels[..., :length], alone, f"kernels of sample {n}")


@pytest.mark.parametrize(
    ("cls", "arguments", "text"),
    [
        (dynaconv.DynamicShortConv1d, {"heads": 3}, "does not divide"),
        (dynaconv.DynamicShortConv2d, {"causal": True}, "1-D"),
        (dynaconv.DynamicShortConv1d, {"low_rank": 0}, "at least 1"),
        (dynaconv.SKAConv2d, {"residual": True, "stride": 2, "padding": 1}, "adds the input"),
        (dynaconv.SKAConv2d, {"residual": True}, "adds the input"),
        (dynaconv.IDConv2d, {"experts": 1}, "at least 2"),
        (dynaconv.IDConv1d, {"causal": True}, "no causal form"),
        (dynaconv.ContMixConv2d, {"kernel_size": 4}, "must be odd"),
        (dynaconv.ContMixConv2d, {"small_size": 5}, "above kernel_size"),
        (dynaconv.ContMixConv2d, {"small_size": 3}, "windows inside"),
        (dynaconv.ContMixConv2d, {"small_size": 3, "padding": 1, "heads": 3}, "must divide"),
    ],
)
def test_refusals(cls, arguments, text):
    with pytest.raises(ValueError, match=text):
        cls(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3} | arguments)


def test_no_position():
    with pytest.raises(ValueError, match="at least 1 position"):
        dynaconv.ContMixConv1d(8, 8, 5, padding=2)(torch.zeros(2, 8, 0))


@pytest.mark.parametrize("name", ["dynamic_shortconv", "ska"])
def test_starts_depthwise_only(name):
    cls = dynaconv.families()[name].classes[2]
    with pytest.raises(ValueError, match="only as a depthwise"):
        cls.from_conv(nn.Conv2d(4, 6, 3))
    with pytest.raises(ValueError, match="softmax"):
        dynaconv.ContMixConv2d.from_conv(nn.Conv2d(8, 8, 3, padding=1), small_size=3)
