"""Segmentation with Lightning: the loss, the metric, the schedule, resuming after a kill."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics.classification import MulticlassJaccardIndex

from dynaconv.anneal import anneal, parameter_groups
from dynaconv.training.files import save_model, whole
from dynaconv.training.model import Config, build, normalise

# The share of a run over which softmax temperatures go from 30 to 1.
ANNEALING = 1 / 3


class Segmentation(L.LightningModule):
    """A model that gives each pixel a class, trained by cross entropy and measured by mIoU."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.miou = metric(config)
        weight = torch.ones(config.classes)
        weight[-1] = config.background_weight
        self.register_buffer("class_weight", weight, persistent=False)
        self.history: list[dict[str, float]] = []

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        total = self.trainer.estimated_stepping_batches
        anneal(self.model, self.global_step / (ANNEALING * float(total)))
        image, mask = batch[:2]
        logits = self.model(normalise(image))
        weight: Tensor = self.class_weight  # type: ignore[assignment]
        loss = F.cross_entropy(logits, mask, weight, ignore_index=self.config.ignore)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], index: int) -> None:
        image, mask = batch[:2]
        self.miou.update(self.model(normalise(image)).argmax(1), mask)

    def on_validation_epoch_end(self) -> None:
        value = self.miou.compute()
        self.miou.reset()
        self.log("miou", value)
        if not self.trainer.sanity_checking:
            self.history.append({"epoch": self.current_epoch + 1, "miou": float(value)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["history"]

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.config.lr)
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [g["lr"] for g in groups], total_steps=max(total, 2), pct_start=0.2
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def metric(config: Config) -> MulticlassJaccardIndex:
    """Mean intersection over union over the classes that occur."""
    return MulticlassJaccardIndex(config.classes, ignore_index=config.ignore)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints written whole or not at all, and read without running code in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with whole(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)


class Bar(L.Callback):
    """Moves one task of a rich progress bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        total = int(trainer.estimated_stepping_batches)
        loss = trainer.callback_metrics.get("loss")
        note = "" if loss is None else f"loss {float(loss):.3f}"
        miou = trainer.callback_metrics.get("miou")
        note += "" if miou is None else f"  mIoU {float(miou):.3f}"
        self.progress.update(self.task, completed=trainer.global_step, total=total, note=note)


class Epochs(L.Callback):
    """Tells the data set which epoch it is, so that its random crops can be drawn anew."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        if hasattr(data, "set_epoch"):
            data.set_epoch(trainer.current_epoch)


def fit(
    config: Config,
    train: Dataset,
    val: Dataset | None,
    out: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    val_every: int | None = None,
    on_start: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Trains the model of `config`; the model in evaluation mode and its validation history.

    With `out`, a checkpoint is written there after each epoch, and a run that finds one goes on
    from it; `out/model.pt` is the result.
    """
    model = build(config)
    if on_start is not None:
        on_start(model)
    task = Segmentation(model, config)
    last = None if out is None else out / "last.ckpt"
    with quiet():
        L.seed_everything(config.seed, verbose=False)
        trainer = L.Trainer(
            max_epochs=config.epochs,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=last is not None,
            callbacks=[*callbacks, Epochs(), *_checkpoints(out)],
            plugins=[WholeCheckpoints()],
            num_sanity_val_steps=0,
            check_val_every_n_epoch=val_every or max(1, config.epochs // 6),
            limit_val_batches=0 if val is None else 1.0,
        )
        trainer.fit(
            task,
            _loader(train, config),
            None if val is None else DataLoader(val, batch_size=1),
            ckpt_path=str(last) if last is not None and last.exists() else None,
        )
    model = task.model.cpu().eval()
    if out is not None:
        save_model(out / "model.pt", model, config)
    return model, task.history


def _checkpoints(out: Path | None) -> list[L.Callback]:
    if out is None:
        return []
    saver = ModelCheckpoint(
        out, filename="last", save_top_k=1, monitor=None, enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    return [saver]


def _loader(data: Dataset, config: Config) -> DataLoader:
    """Batches in an order that depends on seed and epoch alone, so that a resumed run matches."""
    sampler: DistributedSampler = DistributedSampler(
        data, num_replicas=1, rank=0, seed=config.seed, drop_last=False
    )
    count = len(data)  # type: ignore[arg-type]
    return DataLoader(
        data, config.batch, sampler=sampler, drop_last=count > config.batch
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's advice on loggers, workers and devices is not for the user of a command."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
