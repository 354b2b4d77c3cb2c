"""Size and stride chosen per input: their formulas as loops, and what they promise."""

from functools import partial
from math import floor, log

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynaconv
from dynaconv import MaskedSequential, Padded, collect_costs, pad_batch, unpad_batch
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.slow import interpolated, slow_conv

SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def make(family, rank, **arguments):
    torch.manual_seed(rank)
    cls = dynaconv.families()[family].classes[rank]
    layer = randomized(cls, {"in_channels": 4, "out_channels": 6} | arguments)
    with torch.no_grad():
        layer.head.fc.weight.mul_(2)  # so that samples differ
    return layer, torch.randn(3, 4, *SIZES[rank], dtype=torch.float64)


def head_by_hand(layer, x):
    """tanh(fc(relu(squeeze([mean, mean |dx|])))), the detail by loops over dimensions."""
    steps = [
        (x.narrow(d, 1, x.shape[d] - 1) - x.narrow(d, 0, x.shape[d] - 1)).abs()
        for d in range(2, x.dim())
    ]
    detail = sum(s.flatten(2).sum(2) for s in steps) / sum(s[0, 0].numel() for s in steps)
    pooled = torch.cat([x.flatten(2).mean(2), detail], 1)
    squeeze, fc = layer.head.squeeze, layer.head.fc
    hidden = (pooled @ squeeze.weight.T + squeeze.bias).clamp(min=0)
    return torch.tanh(hidden @ fc.weight.T + fc.bias).detach()


GEOMETRIES = [
    {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1},
    {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2, "groups": 2},
]


@ranks
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_size_by_dilation(rank, geometry):
    layer, x = make("adaptive_size", rank, **geometry)
    scale = 4.0 ** head_by_hand(layer, x)
    k, s, p, d, groups = geometry.values()

    def read(n, q, tap, position):
        moved = [
            q[i] * s - p + d * (k - 1) / 2 + float(scale[n, i]) * d * (tap[i] - (k - 1) / 2)
            for i in range(rank)
        ]
        return interpolated(x[n], moved)

    loop = {"kernel": (k,) * rank, "stride": (s,) * rank, "padding": (p,) * rank}
    loop |= {"dilation": (d,) * rank, "groups": groups}
    expected = slow_conv(x, lambda n, q: layer.weight.detach(), **loop, read=read)
    close(layer(x), expected + layer.bias.reshape(-1, *[1] * rank), "dilation")
    close(layer.kernels(x)["size"], 1 + d * (k - 1) * scale, "size")


@ranks
def test_size_by_mask(rank):
    layer, x = make("adaptive_size", rank, kernel_size=5, padding=2, field="mask")
    scale = 4.0 ** head_by_hand(layer, x)
    width = 1 / (2 * log(10)) ** 0.5
    u = torch.linspace(-1, 1, 5).double()
    kernels = []
    for r in scale:
        mask = torch.ones(5, dtype=torch.float64)
        lines = [
            torch.exp(-u.square() / 2 * (1 / (r[i] * width) ** 2 - 1 / width**2))
            for i in range(rank)
        ]
        mask = lines[0]
        for line in lines[1:]:
            mask = mask.unsqueeze(-1) * line
        kernels.append((layer.weight * mask).detach())
    loop = {
        "kernel": (5,) * rank,
        "stride": (1,) * rank,
        "padding": (2,) * rank,
        "dilation": (1,) * rank,
    }
    expected = slow_conv(x, lambda n, q: kernels[n], **loop)
    close(layer(x), expected + layer.bias.reshape(-1, *[1] * rank), "mask")


def read_at_stride(x, stride, padding, dilation, n, q, tap, position):
    return interpolated(x, [q[i] * s - padding + dilation * tap[i] for i, s in enumerate(stride)])


@ranks
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_stride(rank, geometry):
    layer, x = make("adaptive_stride", rank, **geometry, low=0.8, high=3.5)
    k, s0, p, d, groups = geometry.values()
    reach = log(max(3.5 / s0, s0 / 0.8))
    strides = (s0 * torch.exp(reach * head_by_hand(layer, x))).clamp(0.8, 3.5)
    output, mask = layer(x)
    assert strides.std() > 0.01
    for n, (ours, stride) in enumerate(
        zip(unpad_batch(output, mask), strides.tolist(), strict=True)
    ):
        size = [
            floor((l + 2 * p - d * (k - 1) - 1) / s) + 1
            for l, s in zip(SIZES[rank], stride, strict=True)
        ]
        assert list(ours.shape[1:]) == size
        # An input so large that slow_conv visits each position of ours, which it reads elsewhere.
        room = torch.zeros(1, 4, *[m - 1 + d * (k - 1) + 1 for m in size], dtype=torch.float64)
        read = partial(read_at_stride, x[n], stride, p, d)
        loop = {"kernel": (k,) * rank, "stride": (1,) * rank, "padding": (0,) * rank}
        loop |= {"dilation": (d,) * rank, "groups": groups, "read": read}
        expected = slow_conv(room, lambda n, q: layer.weight.detach(), **loop)[0]
        close(ours, expected + layer.bias.reshape(-1, *[1] * rank), "strided")
    close(layer.kernels(x)["stride"], strides, "strides")


@ranks
def test_a_sample_alone_is_the_same_in_any_batch(rank):
    layer, _ = make("adaptive_stride", rank, kernel_size=3, padding=1, stride=2)
    samples = [torch.randn(4, *[n + i for n in SIZES[rank]], dtype=torch.float64) for i in range(4)]
    x, mask = pad_batch(samples, value=1e3)
    together = unpad_batch(*layer(x, mask))
    for sample, ours in zip(samples, together, strict=True):
        close(ours, layer(sample[None]).data[0], "alone")
        close(ours, layer(sample).data, "without a batch dimension")
    assert len({tuple(t.shape) for t in together}) > 1


@ranks
@pytest.mark.parametrize("restore", [True, False])
def test_gradient_in_the_stride(rank, restore):
    """Between the steps of the output's size, numbers agree with differences."""
    layer, x = make("adaptive_stride", rank, kernel_size=2, padding=1, stride=2, restore=restore)
    x = x[:1]

    def run(moved):
        stride = 2 * torch.exp(moved)
        data, _ = layer.strided(x, None, stride)
        return layer.restored(data, stride, layer.output_size(x.shape[2:])) if restore else data

    moved = torch.full((1, rank), 0.0137, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, moved, eps=1e-7, atol=1e-4)
    assert torch.autograd.grad(run(moved).sin().sum(), moved)[0].abs().min() > 0


def test_the_gradient_passes_the_bounds():
    layer, x = make("adaptive_stride", 2, kernel_size=3, padding=1, stride=2, low=1.9, high=2.1)
    with torch.no_grad():
        layer.head.fc.bias.copy_(torch.tensor([3.0, -3.0]))
    stride = layer.kernels(x)["stride"]
    assert stride.min() >= 1.9
    assert stride.max() <= 2.1
    at_bound = (stride == 1.9) | (stride == 2.1)
    assert at_bound.any()
    layer.zero_grad()
    stride.masked_select(at_bound).sum().backward()
    assert layer.head.fc.bias.grad.abs().max() > 0


def test_restored_size_is_that_of_the_static_convolution():
    layer, x = make("adaptive_stride", 2, kernel_size=3, padding=1, stride=2, restore=True)
    assert layer.kernels(x)["stride"].std() > 0.05
    assert layer(x).shape == F.conv2d(x, layer.weight, None, 2, 1).shape


def macs(layer, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops() // 2


def test_compute_falls_with_the_stride():
    layer = dynaconv.AdaptiveStrideConv2d(8, 8, 3, 2, 1, low=1, high=4)
    x = torch.randn(1, 8, 64, 64)
    counts = []
    for shift in (-1.0, 0.0, 1.0):
        nn.init.constant_(layer.head.fc.bias, 20 * shift)
        assert layer.kernels(x)["stride"][0, 0].item() == pytest.approx(2 ** (1 + shift))
        counts.append(macs(layer, x))
    assert counts[0] > 3.9 * counts[1] > 3.9 * 3.9 * counts[2]
    static = 8 * 8 * 9 * 32 * 32
    assert static <= counts[1] < 1.01 * static  # beside it, the head's few


def test_costs_are_collected_and_differentiable():
    layer, x = make("adaptive_stride", 2, kernel_size=3, padding=1, stride=2)
    model = MaskedSequential(
        layer, nn.ReLU(), dynaconv.AdaptiveStrideConv2d(6, 4, 3, 1, 1).double()
    )
    model(x)
    with collect_costs() as costs, collect_costs() as inner:
        model(x)
    assert len(costs) == len(inner) == 2
    expected = (2 / layer.kernels(x)["stride"]).prod(1).mean()
    close(costs[0], expected, "cost")
    close(costs[1], torch.tensor(1.0).double(), "the start's cost is 1")
    costs[0].backward()
    assert layer.head.fc.weight.grad.abs().max() > 0
    model(x)
    assert len(costs) == 2


@ranks
def test_a_classifier_from_end_to_end(rank):
    """Strides, norms and pools in a row: logits alone and in a padded batch are the same."""
    stride = dynaconv.families()["adaptive_stride"].classes[rank]
    size = dynaconv.families()["adaptive_size"].classes[rank]
    norm, pool = getattr(nn, f"BatchNorm{rank}d"), getattr(nn, f"AdaptiveAvgPool{rank}d")
    layers = [stride(4, 6, 3, 2, 1), norm(6), nn.ReLU(), size(6, 6, 3, padding=1), nn.ReLU()]
    layers += [stride(6, 5, 3, 1, 1), pool(1), nn.Flatten(), nn.Linear(5, 3)]
    model = MaskedSequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    samples = [
        torch.randn(4, *[n + 2 * i for n in SIZES[rank]], dtype=torch.float64) for i in range(4)
    ]
    x, mask = pad_batch(samples, value=1e3)
    model(x, mask).data.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.eval()
    logits = model(x, mask).data
    for sample, ours in zip(samples, logits, strict=True):
        close(ours, model(sample[None]).data[0], "logits")


def test_learns_a_larger_stride_for_a_smoother_input():
    """With a price on compute, smooth inputs get the larger stride: their detail allows it."""
    torch.manual_seed(0)
    layer = dynaconv.AdaptiveStrideConv1d(1, 1, 3, 1, 1, bias=False, restore=True, low=1, high=4)
    nn.init.constant_(layer.weight, 1 / 3)
    layer.weight.requires_grad_(False)
    t = torch.arange(128.0)
    phase = 6.28 * torch.rand(32, 1, 1)
    frequency = torch.tensor([0.02, 1.0]).repeat(16)[:, None, None]
    x = torch.sin(frequency * t + phase)
    target = F.conv1d(x, layer.weight, padding=1)
    optimizer = torch.optim.Adam(layer.head.parameters(), 1e-2)
    for _ in range(60):
        with collect_costs() as costs:
            loss = (layer(x) - target).square().mean() + 0.01 * torch.stack(costs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stride = layer.kernels(x)["stride"][:, 0]
    assert stride[::2].mean() > 1.5 * stride[1::2].mean()


def test_refusals():
    with pytest.raises(ValueError, match=r"low=2, high=4.*give low <= stride <= high"):
        dynaconv.AdaptiveStrideConv2d(4, 4, 3, low=2, high=4)
    with pytest.raises(ValueError, match="field='shape'; choose from"):
        dynaconv.AdaptiveSizeConv2d(4, 4, 3, field="shape")
    with pytest.raises(ValueError, match="one tap has no size"):
        dynaconv.AdaptiveSizeConv2d(4, 4, 1)
    with pytest.raises(ValueError, match="max_scale=1 must be above 1"):
        dynaconv.AdaptiveSizeConv2d(4, 4, 3, max_scale=1)
    layer = dynaconv.AdaptiveStrideConv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="come with the output"):
        layer.output_mask(torch.ones(1, 5, 5).bool())
    with pytest.raises(ValueError, match="spans 3 positions"):
        dynaconv.AdaptiveStrideConv2d(4, 4, 3)(torch.randn(1, 4, 2, 2))
    with pytest.raises(ValueError, match="not a tensor"):
        dynaconv.AdaptiveStrideConv2d.from_conv(nn.Conv2d(4, 4, 3), restore=False)
    assert isinstance(layer(torch.randn(2, 4, 6, 6)), Padded)
