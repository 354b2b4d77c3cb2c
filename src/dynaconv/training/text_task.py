"""Text classification: the loss, the metric, batches of texts of similar length."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from dynaconv.data.text import Buckets, TextData, collate
from dynaconv.training.task import History, Task, load, train_task
from dynaconv.training.text_model import TextConfig, TextNet, build_text, chunks


class Classification(Task):
    """A model that gives each text a label, trained by cross entropy and measured by accuracy."""

    score_name = "accuracy"
    model: TextNet

    def __init__(self, model: TextNet, config: TextConfig, data: str) -> None:
        super().__init__(model, config, data, accuracy(config))

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, mask, labels = batch
        return F.cross_entropy(self.model(tokens, mask), labels)

    def judge(self, batch: tuple[Tensor, ...]) -> None:
        tokens, mask, labels = batch
        self.score.update(self.model(tokens, mask), labels)


def accuracy(config: TextConfig) -> MulticlassAccuracy:
    """The share of texts whose label is right."""
    return MulticlassAccuracy(len(config.labels), average="micro")


def fit_text(
    config: TextConfig,
    train: TextData,
    val: TextData | None = None,
    out: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[TextNet, History]:
    """Trains the model of `config` on texts; `train_task` says what `out` does.

    Returns:
        The model in evaluation mode, and the validation accuracy of each epoch.
    """
    task = Classification(build_text(config), config, train.fingerprint())
    order = Buckets(train.lengths(), config.batch, config.seed)
    loader = load(train, order, config, collate)  # type: ignore[arg-type]
    held_out = None
    if val is not None:
        parts = list(chunks(val.lengths()))
        held_out = DataLoader(val, batch_sampler=parts, collate_fn=collate)
    return task.model, train_task(task, loader, held_out, out, callbacks)
