"""FlexConv and DCLS: published outputs, slow loops, the cut, and sizes that follow the data."""

from itertools import product
from math import exp, log, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv.layers.continuous import KernelNetwork
from dynaconv.testing import close
from tests.layers.test_golden import cases, check
from tests.slow import slow_conv

VERSIONS = {"gauss": "gauss", "v1": "linear", "max": "triangle"}
SIZES = {1: (12,), 2: (6, 7), 3: (5, 4, 6)}
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def randomized(name, rank, **arguments):
    layer = dynaconv.families()[name].classes[rank](4, 6, **arguments).double().eval()
    torch.manual_seed(rank)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return layer, torch.randn(2, 4, *SIZES[rank], dtype=torch.float64)


def per_channel(vector, rank):
    return vector.reshape(-1, *(1,) * rank)


# Published outputs ---------------------------------------------------------------------------


@cases("flexconv")
def test_published_flexconv(case):
    config = case["config"]
    keys = ("in_channels", "out_channels", "kernel_size", "groups", "kind", "omega_0", "hidden")
    keys += ("layers", "learn_mean", "threshold")
    cls = dynaconv.families()["flexconv"].classes[config["rank"]]
    layer = cls(**{key: config[key] for key in keys}, padding="same")
    names = {}
    for theirs in case["state"]:
        if theirs.endswith("omega_0"):
            continue
        ours = theirs.replace("Kernel.output_linear", "network.output")
        ours = ours.replace("Kernel.kernel_net", "network.hidden.linears")
        ours = ours.replace("Kernel.", "network.hidden.")
        ours = ours.removesuffix("_param") if ours.startswith("mask_") else ours
        if config["kind"] == "siren":  # published with activations in between
            for i in range(config["layers"] - 1):
                ours = ours.replace(f"linears.{2 * i}.", f"linears.{i}.")
        if ours != "mask_threshold":
            names[ours] = theirs
    assert set(names) == set(layer.state_dict())
    check(layer, case, names)
    kept = [k - 2 * c for k, c in zip(layer.kernel_size, layer.cut(), strict=True)]
    assert kept == config["kept"]


@cases("dcls")
def test_published_dcls(case):
    config = case["config"]
    keys = ("in_channels", "out_channels", "stride", "padding", "groups", "padding_mode", "bias")
    layer = dynaconv.families()["dcls"].classes[config["rank"]](
        **{key: config[key] for key in keys},
        kernel_size=config["dilated_kernel_size"],
        taps=config["kernel_count"],
        interpolation=VERSIONS[config["version"]],
    )
    names = {key: key for key in ("weight", "bias") if key in case["state"]}
    for ours, theirs in (("positions", "P"), ("widths", "SIG")):
        if theirs in case["state"]:  # published with the last dimension first
            names[ours] = theirs
            case["state"][theirs] = case["state"][theirs].flip(0)
            case["grads"][f"weight:{theirs}"] = case["grads"][f"weight:{theirs}"].flip(0)
    assert set(names) == set(layer.state_dict())
    check(layer, case, names)


# Slow loops ----------------------------------------------------------------------------------


def slow_network(network, u):
    """The kernel values (C_out, C_in / groups) at one point u (D,)."""
    body = network.hidden
    apply = lambda layer, h: layer.weight @ h + layer.bias
    if hasattr(body, "omega_0"):
        h = u
        for layer in body.linears:
            h = torch.sin(body.omega_0 * apply(layer, h))
    else:
        gabor = lambda g: torch.stack(
            [
                torch.sin(g.linear.weight[i] @ u + g.linear.bias[i])
                * torch.exp(-sum((g.gamma[i, d] * (u[d] - g.mu[i, d])) ** 2 for d in range(len(u))))
                ** 0.5
                for i in range(len(g.mu))
            ]
        )
        h = gabor(body.filters[0])
        for g, layer in zip(body.filters[1:], body.linears, strict=True):
            h = gabor(g) * apply(layer, h)
    return apply(network.output, h).reshape(network.channels)


@ranks
@pytest.mark.parametrize("kind", ["magnet", "siren"])
@pytest.mark.parametrize("learn_mean", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 5, "stride": 1, "padding": 2, "dilation": 1, "groups": 2},
        {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 1, "groups": 1},
        {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2, "groups": 1},
    ],
    ids=["odd", "even", "dilated"],
)
def test_flexconv_formula(rank, kind, learn_mean, geometry):
    options = {"kind": kind, "hidden": 3, "learn_mean": learn_mean, "base": learn_mean}
    layer, x = randomized("flexconv", rank, **geometry, **options)
    taps = geometry["kernel_size"]
    with torch.no_grad():
        layer.mask_width.copy_(torch.tensor([0.3, -0.25, 0.9][:rank]))
        layer.mask_mean.mul_(0.2)
    kernel = torch.zeros(6, 4 // geometry["groups"], *(taps,) * rank, dtype=torch.float64)
    for k in product(range(taps), repeat=rank):
        u = torch.tensor([2 * q / (taps - 1) - 1 for q in k], dtype=torch.float64)
        value, inside = slow_network(layer.network, u), True
        if learn_mean:
            value = value + layer.weight[(..., *k)]
        for d in range(rank):
            width, mean = layer.mask_width[d].item(), layer.mask_mean[d].item()
            value = value * exp(-((u[d].item() - mean) ** 2) / (2 * width**2 + 2e-8))
            end = max(abs(mean) + abs(width) * sqrt(-2 * log(0.1)), 2 / (taps - 1))
            inside &= abs(u[d].item()) <= end + 1e-12
        if inside:
            kernel[(..., *k)] = value.detach()
    loop = {key: (geometry[key],) * rank for key in ("stride", "padding", "dilation")}
    loop |= {"kernel": (taps,) * rank, "groups": geometry["groups"]}
    expected = slow_conv(x, lambda n, p: kernel, **loop) + per_channel(layer.bias, rank)
    close(layer(x), expected, "FlexConv")


def spread(interpolation, distance, width):
    if interpolation == "gauss":
        return exp(-0.5 * (distance / (0.27 + abs(width))) ** 2)
    return max(0.0, 1 + (abs(width) if interpolation == "triangle" else 0) - abs(distance))


@ranks
@pytest.mark.parametrize("interpolation", ["gauss", "linear", "triangle"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 1, "groups": 2},
        {"kernel_size": 4, "stride": 2, "padding": 1, "dilation": 1, "groups": 1},
        {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3, "groups": 1},
    ],
    ids=["odd", "even", "dilated"],
)
def test_dcls_formula(rank, interpolation, geometry):
    layer, x = randomized("dcls", rank, **geometry, taps=3, interpolation=interpolation)
    with torch.no_grad():
        layer.positions.mul_(3)
    layer.keep_inside()
    extent = geometry["dilation"] * (geometry["kernel_size"] - 1) + 1
    kernel = torch.zeros(6, 4 // geometry["groups"], *(extent,) * rank, dtype=torch.float64)
    for o, c, t in product(range(6), range(kernel.shape[1]), range(3)):
        values = {}
        for i in product(range(extent), repeat=rank):
            values[i] = 1.0
            for d in range(rank):
                width = 0.0 if layer.widths is None else layer.widths[d, o, c, t].item()
                distance = i[d] - extent // 2 - layer.positions[d, o, c, t].item()
                values[i] *= spread(interpolation, distance, width)
        for i, value in values.items():
            kernel[(o, c, *i)] += (
                layer.weight[o, c, t].item() * value / (sum(values.values()) + 1e-7)
            )
    loop = {key: (geometry[key],) * rank for key in ("stride", "padding")}
    loop |= {"dilation": (1,) * rank, "kernel": (extent,) * rank, "groups": geometry["groups"]}
    expected = slow_conv(x, lambda n, p: kernel, **loop) + per_channel(layer.bias, rank)
    close(layer(x), expected, "DCLSConv")


# The network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["magnet", "siren"])
@pytest.mark.parametrize("size", [(33,), (7, 9), (5, 4, 3)])
def test_network_on_a_grid_and_at_points(kind, size):
    torch.manual_seed(0)
    network = KernelNetwork(len(size), (6, 4), hidden=8, kind=kind).double()
    kernel = network(size)
    assert kernel.shape == (6, 4, *size)
    for k in ((0,) * len(size), tuple(n - 1 for n in size), tuple(n // 2 for n in size)):
        u = [2 * q / (n - 1) - 1 for q, n in zip(k, size, strict=True)]
        at = network.at(torch.tensor([u], dtype=torch.float64))
        close(at[..., 0], kernel[(..., *k)], f"tap {k}")
        close(
            at[..., 0],
            slow_network(network, torch.tensor(u, dtype=torch.float64)),
            f"formula at {k}",
        )


@pytest.mark.parametrize("kind", ["magnet", "siren"])
def test_network_keeps_the_variance_at_any_size(kind):
    """Of the same order for all sizes; published starts lie below 1."""
    torch.manual_seed(0)
    for size in ((9,), (129,), (9, 9), (31, 31)):
        taps = torch.Size(size).numel()
        network = KernelNetwork(len(size), (32, 16), kind=kind, taps=taps)
        gain = network(size).square().mean().item() * 16 * taps
        assert 0.05 < gain < 1, (size, gain)


def test_network_refuses():
    with pytest.raises(ValueError, match="kind='mlp'"):
        KernelNetwork(2, (4, 4), kind="mlp")
    with pytest.raises(ValueError, match="omega_0"):
        KernelNetwork(2, (4, 4), omega_0=0.0)
    with pytest.raises(ValueError, match="size"):
        KernelNetwork(2, (4, 4))((3, 3, 3))
    with pytest.raises(ValueError, match=r"give \(T, 2\)"):
        KernelNetwork(2, (4, 4)).at(torch.zeros(5, 3))


def test_network_is_computed_finely_in_half_precision():
    torch.manual_seed(0)
    network = KernelNetwork(1, (4, 4), kind="siren").bfloat16()
    assert network((9,)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = network.float()((9,))
    assert torch.equal(inside, network((9,)))


# The cut -------------------------------------------------------------------------------------


@ranks
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 9, "padding": 4},
        {"kernel_size": 9, "padding": 1, "stride": 2},
        {"kernel_size": 7, "padding": "same", "dilation": 1},
        {"kernel_size": 6, "padding": "same"},
        {"kernel_size": 5, "padding": "valid", "dilation": 2},
        {"kernel_size": 5, "padding": 3, "dilation": 2, "stride": 3},
    ],
    ids=["half", "stride", "same", "even", "valid", "dilation"],
)
def test_the_cut_changes_nothing(rank, mode, geometry, monkeypatch):
    layer, _ = randomized("flexconv", rank, **geometry, padding_mode=mode, hidden=3)
    with torch.no_grad():
        layer.mask_width.copy_(torch.tensor([0.2, 0.35, 2.0][:rank]))
    x = torch.randn(2, 4, *(13, 12, 11)[:rank], dtype=torch.float64)
    assert max(layer.cut()) > 0
    results = []
    for _ in range(2):
        layer.zero_grad()
        y = layer(x.requires_grad_())
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
        y.sin().sum().backward()
        results.append((y, gradient, layer.mask_width.grad.clone()))
        monkeypatch.setattr(layer, "cut", lambda: [0] * rank)
    for what, cut, whole in zip(("output", "x", "mask_width"), *results, strict=True):
        close(cut, whole, what)


def test_compiles_without_a_break():
    layer, x = randomized("flexconv", 2, kernel_size=7, padding=3, hidden=3)
    with torch.no_grad():
        layer.mask_width.fill_(0.25)
    assert layer.cut() == [2, 2]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(compiled(x), layer(x), "compiled")


def test_three_taps_stay():
    """So that a mask that fell below one tap still has a gradient."""
    layer, x = randomized("flexconv", 1, kernel_size=9, padding=4)
    with torch.no_grad():
        layer.mask_width.fill_(0.05)
    assert layer.cut() == [3]
    layer(x).sum().backward()
    assert layer.mask_width.grad.abs() > 0


# Sizes follow the data -----------------------------------------------------------------------


def fit(layer, size, steps=400, lr=0.01):
    """Trains `layer` towards a kernel of all `size` taps; its size before and after."""
    torch.manual_seed(0)
    target = 0.5 + torch.rand(1, 1, size)
    sizes = []
    optimizer = torch.optim.Adam(dynaconv.parameter_groups(layer, lr))
    for group in optimizer.param_groups:
        group["lr"] = lr
    for step in range(steps + 1):
        x = torch.randn(16, 1, 64)
        loss = (layer(x) - F.conv1d(x, target, padding=size // 2)).square().mean()
        if step in (0, steps):
            sizes.append(layer.kernels(x)["size"][0, 0].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sizes


@pytest.mark.parametrize("seed", [0, 1])
def test_flexconv_finds_the_size(seed):
    torch.manual_seed(seed)
    arguments = {"kernel_size": 33, "padding": 16, "hidden": 16}
    before, grown = fit(dynaconv.FlexConv1d(1, 1, **arguments), 17)
    _, shrunk = fit(dynaconv.FlexConv1d(1, 1, **arguments, mask_width=0.6), 5)
    assert before < 7
    assert grown > 1.5 * before
    assert shrunk < 0.6 * 33
    assert shrunk < grown


@pytest.mark.parametrize(("interpolation", "least"), [("linear", 1), ("gauss", 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_dcls_spreads_to_the_size(interpolation, least, seed):
    """Gaussians further than linear shares, which see one position to each side."""
    torch.manual_seed(seed)
    options = {"taps": 9, "bias": False, "interpolation": interpolation}
    before, after = fit(dynaconv.DCLSConv1d(1, 1, 21, padding=10, **options), 13, lr=0.03)
    assert before + least < after < 13 + 2


# Starts from a convolution -------------------------------------------------------------------


def static(rank, **arguments):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 6, **arguments).double()
    return conv, torch.randn(2, 4, *(11, 10, 9)[:rank], dtype=torch.float64)


@ranks
@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("family", ["flexconv", "dcls"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "padding": "same", "dilation": 2, "groups": 2, "bias": False},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
    ],
    ids=["plain", "same", "valid", "reflect"],
)
def test_exact_start_with_room(rank, room, family, arguments):
    conv, x = static(rank, **arguments)
    layer = dynaconv.families()[family].classes[rank].from_conv(conv, room=room)
    close(layer(x), conv(x), family)
    layer(x).sin().sum().backward()
    moved = layer.mask_width if family == "flexconv" else layer.positions
    assert moved.grad.abs().max() > 0


def test_exact_start_needs():
    conv, x = static(2, kernel_size=3, padding=1)
    with pytest.raises(ValueError, match="base=True"):
        dynaconv.FlexConv2d.from_conv(conv, base=False)
    with pytest.raises(ValueError, match="taps=5"):
        dynaconv.DCLSConv2d.from_conv(conv, taps=5)
    gauss = dynaconv.DCLSConv2d.from_conv(conv, interpolation="gauss")
    close(gauss(x), conv(x), "Gaussian taps on every position")
    with pytest.raises(ValueError, match="fills the holes"):
        dynaconv.DCLSConv2d.from_conv(conv, interpolation="gauss", room=1)
    for cls in (dynaconv.FlexConv2d, dynaconv.DCLSConv2d):
        with pytest.raises(ValueError, match="one "):
            cls.from_conv(nn.Conv2d(4, 4, 1))
        with pytest.raises(ValueError, match="room"):
            cls.from_conv(conv, room=-1)
        with pytest.raises(ValueError, match="replaces"):
            cls.from_conv(nn.Linear(2, 2), room=1)


def test_convert_with_room():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for family, kind in (("flexconv", dynaconv.FlexConv2d), ("dcls", dynaconv.DCLSConv2d)):
        converted, _ = dynaconv.convert(model, to=family, where="0", room=3)
        assert isinstance(converted[0], kind)
        assert converted[0].kernel_size == (9, 9)
        close(converted(x), model(x), family)


def test_refusals():
    with pytest.raises(ValueError, match="threshold=1"):
        dynaconv.FlexConv1d(4, 4, 5, threshold=1)
    with pytest.raises(ValueError, match="mask_width"):
        dynaconv.FlexConv1d(4, 4, 5, mask_width=0.0)
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        dynaconv.DCLSConv1d(4, 4, 5, interpolation="cubic")
    with pytest.raises(ValueError, match="taps=0"):
        dynaconv.DCLSConv1d(4, 4, 5, taps=0)


def test_positions_come_back_into_the_kernel():
    layer, x = randomized("dcls", 1, kernel_size=6, padding=3)
    with torch.no_grad():
        layer.positions.copy_(100 * torch.randn_like(layer.positions))
    before = layer(x)
    assert layer.positions.abs().max() > 3  # evaluation stores nothing
    close(layer.train()(x), before, "moved back")
    assert layer.positions.min() >= -3
    assert layer.positions.max() <= 2


def test_a_tap_on_a_whole_position_can_leave_it():
    """The slope there is the difference to the neighbour, not 0."""
    conv, x = static(1, kernel_size=3, padding=1)
    layer = dynaconv.DCLSConv1d.from_conv(conv, room=1)
    layer(x).sin().sum().backward()
    slope = layer.positions.grad.clone()
    with torch.no_grad():
        layer.positions += 1e-6
    layer.zero_grad()
    layer(x).sin().sum().backward()
    close(slope, layer.positions.grad, "slope on and beside a whole position", 1e-4)
    assert slope.abs().min() > 0
