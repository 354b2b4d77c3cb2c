"""MACs and parameters counted by hand for each family."""

import pytest
import torch
from torch import nn

import dynaconv

SIZE = 10 * 12
STATIC = 8 * 6 * 9 * SIZE


def analysis(name, **options):
    conv = nn.Conv2d(8, 6, 3, padding=1)
    layer = dynaconv.families()[name].classes[2].like(conv, **options)
    return dynaconv.analyze(nn.Sequential(layer), torch.randn(1, 8, 10, 12))


@pytest.mark.parametrize(
    ("name", "options", "generation", "mixing"),
    [
        ("condconv", {}, 8 * 4, 4 * 8 * 6 * 9 + 4 * 6),
        ("dyconv", {}, 8 * 3 + 3 * 4, 4 * 8 * 6 * 9 + 4 * 6),
        ("odconv", {}, 8 * 16 + 16 * (8 + 6 + 9 + 4), 4 * 8 * 6 * 9),
        ("deform", {}, 8 * 18 * 9 * SIZE, 4 * 8 * 9 * SIZE),
        ("deform_v2", {}, 8 * 27 * 9 * SIZE, 4 * 8 * 9 * SIZE),
    ],
)
def test_macs(name, options, generation, mixing):
    (row,) = analysis(name, **options).rows
    assert row.static_macs == STATIC
    assert row.static_parameters == 8 * 6 * 9 + 6
    assert row.generation_macs == generation
    assert row.mixing_macs == mixing
    assert row.convolution_macs == STATIC
    assert row.macs == STATIC + generation + mixing


def test_involution():
    layer = dynaconv.Involution2d(8, 8, 3, padding=1, group_channels=4, reduction=2)
    (row,) = dynaconv.analyze(nn.Sequential(layer), torch.randn(1, 8, 10, 12)).rows
    assert row.generation_macs == (8 * 4 + 4 * 2 * 9) * SIZE
    assert row.mixing_macs == 0
    assert row.convolution_macs == 8 * 9 * SIZE


def test_selective_kernel_counts_both_branches():
    (row,) = analysis("selective_kernel").rows
    assert row.convolution_macs == 2 * STATIC
    assert row.mixing_macs == 0
    assert row.generation_macs == 6 * 32 + 32 * 12


def test_whole_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1))
    x = torch.randn(2, 3, 10, 12)
    static = dynaconv.analyze(model, x)
    assert static.macs == static.static_macs == 2 * SIZE * (3 * 8 * 9 + 8 * 6)
    assert static.parameters == sum(p.numel() for p in model.parameters())
    model = model.train()
    converted, _ = dynaconv.convert(model, to="odconv", where="0")
    result = dynaconv.analyze(converted, x)
    assert converted.training
    assert result.static_macs == static.macs
    assert result.static_parameters == static.parameters
    assert result.macs > static.macs
    table = str(result)
    assert "ODConv2d" in table
    assert f"{result.macs:,}" in table


def test_layers_that_enlarge_are_compared_with_a_transposed_convolution():
    static = nn.ConvTranspose2d(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 5, 7)
    (row,) = dynaconv.analyze(static, x).rows
    assert row.macs == row.static_macs == x.numel() * 6 * 9
    (row,) = dynaconv.analyze(dynaconv.CondConvTranspose2d.like(static), x).rows
    assert row.static_macs == x.numel() * 6 * 9
    assert row.static_parameters == sum(p.numel() for p in static.parameters())
    (row,) = dynaconv.analyze(dynaconv.CARAFE2d(4, 4), x).rows
    assert row.static_macs == x.numel() * 4 * 4
