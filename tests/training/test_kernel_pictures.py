import pytest
import torch
from matplotlib.figure import Figure

from dynaconv.registry import family, names
from dynaconv.testing.families import example, randomized
from dynaconv.training import kernel_pictures
from dynaconv.training.kernel_pictures import (
    BARS_WITH_NUMBERS,
    MEANINGS,
    TAPS_WITH_NUMBERS,
    TILES,
    Ground,
    captions,
    capture,
    draw_bars,
    draw_gate,
    draw_kernels,
    draw_offsets,
    draw_per_position,
    draw_regions,
    draw_taps,
    draw_tiles,
    draw_with_captions,
    drawer,
    spread,
    view,
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
SAMPLES = [
    pytest.param(cls, arguments, id=f"{cls.__name__}-{i}")
    for name in TWO_D
    for cls in family(name).all_classes
    if cls.rank == 2
    for i, arguments in enumerate(cls.samples(2))
]


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


@pytest.mark.parametrize(("cls", "arguments"), SAMPLES)
def test_whatever_a_layer_makes_is_drawn_and_explained(cls, arguments):
    layer, x = randomized(cls, arguments), example(cls, arguments)
    made = layer.kernels(x)
    assert set(made) <= set(MEANINGS)
    ground = Ground(torch.rand(3, 20, 28), (24, 32), layer.kernel_size, tuple(x.shape[2:]))
    for key, value in made.items():
        axes, values = Figure().subplots(), view(key, value[0].detach().float())
        assert drawer(key, values, ground)(axes, values, ground)
        assert drawn(axes)
        axes.figure.draw_without_rendering()


@pytest.mark.parametrize("layer", TWO_D)
def test_all_that_is_drawn_is_explained(layer):
    figure = draw_with_captions(model_of(layer), torch.rand(3, 20, 33), most=9)
    text = figure.get_supxlabel()
    for axes in figure.axes:
        if ": " in axes.get_title():
            key = axes.get_title().split(": ")[0].split("\n")[-1]
            assert f"{key}: " in text
    assert "what the layer made of" not in text


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


def test_arrows_of_a_layer_that_enlarges_are_in_positions_of_its_input():
    offset = torch.full((2, 12, 16), 1.0)
    ground = Ground(GROUND.image, GROUND.padded, (1, 1), seen=(6, 8))
    axes = Figure().subplots()
    draw_offsets(axes, offset, ground)
    (arrows,) = axes.collections
    assert torch.allclose(torch.tensor(arrows.U), torch.tensor(4.0))  # 32 pixels over 8 positions


def test_the_image_is_dark_where_a_gate_is_off():
    gate = torch.ones(1, 6, 8)
    gate[0, 2, 3:6] = 0
    axes = Figure().subplots()
    assert draw_gate(axes, gate, GROUND) == "on at 94% of positions"
    _, shade = axes.images
    assert (torch.tensor(shade.get_alpha()) > 0).equal(gate[0] == 0)
    assert not shade.get_array().any()  # black
    assert axes.get_xlim() == (0, 28)


def test_each_region_has_its_colour():
    regions = torch.zeros(1, 6, 8)
    regions[0, 3:], regions[0, 0, 0] = 4, 2
    axes = Figure().subplots()
    assert draw_regions(axes, regions, GROUND) == "3, largest 50%"
    colours = axes.images[1].get_array()
    assert colours.shape == (6, 8, 3)
    assert len({tuple(colour) for colour in colours.reshape(-1, 3).tolist()}) == 3


@pytest.mark.parametrize(("count", "said"), [(3, "0.00 to 5.00"), (TILES + 4, "16 of 20\n")])
def test_tiles_lie_side_by_side(count, said):
    values = torch.arange(count * 2.0).reshape(count, 1, 2)
    axes = Figure().subplots()
    assert draw_tiles(axes, values, GROUND).startswith(said)
    tiles = axes.images
    assert [tile.get_array().tolist() for tile in tiles] == values[:TILES].tolist()
    columns = 2 if count == 3 else 4
    for i, tile in enumerate(tiles):
        left, right, bottom, top = tile.get_extent()
        assert (int(left), int(right)) == (i % columns, i % columns)
        assert int(top / 0.5) == int(bottom / 0.5) == i // columns


@pytest.mark.parametrize(("low", "cmap"), [(-1, "RdBu"), (0, "Blues")])
def test_kernels_of_positions_have_colours_for_their_signs(low, cmap):
    axes = Figure().subplots()
    draw_per_position(axes, torch.rand(2, 3, 3, 6, 8) + low, GROUND)
    assert {image.get_cmap().name for image in axes.images[1:]} == {cmap}


def test_large_kernels_have_no_numbers():
    axes, ground = Figure().subplots(), Ground(GROUND.image, GROUND.padded, (7, 7))
    assert TAPS_WITH_NUMBERS < 49
    draw_taps(axes, torch.rand(49), ground)
    assert axes.images
    assert not axes.texts


def test_modulation_is_that_of_the_strongest_tap():
    softmax = torch.rand(9, 6, 8).softmax(0)
    assert view("modulation", softmax).equal(softmax.amax(0, keepdim=True))


def test_a_scale_of_channels_is_no_scale_of_a_size():
    scale, phi = torch.rand(1, 16), torch.rand(1, 1, 2, 2)
    assert "output channel" in captions({"scale": scale, "phi": phi})[0]
    assert "how many times" in captions({"scale": torch.rand(1, 2)})[0]


def test_a_kernel_for_the_image_is_not_called_one_of_a_place():
    assert "very place" in captions({"weight": torch.rand(1, 1, 3, 3, 6, 8)})[0]
    assert "used on this image" in captions({"weight": torch.rand(1, 16, 8, 3, 3)})[0]


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
        ("mask", (3, 3), "draw_taps"),
        ("coefficients", (2, 16), "draw_shares"),
        ("bias_shares", (2, 16), "draw_shares"),
        ("attention", (9, 9), "draw_table"),
        ("phi", (2, 4, 4), "draw_tiles"),
        ("shares", (2, 3, 3), "draw_tiles"),
        ("channel_filter", (16, 3, 3), "draw_tiles"),
        ("bands", (3, 6, 8), "draw_tiles"),
        ("gate", (1, 6, 8), "draw_gate"),
        ("regions", (1, 6, 8), "draw_regions"),
        ("size", (1,), "draw_number"),
        ("stride", (), "draw_number"),
        ("new", (4,), "draw_bars"),
        ("new", (2, 16), "draw_table"),
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
