import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dynaconv.training.demo as demo_module
import dynaconv.training.text_demo as text_demo_module
from dynaconv.cli import app
from dynaconv.data.phrases import make_texts
from dynaconv.registry import names
from dynaconv.training.files import load_model, save_model
from dynaconv.training.model import Config, build
from dynaconv.training.text_model import TextConfig, build_text, label, logits
from tests.data.folders import make_folder

SMALL = ["--widths", "4,8", "--size", "16", "--batch", "2", "--epochs", "2"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    config = Config(layer="deform_v2", widths=[4, 8], classes=3)
    save_model(path, build(config), config)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 31, 3), np.uint8)).save(path)
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments):
    """The text of a refusal: exit code 2, no traceback."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_help_and_families():
    assert "demo" in succeeds("--help")
    listed = succeeds("families")
    for name in names():
        assert re.search(rf"^ *{name} ", listed, re.M)


def test_demo(tmp_path, monkeypatch):
    tiny = demo_module.Budget(scenes=8, val=4, epochs=1, seeds=1, widths=(4, 8))
    monkeypatch.setattr(demo_module, "QUICK", tiny)
    output = succeeds("demo", "--quick", "--out", tmp_path / "out", "--seed", 3)
    for layer in ("static", *demo_module.LAYERS):
        assert re.search(rf"^ *{layer} +\d+\.\d +\d", output, re.M)
    expected = [f"models/{layer}-3.pt" for layer in sorted(["static", *demo_module.LAYERS])]
    assert files(tmp_path / "out") == [*expected, "report.html"]
    output = succeeds("demo", "--quick", "--layers", "involution,", "--out", tmp_path / "two")
    assert files(tmp_path / "two/models") == ["involution-0.pt", "static-0.pt"]


def test_demo_refusals(tmp_path):
    assert "--layers 'nowhere' does not exist; there are static" in refused(
        "demo", "--layers", "nowhere"
    )
    (tmp_path / "file").write_text("")
    assert "file" in refused("demo", "--out", tmp_path / "file")
    assert refused("demo", "--seeds", "0")


def test_train_predict_inspect(folder, tmp_path):
    out = tmp_path / "run"
    output = succeeds("train", folder, "--layer", "selective_kernel", *SMALL, "--out", out)
    assert "3 train and 2 val images, 2 classes" in output
    assert re.search(r"validation mIoU \d+\.\d after 2 epochs", output)
    assert files(out) == ["last.ckpt", "model.pt"]

    sizes = {"a": (1, 1), "b": (50, 13), "c": (24, 40)}
    images = [tmp_path / f"{name}.png" for name in sizes]
    for path, (height, width) in zip(images, sizes.values(), strict=True):
        Image.new("L", (width, height), 99).save(path)
    predictions = tmp_path / "predictions"
    output = succeeds("predict", out / "model.pt", *images, "--out", predictions)
    for name, (height, width) in sizes.items():
        assert f"{name}_mask.png" in output
        mask = pixels(predictions / f"{name}_mask.png")
        assert mask.shape == (height, width)
        assert set(np.unique(mask)) <= {0, 1}
        assert pixels(predictions / f"{name}_overlay.png").shape == (height, width, 3)
    assert len(files(predictions)) == 6

    picture = tmp_path / "pictures" / "inspect.png"
    assert "selective_kernel on" in succeeds(
        "inspect", out / "model.pt", images[1], "--out", picture
    )
    assert pixels(picture).shape[1] > 300
    assert files(picture.parent) == ["inspect.png"]


def test_predict_writes_what_the_model_says(checkpoint, image, tmp_path):
    from dynaconv.data.images import read_image
    from dynaconv.training.model import predict

    succeeds("predict", checkpoint, image, "--out", tmp_path / "p")
    mask = pixels(tmp_path / "p/scene_mask.png")
    wanted = predict(load_model(checkpoint)[0], read_image(image)[None])[0]
    assert (mask == wanted.numpy()).all()


def test_train_again_goes_on_or_says_why_not(folder, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", folder, *SMALL, "--out", out]
    succeeds(*arguments)
    model = (out / "model.pt").read_bytes()
    succeeds(*arguments)
    assert (out / "model.pt").read_bytes() == model
    assert "lr=0.002, now 0.1" in refused(*arguments, "--lr", "0.1")
    (out / "last.ckpt").write_bytes(b"damaged")
    assert "last.ckpt: damaged" in refused(*arguments)
    assert (out / "last.ckpt").read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layer", "nowhere"], "--layer 'nowhere' does not exist"),
        (["--widths", "8,x"], "--widths '8,x': give whole numbers"),
        (["--widths", "8"], "needs two or more widths"),
        (["--where", "("], "--where '(' is no regular expression"),
        (["--where", "nothing"], "no convolution was converted"),
        (["--classes", "1"], "--classes"),
        (["--lr", "0"], "--lr"),
        (["--size", "5"], "--size 5: give 16 or more, or 0 for whole images"),
        (["--lr", "1e30", "--epochs", "30"], "lower --lr"),
    ],
)
def test_train_refuses_options(folder, tmp_path, arguments, text):
    assert text in refused("train", folder, *SMALL, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run/model.pt").exists()


def test_train_refuses_folders_before_training(folder, tmp_path):
    assert "no such folder" in refused("train", tmp_path / "nowhere", "--out", tmp_path / "run")
    (folder / "val/images/1.png").write_bytes(b"\x89PNG")
    (folder / "train/masks/0.png").unlink()
    assert "train/images/0.png: has no mask" in refused("train", folder, "--out", tmp_path / "run")
    (folder / "train/images/0.png").unlink()
    output = refused("train", folder, *SMALL, "--out", tmp_path / "run")
    assert "val/images/1.png: not a readable image" in output
    assert files(tmp_path / "run") == []
    (tmp_path / "file").write_text("")
    assert "file" in refused("train", folder, *SMALL, "--out", tmp_path / "file")


def test_predict_refusals(checkpoint, image, tmp_path):
    out = tmp_path / "p"
    assert "no such checkpoint" in refused("predict", tmp_path / "no.pt", image)
    assert "not a checkpoint" in refused("predict", image, image)
    assert "no.png: no such file" in refused("predict", checkpoint, image, "no.png", "--out", out)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    text = refused("predict", checkpoint, image, tmp_path / "broken.jpg", "--out", out)
    assert "broken.jpg: not a readable image" in text
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "file" in refused("predict", checkpoint, image, "--out", tmp_path / "file")


def test_outputs_overwrite_neither_each_other_nor_an_input(checkpoint, image, tmp_path):
    twin = tmp_path / "scene.jpg"
    Image.fromarray(pixels(image)).save(twin)
    out = tmp_path / "p"
    text = refused("predict", checkpoint, image, twin, "--out", out)
    assert "scene_mask.png" in text
    assert "scene.jpg" in text
    assert not out.exists()
    succeeds("predict", checkpoint, image, image, "--out", out)
    mask = out / "scene_mask.png"
    Image.fromarray(pixels(image)).save(out / "scene.png")
    before = mask.read_bytes()
    assert "would overwrite" in refused(
        "predict", checkpoint, out / "scene.png", mask, "--out", out
    )
    assert "would overwrite" in refused(
        "predict", checkpoint, mask, out / "scene.png", "--out", out
    )
    assert mask.read_bytes() == before


def test_many_classes_get_a_deep_mask(image, tmp_path):
    config = Config(widths=[4, 8], classes=300)
    model = build(config)
    model.head.bias.data[299] = 1e6
    save_model(tmp_path / "model.pt", model, config)
    succeeds("predict", tmp_path / "model.pt", image, "--out", tmp_path / "p")
    assert (pixels(tmp_path / "p/scene_mask.png") == 299).all()


def test_inspect_refusals(checkpoint, image, tmp_path):
    save_model(tmp_path / "static.pt", build(Config(widths=[4, 8])), Config(widths=[4, 8]))
    assert "nothing to look at" in refused("inspect", tmp_path / "static.pt", image)
    assert "no.png: no such file" in refused("inspect", checkpoint, tmp_path / "no.png")
    (tmp_path / "file").write_text("")
    assert "file" in refused("inspect", checkpoint, image, "--out", tmp_path / "file" / "a.png")
    assert "is a directory" in refused("inspect", checkpoint, image, "--out", tmp_path).lower()
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_a_killed_training_goes_on_and_ends_the_same(folder, tmp_path):
    arguments = ["train", str(folder), "--widths", "4,8", "--size", "16", "--epochs", "100"]
    _killed_and_undisturbed(arguments, tmp_path)


def _killed_and_undisturbed(arguments, tmp_path):
    """SIGKILL in mid-training; the same command then ends bit-equal to an undisturbed run."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dynaconv.cli", *arguments, "--out", str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 60
        while not (killed / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "model.pt").exists()
    reached = torch.load(killed / "last.ckpt", weights_only=True)["epoch"]
    assert reached + 1 < int(arguments[-1])
    succeeds(*arguments, "--out", killed)
    succeeds(*arguments, "--out", undisturbed)
    first, second = (load_model(out / "model.pt")[0].state_dict() for out in (killed, undisturbed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


TINY_TEXT = ["--channels", "8", "--blocks", "2", "--kernel", "3", "--epochs", "2", "--batch", "4"]


@pytest.fixture
def texts(tmp_path):
    """Three languages in one script, as a CSV file."""
    made = make_texts("train", 12)
    rows = [
        row for row in zip(made.texts, made.labels, strict=True) if row[1] in ("de", "es", "fi")
    ]
    path = tmp_path / "texts.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "model.pt"
    config = TextConfig(
        layer="dynamic_lightconv", labels=["de", "es"], characters="abc é", channels=16, blocks=2
    )
    save_model(path, build_text(config), config)
    return path


def test_train_predict_inspect_texts(texts, tmp_path):
    out = tmp_path / "run"
    output = succeeds("train", texts, "--layer", "dynamic_lightconv", *TINY_TEXT, "--out", out)
    assert "33 train and 3 val texts, 3 labels, " in output
    assert re.search(r"validation accuracy \d+\.\d after 2 epochs", output)
    assert files(out) == ["last.ckpt", "model.pt"]
    predictions = tmp_path / "p" / "said.jsonl"
    assert "36 texts of" in succeeds("predict", out / "model.pt", texts, "--out", predictions)
    lines = [json.loads(line) for line in predictions.read_text("utf-8").splitlines()]
    with open(texts, newline="", encoding="utf-8") as file:
        assert [line["text"] for line in lines] == [row["text"] for row in csv.DictReader(file)]
    assert all(line["label"] in ("de", "es", "fi") for line in lines)
    assert all(1 / 3 < line["probability"] <= 1 for line in lines)
    assert files(tmp_path / "p") == ["said.jsonl"]
    said = succeeds("predict", out / "model.pt", "--text", lines[0]["text"], "--text", "a[b]c")
    first, second = said.splitlines()
    assert first == f"{lines[0]['label']}  {lines[0]['probability']:.3f}  {lines[0]['text']}"
    assert second.endswith("  a[b]c")
    picture = tmp_path / "inspect.png"
    succeeds("inspect", out / "model.pt", "--text", "drei $Wörter$ 漢字", "--out", picture)
    assert pixels(picture).shape[1] > 500


def test_predictions_as_csv_from_json_lines(text_checkpoint, tmp_path):
    given = tmp_path / "a.jsonl"
    given.write_text('{"text": "a, \\"b\\""}\n{"text": "e\\u0301"}\n', encoding="utf-8")
    out = tmp_path / "said.csv"
    succeeds("predict", text_checkpoint, given, "--out", out)
    with open(out, newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    assert head == ["text", "label", "probability"]
    assert [line[0] for line in lines] == ['a, "b"', "é"]
    model, config = load_model(text_checkpoint)
    named, shares = label(model, config, ['a, "b"', "é"])
    assert [line[1] for line in lines] == named
    assert [float(line[2]) for line in lines] == shares


def test_predictions_are_written_by_default_beside_nothing(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text\na\nb\n", encoding="utf-8")
    assert "2 texts of a.csv -> predictions.csv" in succeeds("predict", text_checkpoint, "a.csv")
    assert files(tmp_path) == ["a.csv", "predictions.csv"]


def test_train_texts_refusals(texts, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert "no such file" in refused("train", tmp_path / "no.csv", *out)
    assert "--size, --widths: not for text, which" in refused(
        "train", texts, "--size", "32", "--widths", "8", *out
    )
    assert "kernel=4 has no middle" in refused("train", texts, "--kernel", "4", *out)
    assert "heads=8 does not divide 12" in refused(
        "train", texts, "--layer", "lightconv", "--channels", "12", *out
    )
    (tmp_path / "val.csv").write_text("text,label\na,xx\nb,\n", encoding="utf-8")
    text = refused("train", texts, "--val", tmp_path / "val.csv", *out)
    assert "val.csv, line 3: its label is empty" in text
    (tmp_path / "val.csv").write_text("text,label\na,xx\n", encoding="utf-8")
    text = refused("train", texts, "--val", tmp_path / "val.csv", *out)
    assert "val.csv, line 2: unknown label 'xx'" in text
    assert files(tmp_path / "run") == []


def test_train_images_refuses_options_of_texts(folder, tmp_path):
    text = refused("train", folder, "--kernel", "3", "--out", tmp_path / "run")
    assert "--kernel: not for images, which" in text


def test_a_validation_file_is_used(texts, tmp_path):
    val = tmp_path / "val.csv"
    val.write_text("\n".join(texts.read_text("utf-8").splitlines()[:3]), encoding="utf-8")
    output = succeeds("train", texts, *TINY_TEXT, "--val", val, "--out", tmp_path / "run")
    assert "36 train and 2 val texts" in output
    assert "2 of the val texts are train texts too" in output


def test_predict_texts_refusals(checkpoint, text_checkpoint, image, texts, tmp_path):
    out = tmp_path / "said.csv"
    assert "is a model of images" in refused("predict", checkpoint, "--text", "a")
    assert "give an image" in refused("predict", checkpoint)
    assert "give one file of texts, or --text" in refused("predict", text_checkpoint)
    assert "give one file" in refused("predict", text_checkpoint, texts, texts)
    assert "give one file" in refused("predict", text_checkpoint, texts, "--text", "a")
    assert "--text: its text is empty" in refused("predict", text_checkpoint, "--text", " ")
    assert "not a text file that is known" in refused("predict", text_checkpoint, image)
    assert "said.txt: give a file that ends in" in refused(
        "predict", text_checkpoint, texts, "--out", tmp_path / "said.txt"
    )
    before = texts.read_bytes()
    assert "would overwrite the texts" in refused("predict", text_checkpoint, texts, "--out", texts)
    assert texts.read_bytes() == before
    texts.write_text("text,label\na,b\n,c\n")
    assert "texts.csv, line 3: its text is empty" in refused(
        "predict", text_checkpoint, texts, "--out", out
    )
    assert not out.exists()


def test_inspect_texts_refusals(checkpoint, text_checkpoint, image, tmp_path):
    assert "is a model of texts; give --text" in refused("inspect", text_checkpoint, image)
    assert "is a model of texts; give --text" in refused("inspect", text_checkpoint)
    assert "is a model of images; give an image" in refused("inspect", checkpoint, "--text", "a")
    assert "is a model of images; give an image" in refused("inspect", checkpoint)
    assert "its text is empty" in refused("inspect", text_checkpoint, "--text", "")


def test_demo_of_texts(tmp_path, monkeypatch):
    tiny = text_demo_module.TextBudget(texts=4, val=3, epochs=1, seeds=1, channels=8, blocks=1)
    monkeypatch.setattr(text_demo_module, "QUICK", tiny)
    out = tmp_path / "out"
    output = succeeds("demo", "--task", "text", "--quick", "--out", out)
    for layer in ("static", *text_demo_module.LAYERS):
        assert re.search(rf"^ *{layer} +\d+\.\d +\d", output, re.M)
        assert re.search(rf"^ *{layer} +66 of 66 +\d\.\de-\d\d", output, re.M)
    expected = [f"models/text-{name}-0.pt" for name in sorted(["static", *text_demo_module.LAYERS])]
    assert files(out) == [*expected, "text.html"]


def test_a_killed_text_training_goes_on_and_ends_the_same(texts, tmp_path):
    arguments = ["train", str(texts), "--layer", "dyconv", *TINY_TEXT, "--epochs", "60"]
    _killed_and_undisturbed(arguments, tmp_path)


# Export ------------------------------------------------------------------------------------


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_an_exported_model_predicts_the_same(checkpoint, image, tmp_path, onnxruntime):
    out = tmp_path / "onnx" / "model.onnx"
    said = succeeds("export", checkpoint, out)
    assert "inputs: image (" in said
    assert "onnxruntime differs by" in said
    assert files(out.parent) == ["model.onnx"]
    pixel = np.asarray(Image.open(image), np.float32) / 255
    session = onnxruntime.InferenceSession(out)
    (scores,) = session.run(None, {"image": pixel.transpose(2, 0, 1)[None]})
    succeeds("predict", checkpoint, image, "--out", tmp_path / "p")
    predicted = np.asarray(Image.open(tmp_path / "p" / "scene_mask.png"))
    np.testing.assert_array_equal(scores[0].argmax(0), predicted)


def test_an_exported_model_of_texts_predicts_the_same(text_checkpoint, tmp_path, onnxruntime):
    out = tmp_path / "text.onnx"
    assert "inputs: tokens (" in succeeds("export", text_checkpoint, out)
    session = onnxruntime.InferenceSession(out)
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["labels"]) == ["de", "es"]
    characters, text = json.loads(known["characters"]), "cab é?"
    tokens = np.array([[characters.find(character) + 1 for character in text]])
    given = {"tokens": tokens, "mask": np.ones_like(tokens, bool)}
    (scores,) = session.run(None, given)
    expected = logits(*load_model(text_checkpoint), [text])
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)


def test_export_refusals(checkpoint, tmp_path, monkeypatch):
    assert "no such checkpoint" in refused("export", tmp_path / "none.pt", tmp_path / "a.onnx")
    monkeypatch.setattr("dynaconv.export.NEEDS", ("no_such_package",))
    said = refused("export", checkpoint, tmp_path / "a.onnx")
    assert "no_such_package missing; run: pip install 'dynaconv[onnx]'" in said
    assert files(tmp_path) == []
