import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dynaconv.data.text import encode, index_of
from dynaconv.registry import family, names
from dynaconv.testing.families import example, randomized
from dynaconv.training import text_pictures
from dynaconv.training.model import dynamic_layers, kernels_of
from dynaconv.training.text_model import TextConfig, build_text
from dynaconv.training.text_pictures import (
    MEANINGS,
    MOST_CHARACTERS,
    Along,
    caption,
    draw_along,
    draw_of_taps,
    draw_per_character,
    draw_regions,
    draw_text_kernels,
    drawer,
    save_text_picture,
    view,
)
from tests.training.test_text_model import ONE_D

ALL = [name for name in names() if 1 in family(name).classes]
SAMPLES = [
    pytest.param(cls, arguments, id=f"{cls.__name__}-{i}")
    for name in ALL
    for cls in family(name).all_classes
    if cls.rank == 1
    for i, arguments in enumerate(cls.samples(1))
]
TEXT = "ein $Satz$ 漢字"


def model_of(layer):
    config = TextConfig(
        layer=layer, labels=["x", "y"], characters="abc $", channels=16, blocks=3, kernel=5
    )
    return build_text(config).eval(), config


def drawn(axes):
    return bool(axes.patches or axes.images or axes.collections or axes.texts or axes.lines)


@pytest.mark.parametrize("layer", ONE_D)
def test_every_family_has_its_pictures(layer, tmp_path):
    model, config = model_of(layer)
    found = kernels_of(model, torch.zeros(1, 4, dtype=torch.long))
    for text in (TEXT, "x"):
        figure = draw_text_kernels(model, config, text, most=2)
        panels = [axes for axes in figure.axes if ":" in axes.get_title()]
        titles = [axes.get_title().split(":")[0] for axes in panels]
        shown = ["blocks.0.mixer.conv", "blocks.2.mixer.conv"]
        assert titles == [f"{name}, {key}" for name in shown for key in found[name]]
        assert all(drawn(axes) for axes in panels)
        save_text_picture(tmp_path / "a.png", figure)
        with Image.open(tmp_path / "a.png") as image:
            assert image.width > 500
    for key in found["blocks.0.mixer.conv"]:
        assert f"{key}: " in figure.get_supxlabel()


@pytest.mark.parametrize(("cls", "arguments"), SAMPLES)
def test_whatever_a_layer_makes_is_drawn_and_explained(cls, arguments):
    layer, x = randomized(cls, arguments), example(cls, arguments)
    made = layer.kernels(x)
    assert set(made) <= set(MEANINGS)
    for key, value in made.items():
        axes, values = Figure().subplots(), view(key, value[0].detach().float())
        assert drawer(key, values)(axes, values, Along("abc", layer.kernel_size[0]))
        assert drawn(axes)
        assert "image" not in caption(key, values)
        axes.figure.draw_without_rendering()


@pytest.mark.parametrize("layer", ONE_D)
def test_kernels_are_what_the_layers_made(layer):
    model, config = model_of(layer)
    tokens = encode("abc", index_of(config.characters))[None]
    found = kernels_of(model, tokens)
    layers = dynamic_layers(model)
    assert list(found) == list(layers)
    inputs = []
    first = next(iter(layers))
    handle = layers[first].register_forward_pre_hook(lambda _, given: inputs.append(given))
    model(tokens)
    handle.remove()
    for key, value in layers[first].kernels(*inputs[0]).items():
        assert torch.equal(found[first][key], value)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_kernel_above_each_character():
    values = torch.zeros(3, 5, 4)
    values[1, :, 2] = torch.arange(5.0)  # head 2 changes, at the third character
    axes = Figure().subplots()
    said = draw_per_character(axes, values, Along("a $b", 5))
    assert said.startswith("head 2 of 3, 0.00 to 4.00")
    (image,) = axes.images
    assert image.get_array().tolist() == values[1].tolist()
    assert image.get_extent() == [-0.5, 3.5, 4.5, -0.5]  # one unit is one character, one tap
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "·", "$", "b"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["-2", "-1", "0", "+1", "+2"]


def test_a_kernel_for_all_characters_says_so():
    axes = Figure().subplots()
    assert drawer("weight", torch.rand(8, 1, 5))(axes, torch.rand(8, 1, 5), Along("ab", 5))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["-2", "-1", "0", "+1", "+2"]
    assert axes.get_yticklabels()[0].get_text() == "1"
    assert "the same at every character" in caption("weight", torch.rand(8, 1, 5))
    assert "above each character" in caption("weight", torch.rand(8, 5, 30))


def test_one_number_a_character_is_a_line():
    axes = Figure().subplots()
    assert draw_along(axes, torch.tensor([[1.0, 3.0, 2.0]]), Along("abc", 5)) == "1.00 to 3.00"
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(line.get_ydata()) == [1, 3, 2]


def test_taps_of_heads_are_those_of_the_head_that_changes_most():
    values = torch.zeros(15, 3)
    values[5:10, 1] = torch.arange(5.0)
    axes = Figure().subplots()
    assert draw_of_taps(axes, values, Along("abc", 5)).startswith("head 2 of 3, ")
    assert axes.images[0].get_array().tolist() == values[5:10].tolist()
    axes = Figure().subplots()
    assert draw_of_taps(axes, values[:4], Along("abc", 5)) == "0.00 to 0.00"  # 4 taps, no heads
    assert axes.images[0].get_array().shape == (4, 3)


def test_regions_are_points():
    axes = Figure().subplots()
    assert draw_regions(axes, torch.tensor([[2.0, 0.0, 2.0]]), Along("abc", 5)) == "2 in use"
    (points,) = axes.lines
    assert points.get_linestyle() == "None"
    assert list(points.get_ydata()) == [2, 0, 2]


def test_a_scale_of_channels_is_no_scale_of_a_size():
    assert "output channel" in caption("scale", torch.rand(16))
    assert "how many times" in caption("scale", torch.rand(1))


def test_of_shares_the_mean_over_channels_is_drawn():
    shares = torch.rand(2, 16, 5)
    assert view("shares", shares).equal(shares.mean(1))
    assert view("weight", shares) is shares


def test_of_long_texts_the_beginning_is_drawn():
    model, config = model_of("dynamic_lightconv")
    figure = draw_text_kernels(model, config, "abc" * 500, most=1)
    (axes,) = [axes for axes in figure.axes if ":" in axes.get_title()]
    assert axes.get_xlim() == (-0.5, MOST_CHARACTERS - 0.5)
    assert axes.images[0].get_array().shape == (5, 1500)
    assert figure.get_figwidth() < 20


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("weight", (8, 5, 30), "draw_per_character"),
        ("weight", (8, 1, 5), "draw_heads"),
        ("offset", (5, 30), "draw_of_taps"),
        ("modulation", (80, 30), "draw_of_taps"),
        ("bands", (3, 30), "draw_along"),
        ("regions", (1, 30), "draw_regions"),
        ("channel_filter", (16, 5), "draw_heads"),
        ("kernel", (128, 2, 5), "draw_heads"),
        ("shares", (2, 5), "draw_heads"),
        ("new", (1, 30), "draw_along"),
    ],
)
def test_quantities_are_drawn_by_their_shape(key, shape, wanted):
    assert drawer(key, torch.rand(shape)) is getattr(text_pictures, wanted)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("coefficients", (2, 16)),
        ("coefficients", (4,)),
        ("bias_shares", (2, 16)),
        ("attention", (5, 5)),
        ("phi", (16, 1, 1)),
        ("positions", (5, 1)),
        ("size", (1,)),
        ("new", ()),
        ("new", (2, 2, 2, 2)),
    ],
)
def test_quantities_of_the_whole_text_are_drawn(key, shape):
    axes, values = Figure().subplots(), torch.rand(shape)
    assert drawer(key, values)(axes, values, Along("abc", 5))
    assert drawn(axes)
