"""The recipe for ultralytics in examples/yolo: yaml, training, checkpoints, fuse, ONNX."""

import copy
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.layers.base import DynamicConv
from tests.interop.models import TOLERANCE, awake, trains

RECIPE = Path(__file__).parents[2] / "examples" / "yolo"
YAML = RECIPE / "yolo-dynamic.yaml"
# They enlarge their input, as nn.ConvTranspose2d does.
UPSAMPLERS = ("carafe", "ddf_up", "dysample", "pac_transpose")
BOTTLENECKS = r"\.m\.\d+\.cv"

# The package's own warnings are not this project's.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe's module. ultralytics stays off the network and out of the home directory."""
    config = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ |= config | {"YOLO_CONFIG_DIR": str(tmp_path_factory.mktemp("config"))}
    pytest.importorskip("ultralytics")
    sys.path.insert(0, str(RECIPE))
    import dynamic_yolo

    yield dynamic_yolo
    sys.path.remove(str(RECIPE))
    torch.use_deterministic_algorithms(False)  # its trainer sets that for the process


@pytest.fixture
def yolo(recipe):
    from ultralytics import YOLO

    return YOLO


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A data set of white squares on black, in the files that ultralytics reads."""
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("squares")
    for split, count in (("train", 8), ("val", 4)):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            left, top = 4 * index + 4, 40 - 4 * index
            image = image_module.new("RGB", (64, 64))
            image.paste((255, 255, 255), (left, top, left + 20, top + 20))
            image.save(images / f"{index}.png")
            box = f"0 {(left + 10) / 64} {(top + 10) / 64} {20 / 64} {20 / 64}\n"
            (labels / f"{index}.txt").write_text(box)
    data = root / "data.yaml"
    data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: square}}\n")
    return data


@pytest.fixture
def once(squares, tmp_path):
    """Arguments of one small epoch."""
    quiet = {"plots": False, "verbose": False, "workers": 0, "device": "cpu"}
    size = {"epochs": 1, "imgsz": 64, "batch": 4}
    return {"data": str(squares), "project": str(tmp_path)} | quiet | size


def dynamic_layers(model):
    return [type(m).__name__ for m in model.modules() if isinstance(m, DynamicConv)]


def pictures(count=2):
    return torch.rand(count, 3, 64, 96)


def test_yaml_names_families(recipe, yolo):
    model = yolo(YAML).model
    assert model.stride.tolist() == [8, 16]
    assert {type(model.model[i].conv).__name__ for i in (1, 6)} == {"ODConv2d", "SnakeConv2d"}
    for index, name in ((2, "ODConv2d"), (4, "ModulatedDeformConv2d"), (10, "ODConv2d")):
        assert set(dynamic_layers(model.model[index])) == {name}
        assert nn.Conv2d in map(type, model.model[index].modules())
    assert model.model[6].conv.axis == 1
    assert not dynamic_layers(model.model[7])
    predictions = model.eval()(pictures())[0]
    assert predictions.shape == (2, 4 + 80, 12 * 8 + 6 * 4)


def test_wrong_rows_are_refused(recipe, yolo, tmp_path):
    right = "Conv.odconv, [128, 3, 2]"
    for wrong, text in (
        ("Conv.odcon, [128, 3, 2]", "family 'odcon' does not exist"),
        ("Conv.odconv, [128, 1, 2]", "no convolution was converted"),
    ):
        path = tmp_path / "wrong.yaml"
        path.write_text(YAML.read_text().replace(right, wrong))
        with pytest.raises(ValueError, match=text):
            yolo(path)


def test_one_step_with_the_loss_of_ultralytics(recipe, yolo):
    from ultralytics.cfg import get_cfg

    model = yolo(YAML).model
    model.args = get_cfg()
    batch = {
        "img": pictures(),
        "cls": torch.tensor([[1.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.4, 0.6, 0.5, 0.2]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    trains(model, lambda m: m.loss(batch)[0].sum())


def test_fuse_keeps_the_function(recipe, yolo):
    model = awake(yolo(YAML).model, pictures(4))
    x = pictures()
    expected = model(x)[0]
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert fused.is_fused()
    assert len(dynamic_layers(fused)) == len(dynamic_layers(model)) == 8
    assert (fused(x)[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert expected[:, 4:].std() > 1e-3


def test_a_pickled_model_is_the_same(recipe, yolo):
    model, x = awake(yolo(YAML).model, pictures(4)), pictures()
    file = io.BytesIO()
    torch.save({"model": copy.deepcopy(model).half()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["model"].float()
    expected = copy.deepcopy(model).half().float()(x)[0]
    assert torch.equal(loaded(x)[0], expected)


@pytest.mark.parametrize("family", ["odconv", "deform_v2", "dcd", "kernel_warehouse", "fdconv"])
def test_a_trained_model_keeps_its_function(recipe, yolo, family):
    model, x = awake(yolo("yolov8n.yaml").model, pictures(4)), pictures()
    expected = model(x)[0]
    converted = copy.deepcopy(model)
    converted.model = recipe.dynamic(converted.model, family, BOTTLENECKS)
    assert len(dynamic_layers(converted)) == 20
    for model_now in (converted, converted.fuse(verbose=False)):
        assert (model_now(x)[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert len(dynamic_layers(model)) == 0


def test_trains_from_yaml_and_goes_on(recipe, yolo, once):
    trained = yolo(YAML)
    trained.train(**once, name="first")
    checkpoint = trained.trainer.last
    assert len(dynamic_layers(yolo(checkpoint).model)) == 8
    again = yolo(checkpoint)
    before = again.model.state_dict()
    again.train(**once, name="second")
    assert len(dynamic_layers(again.model)) == 8
    assert set(before) == set(again.model.state_dict())


def test_trains_on_from_static_weights_and_goes_on(recipe, yolo, once):
    static = yolo("yolov8n.yaml")
    static.train(**once, name="static")
    for run in ("converted", "again"):
        trained = yolo(static.trainer.last)
        trained.train(**once, name=run, trainer=recipe.DynamicTrainer)
        assert dynamic_layers(trained.model) == ["ODConv2d"] * 20
        static = trained
    picture = (pictures(1)[0] * 255).byte().permute(1, 2, 0).numpy()
    (result,) = yolo(static.trainer.last).predict(picture, imgsz=64, conf=0.0, verbose=False)
    assert result.boxes.xyxy.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(recipe, yolo, tmp_path, monkeypatch, dynamic):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    exported = yolo(YAML)
    model = awake(exported.model, pictures(4))
    path = exported.export(format="onnx", imgsz=64, dynamic=dynamic)
    session = runtime.InferenceSession(path)
    for shape in [(1, 3, 64, 64), *([(2, 3, 96, 128)] if dynamic else [])]:
        x = torch.rand(shape)
        (got,) = session.run(["output0"], {"images": x.numpy()})
        expected = model(x)[0]
        assert (torch.from_numpy(got) - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert expected[:, 4:].std() > 1e-3


FITTING = [n for n in dynaconv.families() if n not in UPSAMPLERS]


@pytest.mark.parametrize("family", FITTING)
def test_a_row_for_each_family(recipe, yolo, tmp_path, family):
    path = tmp_path / "row.yaml"
    path.write_text(YAML.read_text().replace("C2f.odconv, [128", f"C2f.{family}, [128"))
    model = yolo(path).model
    expected = dynaconv.families()[family].classes[2].__name__
    assert set(dynamic_layers(model.model[2])) == {expected}
    assert model(pictures())["scores"].isfinite().all()
