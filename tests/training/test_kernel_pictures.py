import pytest
import torch
from matplotlib.figure import Figure

from dynaconv.registry import family, names
from dynaconv.training import kernel_pictures
from dynaconv.training.kernel_pictures import (
    BARS_WITH_NUMBERS,
    Ground,
    captions,
    capture,
    draw_bars,
    draw_kernels,
    draw_offsets,
    draw_with_captions,
    drawer,
    spread,
)
from dynaconv.training.model import Config, build, dynamic_layers, normalise

TWO_D = [name for name in names() if 2 in family(name).classes]
GROUND = Ground(torch.rand(3, 20, 28), padded=(24, 32), window=(3, 3))
SHOWN = {
    "condconv": ["coefficients"],
    "dyconv": ["coefficients"],
    "odconv": ["coefficients", "channel", "filter", "spatial"],
    "involution": ["weight"],
    "deform": ["offset"],
    "deform_v2": ["offset", "modulation"],
    "selective_kernel": ["coefficients"],
}


def model_of(layer):
    return build(Config(layer=layer, widths=[8, 8, 8])).eval()


def drawn(axes):
    """Whether there is anything in the axes."""
    return bool(axes.patches or axes.images or axes.collections or axes.texts)


@pytest.mark.parametrize("size", [(1, 1), (20, 33)])
@pytest.mark.parametrize("layer", TWO_D)
def test_every_family_has_its_pictures(layer, size):
    figure = draw_kernels(model_of(layer), torch.rand(3, *size), most=2)
    panels = [axes for axes in figure.axes if ":" in axes.get_title()]
    shown = [
        axes.get_title().split("\n")[-1 if "\n" not in axes.get_title() else 1] for axes in panels
    ]
    keys = [title.split(":")[0] for title in shown if ":" in title]
    wanted = SHOWN.get(layer)
    assert wanted is None or sorted(set(keys)) == sorted(wanted)
    assert all(drawn(axes) for axes in panels)
    figure.draw_without_rendering()


@pytest.mark.parametrize("layer", TWO_D)
def test_capture_is_what_the_layers_made(layer):
    model, image = model_of(layer), torch.rand(3, 9, 14)
    found = capture(model, image)
    layers = dynamic_layers(model)
    assert list(found) == list(layers)
    first = next(iter(layers))
    inputs = []
    handle = layers[first].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(normalise(image)[None])
    handle.remove()
    for key, value in layers[first].kernels(inputs[0]).items():
        assert torch.equal(found[first][key], value)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_arrows_point_where_the_taps_look():
    offset = torch.zeros(9 * 2, 6, 8)
    offset[2 * 4], offset[2 * 4 + 1] = -1.0, 2.0  # the fifth tap: a row up, two columns right
    offset[0] = 0.5
    axes = Figure().subplots()
    said = draw_offsets(axes, offset, GROUND)
    (arrows,) = axes.collections
    assert "max 2.24" in said
    assert torch.allclose(torch.tensor(arrows.U), torch.tensor(8.0))  # 2 positions of 4 pixels
    assert torch.allclose(torch.tensor(arrows.V), torch.tensor(-4.0))
    assert axes.get_xlim() == (0, 28)
    assert axes.get_ylim() == (20, 0)


def test_offsets_of_zero_can_be_drawn():
    assert "max 0.00\narrows x1" in draw_offsets(Figure().subplots(), torch.zeros(18, 6, 8), GROUND)


@pytest.mark.parametrize("values", [torch.rand(3), torch.rand(BARS_WITH_NUMBERS + 1)])
def test_bars_reach_their_values(values):
    axes = Figure().subplots()
    draw_bars(axes, values, GROUND)
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    torch.testing.assert_close(torch.tensor(tops, dtype=torch.float32), values)


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("offset", (18, 6, 8), "draw_offsets"),
        ("offset", (9, 6, 8), "draw_map"),
        ("spatial", (9,), "draw_taps"),
        ("spatial", (4,), "draw_bars"),
        ("size", (1,), "draw_number"),
        ("stride", (), "draw_number"),
        ("new", (4,), "draw_bars"),
        ("new", (2, 16), "draw_shares"),
        ("new", (2, 6, 8), "draw_map"),
        ("new", (4, 3, 3, 3), "draw_kernel"),
        ("new", (2, 3, 5, 6, 8), "draw_per_position"),
        ("new", (2, 2, 2, 2, 2, 2), "draw_shape"),
    ],
)
def test_unknown_quantities_are_drawn_by_their_shape(key, shape, wanted):
    values = torch.rand(shape)
    draw = drawer(key, values, GROUND)
    assert draw is getattr(kernel_pictures, wanted)
    axes = Figure().subplots()
    assert draw(axes, values, GROUND)
    assert drawn(axes)
    assert captions({key: values[None]})[0].startswith(f"{key}: ")


def test_captions_are_in_the_picture():
    model, image = model_of("deform_v2"), torch.rand(3, 16, 16)
    text = draw_with_captions(model, image).get_supxlabel()
    assert "offset: each arrow" in text
    assert "modulation: " in text


def test_spread():
    assert spread(list("abc"), 5) == ["a", "b", "c"]
    assert spread(list("abcdefg"), 3) == ["a", "d", "g"]
    assert spread(list("abc"), 1) == ["a"]
