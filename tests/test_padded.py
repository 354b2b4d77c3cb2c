"""Convolutions of other libraries that pad in their own forward, taken apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv.padded import SamePad
from dynaconv.testing import close


class Conv2dSame(nn.Conv2d):
    """Pads as TensorFlow's "SAME" does; timm's class of that name."""

    def forward(self, x):
        widths = []
        for length, k, s, d in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            outputs = (length + s - 1) // s
            total = max(0, (outputs - 1) * s + d * (k - 1) + 1 - length)
            widths = [total // 2, total - total // 2, *widths]
        padded = F.pad(x, widths)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Conv2dStaticSamePadding(nn.Conv2d):
    """Pads by a module of its own; segmentation_models_pytorch's class of that name."""

    def __init__(self, *args, pad, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = pad

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


Conv2dSame.__module__ = "timm.layers.conv2d_same"
Conv2dStaticSamePadding.__module__ = "segmentation_models_pytorch.encoders"

GEOMETRIES = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (5, 2), "stride": (3, 2), "groups": 2},
    {"kernel_size": 3, "stride": 2, "dilation": 3},
    {"kernel_size": 2, "stride": 4},
    {"kernel_size": 4},
    {"kernel_size": (3, 1), "dilation": 2},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("family", ["odconv", "deform_v2"])
def test_same_as_tensorflow_pads(geometry, family):
    conv = Conv2dSame(4, 6, **geometry).double()
    layer, report = dynaconv.convert(conv, to=family)
    assert report.converted == [""]
    for size in ((9, 12), (8, 7), (10, 11), (13, 5)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        close(layer(x), conv(x), f"size {size}", 1e-12)


def test_only_strides_need_a_module_that_pads():
    kinds = [type(dynaconv.convert(Conv2dSame(4, 4, **g), "dyconv")[0]) for g in GEOMETRIES[3:]]
    assert kinds == [nn.Sequential, *[dynaconv.DyConv2d] * 3]


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 1, 2)), nn.Identity()])
def test_padded_by_a_module_of_its_own(pad):
    conv = Conv2dStaticSamePadding(4, 6, 3, 2, pad=pad).eval()
    layer, _ = dynaconv.convert(conv, to="condconv")
    x = torch.randn(2, 4, 9, 12)
    close(layer(x), conv(x), "padded by its own module", 1e-5)
    assert not layer.training
    assert not any(parameter.is_meta for parameter in layer.parameters())


def test_a_class_of_the_same_name_elsewhere_is_kept():
    other = type("Conv2dSame", (Conv2dSame,), {"__module__": "somewhere.else"})
    with pytest.raises(ValueError, match="Conv2dSame has a forward of its own"):
        dynaconv.convert(other(4, 4, 3), to="odconv")


def test_the_original_keeps_its_weights():
    conv = Conv2dSame(4, 4, 3, 2)
    weight = conv.weight.clone()
    layer, _ = dynaconv.convert(conv, to="deform", inplace=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    assert torch.equal(conv.weight, weight)


def test_padded_batches():
    pad = SamePad((3, 3), (2, 2))
    sizes = [(9, 12), (6, 7)]
    samples = [torch.randn(4, *size) for size in sizes]
    x, mask = dynaconv.pad_batch(samples)
    data, real = dynaconv.MaskedSequential(pad)(x, mask)
    for i, sample in enumerate(samples):
        alone = pad(sample[None])[0]
        at = (slice(None), *map(slice, alone.shape[1:]))
        close(data[i][at], alone, "padded by its own size", 0.0)
        assert real[i].sum() == alone[0].numel()
