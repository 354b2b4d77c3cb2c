"""A small network around one layer, and something for it to learn."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import DynamicConv
from dynaconv.masking import Padded, masked_mean
from dynaconv.testing.families import SIZES

CLASSES = 4


class Classifier(nn.Module):
    """head(mean(relu(layer(x)))): (N, C_in, *L) -> (N, CLASSES), whatever size the output has."""

    def __init__(self, cls: type[DynamicConv], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.layer = cls(**arguments)
        self.head = nn.Linear(self.layer.out_channels, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        output = self.layer(x, mask)
        if isinstance(output, Padded):
            output, mask = output
        elif mask is not None:
            mask = self.layer.output_mask(mask)
        seen = F.relu(output)
        if mask is not None:
            seen = seen.masked_fill(~mask.unsqueeze(1), 0)
        return self.head(masked_mean(seen, mask))


def examples(
    cls: type[DynamicConv], arguments: dict[str, Any], batch: int = CLASSES
) -> tuple[Tensor, Tensor]:
    """One noisy pattern a class: (batch, C_in, *L) in float32, and labels (batch,)."""
    labels = torch.arange(batch) % CLASSES
    patterns = torch.randn(CLASSES, arguments["in_channels"], *SIZES[cls.rank])
    x = patterns[labels]
    return x + 0.5 * torch.randn_like(x), labels
