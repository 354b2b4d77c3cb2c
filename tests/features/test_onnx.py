"""ONNX files against the model, in onnxruntime: every class, whole models, and the refusals."""

import importlib.util

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.registry import family
from dynaconv.testing.families import example, randomized
from dynaconv.testing.features import check_feature
from tests.features.cases import over_families

NEEDS = ("onnx", "onnxscript", "onnxruntime")
missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
with_onnx = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@over_families("onnx", ranks=(2,))
def test_onnx_2d(cls, arguments):
    check_feature("onnx", cls, arguments)


@pytest.mark.slow
@over_families("onnx", ranks=(1, 3))
def test_onnx_1d_and_3d(cls, arguments):
    check_feature("onnx", cls, arguments)


@with_onnx
@pytest.mark.parametrize("name", ["deform_v2", "adaptive_dilation", "ldconv"])
def test_deformable_convolution_in_standard_operators(name, tmp_path):
    import onnx

    cls = family(name).classes[2]
    layer, x = randomized(cls, cls.samples(2)[0]).float(), example(cls, cls.samples(2)[0]).float()
    dynaconv.export_onnx(layer, x, tmp_path / "a.onnx", deform="standard")
    assert "DeformConv" not in {n.op_type for n in onnx.load(tmp_path / "a.onnx").graph.node}


@with_onnx
def test_deformable_convolution_is_one_operator(tmp_path):
    import onnx

    for name in ("DeformConv1d", "DeformConv2d"):
        layer = getattr(dynaconv, name)(4, 6, 3, padding=1)
        x = torch.randn(2, 4, *[9, 8][: layer.rank])
        made = dynaconv.export_onnx(layer, x, tmp_path / "a.onnx")
        assert made.opset >= 19
        assert [n.op_type for n in onnx.load(made.path).graph.node].count("DeformConv") == 1


# Whole models ------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions and what goes round them, as in ResNet."""

    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


NETWORKS = ["odconv", "condconv", "involution", "deform_v2"]


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 8, 2), Block(8, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, image):
        return self.fc(self.blocks(image).mean((2, 3)))


@with_onnx
@pytest.mark.parametrize("name", [*NETWORKS, pytest.param("fdconv", marks=pytest.mark.slow)])
def test_a_converted_network(name, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    net = dynaconv.convert(ResNet(), name, where="conv2", exact=False).model
    made = dynaconv.export_onnx(net, torch.randn(1, 3, 24, 28), tmp_path / "net.onnx")
    assert net.training
    assert list(made.inputs) == ["image"]
    session = onnxruntime.InferenceSession(made.path)
    net.eval()
    for batch in (1, 2, 5):
        for size in ((24, 28), (17, 33), (40, 20)):
            x = torch.randn(batch, 3, *size)
            (actual,) = session.run(None, {"image": x.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(actual), net(x), atol=1e-4, rtol=1e-4)


@with_onnx
def test_inputs_by_name_and_a_padding_mask(tmp_path):
    layer = dynaconv.ODConv1d(4, 6, 3, padding=1)
    mask = dynaconv.mask_from_sizes([9, 5], (9,))
    example = {"input": torch.randn(2, 4, 9), "padding_mask": mask}
    made = dynaconv.export_onnx(layer, example, tmp_path / "a.onnx")
    assert list(made.inputs) == ["input", "padding_mask"]
    assert made.inputs["padding_mask"] == (made.inputs["input"][0], made.inputs["input"][2])
    assert [c["padding_mask"][0] for c in made.compared] == [2, 1, 5]


@with_onnx
def test_fixed_sizes(tmp_path):
    layer = dynaconv.ShapeConv1d(4, 6, 0.4, kernel="pinv")
    with pytest.raises(ValueError, match="refuses the model"):
        dynaconv.export_onnx(layer, torch.randn(2, 4, 9), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
    layer = dynaconv.ShapeConv1d(4, 6, 0.4)
    made = dynaconv.export_onnx(layer, torch.randn(2, 4, 9), tmp_path / "a.onnx", "batch")
    assert made.inputs["input"][1:] == (4, 9)
    made = dynaconv.export_onnx(layer, torch.randn(2, 4, 9), tmp_path / "a.onnx", {})
    assert made.inputs["input"] == (2, 4, 9)


# Refusals ----------------------------------------------------------------------------------


@with_onnx
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dynamic": "all"}, "dynamic='all'"),
        ({"dynamic": {"x": [0]}}, r"no inputs \['x'\]"),
        ({"deform": "none"}, "deform='none'"),
        ({"opset": 18}, "opset=18 has no DeformConv"),
        ({"tolerance": 0.0}, "nothing was written"),
        ({"example": torch.randn(2, 4, 1)}, r"dimensions \[2\] are to be free"),
        ({"example": ()}, "there is no input"),
    ],
)
def test_refusals(change, text, tmp_path):
    arguments = {"example": torch.randn(2, 4, 9), "path": tmp_path / "a.onnx"} | change
    with pytest.raises(ValueError, match=text):
        dynaconv.export_onnx(dynaconv.DeformConv1d(4, 6, 3, padding=1), **arguments)
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("dynaconv.export.NEEDS", ("no_such_package",))
    with pytest.raises(ImportError, match=r"pip install 'dynaconv\[onnx\]'"):
        dynaconv.export_onnx(nn.ReLU(), torch.randn(2, 3), tmp_path / "a.onnx")


@with_onnx
def test_an_export_that_differs_is_refused(monkeypatch, tmp_path):
    """The comparison sees a formulation that is wrong."""
    from dynaconv.backends import onnx

    right = onnx.tap_slices
    monkeypatch.setattr(onnx, "tap_slices", lambda x, g: reversed(list(right(x, g))))
    with pytest.raises(ValueError, match="differs from the model by"):
        dynaconv.export_onnx(
            dynaconv.ODConv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9), tmp_path / "a.onnx"
        )


@pytest.mark.parametrize(("dynamic", "shape"), [("none", (1, 4, 6, 6)), ("batch", ("?", 4, 6, 6))])
def test_sizes_that_are_fixed(dynamic, shape, tmp_path):
    layer = dynaconv.DyConv2d(4, 4, 3, padding=1)
    written = dynaconv.export_onnx(layer, torch.randn(1, 4, 6, 6), tmp_path / "m.onnx", dynamic)
    given = tuple(n if isinstance(n, int) else "?" for n in written.inputs["input"])
    assert given == shape
