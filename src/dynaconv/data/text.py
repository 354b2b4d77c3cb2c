"""Texts with labels in files, checked before training starts.

    CSV: a header with the columns `text` and `label`, then a line each
    JSON Lines: {"text": "...", "label": "..."} a line

Files are UTF-8; other columns and keys are passed over. Texts are NFC-normalised, so that a
character is the same however it was typed. Characters are Unicode code points.
"""

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from dynaconv.data.errors import InputError, refuse
from dynaconv.masking import pad_batch

# One in so many different texts of a label validates, where there is no file for that.
ONE_IN = 10
# Texts of this many batches are put in order of length at a time.
POOL = 30
UNKNOWN = 0
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Texts:
    """Texts in the order of their file, with labels ("" where none were asked for).

    `places` names file and line of each.
    """

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def pick(self, chosen: Callable[[str], bool]) -> "Texts":
        """Those whose text is chosen."""
        rows = zip(self.texts, self.labels, self.places, strict=True)
        kept = [row for row in rows if chosen(row[0])]
        return Texts(*map(list, zip(*kept, strict=True)))


@dataclass(frozen=True)
class TextSet:
    """A checked data set: `labels` and `characters` are those of `train`, sorted.

    `repeated` counts the texts of `val` that are in `train` too.
    """

    train: Texts
    val: Texts
    labels: list[str]
    characters: str
    repeated: int


def check_texts(path: Path | str, val: Path | str | None = None) -> TextSet:
    """Reads every line, and refuses the files if one of them cannot be trained on.

    Without `val`, a tenth of the texts of each label validates: which, their hashes decide.

    Raises:
        InputError: names each file, line and fault.
    """
    read = read_texts(path)
    labels = sorted(set(read.labels))
    if len(labels) < 2:
        raise InputError(
            f"{path}: has the label {labels[0]!r} alone; at least two are needed to tell apart"
        )
    train, held_out = split(read) if val is None else (read, read_texts(val))
    if not len(held_out):
        raise InputError(f"{path}: has too few texts to keep some for validation; give --val")
    known, characters = set(train.labels), "".join(sorted(set().union(*train.texts)))
    refuse(
        f"{place}: unknown label {label!r}; in training there are {_some(known)}"
        for place, label in zip(held_out.places, held_out.labels, strict=True)
        if label not in known
    )
    seen = set(train.texts)
    repeated = sum(text in seen for text in held_out.texts)
    return TextSet(train, held_out, sorted(known), characters, repeated)


def split(read: Texts) -> tuple[Texts, Texts]:
    """Training and validation texts; no text is in both, however often it occurs.

    Of the different texts of each label those with the smallest hashes validate, so that neither
    the order of the file nor a random number decides.
    """
    first: dict[str, str] = {}
    for text, label in zip(read.texts, read.labels, strict=True):
        first.setdefault(text, label)
    by_label: dict[str, list[str]] = {}
    for text in sorted(first, key=lambda text: hashlib.sha256(text.encode()).digest()):
        by_label.setdefault(first[text], []).append(text)
    held_out = {
        text
        for texts in by_label.values()
        for text in texts[: max(len(texts) // ONE_IN, min(1, len(texts) - 1))]
    }
    return read.pick(lambda text: text not in held_out), read.pick(held_out.__contains__)


def read_texts(path: Path | str, labelled: bool = True) -> Texts:
    """The texts of a CSV or JSON Lines file, with their labels if `labelled`.

    Raises:
        InputError: names the file, and each line and its fault (the first twenty).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path}: not a text file that is known; give {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    content = _decoded(path)
    wanted = ("text", "label") if labelled else ("text",)
    found, faults = Texts(), []
    for line in READERS[suffix](content, wanted):
        place = f"{path}, line {line.number}"
        values = [line.values.get(name) for name in wanted]
        fault = line.fault or next(filter(None, map(_fault, wanted, values)), None)
        if fault:
            faults.append(f"{place}: {fault}")
            continue
        found.texts.append(normal(str(values[0])))
        found.labels.append(str(values[1]) if labelled else "")
        found.places.append(place)
    refuse(faults)
    if not len(found):
        raise InputError(f"{path}: has no texts")
    return found


def is_text(path: Path) -> bool:
    """Whether a path is meant as a file of texts, not as a folder of images."""
    return path.is_file() or (path.suffix.lower() in READERS and not path.is_dir())


def check_text(source: str, text: str) -> None:
    """InputError unless this is a text; `source` is named."""
    fault = _fault("text", text)
    if fault:
        raise InputError(f"{source}: {fault}")


def normal(text: str) -> str:
    """NFC: characters composed, where there is a composed form."""
    return unicodedata.normalize("NFC", text)


class _Line(NamedTuple):
    """A line (the first, where a record has several): its values by name, or why it has none."""

    number: int
    values: dict[str, object]
    fault: str = ""


def _decoded(path: Path) -> str:
    """The file as UTF-8, with or without its mark at the start."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode()
    except UnicodeDecodeError:
        refuse(_undecodable(path, content))
        raise


def _undecodable(path: Path, content: bytes) -> Iterator[str]:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            byte = f"byte {line[error.start]:#04x} at position {error.start + 1}"
            yield f"{path}, line {number}: not UTF-8 ({byte}); save the file as UTF-8"


def _csv(content: str, wanted: Sequence[str]) -> Iterator[_Line]:
    """The records of a CSV file; stops at what is no CSV."""
    lines = csv.reader(io.StringIO(content, newline=""), strict=True)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    start, head = 1, None
    try:
        for values in lines:
            number, start = start, lines.line_num + 1
            if not values:
                continue
            if head is None:
                head = values
                wrong = [name for name in wanted if head.count(name) != 1]
                if wrong:
                    fault = f"has not one column {wrong[0]!r}, but {head.count(wrong[0])}"
                    yield _Line(number, {}, f"the header {fault}; it is: {', '.join(head)}")
                    return
            elif len(values) != len(head):
                yield _Line(number, {}, f"has {len(values)} fields, the header {len(head)}")
            else:
                yield _Line(number, dict(zip(head, values, strict=True)))
    except csv.Error as error:
        yield _Line(start, {}, f"not CSV ({error})")
    finally:
        csv.field_size_limit(limit)


def _json(content: str, wanted: Sequence[str]) -> Iterator[_Line]:
    """The objects of a JSON Lines file; empty lines are passed over."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield _Line(number, {}, f"not JSON ({error})")
            continue
        if isinstance(values, dict):
            yield _Line(number, values)
        else:
            yield _Line(number, {}, f"a JSON {type(values).__name__}, where an object is needed")


READERS = {".csv": _csv, ".jsonl": _json, ".ndjson": _json}


def _fault(name: str, value: object) -> str | None:
    """Why a value will not do; a label may be a whole number as well."""
    if value is None:
        return f"has no {name}"
    if name == "label" and isinstance(value, int) and not isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return f"its {name} is {json.dumps(value)[:40]}; give a string"
    if not value.strip():
        return f"its {name} is empty"
    if SURROGATE.search(value):
        return f"its {name} has half of a surrogate pair, which is no character"
    return None


def _some(labels: set[str], most: int = 10) -> str:
    """Labels for a message."""
    shown = ", ".join(map(repr, sorted(labels)[:most]))
    return shown if len(labels) <= most else f"{shown} and {len(labels) - most} more"


class TextData(Dataset[tuple[Tensor, int]]):
    """Items (characters (L,) long, label): places in `characters` and `labels`, from 1 and 0.

    0 is any character that is not in `characters`.
    """

    def __init__(
        self, texts: Sequence[str], labels: Sequence[str], characters: str, names: Sequence[str]
    ) -> None:
        self.texts, self.index = texts, index_of(characters)
        places = {name: i for i, name in enumerate(names)}
        self.targets = [places[label] for label in labels]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return encode(self.texts[index], self.index), self.targets[index]

    def fingerprint(self) -> str:
        """Changes with any text or label."""
        lines = zip(self.texts, self.targets, strict=True)
        return hashlib.sha256(json.dumps(list(lines)).encode()).hexdigest()

    def lengths(self) -> list[int]:
        """Characters of each text."""
        return [len(text) for text in self.texts]


def index_of(characters: str) -> dict[str, int]:
    """The number of each character, from 1; 0 is left to all others."""
    return {character: i for i, character in enumerate(characters, 1)}


def encode(text: str, index: dict[str, int]) -> Tensor:
    """The numbers of the characters of a text, (L,) long."""
    return torch.tensor([index.get(character, UNKNOWN) for character in text], dtype=torch.long)


def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Items as one batch: characters (N, L), padding mask (N, L), labels (N,)."""
    tokens, mask = pad_texts([tokens for tokens, _ in items])
    return tokens, mask, torch.tensor([target for _, target in items])


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (L,) of any lengths as one batch: characters (N, L) and padding mask (N, L)."""
    data, mask = pad_batch([tokens[None] for tokens in texts], UNKNOWN)
    return data.squeeze(1), mask  # type: ignore[return-value]


class Buckets(Sampler[list[int]]):
    """Batches of texts of similar length, in an order that depends on seed and epoch alone.

    The shuffled texts are taken some batches at a time, those put in order of length and cut into
    batches, and all batches shuffled again. The last, smaller batch is left out.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch = lengths, min(batch, len(lengths))
        # Named as in torch's BatchSampler: Lightning tells it the epoch.
        self.sampler: DistributedSampler = DistributedSampler(
            lengths,  # type: ignore[arg-type]
            num_replicas=1,
            rank=0,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.lengths) // self.batch

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)[: len(self) * self.batch]
        batches: list[list[int]] = []
        for start in range(0, len(order), POOL * self.batch):
            pool = sorted(order[start : start + POOL * self.batch], key=self.lengths.__getitem__)
            batches += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        mixed = self.sampler.seed * 1_000_003 + self.sampler.epoch
        generator = torch.Generator().manual_seed(mixed)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]
