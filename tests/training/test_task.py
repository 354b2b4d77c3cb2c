import json
import math
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from dynaconv.data.digits import DigitScenes
from dynaconv.data.errors import InputError
from dynaconv.data.folder import FolderData, check_folder, collate_padded
from dynaconv.testing import close
from dynaconv.training.files import load_model
from dynaconv.training.model import Config, build, dynamic_layers
from dynaconv.training.task import Segmentation, fit, metric, pixel_loss
from tests.data.folders import make_folder, save_image, save_mask

CONFIG = Config(layer="dyconv", widths=[4, 8], classes=11, epochs=3, batch=4, size=16)


@pytest.fixture(scope="module")
def scenes():
    return DigitScenes("train", 12, 16).in_memory()


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


class Record(L.Callback):
    """Losses of all steps; raises before the step `stop`."""

    def __init__(self, stop=None):
        self.losses, self.stop = [], stop

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.stop:
            raise ConnectionAbortedError("the plug was pulled")

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def test_the_loss_falls(scenes):
    record = Record()
    fit(replace(CONFIG, epochs=20, lr=1e-2), scenes, callbacks=[record])
    assert len(record.losses) == 60
    assert sum(record.losses[-6:]) < 0.75 * sum(record.losses[:6])


def test_same_seed_same_weights_another_seed_others(scenes):
    first, again = fit(CONFIG, scenes)[0], fit(CONFIG, scenes)[0]
    assert not first.training
    assert same(first, again)
    assert not same(first, build(CONFIG))
    assert not same(first, fit(replace(CONFIG, seed=1), scenes)[0])


def test_training_leaves_the_random_numbers_of_others(scenes):
    state = torch.get_rng_state()
    fit(replace(CONFIG, epochs=1), scenes)
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_is_annealed(scenes):
    model, _ = fit(CONFIG, scenes)
    assert [float(layer.temperature) for layer in dynamic_layers(model).values()] == [1.0, 1.0]


def test_positions_end_inside_the_kernel(scenes):
    """After the last step too, which no `forward` follows."""
    model, _ = fit(replace(CONFIG, layer="dcls", epochs=1, lr=0.5), scenes)
    for layer in dynamic_layers(model).values():
        assert layer.positions.abs().amax() == layer.extent[0] // 2


@pytest.mark.parametrize("stop", [4, 8])
def test_a_stopped_run_goes_on_and_ends_the_same(scenes, tmp_path, stop):
    undisturbed, history = fit(CONFIG, scenes, scenes, tmp_path / "a")
    with pytest.raises(ConnectionAbortedError):
        fit(CONFIG, scenes, scenes, tmp_path / "b", [Record(stop)])
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["last.ckpt"]
    record = Record()
    resumed, resumed_history = fit(CONFIG, scenes, scenes, tmp_path / "b", [record])
    assert len(record.losses) == 9 - 3 * (stop // 3)  # it went on, it did not start anew
    assert same(resumed, undisturbed)
    assert resumed_history == history
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert same(load_model(tmp_path / "b" / "model.pt")[0], undisturbed)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["last.ckpt", "model.pt"]


def test_random_layers_resume_as_well(scenes, tmp_path, monkeypatch):
    """Dropout draws what it would have drawn without the stop."""
    import dynaconv.training.task as task

    def with_dropout(config):
        model = build(config)
        model.stem[0].relu = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Dropout(0.5))
        return model

    monkeypatch.setattr(task, "build", with_dropout)
    undisturbed, _ = fit(CONFIG, scenes)
    with pytest.raises(ConnectionAbortedError):
        fit(CONFIG, scenes, None, tmp_path, [Record(4)])
    assert same(fit(CONFIG, scenes, None, tmp_path)[0], undisturbed)


def test_a_finished_run_is_not_trained_again(scenes, tmp_path):
    model, history = fit(CONFIG, scenes, scenes, tmp_path)
    record = Record()
    again, again_history = fit(CONFIG, scenes, scenes, tmp_path, [record])
    assert record.losses == []
    assert same(model, again)
    assert history == again_history


def test_another_configuration_or_data_is_refused(scenes, tmp_path):
    config = replace(CONFIG, epochs=1)
    fit(config, scenes, None, tmp_path)
    kept = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(
        InputError, match=r"last\.ckpt: is of a run with lr=0\.002, now 0\.1\. Go on"
    ):
        fit(replace(config, lr=0.1), scenes, None, tmp_path)
    with pytest.raises(InputError, match=r"layer='dyconv', now 'odconv'; seed=0, now 1"):
        fit(replace(config, layer="odconv", seed=1), scenes, None, tmp_path)
    with pytest.raises(InputError, match="other training data; give another --out"):
        fit(config, DigitScenes("train", 13, 16), None, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == kept


def test_a_damaged_checkpoint_is_refused_and_kept(scenes, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"last\.ckpt: damaged.*give another --out, or remove"):
        fit(CONFIG, scenes, None, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == b"damaged"


def test_a_model_without_its_checkpoint_is_not_overwritten(scenes, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"model\.pt: would be overwritten"):
        fit(CONFIG, scenes, None, tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"


def test_a_diverging_run_ends_before_it_spoils_the_checkpoint(scenes, tmp_path):
    class Spoil(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.model.head.bias.data.fill_(math.nan)

    with pytest.raises(InputError, match="the loss is nan at step 3; lower --lr"):
        fit(CONFIG, scenes, None, tmp_path, [Spoil()])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_checkpoints_hold_plain_values(scenes, tmp_path):
    fit(replace(CONFIG, epochs=1), scenes, None, tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert json.loads(json.dumps(content["identity"]))["data"] == "12"


def test_pixel_loss_is_the_weighted_mean_of_torch():
    logits, mask = torch.randn(2, 4, 5, 5), torch.randint(0, 4, (2, 5, 5))
    mask[0, :3] = 255
    weight = torch.tensor([1.0, 1.0, 2.0, 0.3])
    wanted = F.cross_entropy(logits, mask, weight, ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, mask, weight, 255), wanted)


def test_pixels_of_large_objects_count_less():
    logits, mask = torch.randn(1, 4, 1, 3), torch.tensor([[[0, 1, 3]]])
    sizes, weight = torch.tensor([[[8.0, 32.0, 0.0]]]), torch.tensor([1.0, 1.0, 1.0, 0.5])
    each = F.cross_entropy(logits, mask, reduction="none").flatten()
    wanted = (each * torch.tensor([2.0, 0.5, 0.5])).sum() / 3
    torch.testing.assert_close(pixel_loss(logits, mask, weight, 255, sizes), wanted)


def test_a_batch_without_a_class_has_loss_and_gradient_zero():
    logits = torch.randn(1, 4, 5, 5, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 5, 5), 255), torch.ones(4), 255)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_images_of_different_sizes_train_in_one_batch(tmp_path):
    """Whole images, padded: the loss of a batch is that of its images taken one by one."""
    root = make_folder(tmp_path / "data", train=3)
    for i, scene in enumerate(DigitScenes("train", 3, 40)):
        cut = (slice(0, 40 - 7 * i), slice(0, 16 + 9 * i))
        save_image(root / "train" / "images" / f"{i}.png", scene.image[:, *cut])
        save_mask(root / "train" / "masks" / f"{i}.png", scene.mask[cut] < 10)
    data = FolderData(check_folder(root).train, 255)
    config = replace(CONFIG, classes=2, size=0, batch=3, epochs=2)
    model, _ = fit(config, data)
    task = Segmentation(model, config, "")
    items = [data[i] for i in range(3)]
    batch = collate_padded(items, 255)
    assert len({tuple(image.shape) for image, _ in items}) == 3
    each = [task.loss(tuple(t[None] for t in item)) * item[1].numel() for item in items]
    expected = sum(each) / sum(mask.numel() for _, mask in items)
    close(task.loss(batch).double(), expected.double(), "loss", 1e-5)


def test_metric_against_counting():
    predicted, mask = torch.randint(0, 3, (2, 9, 9)), torch.randint(0, 3, (2, 9, 9))
    mask[0] = 255
    real = mask != 255
    ratios = [
        ((predicted == c) & (mask == c)).sum() / (((predicted == c) | (mask == c)) & real).sum()
        for c in range(3)
    ]
    value = metric(Config(classes=7))(predicted, mask)  # classes 3 to 6 do not occur
    torch.testing.assert_close(value, sum(ratios) / 3)
