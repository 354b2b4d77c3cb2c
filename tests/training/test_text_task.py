import json
from dataclasses import replace

import lightning as L
import pytest
import torch

from dynaconv.data.errors import InputError
from dynaconv.data.phrases import make_texts
from dynaconv.data.text import TextData
from dynaconv.training.files import load_model
from dynaconv.training.model import dynamic_layers
from dynaconv.training.text_model import TextConfig, build_text, logits
from dynaconv.training.text_task import accuracy, fit_text

LABELS = ["de", "es", "fi"]
SIZES = {"channels": 8, "blocks": 2, "kernel": 3}


def texts_of(split, count):
    made = make_texts(split, count)
    return [row for row in zip(made.texts, made.labels, strict=True) if row[1] in LABELS]


TRAIN, VAL = texts_of("train", 10), texts_of("val", 4)
CHARACTERS = "".join(sorted(set("".join(text for text, _ in TRAIN))))
CONFIG = TextConfig(
    layer="dyconv", labels=LABELS, characters=CHARACTERS, epochs=3, batch=8, **SIZES
)


def data_of(rows):
    return TextData(*zip(*rows, strict=True), CHARACTERS, LABELS)


DATA, HELD_OUT = data_of(TRAIN), data_of(VAL)
STEPS = len(TRAIN) // 8


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


def test_it_learns():
    record = Record()
    config = replace(CONFIG, layer="dynamic_lightconv", epochs=30, lr=1e-2)
    _, history = fit_text(config, DATA, HELD_OUT, callbacks=[record])
    assert len(record.losses) == 30 * STEPS
    assert sum(record.losses[-STEPS:]) < 0.6 * sum(record.losses[:STEPS])
    assert history[-1]["accuracy"] > 0.5  # of three languages


def test_the_history_is_the_accuracy_of_the_model():
    model, history = fit_text(CONFIG, DATA, HELD_OUT)
    said = logits(model, CONFIG, HELD_OUT.texts).argmax(1)
    right = (said == torch.tensor(HELD_OUT.targets)).float().mean()
    assert history[-1] == {"epoch": 3, "accuracy": pytest.approx(float(right))}
    assert accuracy(CONFIG)(said, torch.tensor(HELD_OUT.targets)) == right


def test_same_seed_same_weights_another_seed_others():
    first, again = fit_text(CONFIG, DATA)[0], fit_text(CONFIG, DATA)[0]
    assert not first.training
    assert same(first, again)
    assert not same(first, build_text(CONFIG))
    assert not same(first, fit_text(replace(CONFIG, seed=1), DATA)[0])


def test_epochs_come_in_different_orders():
    class Seen(L.Callback):
        batches: list = []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.batches.append(batch[0].flatten().tolist())

    fit_text(replace(CONFIG, epochs=2), DATA, callbacks=[Seen()])
    assert Seen.batches[:STEPS] != Seen.batches[STEPS:]


def test_temperature_is_annealed():
    model, _ = fit_text(CONFIG, DATA)
    assert [float(layer.temperature) for layer in dynamic_layers(model).values()] == [1.0, 1.0]


@pytest.mark.parametrize("stop", [STEPS + 1, 2 * STEPS])
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, stop):
    """Its dropout, unknown characters and batches are those of the run without the stop."""
    undisturbed, history = fit_text(CONFIG, DATA, HELD_OUT, tmp_path / "a")
    with pytest.raises(ConnectionAbortedError):
        fit_text(CONFIG, DATA, HELD_OUT, tmp_path / "b", [Record(stop)])
    record = Record()
    resumed, resumed_history = fit_text(CONFIG, DATA, HELD_OUT, tmp_path / "b", [record])
    assert len(record.losses) == 3 * STEPS - STEPS * (stop // STEPS)
    assert same(resumed, undisturbed)
    assert resumed_history == history
    loaded, config = load_model(tmp_path / "b" / "model.pt")
    assert config == CONFIG
    assert same(loaded, undisturbed)


def test_another_configuration_or_other_texts_are_refused(tmp_path):
    config = replace(CONFIG, epochs=1)
    fit_text(config, DATA, None, tmp_path)
    kept = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"is of a run with lr=0\.002, now 0\.1\. Go on"):
        fit_text(replace(config, lr=0.1), DATA, None, tmp_path)
    other = TextData(DATA.texts, ["de"] * len(DATA), CHARACTERS, LABELS)
    with pytest.raises(InputError, match="other training data; give another --out"):
        fit_text(replace(config, characters=CHARACTERS[1:]), other, None, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == kept


def test_checkpoints_hold_plain_values(tmp_path):
    fit_text(replace(CONFIG, epochs=1), DATA, None, tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert json.loads(json.dumps(content["identity"]))["data"] == DATA.fingerprint()


def test_a_batch_of_one_text_of_one_character():
    data = TextData(["a", "b"], ["de", "fi"], "ab", LABELS)
    config = replace(CONFIG, characters="ab", batch=1, epochs=1)
    model, _ = fit_text(config, data)
    assert all(value.isfinite().all() for value in model.state_dict().values())
