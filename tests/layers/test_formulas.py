"""Each family in 1-D, 2-D and 3-D against its formula written as slow loops, in float64."""

from itertools import product
from math import prod

import pytest
import torch
from torch.nn import functional as F

import dynaconv
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.slow import deformed, slow_conv

SIZES = {1: (9,), 2: (5, 6), 3: (4, 3, 5)}
GEOMETRIES = [
    {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1},
    {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 1, "groups": 2},
    {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2, "groups": 1},
]
everywhere = pytest.mark.parametrize(
    ("rank", "geometry"),
    [pytest.param(r, g, id=f"{r}d-{i}") for r, (i, g) in product((1, 2, 3), enumerate(GEOMETRIES))],
)


def make(name, rank, geometry, channels=(4, 6), **options):
    """A randomised layer, its input (2, C, *L), and slow_conv's keywords."""
    torch.manual_seed(rank)
    cls = dynaconv.families()[name].classes[rank]
    layer = randomized(
        cls, {"in_channels": channels[0], "out_channels": channels[1], **geometry, **options}
    )
    x = torch.randn(2, channels[0], *SIZES[rank], dtype=torch.float64)
    keys = ("stride", "padding", "dilation")
    loop = {key: (geometry[key],) * rank for key in keys} | {"groups": geometry["groups"]}
    return layer, x, loop | {"kernel": (geometry["kernel_size"],) * rank}


def per_channel(vector, rank):
    return vector.reshape(*vector.shape, *(1,) * rank)


@everywhere
def test_condconv(rank, geometry):
    layer, x, loop = make("condconv", rank, geometry)
    routing = 1 / (
        1 + torch.exp(-(x.flatten(2).mean(2) @ layer.routing.weight.T + layer.routing.bias))
    )
    kernels = [sum(r * w for r, w in zip(rs, layer.weight, strict=True)) for rs in routing]
    bias = torch.stack([sum(r * b for r, b in zip(rs, layer.bias, strict=True)) for rs in routing])
    expected = slow_conv(x, lambda n, p: kernels[n], **loop) + per_channel(bias, rank)
    close(layer(x), expected, "CondConv")


@everywhere
def test_dyconv(rank, geometry):
    layer, x, loop = make("dyconv", rank, geometry, temperature=3.0)
    hidden = (x.flatten(2).mean(2) @ layer.squeeze.fc.weight.T).clamp(min=0)
    scores = torch.exp((hidden @ layer.mix.weight.T + layer.mix.bias) / 3)
    shares = scores / scores.sum(1, keepdim=True)
    kernels = [sum(a * w for a, w in zip(row, layer.weight, strict=True)) for row in shares]
    bias = torch.stack([sum(a * b for a, b in zip(row, layer.bias, strict=True)) for row in shares])
    expected = slow_conv(x, lambda n, p: kernels[n], **loop) + per_channel(bias, rank)
    close(layer(x), expected, "DyConv")


@everywhere
@pytest.mark.parametrize("experts", [1, 3])
def test_odconv(rank, geometry, experts):
    layer, x, loop = make("odconv", rank, geometry, experts=experts, temperature=2.0)
    hidden = F.relu(layer.attention.bn(x.flatten(2).mean(2) @ layer.attention.fc.weight.T))
    head = lambda fc: (hidden @ fc.weight.T + fc.bias) / 2
    a_c, a_f = torch.sigmoid(head(layer.channel_fc)), torch.sigmoid(head(layer.filter_fc))
    a_s = torch.sigmoid(head(layer.spatial_fc))
    a_w = torch.softmax(head(layer.kernel_fc), 1) if experts > 1 else torch.ones(2, 1).double()
    group = prod(layer.weight.shape[1:2]) // geometry["groups"]

    def kernel_at(n, p):
        kernel = torch.zeros(layer.weight.shape[1:], dtype=torch.float64)
        for e, (o, c) in product(range(experts), product(*map(range, kernel.shape[:2]))):
            channel = o // group * kernel.shape[1] + c
            taps = a_s[n].reshape(kernel.shape[2:])
            kernel[o, c] += a_w[n, e] * a_f[n, o] * a_c[n, channel] * taps * layer.weight[e, o, c]
        return kernel

    kernels = [kernel_at(n, None).detach() for n in range(2)]
    expected = slow_conv(x, lambda n, p: kernels[n], **loop)
    close(layer(x), expected + per_channel(layer.bias, rank), "ODConv")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "kernel", "dilation"), [(1, 3, 1), (2, 3, 1), (1, 3, 2), (2, 5, 1)]
)
def test_involution(rank, stride, kernel, dilation):
    padding = dilation * (kernel - 1) // 2
    geometry = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    layer, x, loop = make(
        "involution", rank, geometry | {"groups": 1}, channels=(6, 6), group_channels=3, reduction=2
    )
    squeeze = lambda v: layer.bn((v @ layer.reduce.weight.flatten(1).T)[None])[0].clamp(min=0)
    span = layer.span.weight.flatten(1)

    def kernel_at(n, p):
        cell = [slice(q * stride, q * stride + stride) for q in p]
        features = x[(n, slice(None), *cell)].flatten(1).mean(1)
        taps = span @ squeeze(features) + layer.span.bias
        shared = taps.reshape(2, 1, *loop["kernel"]).repeat_interleave(3, 0)  # 3 channels a group
        return shared.detach()

    expected = slow_conv(x, kernel_at, **loop | {"groups": 6})
    close(layer(x), expected + per_channel(layer.bias, rank), "Involution")


@everywhere
@pytest.mark.parametrize("name", ["deform", "deform_v2"])
def test_deform(rank, geometry, name):
    options = {"gate_scale": 1.5} if name == "deform_v2" else {}
    layer, x, loop = make(name, rank, geometry, offset_groups=2, **options)
    made = [F.conv1d, F.conv2d, F.conv3d][rank - 1](
        x,
        layer.offset_conv.weight,
        layer.offset_conv.bias,
        loop["stride"],
        loop["padding"],
        loop["dilation"],
    ).detach()
    made = 3 * made  # offsets that leave the input now and then
    with torch.no_grad():
        layer.offset_conv.weight *= 3
        layer.offset_conv.bias *= 3
    offset, logits = made.tensor_split([2 * prod(loop["kernel"]) * rank], 1)
    modulation = 1.5 * torch.sigmoid(logits) if name == "deform_v2" else None
    read = deformed(x, loop["kernel"], offset, modulation)
    weight = layer.weight.detach()
    expected = slow_conv(x, lambda n, p: weight, **loop, read=read)
    close(layer(x), expected + per_channel(layer.bias, rank), "deformable")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dilated", [True, False])
def test_selective_kernel(rank, dilated):
    geometry = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    layer, x, loop = make("selective_kernel", rank, geometry, dilated=dilated)
    branches = []
    for b, (conv, norm) in enumerate(zip(layer.convs, layer.norms, strict=True)):
        size = {"dilation": (1 + b,) * rank} if dilated else {"kernel": (3 + 2 * b,) * rank}
        weight = conv.weight.detach()
        u = slow_conv(x, lambda n, p, w=weight: w, **loop | size | {"padding": (1 + b,) * rank})
        branches.append(norm(u).clamp(min=0))
    hidden = layer.squeeze.bn(sum(branches).flatten(2).mean(2) @ layer.squeeze.fc.weight.T)
    logits = (hidden.clamp(min=0) @ layer.select.weight.T).reshape(2, 2, 6)
    shares = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    expected = sum(per_channel(shares[:, b], rank) * u for b, u in enumerate(branches))
    close(layer(x), expected + per_channel(layer.bias, rank), "selective kernel")
