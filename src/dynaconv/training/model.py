"""The model of a run, from plain values: a U-Net with static or dynamic convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.convert import convert, select
from dynaconv.layers.base import DynamicConv
from dynaconv.training.unet import UNet

STATIC = "static"
# Where a U-Net becomes dynamic: below full resolution, on the way down and at the bottom.
WHERE = r"encoder|bottleneck"


@dataclass
class Config:
    """Everything that a run depends on but its data; plain values, kept in the checkpoint."""

    layer: str = STATIC
    options: dict[str, Any] = field(default_factory=dict)
    where: str = WHERE
    classes: int = 11
    ignore: int = 255
    names: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=lambda: [24, 48, 96, 128])
    epochs: int = 30
    batch: int = 8
    lr: float = 2e-3
    size: int = 160
    seed: int = 0
    background_weight: float = 1.0


def build(config: Config) -> nn.Module:
    """The model with fresh weights: the same static start for every layer and a given seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: nn.Module = UNet(3, config.classes, config.widths)
        if config.layer == STATIC:
            return model
        where = select(name=config.where, kernel_size=3)
        return convert(model, config.layer, where, exact=False, inplace=True, **config.options)[0]


def normalise(image: Tensor) -> Tensor:
    """Pixels in [0, 1] to about zero mean and unit spread."""
    return (image - 0.5) * 4


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv]:
    """The dynamic layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DynamicConv)}
