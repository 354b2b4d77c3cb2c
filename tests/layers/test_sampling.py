"""Families that sample along learned shapes: formula, published outputs, properties."""

from itertools import product

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.testing import close
from tests.layers.test_formulas import everywhere, make, per_channel
from tests.layers.test_golden import cases, check
from tests.slow import interpolated, value_at

ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def conv_nd(rank, *args, **kwargs):
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](*args, **kwargs).double()


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


def linear(conv, vector):
    """A 1x1 convolution, with groups, of the channels (C,) at one position."""
    parts = vector.reshape(conv.groups, -1)
    weight = conv.weight.detach().flatten(1).unflatten(0, (conv.groups, -1))
    output = torch.cat([w @ v for w, v in zip(weight, parts, strict=True)])
    return output if conv.bias is None else output + conv.bias.detach()


def everywhere_linear(conv, x):
    """The same at every position of x (N, C, *L)."""
    flat = [[linear(conv, column) for column in sample.flatten(1).T] for sample in x]
    return torch.stack([torch.stack(s, 1) for s in flat]).unflatten(2, x.shape[2:])


# DCNv3 and DCNv4 ---------------------------------------------------------------------------


def query_at(layer, x, n, centre, size):
    """q at one position, from a window of `size` around `centre`; size 0 is x itself."""
    if not size:
        return value_at(x[n], centre)
    total = layer.dw_conv.bias.detach().clone()
    for t in product(range(size), repeat=len(centre)):
        place = [c - (size - 1) // 2 + i for c, i in zip(centre, t, strict=True)]
        total += layer.dw_conv.weight.detach()[(slice(None), 0, *t)] * value_at(x[n], place)
    return total


def slow_dcn(layer, x, geometry, scale, removed, dw, version):
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    rank, groups = x.dim() - 2, layer.offset_groups
    values = everywhere_linear(layer.value_proj, x)
    size = [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length in x.shape[2:]]
    taps = list(product(range(k), repeat=rank))
    if removed:
        taps.remove(((k - 1) // 2,) * rank)
    y = torch.zeros(2, 6, *size, dtype=x.dtype)
    for n, q in product(range(2), product(*map(range, size))):
        centre = [i * s - p + d * (k - 1) // 2 for i in q]
        query = query_at(layer, x, n, centre, dw)
        if version == 3:
            query = (query - query.mean()) / (query.var(correction=0) + 1e-6).sqrt()
            query = query * layer.norm.weight.detach() + layer.norm.bias.detach()
            query = query * (1 + torch.erf(query / 2**0.5)) / 2
        offset = linear(layer.offset, query).reshape(groups, len(taps), rank)
        weights = linear(layer.modulation, query).reshape(groups, -1)
        if version == 3:
            weights = torch.exp(weights) / torch.exp(weights).sum(1, keepdim=True)
        z = []
        for g, channels in enumerate(values[n].chunk(groups)):
            total = 0
            for t, tap in enumerate(taps):
                shift = [
                    d * i - d * (k - 1) // 2 + o for i, o in zip(tap, offset[g, t], strict=True)
                ]
                place = [c + scale * float(o) for c, o in zip(centre, shift, strict=True)]
                total = total + weights[g, t] * interpolated(channels, place)
            z.append(total)
        z = torch.cat(z)
        if layer.center_scale is not None:
            share = torch.sigmoid(linear(layer.center_scale, query if version == 3 else z))
            share = share.repeat_interleave(4 // groups)
            z = (1 - share) * z + share * value_at(values[n], centre)
        y[(n, slice(None), *q)] = linear(layer.output_proj, z)
    return y + per_channel(layer.bias.detach(), rank)


@everywhere
@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("extra", [False, True])
def test_dcn(rank, geometry, version, extra):
    removed = extra and geometry["kernel_size"] % 2 == 1
    options = {"offset_scale": 1.5, "center_feature_scale": True, "dw_kernel_size": 2}
    options = options | {"remove_center": removed} if extra else {}
    layer, x, _ = make(f"dcnv{version}", rank, geometry, offset_groups=2, **options)
    with torch.no_grad():
        layer.offset.weight *= 2  # offsets that leave the input now and then
        layer.modulation.weight *= 2
    dw = 2 if extra else geometry["kernel_size"] if version == 3 else 0
    scale = 1.5 if extra else 1.0
    expected = slow_dcn(layer, x, geometry, scale, removed, dw, version)
    close(layer(x), expected, "DCN")


def by_row(rows, groups, order, *inner):
    """Published rows (groups * taps * inner, ...), taps in `order`, as ours lie."""
    taps = rows.unflatten(0, (groups, len(order), *inner))[:, order]
    return (taps.flip(2) if inner else taps).flatten(0, 1 + len(inner))


def our_dcn(tensors, config, prefix=""):
    """Published parameters (or their gradients, with a prefix to the key) by our names.

    Published taps go column by column, and offsets are (x, y).
    """
    k, groups, removed = config.get("kernel_size", 3), config["group"], config.get("remove_center")
    columns = [(i, j) for j in range(k) for i in range(k)]
    if removed:
        columns.remove((k // 2, k // 2))
    order = [columns.index(tap) for tap in sorted(columns)]
    found = {}
    for key, value in tensors.items():
        name, _, end = key.removeprefix(prefix).rpartition(".")
        if name == "offset_mask":
            used = value[: groups * 3 * len(order)].unflatten(0, (groups, -1))
            offset, mask = used.tensor_split([2 * len(order)], 1)
            found[f"offset.{end}"] = by_row(offset.flatten(0, 1), groups, order, 2)
            found[f"modulation.{end}"] = by_row(mask.flatten(0, 1), groups, order)
        elif name == "offset":
            found[f"offset.{end}"] = by_row(value, groups, order, 2)
        elif name == "mask":
            found[f"modulation.{end}"] = by_row(value, groups, order)
        elif "center_feature" in key:
            found[f"center_scale.{end.removeprefix('center_feature_scale_proj_')}"] = value
        elif (name, end) == ("output_proj", "bias"):
            found["bias"] = value
        elif key.startswith(prefix):
            ours = {"dw_conv.0": "dw_conv", "offset_mask_dw": "dw_conv", "dw_conv.1.1": "norm"}
            ours |= {"input_proj": "value_proj"}
            found[f"{ours.get(name, name)}.{end}"] = value
    return found


@cases("dcn")
def test_published_dcn(case):
    config = case["config"]
    cls = dynaconv.DCNv4Conv2d if case["name"].startswith("v4") else dynaconv.DCNv3Conv2d
    options = {
        key: config[key]
        for key in ("dw_kernel_size", "offset_scale", "remove_center", "center_feature_scale")
        if key in config
    }
    if "without_pointwise" in config:
        options["pointwise"] = False
    state = our_dcn(case["state"], config)
    layer = cls(
        config["channels"],
        config["channels"],
        config.get("kernel_size", 3),
        padding=config.get("pad", 1),
        dilation=config.get("dilation", 1),
        bias="bias" in state,
        offset_groups=config["group"],
        **options,
    )
    assert set(state) == set(dict(layer.named_parameters()))
    grads = our_dcn({k: v for k, v in case["grads"].items() if k != "input"}, config, "weight:")
    grads = {f"weight:{key}": value for key, value in grads.items()}
    ours = case | {"state": state, "grads": grads | {"input": case["grads"]["input"]}}
    check(layer, ours, {key: key for key in state})


@ranks
@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_dcnv4_starts_as_any_depthwise_convolution(rank, pointwise, mode):
    torch.manual_seed(rank)
    x = torch.randn(2, 6, *(8, 9, 7)[:rank], dtype=torch.float64)
    for geometry in ((3, 2, 1, 1), (2, 1, 1, 2), (4, 1, "same", 1)):
        conv = conv_nd(rank, 6, 6, *geometry, groups=6, padding_mode=mode)
        layer = cls_of("dcnv4", rank).from_conv(conv, pointwise=pointwise)
        close(layer(x), conv(x), "from_conv")
        layer(x).square().sum().backward()
        assert layer.offset.weight.grad.any(), "the offset cannot learn"


@ranks
@pytest.mark.parametrize("name", ["dcnv3", "dcnv4"])
def test_dcn_starts_as_any_convolution_of_one_tap(rank, name):
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *(8, 9, 7)[:rank], dtype=torch.float64)
    for stride, padding, groups in ((1, 0, 1), (2, 1, 2)):
        conv = conv_nd(rank, 4, 6, 1, stride, padding, groups=groups)
        close(cls_of(name, rank).from_conv(conv)(x), conv(x), "from_conv")


@ranks
@pytest.mark.parametrize("name", ["dcnv3", "dcnv4"])
def test_dcn_starts_from_average_pooling(rank, name):
    torch.manual_seed(rank)
    x = torch.randn(2, 8, *(8, 9, 7)[:rank], dtype=torch.float64)
    layer = cls_of(name, rank)(8, 6, 3, 2, 1).double()
    pool = [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d][rank - 1](3, 2, 1)
    close(
        layer(x), layer.output_proj(pool(layer.value_proj(x))), f"{name} at first", 1e-6
    )  # 1 / 9 is a float32


def test_dcn_defaults():
    groups = lambda channels, **options: dynaconv.DCNv3Conv2d(channels, 12, 3, **options)
    assert groups(64).offset_groups == 4
    assert groups(6).offset_groups == 3
    assert groups(5).offset_groups == 1
    assert groups(12, groups=6).offset_groups == 6
    assert groups(12, groups=6, offset_groups=2).offset_groups == 2
    nothing = dynaconv.DCNv4Conv2d(8, 6, 3, zero_start=True)
    assert not nothing(torch.randn(1, 8, 5, 5)).any(), "y is not b at first"


def test_dcn_refusals():
    v3, v4 = dynaconv.DCNv3Conv2d, dynaconv.DCNv4Conv2d
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    for text, call in (
        ("offset_groups=3 does not divide", lambda: v3(4, 6, 3, offset_groups=3)),
        ("offset_groups=0", lambda: v3(4, 6, 3, offset_groups=0)),
        ("dw_kernel_size=0", lambda: v4(4, 6, 3, dw_kernel_size=0)),
        ("offset_scale=0", lambda: v3(4, 6, 3, offset_scale=0)),
        ("odd sizes", lambda: v3(4, 6, (3, 2), remove_center=True)),
        ("more than one tap", lambda: v4(4, 6, 1, remove_center=True)),
        ("in_channels=4 must be out_channels=6", lambda: v4(4, 6, 3, pointwise=False)),
        ("softmax", lambda: v3.from_conv(depthwise)),
        ("only as a depthwise", lambda: v4.from_conv(nn.Conv2d(4, 4, 3))),
        ("only as a depthwise", lambda: v4.from_conv(depthwise, offset_groups=2)),
        ("offset_scale=1", lambda: v4.from_conv(depthwise, offset_scale=2.0)),
        ("center_feature_scale", lambda: v4.from_conv(depthwise, center_feature_scale=True)),
    ):
        with pytest.raises(ValueError, match=text):
            call()
