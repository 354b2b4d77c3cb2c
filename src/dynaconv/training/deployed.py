"""What a trained model takes and gives where it is deployed."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.masking import mask_from_sizes
from dynaconv.training.model import Config, normalise
from dynaconv.training.text_model import TextConfig


class Pixels(nn.Module):
    """Scores (N, classes, H, W) of images (N, 3, H, W) in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(normalise(image))


def deployed(
    model: nn.Module, config: Config | TextConfig
) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """A model, an example of its inputs by name, and what one has to know to use it.

    Images are `image` (N, 3, H, W) in [0, 1], texts `tokens` (N, L) and `mask` (N, L), True where
    a text has characters: token i + 1 is `characters[i]`, 0 any other.
    """
    if isinstance(config, TextConfig):
        tokens = torch.arange(32).remainder(len(config.characters) + 1).reshape(2, 16)
        known: dict[str, Any] = {"characters": config.characters, "labels": config.labels}
        example = {"tokens": tokens, "mask": mask_from_sizes([16, 9], (16,))}
        return model, example, {key: json.dumps(value) for key, value in known.items()}
    side = 2 ** (len(config.widths) + 2)
    image = torch.rand(2, 3, side, side + 1, generator=torch.Generator().manual_seed(0))
    return Pixels(model), {"image": image}, {"classes": json.dumps(config.names)}
