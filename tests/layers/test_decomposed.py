"""DCD, WeightNet and KernelDNA: formulas, published outputs, kernels that layers share."""

import copy
from itertools import product
from math import prod

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.masking import mask_from_sizes
from dynaconv.testing import close
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check, static, with_norm
from tests.slow import slow_conv, value_at

ranks = pytest.mark.parametrize("rank", [1, 2, 3])
NAMES = ("dcd", "weightnet", "kerneldna")


def conv_nd(rank, *args, **kwargs):
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](*args, **kwargs).double()


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


# Formulas as slow loops --------------------------------------------------------------------


def hsigmoid(v):
    return (v + 3).clamp(0, 6) / 3


def pooled(x, cells):
    """Means of x (C, *L) over adaptive cells, (C * cells^D,)."""
    means = []
    for cell in product(range(cells), repeat=x.dim() - 1):
        slices = [
            slice(i * length // cells, -(-(i + 1) * length // cells))
            for i, length in zip(cell, x.shape[1:], strict=True)
        ]
        means.append(x[(slice(None), *slices)].flatten(1).mean(1))
    return torch.stack(means, 1).flatten()


def blockwise(weight, vector, blocks):
    """A grouped 1x1 convolution of one vector."""
    parts = zip(weight.flatten(1).chunk(blocks), vector.chunk(blocks), strict=True)
    return torch.cat([w @ v for w, v in parts])


def normed(bn, vector):
    return bn(vector[None])[0]


@everywhere
@pytest.mark.parametrize("options", [{}, {"pool": 2, "latent": 3, "blocks": 2}])
def test_dcd(rank, geometry, options):
    layer, x, loop = make("dcd", rank, geometry, **options)
    blocks, latent = layer.blocks, layer.latent
    weight = layer.weight.detach()
    expected = slow_conv(x, lambda n, p: weight, **loop)
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    for n in range(2):
        h = layer.fc.weight @ pooled(x[n], options.get("pool", 1))
        h = h * hsigmoid(layer.se.weight @ h)
        scale = hsigmoid(layer.fc_scale.weight @ h)
        phi = (layer.fc_phi.weight @ h).reshape(blocks, latent, latent)
        for q in product(*map(range, expected.shape[2:])):
            centre = value_at(x[n], [i * s - p + d * (k - 1) // 2 for i in q])
            z = normed(layer.bn1, blockwise(layer.q.weight, centre, blocks))
            fused = torch.cat([f @ v for f, v in zip(phi, z.chunk(blocks), strict=True)])
            residual = blockwise(layer.p.weight, normed(layer.bn2, fused) + z, blocks)
            at = (n, slice(None), *q)
            expected[at] = (scale * expected[at] + residual + layer.bias).detach()
    close(layer(x), expected, "DCD")


@everywhere
@pytest.mark.parametrize(("multiplier", "divisor"), [(2, 2), (6, 2), (3, 1)])
def test_weightnet(rank, geometry, multiplier, divisor):
    layer, x, loop = make(
        "weightnet", rank, geometry, multiplier=multiplier, divisor=divisor, min_hidden=5
    )
    code = x.flatten(2).mean(2) @ layer.reduce.weight.T + layer.reduce.bias
    code = torch.sigmoid(code @ layer.fc.weight.T + layer.fc.bias)
    shape, inputs = layer.kernel_shape(), multiplier // divisor
    part, rows = prod(shape[1:]) // divisor, layer.weight.flatten(0, 1)

    def kernel_of(n):
        entries = [
            rows[j] @ code[n, j // part * inputs : (j // part + 1) * inputs]
            for j in range(prod(shape))
        ]
        return torch.stack(entries).reshape(shape).detach()

    kernels = [kernel_of(n) for n in range(2)]
    expected = slow_conv(x, lambda n, p: kernels[n], **loop) + per_channel(layer.bias, rank)
    close(layer(x), expected, "WeightNet")
    close(layer.kernels(x)["weight"], torch.stack(kernels), "kernels")


@everywhere
def test_kerneldna(rank, geometry):
    layer, x, loop = make("kerneldna", rank, geometry, gate_scale=1.5, min_hidden=3)
    hidden = layer.squeeze.bn(x.flatten(2).mean(2) @ layer.squeeze.fc.weight.T).clamp(min=0)
    gate = 1.5 * torch.sigmoid(hidden @ layer.gate.weight.T + layer.gate.bias)
    kernel = layer.weight.detach().clone()
    for o, k in product(range(6), product(*map(range, loop["kernel"]))):
        factor = (1 + layer.filter[o]) * (1 + layer.spatial[k])
        kernel[(o, slice(None), *k)] *= factor.detach()
    gated = (x * per_channel(gate, rank)).detach()
    expected = slow_conv(gated, lambda n, p: kernel, **loop) + per_channel(layer.bias, rank)
    close(layer(x), expected, "KernelDNA")
    close(layer.kernels(x)["channel"], gate, "gate")


# Published outputs -------------------------------------------------------------------------


@cases("dcd")
def test_published_dcd(case):
    config = case["config"]
    options = {k: config[k] for k in ("pool", "latent", "reduction") if k in config}
    layer = dynaconv.DCDConv2d(
        config["in_channels"],
        config["out_channels"],
        **static(config),
        bias=False,
        min_hidden=min(config["hidden"], 4),
        **options,
    )
    prefix = "conv_" if "conv_q.weight" in case["state"] else ""
    pairs = {"weight": "conv.weight", "q.weight": f"{prefix}q.weight"}
    pairs |= {"p.weight": f"{prefix}p.weight", "fc.weight": "fc.0.weight"}
    pairs |= {"se.weight": "fc.1.fc.0.weight"} | with_norm({"bn1": "bn1", "bn2": "bn2"})
    pairs |= {f"{fc}.weight": f"{fc}.weight" for fc in ("fc_phi", "fc_scale")}
    assert set(pairs.values()) == set(case["state"])
    check(layer, case, pairs)


@cases("weightnet")
def test_published_weightnet(case):
    config = case["config"]
    layer = dynaconv.WeightNetConv2d(
        config["in_channels"], config["out_channels"], **static(config), bias=False
    )
    names = {"weight": "wnet.wn_fc2.weight"}
    for ours, theirs in {"fc": "wnet.wn_fc1", "reduce": "reduce"}.items():
        names |= {f"{ours}.{key}": f"{theirs}.{key}" for key in ("weight", "bias")}
    assert set(names.values()) == set(case["state"])
    check(layer, case, names)


@cases("kerneldna")
def test_published_kerneldna(case):
    config = case["config"]
    channels = config["in_channels"]
    layer = dynaconv.KernelDNAConv2d(
        channels,
        config["out_channels"],
        **static(config),
        bias=False,
        reduction=config["hidden"] / channels,
    )
    names = {"weight": "weight", "filter": "filter", "squeeze.fc.weight": "se.fc1.weight"}
    names |= {"spatial": "spatial"} if config["kernel_size"] > 1 else {}
    names |= {f"gate.{key}": f"se.fc2.{key}" for key in ("weight", "bias")}
    names |= with_norm({"squeeze.bn": "se.bn"})
    assert set(names.values()) == set(case["state"])
    check(layer, case, names)


# Properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "groups": 2},
        {"kernel_size": (2, 4), "padding": "valid", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 2, "padding": (1, 2), "padding_mode": "circular", "stride": 3},
    ],
)
def test_any_geometry_starts_as_the_static_convolution(name, geometry):
    torch.manual_seed(0)
    conv = conv_nd(2, 4, 6, **geometry)
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    layer = cls_of(name, 2).from_conv(conv)
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    learning = {"dcd": "fc_scale", "weightnet": "fc", "kerneldna": "gate"}[name]
    assert getattr(layer, learning).weight.grad.any(), "what follows the input cannot learn"
    if name == "dcd":
        assert layer.p.weight.grad.any(), "the residual cannot learn"


def test_copied_inputs_of_a_weightnet_group_learn_apart():
    torch.manual_seed(0)
    conv, x = conv_nd(2, 4, 6, 3), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    layer = dynaconv.WeightNetConv2d.from_conv(conv, multiplier=4, divisor=2)
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    first, second = layer.fc.weight.grad.unflatten(0, (-1, 2)).unbind(1)
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


@ranks
def test_a_fresh_weightnet_kernel_has_the_spread_of_a_convolution(rank):
    torch.manual_seed(rank)
    layer = cls_of("weightnet", rank)(64, 64, 3, multiplier=8, divisor=2)
    weight = layer.kernels(torch.randn(2, 64, *SIZES[rank]))["weight"]
    expected = conv_nd(rank, 64, 64, 3).weight.std()
    assert 0.8 < weight.std() / expected < 1.25


@ranks
def test_cells_of_a_sample_smaller_than_the_cells(rank):
    """Adaptive cells overlap there, and are still the sample's own."""
    torch.manual_seed(rank)
    geometry = {"kernel_size": 3, "padding": 1, "stride": 1, "dilation": 1, "groups": 1}
    layer, x, _ = make("dcd", rank, geometry, pool=3)
    full = list(SIZES[rank])
    sizes = [[1] * rank, [2] * (rank - 1) + [full[-1]]]
    output = layer(x, mask_from_sizes(torch.tensor(sizes), full))
    for n, size in enumerate(sizes):
        block = (slice(n, n + 1), slice(None), *(slice(length) for length in size))
        close(output[block], layer(x[block]), f"a sample of size {size}")


# A kernel that layers share ----------------------------------------------------------------


def family_of_two(rank, parent=None):
    """A child before its parent, as published."""
    cls = cls_of("kerneldna", rank)
    parent = parent or conv_nd(rank, 4, 4, 3, padding=1, bias=False)
    child = cls(4, 4, 3, padding=1, bias=False).double().derive_from(parent)
    with torch.no_grad():
        child.filter.normal_(0, 0.3)
        child.spatial.normal_(0, 0.3)
    return nn.Sequential(child, parent)


def example(rank):
    return torch.randn(2, 4, *SIZES[rank], dtype=torch.float64)


@ranks
def test_child_and_parent_train_one_kernel(rank):
    torch.manual_seed(rank)
    model = family_of_two(rank).eval()
    child, parent = model
    assert sum(p is parent.weight for p in model.parameters()) == 1
    x = example(rank)
    apart = copy.deepcopy(child), copy.deepcopy(parent)
    assert apart[0].weight is not apart[1].weight
    close(model(x), apart[1](apart[0](x)), "together", 0)
    model(x).square().sum().backward()
    apart[1](apart[0](x)).square().sum().backward()
    both = apart[0].weight.grad + apart[1].weight.grad
    close(parent.weight.grad, both, "gradient of the shared kernel")
    with torch.no_grad():
        parent.weight.mul_(2)
    close(child(x), 2 * apart[0](x), "a child follows its parent")


@ranks
@pytest.mark.parametrize("how", ["deepcopy", "state_dict", "float", "convert"])
def test_sharing_survives(rank, how):
    torch.manual_seed(rank)
    model, x = family_of_two(rank).eval(), example(rank)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "state_dict":
        other = family_of_two(rank).eval()
        other.load_state_dict(model.state_dict())
    elif how == "float":
        other = copy.deepcopy(model).float().double()
    else:
        other, _ = dynaconv.convert(nn.Sequential(model[1], model[1]), "kerneldna")
    assert other[0].weight is other[1].weight
    assert other[0].weight is not model[0].weight
    if how in ("deepcopy", "state_dict"):
        close(other(x), model(x), how, 0)


def test_a_child_of_a_child_and_layers_that_are_their_own_parents():
    first = dynaconv.KernelDNAConv2d(4, 6, 3)
    second = dynaconv.KernelDNAConv2d(4, 6, 3, dilation=2).derive_from(first)
    third = dynaconv.KernelDNAConv2d(4, 6, 3, stride=2).derive_from(second)
    assert third.weight is first.weight
    assert third.filter is not first.filter
    assert dynaconv.KernelDNAConv2d(4, 6, 1).spatial is None


def test_refusals():
    dcd, net, dna = dynaconv.DCDConv2d, dynaconv.WeightNetConv2d, dynaconv.KernelDNAConv2d
    for text, call in (
        ("blocks=4 does not divide out_channels=6", lambda: dcd(4, 6, 3, blocks=4)),
        ("blocks=3 does not divide in_channels=4", lambda: dcd(4, 6, 3, blocks=3)),
        ("no multiple of groups=4", lambda: dcd(8, 8, 3, groups=4, blocks=2)),
        ("latent=0", lambda: dcd(4, 6, 3, latent=0)),
        ("pool=0", lambda: dcd(4, 6, 3, pool=0)),
        ("min_hidden=0", lambda: dcd(4, 6, 3, min_hidden=0)),
        ("divisor=2 does not divide multiplier=3", lambda: net(4, 6, 3, multiplier=3)),
        ("divisor=2 does not divide the 27 entries", lambda: net(3, 6, 3)),
        ("multiplier=0", lambda: net(4, 6, 3, multiplier=0)),
        ("reduction=0", lambda: dna(4, 6, 3, reduction=0)),
        ("gate_scale=0", lambda: dna(4, 6, 3, gate_scale=0)),
        ("has shape", lambda: dna(4, 6, 3).derive_from(nn.Conv2d(4, 6, 1))),
        ("has dtype", lambda: dna(4, 6, 3).derive_from(nn.Conv2d(4, 6, 3).double())),
        ("has device", lambda: dna(4, 6, 3).derive_from(nn.Conv2d(4, 6, 3, device="meta"))),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="a parent is an nn"):
        dna(4, 6, 3).derive_from(nn.Linear(4, 6))
