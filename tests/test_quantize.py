"""int8 around dynamic layers in float, and everywhere once they are frozen."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.nn.intrinsic import quantized as fused
from torch.ao.nn.quantized import Conv2d as QuantizedConv2d
from torch.ao.nn.quantized import Linear as QuantizedLinear
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import dynaconv
from dynaconv.testing import close
from tests.test_docs import FENCED, ROOT

pytestmark = [
    # The successor, torchao, is a package of its own.
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.skipif(
        "x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine"
    ),
]
PAGE = Path(ROOT) / "docs" / "deploy.md"


def network():
    """A small CNN and its inputs."""
    layers = [
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ]
    return nn.Sequential(*layers).eval(), list(torch.randn(8, 4, 3, 16, 16))


def moved(model):
    """Generators that follow the input: away from the exact start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def quantised(model, batches, kinds=()):
    """`model` by FX, with layers of `kinds` in float."""
    mapping = quantization.get_default_qconfig_mapping("x86")
    for kind in kinds:
        mapping.set_object_type(kind, None)
    leaves = PrepareCustomConfig().set_non_traceable_module_classes(list(kinds))
    prepared = prepare_fx(model, mapping, (batches[0],), prepare_custom_config=leaves)
    for batch in batches:
        prepared(batch)
    return convert_fx(prepared)


def check_near(given, model, batches):
    """int8 rounds, and does little more."""
    off, whole = given(batches[0]) - model(batches[0]), model(batches[0])
    assert 0 < off.norm() / whole.norm() < 0.05


@pytest.mark.parametrize(
    "name", ["odconv", "involution", "deform_v2", "kernel_warehouse", "fdconv", "adaptive_size"]
)
def test_the_rest_is_int8(name):
    model, batches = network()
    model = moved(dynaconv.convert(model, to=name, where="3").model)
    layer = copy.deepcopy(model[3])
    given = quantised(model, batches, [type(layer)])
    kinds = [type(module) for module in given.children()]
    assert kinds[0] is fused.ConvReLU2d
    assert QuantizedConv2d in kinds
    assert QuantizedLinear in kinds
    kept = given.get_submodule("3")
    assert type(kept) is type(layer)
    x = torch.randn(2, 16, 9, 9)
    close(kept(x), layer(x), name, 0)
    check_near(given, model, batches)


def test_after_freeze_all_is_int8():
    model, batches = network()
    model = moved(dynaconv.convert(model, to="odconv").model)
    frozen, report = dynaconv.freeze(model, batches, tolerance=0.1)
    assert all(row.frozen for row in report.layers)
    given = quantised(frozen, batches)
    assert not any(isinstance(m, nn.Conv2d | dynaconv.DynamicConv) for m in given.modules())
    check_near(given, frozen, batches)


def test_eager_mode():
    """Between dequantize and quantize, with qconfig=None, a dynamic layer stays as it is."""
    model, batches = network()
    model = moved(dynaconv.convert(model, to="odconv", where="3").model)
    expected = copy.deepcopy(model)
    model.qconfig = quantization.get_default_qconfig("x86")
    model[3].qconfig = None
    model = quantization.fuse_modules(model, [["0", "1", "2"]])
    model[3] = nn.Sequential(quantization.DeQuantStub(), model[3], quantization.QuantStub())
    model = quantization.QuantWrapper(model)
    prepared = quantization.prepare(model)
    for batch in batches:
        prepared(batch)
    given = quantization.convert(prepared)
    assert type(given.module[0]) is fused.ConvReLU2d
    assert type(given.module[5]) is QuantizedConv2d
    x = torch.randn(2, 16, 9, 9)
    close(given.module[3][1](x), expected[3](x), "the dynamic layer", 0)
    check_near(given, expected, batches)


def test_dynamic_quantisation_leaves_what_makes_the_kernels():
    model, batches = network()
    model = moved(dynaconv.convert(model, to="adaptive_size", where="3").model)
    for layer in model.modules():
        if isinstance(layer, dynaconv.DynamicConv):
            for part in layer.modules():
                part.qconfig = None
    given = quantization.quantize_dynamic(model)
    assert type(given[8]) is DynamicLinear
    assert not any(isinstance(m, DynamicLinear) for m in given[3].modules())
    check_near(given, model, batches)


def test_the_page_runs(capsys):
    text = PAGE.read_text(encoding="utf-8")
    section = text.split("## Freeze and quantise\n")[1].split("\n## ")[0]
    names = {}
    blocks = [block for kind, block in FENCED.findall(section) if kind == "python"]
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert "2 of 2 dynamic layers became static" in capsys.readouterr().out
    kept = [m for m in names["quantised"].modules() if isinstance(m, dynaconv.DynamicConv)]
    assert len(kept) == 2
    assert any(isinstance(m, fused.ConvReLU2d) for m in names["quantised"].modules())
