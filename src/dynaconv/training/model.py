"""The model of a run, from plain values: a U-Net with static or dynamic convolutions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dynaconv.convert import convert, select
from dynaconv.layers.base import DynamicConv
from dynaconv.registry import family
from dynaconv.training.unet import UNet

STATIC = "static"
# Where a U-Net becomes dynamic: below its stem, on the way down and at the bottom.
WHERE = r"encoder|bottleneck"
Seen = TypeVar("Seen")
# Images a forward pass; enough for speed on a CPU, little memory.
CHUNK = 25


@dataclass
class RunConfig:
    """What every run depends on; plain values, kept in the checkpoint.

    `options` are those of the family. `from_data` names the fields that the data decide.
    `devices` are the processes that share each batch.
    """

    from_data: ClassVar[tuple[str, ...]] = ()

    layer: str = STATIC
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch: int = 8
    lr: float = 2e-3
    seed: int = 0
    devices: int = 1


@dataclass
class Config(RunConfig):
    """Everything that a run depends on but its data.

    `names` are those of the classes, where they are known. `background_weight` is the weight of
    the last class in the loss.
    """

    where: str = WHERE
    classes: int = 11
    ignore: int = 255
    names: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    size: int = 160
    background_weight: float = 1.0

    @property
    def background(self) -> int | None:
        """The class called background, if there is one: pictures leave it plain."""
        return self.names.index("background") if "background" in self.names else None


def build(config: Config) -> UNet:
    """The model with fresh weights: the same static start for every layer and a given seed.

    Raises:
        ValueError: the widths, the family, or where to put it do not make a model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(3, config.classes, config.widths)
        if config.layer != STATIC:
            cls = family(config.layer).classes[2]
            if cls.static[2] is nn.ConvTranspose2d:
                enlarge_by(model, cls, config)
            else:
                where = select(name=config.where, kernel_size=3)
                convert(model, config.layer, where, exact=False, inplace=True, **config.options)
    return model


def enlarge_by(model: UNet, cls: type[DynamicConv], config: Config) -> None:
    """Puts layers of a family that enlarges in the places of bilinear interpolation."""
    for i, channels in enumerate(reversed(config.widths[1:])):
        doubling = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        model.enlarge[i] = cls.like(doubling, **config.options)


def normalise(image: Tensor) -> Tensor:
    """Pixels in [0, 1] to about zero mean and unit spread."""
    return (image - 0.5) * 4


def predict(model: UNet, images: Tensor) -> Tensor:
    """Classes (N, H, W) of images (N, 3, H, W) in [0, 1], in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(normalise(part)).argmax(1) for part in images.split(CHUNK)])


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv]:
    """The dynamic layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DynamicConv)}


def kernels_of(model: nn.Module, *inputs: Any) -> dict[str, dict[str, Tensor]]:
    """What each dynamic layer made of its kernel in `model(*inputs)`, in evaluation mode."""
    return look(model, lambda layer, given: kernels(layer, *given), *inputs)


def kernels(layer: DynamicConv, *given: Any) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in layer.kernels(*given).items()}


def look(
    model: nn.Module, at: Callable[[DynamicConv, tuple], Seen], *inputs: Any
) -> dict[str, Seen]:
    """at(layer, its inputs) of each dynamic layer in `model(*inputs)`, in evaluation mode."""
    found: dict[str, Seen] = {}

    def keep(name: str) -> Callable:
        return lambda layer, given: found.__setitem__(name, at(layer, given))

    layers = dynamic_layers(model).items()
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
