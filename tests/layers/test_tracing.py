"""Graphs of torch.fx: a layer is one node, whatever its forward does with the input's values."""

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.masking import Padded
from dynaconv.padded import SamePad
from dynaconv.testing.families import example, randomized
from dynaconv.testing.features import cases


def check(layer, x, *rest):
    graph = torch.fx.symbolic_trace(Model(layer))
    assert [node.op for node in graph.graph.nodes if node.op != "placeholder"] == [
        "call_module",
        "output",
    ]
    got, expected = graph(x, *rest), layer(x, *rest)
    pairs = zip(got, expected, strict=True) if isinstance(expected, Padded) else [(got, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask=None):
        return self.layer(x, mask)


class WithoutMask(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("cls", "arguments"), list(cases()), ids=lambda v: getattr(v, "__name__", "")
)
def test_a_layer_is_one_node(cls, arguments):
    layer, x = randomized(cls, arguments).eval(), example(cls, arguments)
    check(layer, x)


def test_a_mask_and_a_style_go_along():
    layer = dynaconv.ModulatedConv2d(4, 4, 3, padding=1)
    x, mask = torch.randn(2, 4, 6, 6), torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, :, 4:] = False
    check(layer, x, mask)


def test_the_module_that_pads_is_one_node():
    layer = SamePad((3, 3), (2, 2))
    graph = torch.fx.symbolic_trace(WithoutMask(layer))
    for size in ((7, 8), (10, 5)):
        x = torch.randn(1, 2, *size)
        assert torch.equal(graph(x), layer(x))
