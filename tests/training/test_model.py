import pytest
import torch
from torch import nn

from dynaconv.registry import family, names
from dynaconv.training.model import Config, build, dynamic_layers, predict
from dynaconv.training.unet import Enlarge, UNet

TWO_D = [name for name in names() if 2 in family(name).classes]


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 16), (33, 17)])
def test_output_has_the_size_of_the_image(size):
    assert UNet(3, 4, [4, 6, 8]).eval()(torch.randn(1, 3, *size)).shape == (1, 4, *size)


def test_padding_repeats_the_border():
    padded = UNet(3, 4, [4, 6, 8]).pad(torch.arange(15.0).view(1, 1, 3, 5))
    assert padded.shape == (1, 1, 8, 8)
    assert padded[0, 0, 3].tolist() == [10, 11, 12, 13, 14, 14, 14, 14]


@pytest.mark.parametrize("widths", [[], [8], [8, 0]])
def test_widths_that_make_no_network(widths):
    with pytest.raises(ValueError, match="needs two or more widths"):
        UNet(3, 4, widths)


def test_build_depends_on_the_seed_alone_and_leaves_the_random_numbers():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (build(Config(widths=[4, 8], seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("layer", TWO_D)
def test_every_family_starts_from_the_same_static_network(layer):
    static = build(Config(widths=[4, 8, 8]))
    dynamic = build(Config(widths=[4, 8, 8], layer=layer))
    enlarges = family(layer).classes[2].static[2] is nn.ConvTranspose2d
    places = ("enlarge.",) if enlarges else ("encoder", "bottleneck")
    assert list(dynamic_layers(dynamic)) == [
        name
        for name, module in static.named_modules()
        if isinstance(module, nn.Conv2d | Enlarge) and name.startswith(places)
    ]
    same = {n: p for n, p in static.named_parameters() if n.startswith(("stem", "decoder", "head"))}
    state = dict(dynamic.named_parameters())
    assert all(torch.equal(p, state[n]) for n, p in same.items())


def test_background_is_found_by_name():
    assert Config().background is None
    assert Config(names=["a", "background"]).background == 1


def test_predict_in_parts_is_predict():
    model = build(Config(widths=[4, 8], classes=5))
    model.head.bias.data.zero_()  # else one class wins everywhere
    images = torch.rand(27, 3, 8, 8)
    classes = predict(model, images)
    assert classes.shape == (27, 8, 8)
    assert torch.equal(classes[26], predict(model, images[26:])[0])
    assert len(classes.unique()) > 1
