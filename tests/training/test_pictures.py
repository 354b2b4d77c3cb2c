import numpy as np
import torch
from matplotlib.figure import Figure

from dynaconv.training.pictures import DARK, colours, overlay, paint, show_image


def test_colours_differ():
    for classes in (1, 10, 11, 40):
        table = colours(classes)
        assert table.shape == (classes, 3)
        assert table.min() >= 0
        assert table.max() <= 1
        assert len(np.unique(table.round(3), axis=0)) == classes


def test_paint():
    painted = paint(torch.tensor([[0, 1, 255, -1]]), classes=2, background=1)
    assert painted[0, 0].tolist() == colours(2)[0].tolist()
    assert painted[0, 1].tolist() == list(DARK)
    assert painted[0, 2].tolist() == painted[0, 3].tolist() == [1, 1, 1]


def test_overlay_mixes_and_leaves_the_background():
    image, mask = torch.rand(3, 2, 5), torch.tensor([[0, 1, 2, 2, 0]]).expand(2, 5)
    mixed = overlay(image, mask, classes=3, background=2)
    assert mixed.shape == (2, 5, 3)
    assert mixed.dtype == np.uint8
    plain = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    assert (mixed[:, 2:4] == plain[:, 2:4]).all()
    half = 255 * (0.5 * image[:, 0, 1].numpy() + 0.5 * colours(3)[1])
    np.testing.assert_allclose(mixed[0, 1], half, atol=0.51)


def test_one_unit_of_the_axes_is_one_pixel():
    axes = Figure().subplots()
    show_image(axes, torch.rand(3, 4, 7))
    assert axes.images[0].get_extent() == [0, 7, 4, 0]
