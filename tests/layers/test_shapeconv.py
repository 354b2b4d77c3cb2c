"""Kernels whose size follows the input's shape."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv import pad_batch, unpad_batch
from dynaconv.functional import resample_kernel
from dynaconv.layers.shapeconv import growth
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.slow import slow_conv

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def make(rank, kernel_size, **arguments):
    torch.manual_seed(rank)
    cls = dynaconv.families()["shapeconv"].classes[rank]
    return randomized(
        cls, {"in_channels": 4, "out_channels": 6, "kernel_size": kernel_size} | arguments
    )


def test_the_standing_example():
    """Half the height by half the width; 3x32x32, 64 channels: kernel 16x16, output 17x17."""
    layer = dynaconv.ShapeConv2d(3, 64, 0.5)
    assert layer(torch.randn(1, 3, 32, 32)).shape == (1, 64, 17, 17)
    assert layer.kernels(torch.randn(1, 3, 32, 32))["size"].tolist() == [[16, 16]]
    assert layer.kernel_at((16, 16)).shape == (64, 3, 16, 16)
    assert layer(torch.randn(2, 3, 48, 20)).shape == (2, 64, 25, 11)
    assert sum(p.numel() for p in layer.parameters()) == 64 * 3 * 7 * 7 + 64


@ranks
@pytest.mark.parametrize("kernel", ["area", "pinv", "continuous"])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}])
def test_is_the_static_convolution_with_the_resampled_kernel(rank, kernel, geometry):
    layer = make(rank, (0.5, 0.3, 0.4)[:rank], base_size=3, kernel=kernel, **geometry)
    for shape in ((14, 12, 11), (11, 15, 13)):
        shape = shape[:rank]
        taps = tuple(int(f * n + 0.5) for f, n in zip((0.5, 0.3, 0.4), shape, strict=False))
        x = torch.randn(2, 4, *shape, dtype=torch.float64)
        weight = layer.kernel_at(taps).detach()
        if kernel != "continuous":
            assert torch.equal(weight, resample_kernel(layer.weight, taps, kernel).detach())
        else:
            close(
                weight, layer.network(taps).detach() * 3**rank / torch.tensor(taps).prod(), kernel
            )
        keys = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry
        groups = keys.pop("groups")
        loop = {name: (value,) * rank for name, value in keys.items()}
        expected = slow_conv(x[:1], lambda n, p: weight, taps, **loop, groups=groups)  # noqa: B023
        close(layer(x)[:1], expected + layer.bias.reshape(-1, *[1] * rank), kernel)


def test_a_function_of_the_shape():
    layer = make(2, lambda shape: (shape[0] // 4, 3))
    x = torch.randn(2, 4, 16, 9, dtype=torch.float64)
    assert layer(x).shape == (2, 6, 13, 7)
    assert layer.kernels(x)["size"].tolist() == [[4, 3]] * 2
    with pytest.raises(TypeError, match="must be int"):
        make(2, lambda shape: shape[0] / 4)(x)
    with pytest.raises(ValueError, match="spans 20 positions"):
        make(2, lambda shape: 20)(x)


@ranks
@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize(
    ("taps", "padding", "stride"), [(3, 1, 1), (2, 0, 2), (5, 2, 2), (3, "same", 1)]
)
def test_with_a_reference_the_output_has_the_static_size(rank, padding_mode, taps, padding, stride):
    arguments = {"padding": padding, "stride": stride, "padding_mode": padding_mode}
    layer = make(rank, taps, reference=(12,) * rank, **arguments)
    static = CONV[rank](4, 6, taps, **arguments).double()
    with torch.no_grad():
        static.weight.copy_(layer.weight)
        static.bias.copy_(layer.bias)
    for size in (12, 24, 17, 6):
        x = torch.randn(1, 4, *[size] * rank, dtype=torch.float64)
        assert layer(x).shape == static(x).shape, size
    at_reference = torch.randn(1, 4, *[12] * rank, dtype=torch.float64)
    close(layer(at_reference), static(at_reference), "at the reference")


def test_growth_keeps_parity_and_leaves_a_tap():
    for taps in range(1, 9):
        assert growth(taps, 7, 7) == 0
        assert taps + 2 * growth(taps, 1, 100) == (1 if taps % 2 else 2)
        for size in (3, 7, 15, 20, 42):
            grown = taps + 2 * growth(taps, size, 10)
            assert abs(grown - taps * size / 10) <= 1 or grown <= 2
    assert growth(3, 12, 9) == 1  # from half a tap on


@ranks
def test_samples_of_different_sizes_have_kernels_of_their_own(rank):
    layer = make(rank, 0.5, padding=1)
    samples = [torch.randn(4, *[n] * rank, dtype=torch.float64) for n in (8, 11, 8, 6)]
    x, mask = pad_batch(samples, value=1e3)
    output, sizes = layer(x, mask), layer.kernels(x, mask)["size"][:, 0].tolist()
    assert sizes == [4, 6, 4, 3]
    for sample, ours in zip(samples, unpad_batch(output, layer.output_mask(mask)), strict=True):
        close(ours, layer(sample[None])[0], "alone")


def test_the_first_input_can_be_the_reference():
    layer = make(2, 3, padding=1, reference="first")
    assert layer(torch.randn(1, 4, 10, 10).double()).shape == (1, 6, 10, 10)
    assert layer.kernel_size_at((20, 10)) == (7, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = make(2, 3, padding=1, reference="first")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.reference == (10, 10)
    x = torch.randn(1, 4, 20, 14).double()
    close(fresh(x), layer(x), "from the state_dict")


def test_convert_keeps_the_function_at_the_size_it_was_trained_at():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1)
    ).double()
    dynamic, report = dynaconv.convert(model, to="shapeconv")
    assert len(report.converted) == 2
    x = torch.randn(1, 3, 16, 16).double()
    close(dynamic(x), model(x), "converted")
    larger = torch.randn(1, 3, 32, 32).double()
    assert dynamic(larger).shape == model(larger).shape
    assert dynamic[2].kernels(larger.new_zeros(1, 8, 32, 32))["size"].tolist() == [[7, 7]]


def features(layer, image):
    return F.adaptive_avg_pool2d(F.relu(layer(image)), 1).flatten()


@pytest.mark.parametrize("kernel", ["area", "pinv", "continuous"])
def test_answers_the_same_image_alike_at_other_scales(kernel):
    """Features of an image at four scales move several times less than with a fixed kernel."""
    torch.manual_seed(0)
    coarse = torch.randn(1, 3, 6, 6)
    at = lambda size: F.interpolate(coarse, size=size, mode="bicubic")
    dynamic = dynaconv.ShapeConv2d(3, 32, 0.25, padding="same", base_size=8, kernel=kernel)
    fixed = nn.Conv2d(3, 32, 8, padding="same")
    with torch.no_grad():
        fixed.weight.copy_(dynamic.kernel_at((8, 8)))
        fixed.bias.copy_(dynamic.bias)
    moved = {}
    for name, layer in (("dynamic", dynamic), ("fixed", fixed)):
        reference = features(layer, at(32))
        changes = [
            (features(layer, at(s)) - reference).norm() / reference.norm() for s in (24, 48, 64)
        ]
        moved[name] = torch.stack(changes).mean().item()
    assert moved["dynamic"] < moved["fixed"] / 3, moved


@pytest.mark.parametrize("kernel", ["area", "pinv"])
def test_gradcheck(kernel):
    layer = make(1, 0.5, base_size=3, kernel=kernel)
    x = torch.randn(1, 4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    loss = lambda w: torch.func.functional_call(layer, {"weight": w}, (x.detach(),))
    assert torch.autograd.gradcheck(loss, layer.weight.detach().requires_grad_())


def test_repr_says_the_rule():
    assert "kernel_size=(0.5, 3)" in repr(dynaconv.ShapeConv2d(4, 4, (0.5, 3)))
    assert "half" in repr(dynaconv.ShapeConv2d(4, 4, half))


def half(shape):
    return shape[0] // 2


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "a fraction must be above 0", {"kernel_size": -0.5}),
        (ValueError, "kernel='cubic'; choose from", {"kernel_size": 3, "kernel": "cubic"}),
        (ValueError, "reference='last'; give a shape", {"kernel_size": 3, "reference": "last"}),
        (ValueError, "has 3 entries", {"kernel_size": (0.5, 3, 3)}),
        (ValueError, "base_size=0 must be at least 1", {"kernel_size": 0.5, "base_size": 0}),
    ],
)
def test_refusals(error, text, arguments):
    with pytest.raises(error, match=text):
        dynaconv.ShapeConv2d(4, 4, **arguments)


def test_from_conv_says_why_not():
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match="holds no given taps"):
        dynaconv.ShapeConv2d.from_conv(conv, kernel="continuous")
    with pytest.raises(ValueError, match="leave base_size out"):
        dynaconv.ShapeConv2d.from_conv(conv, base_size=5)
