"""Whole models of timm with random weights: the same outputs with our layers in their places."""

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.testing import close

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers.cond_conv2d")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


class Routed(dynaconv.CondConv2d):
    """timm's blocks hand each layer the routing of the block."""

    def build(self, experts=4):
        super().build(experts)
        self.routing = None

    def forward(self, x, coefficients):
        return self.convolve(x, coefficients)


def ours(theirs):
    """A fresh layer of ours with the arguments of a CondConv2d."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    arguments = {name: getattr(theirs, name) for name in (*names, "groups")}
    return Routed(**arguments, bias=theirs.bias is not None, experts=theirs.num_experts)


def test_condconv_efficientnet():
    torch.manual_seed(0)
    published = timm.create_model("efficientnet_cc_b0_4e", num_classes=5).double().eval()
    with torch.no_grad():
        for module in published.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    model = timm.create_model("efficientnet_cc_b0_4e", num_classes=5).double().eval()
    replaced = [n for n, m in model.named_modules() if isinstance(m, layers.CondConv2d)]
    for name in replaced:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ours(model.get_submodule(name)).double())
    dynaconv.load_published(model, published.state_dict(), source="timm")
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        close(model(x), published(x), "efficientnet_cc_b0_4e")
    assert len(replaced) > 10
