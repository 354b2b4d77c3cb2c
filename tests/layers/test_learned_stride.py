"""LearnedStrideConv: the published outputs, the formula, and that strides are learned."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.functional import spectral_resize
from dynaconv.layers.learned_stride import stride_cost
from dynaconv.masking import mask_from_sizes, sizes_from_mask
from dynaconv.testing import close
from tests.functional.test_spectral_resize import slow_learned, slow_published
from tests.slow import slow_conv

GOLDEN = Path(__file__).parent.parent / "golden" / "learned_stride.pt"
CASES = torch.load(GOLDEN, weights_only=True)["cases"]
SIZES = {1: (13,), 2: (9, 12), 3: (6, 5, 7)}
double = torch.float64
forms = pytest.mark.parametrize("published", [False, True], ids=["symmetric", "published"])


def resizer(rank=1, channels=1, **options):
    """A layer whose convolution is the identity and not trained: the resizing alone."""
    cls = dynaconv.families()["learned_stride"].classes[rank]
    layer = cls(channels, channels, 1, bias=False, groups=channels, **options).double()
    layer.weight.requires_grad_(False).fill_(1)
    return layer


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_golden(case, training):
    names = {
        "smoothness_factor": "smoothness",
        "shared_stride": "shared",
        "lower_limit_stride": "min_stride",
        "upper_limit_stride": "max_stride",
        "strides": "stride",
    }
    options = {names[key]: value for key, value in case["config"].items()}
    layer = resizer(2, case["inputs"]["input"].shape[1], **options).train(training)
    layer.load_state_dict(case["state"], strict=False)
    x = case["inputs"]["input"].clone().requires_grad_()
    output = layer(x)
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    close(x.grad, case["grads"]["input"], f"{case['name']}, input gradient")
    close(layer.strides.grad, case["grads"]["weight:strides"], f"{case['name']}, stride gradient")


@forms
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_formula(rank, published):
    """The convolution by loops, then the sums over frequencies of tests/functional."""
    cls = dynaconv.families()["learned_stride"].classes[rank]
    stride = [2.2, 1.7, 1.3][:rank]
    layer = cls(4, 6, 3, stride, 2, 2, groups=2, smoothness=1.2, published=published).double()
    x = torch.randn(2, 4, *SIZES[rank], dtype=double)
    each = lambda value: (value,) * rank
    weight = layer.weight.detach()
    loop = {"kernel": each(3), "stride": each(1), "padding": each(2), "dilation": each(2)}
    y = slow_conv(x, lambda n, p: weight, **loop, groups=2)
    y += layer.bias.detach().reshape(-1, *each(1))
    strides = layer.strides.detach()
    if published:
        lengths = torch.tensor(y.shape[2:], dtype=double)
        strides = torch.maximum(strides, lengths / (lengths - 1.2))
    size = [max(n / s, 2) for n, s in zip(y.shape[2:], strides, strict=True)]
    expected = (slow_published if published else slow_learned)(y, size, 1.2)
    close(layer(x), expected, "LearnedStrideConv")
    assert layer.kernels(x)["stride"].shape == (2, rank)
    close(layer.kernels(x)["stride"][1], layer.strides, "kernels")


@forms
@pytest.mark.parametrize("stride", [1.0, 1.6, 3.4])
def test_padding_promise_at_larger_strides(stride, published):
    """Odd and even sizes, which the published crop treats unlike, and a sample of no size."""
    layer = dynaconv.LearnedStrideConv2d(
        2, 3, 3, stride, 1, smoothness=1.3, published=published
    ).double()
    sizes = torch.tensor([[13, 12], [12, 13], [13, 12], [6, 11], [0, 0], [1, 2]])
    mask = mask_from_sizes(sizes, (13, 14))
    x = torch.randn(6, 2, 13, 14, dtype=double).masked_fill(~mask.unsqueeze(1), 1e3)
    output, real = layer(x, mask), layer.output_mask(mask)
    assert real.shape == (6, *output.shape[2:])
    for n, (height, width) in enumerate(sizes.tolist()):
        kept = tuple(sizes_from_mask(real)[n].tolist())
        if not height:
            assert kept == (0, 0)
            continue
        alone = layer(x[n : n + 1, :, :height, :width])
        assert kept == alone.shape[2:] == layer.output_size((height, width))
        close(output[n : n + 1, :, : kept[0], : kept[1]], alone, f"sample {n}")
    assert not output.masked_select(~real.unsqueeze(1)).any()
    everywhere = torch.ones_like(mask)
    close(layer(x, everywhere), layer(x), "nothing is padding")
    assert layer(x[:0], mask[:0]).shape == layer(x[:0]).shape


def low_and_noise(length=64):
    """A signal of frequencies up to 6, and the same with noise from 14 on."""
    n = torch.arange(length, dtype=double)
    wave = lambda k: torch.cos(2 * torch.pi * (k * n / length + torch.rand(16, 1, 1).double()))
    low = sum(wave(k) for k in range(7))
    return low, low + sum(wave(k) for k in range(14, length // 2 + 1))


@forms
@pytest.mark.parametrize("start", [1.0, 9.0])
def test_strides_learn_what_the_data_need(start, published):
    """Too fine a grid lets the noise through, too coarse a one loses the signal."""
    low, noisy = low_and_noise()
    layer = resizer(stride=start, published=published)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(150):
        output = layer(noisy)
        scale = output.shape[2] / 64 if published else 1.0
        loss = (spectral_resize(scale * output, 64) - low).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The ramp is 4 frequencies long: it fits between 6 and 14 where it starts at 6 to 10. Near
    # there the gradient fades with the loss.
    ramp_start = 32 / layer.strides.item() + published
    assert 6 - 0.5 < ramp_start < 10 + 0.5
    assert losses[-1] < 0.01 * losses[0]


def test_regulariser_raises_the_strides():
    """More weight on the cost, larger strides, on the same task and from the same start."""
    x = torch.randn(8, 2, 12, 12)
    found = []
    for weight in (0.0, 1.0, 10.0):
        torch.manual_seed(1)
        kind = dynaconv.LearnedStrideConv2d
        model = nn.Sequential(
            kind(2, 4, 3, 1.5, 1), nn.ReLU(), kind(4, 2, 3, 1.5, 1, published=False)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            loss = (model(x).mean((2, 3)) - x.mean((2, 3))).square().mean()
            loss = loss + weight * stride_cost(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(stride_cost(model).item())
    assert found[0] > found[1] > found[2]


def test_cost_is_the_papers_sum_of_products():
    kind = dynaconv.LearnedStrideConv2d
    first, second = kind(1, 1, 1, (2, 4)), kind(1, 1, 1, (1.0, 2.0))
    model = nn.Sequential(first, nn.Sequential(second))
    assert first.cost().item() == 1 / 8
    cost = stride_cost(model)
    assert cost.item() == 1 / 8 + 1 / 8 / 2
    cost.backward()
    # d/ds of (1 + 1/2) / (s * 4) at s = 2, and of 1 / (8 s * 2) at s = 1
    close(first.strides.grad[0], torch.tensor(-1.5 / 16), "first", 1e-6)
    close(second.strides.grad[0], torch.tensor(-1 / 16), "second", 1e-6)
    shortcut = kind(1, 1, 1, (2, 4))
    shortcut.strides = first.strides
    assert stride_cost(nn.Sequential(first, shortcut, second)).item() == cost.item()
    with pytest.raises(ValueError, match="has no LearnedStrideConv"):
        stride_cost(nn.Conv2d(1, 1, 1))


def test_training_moves_strides_between_their_bounds():
    layer = resizer(stride=2.0, min_stride=1.5, max_stride=3.0)
    x = torch.randn(1, 1, 32, dtype=double)
    for value, bound in ((0.3, 1.5), (7.0, 3.0)):
        with torch.no_grad():
            layer.strides.fill_(value)
        expected = layer.eval()(x)
        assert layer.strides.item() == value  # evaluation changes nothing, but keeps the bounds
        assert layer.kernels(x)["stride"].item() == bound
        close(layer.train()(x), expected, "train and eval")
        assert layer.strides.item() == bound


def test_input_sizes_leave_no_trace():
    """A small input raises the stride for itself only; the layer may run twice before backward."""
    layer = resizer(stride=1.0)
    large, small = torch.randn(1, 1, 64, dtype=double), torch.randn(1, 1, 6, dtype=double)
    before = layer(large)
    again = layer(small).sum() + layer(large).sum()
    again.backward()
    close(layer(large), before, "after a small input", 0)
    assert layer.strides.item() == 1


def test_from_conv_and_convert():
    kind, conv = dynaconv.LearnedStrideConv2d, nn.Conv2d(3, 5, 3, padding=1).double()
    layer = kind.from_conv(conv)
    x = torch.randn(2, 3, 9, 10, dtype=double)
    output = layer(x)
    close(output, conv(x), "from_conv")
    output.square().sum().backward()
    assert (layer.strides.grad != 0).all()  # the identity is no dead end
    with pytest.raises(ValueError, match="smooth version of all of them"):
        kind.from_conv(nn.Conv2d(3, 5, 3, stride=2))
    with pytest.raises(ValueError, match="damps high frequencies"):
        kind.from_conv(conv, published=True)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, stride=2)).double()
    converted, report = dynaconv.convert(model, to="learned_stride")
    close(converted(x), model(x), "convert")
    assert report.converted == ["0"]
    assert [name for name, _ in report.kept] == ["1"]


def test_as_static_rounds_the_stride():
    kind = dynaconv.LearnedStrideConv2d
    arguments = {"in_channels": 1, "out_channels": 1, "kernel_size": 1, "smoothness": 2.0}
    assert kind.as_static(arguments | {"stride": (1.2, 2.7)}, (8, 8))["stride"] == (1, 3)
    assert kind.as_static(arguments | {"stride": 1.7}, (8, 8))["stride"] == 2
    assert "smoothness" not in kind.as_static(arguments, (8, 8))


def test_state_keeps_the_strides():
    trained = resizer(2)
    with torch.no_grad():
        trained.strides.copy_(torch.tensor([2.25, 3.5]))
    fresh = resizer(2)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.strides.tolist() == [2.25, 3.5]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo, at graph breaks
def test_compiles():
    """With a break: the output's size is read from the strides."""
    layer = dynaconv.LearnedStrideConv1d(2, 3, 3, 2.5, 1).double()
    x = torch.randn(2, 2, 20, dtype=double)
    close(torch.compile(layer, backend="aot_eager")(x), layer(x), "compiled")


@pytest.mark.parametrize(
    ("error", "options", "text"),
    [
        (ValueError, {"stride": 0.5}, "stride=0.5 must be at least 1"),
        (ValueError, {"stride": float("inf")}, "and finite"),
        (ValueError, {"stride": (1.5, 2, 2)}, "has 3 entries; give 1 or 2"),
        (TypeError, {"stride": "2"}, "must be a number"),
        (TypeError, {"stride": True}, "must be a number"),
        (ValueError, {"smoothness": 0}, "smoothness=0 must be above 0"),
        (ValueError, {"min_stride": 0.5}, "min_stride=0.5 must be at least 1"),
        (ValueError, {"min_stride": 2.0, "stride": 3, "max_stride": 1.5}, "max_stride=1.5"),
        (ValueError, {"min_stride": 2.0}, "must lie between min_stride=2.0"),
        (ValueError, {"max_stride": 2.0, "stride": 3}, "must lie between"),
        (ValueError, {"stride": (1, 2), "shared": True}, "needs one stride for all"),
        (ValueError, {"stride": 2, "padding": "same"}, "padding='same' needs stride 1"),
    ],
)
def test_refusals(error, options, text):
    with pytest.raises(error, match=text):
        dynaconv.LearnedStrideConv2d(1, 1, 3, **options)
