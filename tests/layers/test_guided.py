"""Families guided by regions, gates or a guide beside the input: formula, published outputs."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.layers.gated import sparsity_loss
from dynaconv.masking import mask_from_sizes
from dynaconv.testing import close
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check
from tests.slow import interpolated, slow_conv, value_at

GOLDEN = Path(__file__).parent.parent / "golden"
ranks = pytest.mark.parametrize("rank", [1, 2, 3])
TRANSPOSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


# PAC ---------------------------------------------------------------------------------------


def affinity(layer, here, there):
    difference = there - here
    if layer.asymmetric:
        difference = difference.clamp(min=0)
    distance = (difference**2).sum().item()
    if layer.kernel == "gaussian":
        return math.exp(-distance / 2)
    return layer.alpha.item() + (distance + 1e-4) ** (layer.power.item() / 2)


def inside(position, size):
    return all(0 <= q < length for q, length in zip(position, size, strict=True))


PAC_OPTIONS = [
    {},
    {"kernel": "inv", "normalize": True},
    {"asymmetric": True, "blend": 0.7},
]


@everywhere
@pytest.mark.parametrize("options", PAC_OPTIONS)
def test_pac(rank, geometry, options):
    layer, x, loop = make("pac", rank, geometry, **options)
    guide = torch.randn(2, 3, *SIZES[rank], dtype=torch.float64)
    stride, padding, dilation = (geometry[k] for k in ("stride", "padding", "dilation"))
    place = lambda p, k: [q * stride - padding + i * dilation for q, i in zip(p, k, strict=True)]
    middle = (geometry["kernel_size"] // 2,) * rank
    taps = list(product(*map(range, loop["kernel"])))

    def kernel_at(n, p):
        here = value_at(guide[n], place(p, middle))
        kernel, total = layer.weight.detach().clone(), 0.0
        for k in taps:
            share = affinity(layer, here, value_at(guide[n], place(p, k)))
            if layer.blend is not None:
                share = 1 + layer.blend.item() * (share - 1)
            total += share * inside(place(p, k), SIZES[rank])
            kernel[(..., *k)] *= share
        return kernel / total if layer.normalize else kernel

    expected = slow_conv(x, kernel_at, **loop) + per_channel(layer.bias, rank)
    close(layer(x, guide=guide), expected, "PAC")


@ranks
def test_pac_shared_filters_and_default_guide(rank):
    geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    layer, x, loop = make("pac", rank, geometry, channels=(4, 4), shared_filters=True)

    def kernel_at(n, p):
        kernel = layer.weight.detach().expand(4, 1, *loop["kernel"]).clone()
        for k in product(range(3), repeat=rank):
            there = value_at(x[n], [q - 1 + i for q, i in zip(p, k, strict=True)])
            kernel[(..., *k)] *= affinity(layer, value_at(x[n], p), there)
        return kernel

    expected = slow_conv(x, kernel_at, **loop | {"groups": 4}) + per_channel(layer.bias, rank)
    close(layer(x), expected, "PAC, shared filters")
    close(layer(x, guide=x), expected, "PAC, the input as its guide")


@ranks
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 4), (3, 2)])
def test_pac_transpose(rank, given, stride, kernel):
    """Each input position adds to the output, as in nn.ConvTransposeNd."""
    arguments = {"stride": stride, "padding": 1, "output_padding": stride - 1, "groups": 2}
    layer = cls_of("pac_transpose", rank)(4, 6, kernel, **arguments).double()
    size = SIZES[rank] if rank < 3 else (3, 2, 3)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    enlarged = layer.output_size(size)
    guide = torch.randn(1, 3, *enlarged, dtype=torch.float64) if given else None

    def guide_at(o):
        if given:
            return value_at(guide[0], o)
        if not inside(o, enlarged):
            return torch.zeros(4, dtype=x.dtype)
        place = [(q + 1 - (kernel - 1) / 2) / stride for q in o]
        place = [min(max(q, 0), length - 1) for q, length in zip(place, size, strict=True)]
        return interpolated(x[0], place)

    expected = torch.zeros(1, 6, *enlarged, dtype=x.dtype)
    weight = layer.weight.detach()
    for i, k in product(product(*map(range, size)), product(range(kernel), repeat=rank)):
        o = [q * stride - 1 + t for q, t in zip(i, k, strict=True)]
        if inside(o, enlarged):
            other = [q + (kernel - 1) - kernel // 2 - t for q, t in zip(o, k, strict=True)]
            share = affinity(layer, guide_at(o), guide_at(other))
            seen = value_at(x[0], i).reshape(2, 2)
            tap = weight[(..., *k)].reshape(2, 3, 2)
            added = torch.cat([tap[g] @ seen[g] for g in range(2)])
            expected[(0, slice(None), *o)] += share * added
    close(layer(x, guide=guide), expected + per_channel(layer.bias, rank), "transposed PAC")


def pac_options(config):
    kind, *rest = config.get("kernel_type", "gaussian").split("_")
    options = {"kernel": kind, "smooth": config.get("smooth_kernel_type")}
    if kind == "inv":
        options |= {"alpha": float(rest[0]), "power": float(rest[1])}
        options |= {"asymmetric": "asym" in rest, "fixed": "fixed" in rest}
    options["normalize"] = config.get("normalize_kernel", False)
    options["shared_filters"] = config.get("shared_filters", False)
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding")
    return options | {k: config[k] for k in (*keys, "dilation", "bias") if k in config}


def check_pac(cls, case, turned):
    """`turned` takes a published weight to ours, and back."""
    layer = cls(**pac_options(case["config"])).double()
    names = {"inv_alpha": "alpha", "inv_lambda": "power", "smooth_kernel": "smoother"}
    state = {names.get(key, key): value for key, value in case["state"].items()}
    layer.load_state_dict(state | {"weight": turned(state["weight"])})
    x, guide = (case["inputs"][k].clone().requires_grad_() for k in ("input", "guide"))
    output = layer(x, guide=guide)
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    close(x.grad, case["grads"].pop("input"), "input gradient")
    close(guide.grad, case["grads"].pop("guide"), "guide gradient")
    for key, gradient in case["grads"].items():
        key = key.removeprefix("weight:")
        ours = layer.get_parameter(names.get(key, key)).grad
        ours = turned(ours) if key == "weight" else ours.reshape(gradient.shape)
        close(ours, gradient, f"gradient of {key}")


@cases("pac")
def test_published_pac(case):
    check_pac(dynaconv.PACConv2d, case, lambda weight: weight)


@cases("pac_transpose")
def test_published_pac_transpose(case):
    check_pac(dynaconv.PACConvTranspose2d, case, lambda w: w.flip(2, 3).transpose(0, 1))


@ranks
@pytest.mark.parametrize(
    ("name", "padding"), [("pac", 1), ("pac", 2), ("pac_transpose", 1), ("pac_transpose", 0)]
)
def test_pac_masks_the_guide(rank, name, padding):
    """What the guide holds in the padding of a batch does not matter; a sample is as alone."""
    options = {"normalize": True, "smooth": "gaussian"}
    layer = cls_of(name, rank)(4, 6, 3, padding=padding, **options).double()
    sizes = torch.tensor([SIZES[rank], [n - 1 for n in SIZES[rank]]])
    mask = mask_from_sizes(sizes, SIZES[rank])
    x = torch.randn(2, 4, *SIZES[rank], dtype=torch.float64)
    guided = SIZES[rank] if name == "pac" else layer.output_size(SIZES[rank])
    guide = torch.randn(2, 3, *guided, dtype=torch.float64)
    first = lambda y, less: y[
        (slice(1, 2), slice(None), *(slice(0, n - less) for n in y.shape[2:]))
    ]
    alone = layer(first(x, 1), guide=first(guide, 1))
    close(first(layer(x, mask, guide), 1), alone, f"{name} in a padded batch")


@ranks
def test_pac_transpose_from_conv(rank):
    conv = TRANSPOSES[rank](4, 6, 3, stride=2, padding=1, output_padding=1, groups=2).double()
    x = torch.randn(2, 4, *SIZES[rank], dtype=torch.float64)
    layer = cls_of("pac_transpose", rank).from_conv(conv)
    close(layer(x), conv(x), "PACConvTranspose.from_conv")
    layer(x).square().sum().backward()
    assert layer.blend.grad.abs() > 0  # it leaves the start


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel": "box"}, "choose from 'gaussian', 'inv'"),
        ({"smooth": "average_4"}, "with an odd n"),
        ({"shared_filters": True}, "as many output as"),
    ],
)
def test_pac_refuses_options(options, text):
    with pytest.raises(ValueError, match=text):
        dynaconv.PACConv2d(4, 6, 3, **options)


def test_pac_refuses_a_start_or_a_guide():
    conv = nn.Conv2d(4, 4, 3)
    for options, text in (
        ({"blend": 1.0}, "only with blend=0.0"),
        ({"normalize": True}, "a plain convolution does neither"),
        ({"shared_filters": True}, "a plain convolution does neither"),
    ):
        with pytest.raises(ValueError, match=text):
            dynaconv.PACConv2d.from_conv(conv, **options)
    layer, x = dynaconv.PACConv2d(4, 6, 3), torch.randn(2, 4, 6, 7)
    for guide in (torch.randn(2, 3, 6, 6), torch.randn(1, 3, 6, 7), torch.ones(2, 3, 6, 7).int()):
        with pytest.raises(ValueError, match=r"guide has shape .*give \(2, C_guide, 6, 7\)"):
            layer(x, guide=guide)
    with pytest.raises(ValueError, match="a kernel of 3 taps"):
        layer(x[..., :2])
    assert layer(x[0], guide=torch.randn(3, 6, 7)).shape == (6, 4, 5)


# DRConv ------------------------------------------------------------------------------------


def pooled(x, kernel):
    """Means of x (C, *L) over a grid of `kernel` cells, which may overlap."""
    result = torch.zeros(len(x), *kernel, dtype=x.dtype)
    for cell in product(*map(range, kernel)):
        span = [
            slice(c * length // k, -(-(c + 1) * length // k))
            for c, k, length in zip(cell, kernel, x.shape[1:], strict=True)
        ]
        result[(slice(None), *cell)] = x[(slice(None), *span)].flatten(1).mean(1)
    return result


@everywhere
@pytest.mark.parametrize("static", [False, True])
def test_drconv(rank, geometry, static):
    layer, x, loop = make("drconv", rank, geometry, regions=3, static_kernels=static)
    guide_weight = layer.guide.weight.detach()
    guide = slow_conv(x, lambda n, p: guide_weight, **loop | {"groups": 1})
    chosen = (guide + per_channel(layer.guide.bias, rank)).argmax(1)
    assert len(chosen.unique()) == 3
    kernels = []
    for sample in x:
        pool = pooled(sample, loop["kernel"]).flatten(1)
        hidden = torch.sigmoid(layer.fc1.weight.flatten(1) @ pool + layer.fc1.bias[:, None])
        made = torch.cat(
            [
                w.flatten(1) @ h + b[:, None]
                for w, b, h in zip(
                    layer.fc2.weight.chunk(3), layer.fc2.bias.chunk(3), hidden.chunk(3), strict=True
                )
            ]
        ).reshape(3, 6, -1, *loop["kernel"])
        kernels.append((made + layer.weight if static else made).detach())
    kernel_at = lambda n, p: kernels[n][chosen[(n, *p)]]
    expected = slow_conv(x, kernel_at, **loop) + per_channel(layer.bias, rank)
    close(layer(x), expected, "DRConv")
    close(layer.kernels(x)["regions"], chosen.unsqueeze(1).double(), "regions")


@cases("drconv")
def test_published_drconv(case):
    config = {k: v for k, v in case["config"].items() if k not in ("training", "region_num")}
    regions = case["config"].get("region_num", 8)
    layer = dynaconv.DRConv2d(**config, bias=False, regions=regions)
    keys = {"fc1": "conv_kernel.1", "fc2": "conv_kernel.3", "guide": "conv_guide"}
    names = {f"{o}.{key}": f"{t}.{key}" for o, t in keys.items() for key in ("weight", "bias")}
    check(layer, case, names)


def test_drconv_refuses_a_start_without_static_kernels():
    with pytest.raises(ValueError, match="static_kernels=True"):
        dynaconv.DRConv2d.from_conv(nn.Conv2d(4, 6, 3), static_kernels=False)


def test_drconv_where_nothing_is_real():
    layer = dynaconv.DRConv2d(4, 6, 3, padding=1)
    assert layer(torch.randn(2, 4, 5, 6), torch.zeros(2, 5, 6).bool()).isfinite().all()


# GatedConv ---------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_gated(rank, geometry, shift):
    layer, x, loop = make("gated", rank, geometry)
    with torch.no_grad():
        layer.gate.bias += shift
    gate_weight = layer.gate.weight.detach()
    logits = slow_conv(x, lambda n, p: gate_weight, **loop | {"groups": 1})
    mean = x.flatten(2).mean(2) @ layer.gate_fc.weight.T + layer.gate_fc.bias
    logits = (logits + per_channel(layer.gate.bias + mean, rank)).detach()
    gate = (logits >= 0).double()
    weight = layer.weight.detach()
    full = slow_conv(x, lambda n, p: weight, **loop) + per_channel(layer.bias, rank)
    close(layer.kernels(x)["gate"], gate, "gate")
    close(layer(x), gate * full, "GatedConv in evaluation")
    layer.noise = False
    close(layer.train()(x), gate * full, "GatedConv in training")


@ranks
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 2, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
    ],
)
@pytest.mark.parametrize("most", [0, 1, 3])
def test_active_positions_alone(rank, arguments, most, monkeypatch):
    """Computing only `most` active positions gives what computing all of them gives."""
    layer = cls_of("gated", rank)(4, 6, **arguments).double().eval()
    x = torch.randn(3, 4, *SIZES[rank], dtype=torch.float64, requires_grad=True)
    gate = torch.zeros_like(layer(x)[:, :1].detach())
    gate.view(-1)[torch.randperm(gate.numel())[:most]] = 1
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    calls, where = [], layer._where
    monkeypatch.setattr(layer, "_where", lambda *a: calls.append(a) or where(*a))
    results = []
    for training in (False, True):  # picked, then everywhere
        output = layer.train(training).convolve(x, gate)
        assert len(calls) == 1
        results.append((output, *torch.autograd.grad(output.sin().sum(), [x, *parameters])))
    for alone, dense in zip(*results, strict=True):
        close(alone, dense, "active positions alone")


@cases("gated")
def test_published_gated(case):
    layer = dynaconv.GatedConv2d(
        **{k: v for k, v in case["config"].items() if k != "training"}, noise=False
    )
    keys = {"gate": "masker.maskconv.conv", "gate_fc": "masker.maskconv.fc"}
    names = {f"{o}.{key}": f"{t}.{key}" for o, t in keys.items() for key in ("weight", "bias")}
    check(layer, case, names | {"weight": "conv.weight", "bias": "conv.bias"})


LOSSES = torch.load(GOLDEN / "gated.pt", weights_only=True)["losses"]


@pytest.mark.parametrize("case", LOSSES)
def test_published_sparsity_loss(case):
    costs = torch.tensor(case["costs"], dtype=torch.float64).unbind()
    progress = case["epoch"] / (0.33 * case["epochs"])
    loss = sparsity_loss(costs, case["target"], progress, case["work"])
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)  # summed up there in float32


def test_sparsity_loss_refuses():
    cost = [torch.tensor(0.5)]
    for arguments, text in (
        (([], 0.5), "costs is empty"),
        ((cost, 1.5), "target=1.5"),
        ((cost, 0.5, -1.0), "progress=-1.0"),
        ((cost, 0.5, 0.0, [1.0, 2.0]), "2 entries for 1 costs"),
    ):
        with pytest.raises(ValueError, match=text):
            sparsity_loss(*arguments)


def test_noise_opens_by_a_sigmoid():
    """With noise a gate is open as often as sigmoid(m) says; evaluation has none."""
    layer = dynaconv.GatedConv1d(1, 1, 1)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate_fc.weight.zero_()
        layer.gate_fc.bias.zero_()
        layer.gate.bias.fill_(0.7)
    x = torch.randn(1, 1, 40_000)
    share = layer.kernels(x)["gate"].mean().item()
    assert share == pytest.approx(torch.sigmoid(torch.tensor(0.7)).item(), abs=0.015)
    assert layer.eval().kernels(x)["gate"].min() == 1


def test_costs_are_the_active_share_and_close_gates():
    model = nn.Sequential(
        dynaconv.GatedConv2d(4, 6, 3, padding=1, noise=False),
        dynaconv.AdaptiveStrideConv2d(6, 6, 3, padding=1, restore=True),
    )
    x, mask = torch.randn(2, 4, 6, 7), mask_from_sizes([(6, 7), (3, 4)], (6, 7))
    with dynaconv.collect_costs() as costs:
        model(x)
        model[0](x, mask)
    assert len(costs) == 3  # one list for both families
    gates = (model[0].kernels(x)["gate"], model[0].kernels(x, mask)["gate"])
    close(costs[0], gates[0].mean(), "cost")
    close(costs[2], gates[1].sum() / mask.sum(), "cost of a padded batch")
    layer = dynaconv.GatedConv2d.from_conv(nn.Conv2d(4, 6, 3, padding=1)).train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    shares = []
    for _ in range(150):
        with dynaconv.collect_costs() as costs:
            layer(x)
        loss = sparsity_loss(costs, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(costs[0].item())
    assert shares[0] == 1
    assert abs(shares[-1] - 0.5) < 0.2


def test_gated_refuses_a_noisy_start():
    with pytest.raises(ValueError, match="noise=True closes gates at random"):
        dynaconv.GatedConv2d.from_conv(nn.Conv2d(4, 6, 3), noise=True)
