"""The model of a text run: characters to a label, at any length, by masked convolutions."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import masked
from dynaconv.convert import convert, select
from dynaconv.data.text import UNKNOWN, encode, index_of, normal, pad_texts
from dynaconv.masking import Padded, check_mask, masked_mean, sizes_from_mask
from dynaconv.registry import family
from dynaconv.training.model import STATIC, RunConfig

# Kernels of families whose channels share them in heads, as published for width 128 and more.
HEADS = 8
# The share of characters that are unknown in training, so that a model has met unknown ones.
UNKNOWN_SHARE = 0.02
DROPOUT = 0.1
# Texts, and characters with padding, of a forward pass at most.
MOST_TEXTS, MOST_CHARACTERS = 256, 2**15


@dataclass
class TextConfig(RunConfig):
    """Everything that a text run depends on but its data; plain values, kept in the checkpoint.

    `labels` and `characters` are those of the training texts.
    """

    from_data: ClassVar[tuple[str, ...]] = ("labels", "characters")

    labels: list[str] = field(default_factory=list)
    characters: str = ""
    channels: int = 64
    blocks: int = 3
    kernel: int = 5
    epochs: int = 10
    batch: int = 32


class Mixer(nn.Sequential):
    """A depthwise conv of `kernel` taps, norm, activation, and a conv of one tap."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding="same", groups=channels)
        self.norm = nn.BatchNorm1d(channels)
        self.act = nn.SiLU()
        self.mix = nn.Conv1d(channels, channels, 1)
        self.drop = nn.Dropout(DROPOUT)


class Block(nn.Module):
    """x + mixer(glu(gate(x))), after Wu et al., ICLR 2019.

    The convs of one tap mix channels, the one between them positions: so families that mix no
    channels and those that do are compared at equal terms with the depthwise one in their place.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.gate = nn.Conv1d(channels, 2 * channels, 1)
        self.mixer = Mixer(channels, kernel)

    def masked_forward(self, x: Tensor, mask: Tensor) -> Padded:
        gated = F.glu(self.gate(x), 1)
        output, kept = masked.apply(self.mixer, gated, mask)
        return Padded(resized(x, mask, kept) + output, kept)  # type: ignore[arg-type]


def resized(x: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """x (N, C, L) at the lengths of the mask `kept`, for layers that learn a stride."""
    if kept is mask or (mask.shape == kept.shape and torch.equal(mask, kept)):
        return x
    size = kept.shape[1]
    lengths = torch.cat([sizes_from_mask(mask), sizes_from_mask(kept)], 1).tolist()
    parts = [
        F.pad(F.interpolate(one[None, :, :length], wanted, mode="linear"), (0, size - wanted))
        for one, (length, wanted) in zip(x, lengths, strict=True)
    ]
    return torch.cat(parts) if parts else x.new_zeros(*x.shape[:2], size)


class TextNet(nn.Module):
    """Characters to a label: embedding, residual blocks, mean and maximum over the text, linear.

    Args:
        characters: how many there are, without the unknown ones.
        labels: how many there are.
        channels: of the embedding and every block.
        blocks: how many there are.
        kernel: taps of their convolutions.

    Shapes:
        tokens (N, L) long from 0, what is unknown, to `characters`; mask (N, L) bool, True where
        real, None for all; output (N, labels). A text's output is that of the text alone.

    Raises:
        ValueError: a number is below 1, or `kernel` even; the mask has another shape.
    """

    def __init__(
        self, characters: int, labels: int, channels: int, blocks: int, kernel: int
    ) -> None:
        super().__init__()
        numbers = {"labels": labels, "channels": channels, "blocks": blocks, "kernel": kernel}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} has no middle; give an odd number")
        self.embed = nn.Embedding(characters + 1, channels)
        self.blocks = nn.Sequential(*(Block(channels, kernel) for _ in range(blocks)))
        self.drop = nn.Dropout(DROPOUT)
        self.head = nn.Linear(2 * channels, labels)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        check_mask(mask, tokens.unsqueeze(1))
        if self.training:
            unknown = torch.rand(tokens.shape, device=tokens.device) < UNKNOWN_SHARE
            tokens = tokens.masked_fill(unknown, UNKNOWN)
        x, kept = masked.apply(self.blocks, self.embed(tokens).transpose(1, 2), mask)
        outside = ~kept.unsqueeze(1)  # type: ignore[union-attr]
        mean = masked_mean(x.masked_fill(outside, 0), kept)
        highest = x.masked_fill(outside, torch.finfo(x.dtype).min).amax(2)
        return self.head(self.drop(torch.cat([mean, highest], 1)))


def build_text(config: TextConfig) -> TextNet:
    """The model with fresh weights: the same static start for every layer and a given seed.

    Raises:
        ValueError: the numbers or the family do not make a model.
    """
    sizes = (config.channels, config.blocks, config.kernel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TextNet(len(config.characters), len(config.labels), *sizes)
        if config.layer != STATIC:
            options = _shared(config.layer) | config.options
            convert(model, config.layer, select(r"\.conv$"), exact=False, inplace=True, **options)
    return model


def _shared(layer: str) -> dict[str, int]:
    """`heads` for a family that has them."""
    known = inspect.signature(family(layer).classes[1].build).parameters
    return {"heads": HEADS} if "heads" in known else {}


def logits(model: TextNet, config: TextConfig, texts: Sequence[str]) -> Tensor:
    """(N, labels) of texts (N,) in evaluation mode: those of similar length go together.

    Raises:
        ValueError: a text is empty.
    """
    if not all(texts):
        raise ValueError(f"text {list(texts).index('')} is empty")
    index, output = index_of(config.characters), torch.zeros(len(texts), len(config.labels))
    tokens = [encode(normal(text), index) for text in texts]
    model.eval()
    with torch.no_grad():
        for part in chunks([len(one) for one in tokens]):
            output[part] = model(*pad_texts([tokens[i] for i in part]))
    return output


def chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """All indices, by length, in parts that need no more memory than the longest alone does."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = len(part) == MOST_TEXTS or (len(part) + 1) * lengths[i] > MOST_CHARACTERS
        if part and full:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def label(
    model: TextNet, config: TextConfig, texts: Sequence[str]
) -> tuple[list[str], list[float]]:
    """The most probable label of each text, and its probability."""
    shares, places = logits(model, config, texts).double().softmax(1).max(1)
    return [config.labels[place] for place in places.tolist()], shares.tolist()
