"""Training with Lightning: the schedule, resuming after a kill; the loss and metric of images."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from dynaconv.anneal import anneal, keep_inside, parameter_groups
from dynaconv.data.errors import InputError
from dynaconv.data.folder import PaddedImages, collate_padded
from dynaconv.files import clear_temporaries
from dynaconv.training.files import read_checkpoint, save_checkpoint, save_model
from dynaconv.training.model import Config, RunConfig, build, normalise
from dynaconv.training.processes import Part, process
from dynaconv.training.unet import UNet

# The share of a run over which softmax temperatures go from 30 to 1.
ANNEALING = 1 / 3
# What a checkpoint has to hold for a run to go on from it.
RESUMED = {"state_dict", "loops", "optimizer_states", "lr_schedulers", "history"}

History = list[dict[str, float]]


def fit(
    config: Config,
    train: Dataset,
    val: Dataset | None = None,
    out: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[UNet, History]:
    """Trains the model of `config` on images; `train_task` says what `out` does.

    Returns:
        The model in evaluation mode, and the validation mIoU of each epoch.
    """
    task = Segmentation(build(config), config, fingerprint(train))
    held_out = None if val is None else DataLoader(val, batch_size=1)
    collate = None if config.size else partial(collate_padded, ignore=config.ignore)
    return task.model, train_task(task, _loader(train, config, collate), held_out, out, callbacks)


def train_task(
    task: "Task",
    train: DataLoader,
    val: DataLoader | None = None,
    out: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> History:
    """Trains the model of `task`, and leaves it on the CPU in evaluation mode.

    On several devices each is a process of its own that runs this call, on the CPU too: Lightning
    starts the others by this process's command line, unless torchrun has started all.

    With `out`, a checkpoint is written there after each epoch, and a run that finds one goes on
    from it and ends with the weights of an undisturbed run; `out/model.pt` is the result.

    Returns:
        The validation score of each epoch.

    Raises:
        InputError: `out` holds a damaged checkpoint or one of another run, or the loss diverged.
    """
    last = None if out is None else resumable(out, task.identity)
    savers = [] if out is None else [_saver(out)]
    with quiet(), torch.random.fork_rng():
        trainer = L.Trainer(
            max_epochs=task.config.epochs,
            devices=task.config.devices,
            strategy="ddp" if task.config.devices > 1 else "auto",
            use_distributed_sampler=False,
            sync_batchnorm=task.config.devices > 1 and torch.cuda.is_available(),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(savers),
            callbacks=[*callbacks, Draws(task.config.seed), *savers],
            plugins=[WholeCheckpoints()],
            num_sanity_val_steps=0,
        )
        trainer.fit(task, train, val, ckpt_path=last)
    task.model.cpu().eval()
    if out is not None and trainer.is_global_zero:
        save_model(out / "model.pt", task.model, task.config)
        for name in ("last.ckpt", "model.pt"):
            clear_temporaries(out / name)
    return task.history


def fingerprint(data: Dataset) -> str:
    """What tells a data set from another: its own `fingerprint()`, else its length."""
    own = getattr(data, "fingerprint", None)
    return str(len(data)) if own is None else own()  # type: ignore[arg-type]


def resumable(out: Path, identity: dict[str, Any]) -> Path | None:
    """The checkpoint in `out` to go on from; None where there is nothing yet.

    Raises:
        InputError: what is there is damaged, or of a run with another configuration or data.
    """
    last, model = out / "last.ckpt", out / "model.pt"
    mend = "give another --out, or remove it to start anew"
    if not last.exists():
        if model.exists():
            raise InputError(f"{model}: would be overwritten, and there is no {last} of it; {mend}")
        return None
    try:
        content = read_checkpoint(last)
        saved = content.get("identity")
        if not isinstance(saved, dict) or not content.keys() >= RESUMED:
            raise InputError(f"{last}: damaged, or not a checkpoint of a training")
    except InputError as error:
        raise InputError(f"{error}; {mend}") from None
    changed = [
        f"{name}={saved.get(name)!r}, now {value!r}"
        for name, value in identity.items()
        if name != "data" and saved.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{last}: is of a run with {'; '.join(changed)}. Go on as it was, or {mend}"
        )
    if saved.get("data") != identity["data"]:
        raise InputError(f"{last}: is of a run on other training data; {mend}")
    return last


class Task(L.LightningModule):
    """What every kind of training shares: the schedule, the history, what a checkpoint holds.

    A kind defines `loss(batch)`, and `judge(batch)`, which updates `score`, a metric; `score_name`
    is what the history calls it. `identity` says which run this is: its configuration, and
    `data`, a fingerprint.
    """

    score_name: ClassVar[str]

    def __init__(self, model: nn.Module, config: RunConfig, data: str, score: Metric) -> None:
        super().__init__()
        self.model, self.config, self.score = model, config, score
        settings = {k: v for k, v in asdict(config).items() if k not in config.from_data}
        self.identity = settings | {"data": data}
        self.history: History = []

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss of a batch in training."""
        raise NotImplementedError

    def judge(self, batch: tuple[Tensor, ...]) -> None:
        """Updates `score` by a batch of validation."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        total = float(self.trainer.estimated_stepping_batches)
        anneal(self.model, self.global_step / (ANNEALING * total))
        loss = self.loss(batch)
        # All processes end with the same error, and none waits for another.
        if not self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").isfinite():
            raise InputError(f"the loss is {loss.item()} at step {self.global_step}; lower --lr")
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=batch[0].shape[0])
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        keep_inside(self.model)

    def validation_step(self, batch: tuple[Tensor, ...], index: int) -> None:
        self.judge(batch)

    def on_validation_epoch_end(self) -> None:
        value = self.score.compute()
        self.score.reset()
        self.log(self.score_name, value)
        self.history.append({"epoch": self.current_epoch + 1, self.score_name: float(value)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"history": self.history, "identity": self.identity}

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


class Segmentation(Task):
    """A model that gives each pixel a class, trained by cross entropy and measured by mIoU."""

    score_name = "miou"
    model: UNet
    config: Config
    class_weight: Tensor

    def __init__(self, model: UNet, config: Config, data: str) -> None:
        super().__init__(model, config, data, metric(config))
        weight = torch.ones(config.classes)
        weight[-1] = config.background_weight
        self.register_buffer("class_weight", weight, persistent=False)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        logits, mask, sizes = self._logits(batch)
        return pixel_loss(logits, mask, self.class_weight, self.config.ignore, *sizes)

    def judge(self, batch: tuple[Tensor, ...]) -> None:
        logits, mask, _ = self._logits(batch)
        self.score.update(logits.argmax(1), mask)

    def _logits(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Logits, mask, and what else the batch holds, from PaddedImages or (image, mask, ...)."""
        image, mask, *rest = batch
        if isinstance(batch, PaddedImages):
            return self.model(normalise(image), batch.padding_mask), mask, ()
        return self.model(normalise(image)), mask, tuple(rest)


def pixel_loss(
    logits: Tensor, mask: Tensor, weight: Tensor, ignore: int, sizes: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of logits (N, classes, H, W), weighted by class; mask (N, H, W).

    With `sizes` (N, H, W), the width of the object at each pixel (0: none), a pixel counts for
    16 / width, so that one large object does not outweigh many small ones. Zero where no pixel
    has a class, as in crops beyond the border; torch's own mean is NaN there.
    """
    share = weight[mask.masked_fill(mask == ignore, 0)] * (mask != ignore)
    if sizes is not None:
        share = torch.where(sizes > 0, share * 16 / sizes.clamp(min=1), share)
    loss = F.cross_entropy(logits, mask, ignore_index=ignore, reduction="none")
    return (share * loss).sum() / share.sum().clamp(min=1e-6)


def metric(config: Config) -> MulticlassJaccardIndex:
    """Mean intersection over union over the classes that occur."""
    return MulticlassJaccardIndex(config.classes, ignore_index=config.ignore)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints written whole or not at all, and read without running code in them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        save_checkpoint(path, checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class Bar(L.Callback):
    """Moves one task of a rich progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        total = int(trainer.estimated_stepping_batches)
        shown = [
            f"{label} {float(trainer.callback_metrics[name]):.3f}"
            for name, label in (("loss", "loss"), ("miou", "mIoU"), ("accuracy", "accuracy"))
            if name in trainer.callback_metrics
        ]
        note = "  ".join(shown)
        self.progress.update(self.task, completed=trainer.global_step, total=total, note=note)


class Draws(L.Callback):
    """Makes what is random in training depend on the seed and the step alone.

    A resumed run then draws what an undisturbed one does, and each process its own.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        if hasattr(data, "set_epoch"):
            data.set_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        drawn = self.seed * 1_000_003 + trainer.global_step
        torch.manual_seed(drawn + process() * 2**48)


def _saver(out: Path) -> ModelCheckpoint:
    """Keeps out/last.ckpt, written after each epoch and its validation."""
    return ModelCheckpoint(
        out, filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )


def _loader(data: Dataset, config: Config, collate: Callable | None) -> DataLoader:
    """Batches in an order that depends on seed and epoch alone, so that a resumed run matches."""
    order: DistributedSampler = DistributedSampler(data, num_replicas=1, rank=0, seed=config.seed)
    batches = BatchSampler(order, config.batch, drop_last=len(order) > config.batch)
    return load(data, batches, config, collate)


def load(
    data: Dataset, batches: BatchSampler, config: RunConfig, collate: Callable | None
) -> DataLoader:
    """The batches, or this process's part of each."""
    mine = Part(batches) if config.devices > 1 else batches
    return DataLoader(data, batch_sampler=mine, collate_fn=collate)


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
