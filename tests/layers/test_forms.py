"""Transposed and causal forms against their definitions, in float64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv.functional import (
    conv_per_sample,
    conv_transpose_per_sample,
    deform_conv,
    deform_conv_transpose,
)
from dynaconv.registry import families
from dynaconv.testing import close
from dynaconv.testing.families import example, randomized

TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
GEOMETRIES = [
    {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0},
    {"stride": 2, "padding": 1, "dilation": 1, "groups": 2, "output_padding": 1},
    {"stride": 3, "padding": 2, "dilation": 2, "groups": 1, "output_padding": 2},
]
everywhere = pytest.mark.parametrize(
    ("rank", "geometry"),
    [pytest.param(r, g, id=f"{r}d-{i}") for r, (i, g) in product((1, 2, 3), enumerate(GEOMETRIES))],
)
SIZES = {1: (7,), 2: (4, 5), 3: (3, 4, 3)}
POOLED = [
    (family.classes[1], arguments)
    for family in families().values()
    if 1 in family.classes and family.classes[1].causality == "pooled"
    for arguments in family.classes[1].samples(1)
    if arguments.get("causal")
]


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


@everywhere
def test_each_sample_has_its_own_transposed_kernel(rank, geometry):
    x, weight, bias = (
        draw(3, 4, *SIZES[rank]),
        draw(3, 4, 6 // geometry["groups"], *(3,) * rank),
        draw(6),
    )
    output = conv_transpose_per_sample(x, weight, bias, **geometry)
    expected = torch.cat(
        [TRANSPOSES[rank](x[n : n + 1], weight[n], bias, **geometry) for n in range(3)]
    )
    close(output, expected, "conv_transpose_per_sample")


@everywhere
def test_it_is_the_transpose_of_conv_per_sample(rank, geometry):
    """<y, conv x> = <conv^T y, x>."""
    kernel = {k: v for k, v in geometry.items() if k != "output_padding"}
    weight = draw(2, 4, 6 // geometry["groups"], *(3,) * rank)
    small = draw(2, 4, *SIZES[rank])
    large = conv_transpose_per_sample(small, weight, **geometry)
    other = draw(*large.shape)
    back = conv_per_sample(other, weight, **kernel)
    close((back * small).sum(), (large * other).sum(), "inner products")


@everywhere
@pytest.mark.parametrize("offset_groups", [1, 2])
def test_deform_conv_transpose_is_the_transpose_of_deform_conv(rank, geometry, offset_groups):
    kernel = {k: v for k, v in geometry.items() if k != "output_padding"}
    taps = offset_groups * 3**rank
    weight = draw(4, 6 // geometry["groups"], *(3,) * rank)
    small = draw(2, 4, *SIZES[rank])
    offset, modulation = draw(2, taps * rank, *SIZES[rank]), draw(2, taps, *SIZES[rank])
    large = deform_conv_transpose(small, offset, weight, modulation=modulation, **geometry)
    other = draw(*large.shape)
    back = deform_conv(other, offset, weight, modulation=modulation, **kernel)
    close((back * small).sum(), (large * other).sum(), "inner products")
    inputs = [small, offset, weight, modulation]
    ours = torch.autograd.grad((large * other).sum(), inputs)
    theirs = torch.autograd.grad((back * small).sum(), inputs)
    for a, b, what in zip(ours, theirs, ("input", "offset", "weight", "modulation"), strict=True):
        close(a, b, f"gradient of {what}")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_offset_is_the_static_transposed_convolution(rank):
    x, weight, bias = draw(2, 4, *SIZES[rank]), draw(4, 3, *(3,) * rank), draw(6)
    geometry = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 1}
    offset = torch.zeros(2, rank * 3**rank, *SIZES[rank]).double()
    output = deform_conv_transpose(x, offset, weight, bias, **geometry)
    close(output, TRANSPOSES[rank](x, weight, bias, **geometry), "zero offsets")


def test_transposed_primitives_have_gradients():
    x, weight, bias = draw(2, 2, 4), draw(2, 2, 3, 3), draw(2, 3)
    assert torch.autograd.gradcheck(
        lambda *a: conv_transpose_per_sample(*a, stride=2, padding=1), (x, weight, bias)
    )
    offset = (0.3 + 0.1 * torch.rand(2, 3, 4).double()).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda *a: deform_conv_transpose(*a, stride=2, padding=1), (x, offset, draw(2, 3, 3))
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": (3, 2, 3, 3)}, "weight has shape"),
        ({"bias": (4,)}, "bias has shape"),
        ({"padding": 9}, "less padding"),
        ({"output_padding": 1}, "output_padding"),
        ({"groups": 3}, "groups"),
    ],
)
def test_transposed_primitives_refuse(change, text):
    shapes = {"weight": (2, 4, 3, 3), "bias": (3,)} | change
    tensors = {k: torch.randn(v) for k, v in shapes.items() if isinstance(v, tuple)}
    settings = {k: v for k, v in shapes.items() if not isinstance(v, tuple)}
    with pytest.raises(ValueError, match=text):
        conv_transpose_per_sample(torch.randn(2, 4, 5), **tensors, **settings)


def test_transposed_layers_refuse_what_has_no_transpose():
    with pytest.raises(ValueError, match="output_padding"):
        dynaconv.CondConvTranspose2d(4, 4, 3, stride=2, output_padding=2)
    with pytest.raises(ValueError, match="zeros"):
        dynaconv.CondConvTranspose2d(4, 4, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match="ConvTranspose2d"):
        dynaconv.CondConvTranspose2d.from_conv(nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize(("cls", "arguments"), POOLED, ids=[c.__name__ for c, _ in POOLED])
def test_causal_output_is_the_plain_layers_at_the_end_of_each_beginning(cls, arguments):
    layer, x = randomized(cls, arguments), example(cls, arguments)
    plain = cls(**{**arguments, "causal": False, "padding": layer.past}).double().eval()
    plain.load_state_dict(layer.state_dict())
    for p in (0, 4, x.shape[2] - 1):
        close(plain(x[..., : p + 1])[..., p], layer(x)[..., p], f"{cls.__name__} at {p}")


@pytest.mark.parametrize("offset_bound", [0.5, 3.0])
def test_causal_deformable_taps_stay_in_the_past_and_within_reach(offset_bound):
    arguments = {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "causal": True}
    layer = randomized(dynaconv.DeformConv1d, arguments | {"offset_bound": offset_bound})
    x = torch.randn(1, 2, 12, dtype=torch.float64).mul(30).requires_grad_()
    offset = layer.kernels(x)["offset"]
    taps = torch.arange(3).unsqueeze(1) - 2
    assert (offset + taps <= 0).all()
    assert (offset >= -offset_bound).all()
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 8].sum(), x)
    assert gradient[..., 9:].eq(0).all()
    assert gradient[..., : 8 - layer.past].eq(0).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"padding": 1}, "padding"),
        ({"stride": 2}, "stride 1"),
        ({"padding_mode": "reflect"}, "padding_mode"),
    ],
)
def test_causal_layers_refuse_what_is_not_causal(change, text):
    with pytest.raises(ValueError, match=text):
        dynaconv.DyConv1d(4, 4, 3, causal=True, **change)


def test_causal_is_refused_where_a_family_has_none():
    with pytest.raises(ValueError, match="1-D"):
        dynaconv.DyConv2d(4, 4, 3, causal=True)
    with pytest.raises(ValueError, match="no causal form"):
        dynaconv.SelectiveKernelConv1d(4, 4, 3, causal=True)
    with pytest.raises(ValueError, match="offset_bound"):
        dynaconv.DeformConv1d(4, 4, 3, causal=True)
    with pytest.raises(ValueError, match="step needs causal"):
        dynaconv.DyConv1d(4, 4, 3).step(torch.randn(2, 4))
    with pytest.raises(ValueError, match="before the input only"):
        dynaconv.DyConv1d.from_conv(nn.Conv1d(4, 4, 3), causal=True)
