"""A U-Net on images of different sizes in one batch: what each gives alone."""

import pytest
import torch

import dynaconv
from dynaconv import pad_batch, unpad_batch
from dynaconv.masking import replicate_edges
from dynaconv.registry import families
from dynaconv.testing import close
from dynaconv.training.model import STATIC, Config, build

SIZES = [(17, 30), (24, 9), (24, 30), (8, 11)]
NAMES = [name for name, family in families().items() if 2 in family.classes]


def images(filler=1e3):
    samples = [torch.rand(3, *size, dtype=torch.float64) for size in SIZES]
    return samples, *pad_batch(samples, value=filler)


def unet(layer=None):
    torch.manual_seed(0)
    return build(Config(classes=5, widths=[4, 6, 8], layer=layer or STATIC)).double()


@pytest.mark.parametrize("layer", [None, *NAMES])
def test_each_image_as_alone(layer):
    model = unet(layer).eval()
    samples, x, mask = images()
    with torch.no_grad():
        if layer is not None:  # no start at zero that would hide a fault
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        outputs = unpad_batch(model(x, mask), mask)
        for sample, ours in zip(samples, outputs, strict=True):
            close(ours, model(sample[None])[0], f"{layer} on {tuple(sample.shape)}")


def test_gradients_stay_inside():
    model = unet("odconv").train()
    _, x, mask = images()
    x.requires_grad_()
    output = model(x, mask)
    output.masked_fill(~mask.unsqueeze(1), 0).square().sum().backward()
    assert x.grad.masked_select(~mask.unsqueeze(1)).abs().max() == 0
    assert x.grad.masked_select(mask.unsqueeze(1)).any()


def test_replicate_edges():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    mask = dynaconv.mask_from_sizes([(2, 3)], (3, 4))
    expected = [[0, 1, 2, 2], [4, 5, 6, 6], [4, 5, 6, 6]]
    assert replicate_edges(x, mask)[0, 0].tolist() == expected


def test_refuses_a_mask_of_another_shape():
    _, x, mask = images()
    with pytest.raises(ValueError, match="padding_mask has shape"):
        unet()(x, mask[:, 1:])
