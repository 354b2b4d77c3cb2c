"""Real phrases of 22 languages in one script; the class is the language.

The names of territories, languages and currencies in Unicode's CLDR, which come with Babel, so
nothing is downloaded: "Arabia Saudí", "kwacha zambijska", "Schwedische Krone". A phrase that two
languages share has no single answer and is left out. Train and validation share no source: all
translations of one territory, language or currency are on the same side.

An item is a few phrases of one language joined by ", ": 3 to 200 characters, all real words.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import torch

from dynaconv.data.text import Texts, normal

Split = Literal["train", "val"]

LANGUAGES = (
    *("es", "pt", "it", "ca", "gl", "fr", "ro", "da", "nb", "sv", "nl"),
    *("de", "cs", "sk", "pl", "hr", "sl", "tr", "fi", "et", "hu", "id"),
)
KINDS = ("territories", "languages", "currencies")
LENGTHS = (3, 200)
LENGTH_BUCKETS = {"short": (3, 16), "medium": (16, 48), "long": (48, 201)}
VAL_SHARE = 0.2
JOINT = ", "


@lru_cache(maxsize=2)
def load_phrases(split: Split) -> dict[str, list[str]]:
    """The phrases of each language whose sources belong to `split`, in the order of their keys."""
    found = [(language, key, phrase) for language, key, phrase in _names()]
    count = Counter(phrase.casefold() for _, _, phrase in found)
    phrases: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for language, key, phrase in found:
        fits = LENGTHS[0] <= len(phrase) <= LENGTHS[1] and count[phrase.casefold()] == 1
        if fits and split_of(key) == split:
            phrases[language].append(phrase)
    return phrases


def split_of(key: str) -> Split:
    """The side of a source, by its hash alone."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return "val" if share < VAL_SHARE else "train"


def _names() -> Iterator[tuple[str, str, str]]:
    """Language, source ("territories FR") and name of everything that CLDR names."""
    from babel import Locale

    for language in LANGUAGES:
        locale = Locale.parse(language)
        for kind in KINDS:
            for code, name in sorted(getattr(locale, kind).items()):
                yield language, f"{kind} {code}", normal(name)


def make_texts(split: Split, count: int, seed: int = 0) -> Texts:
    """`count` texts of each language, of lengths equally likely per octave.

    Text i of a language depends on (split, seed, language, i) alone. No text occurs twice.

    Raises:
        ValueError: for an unknown split or a negative count.
    """
    if split not in ("train", "val") or count < 0:
        raise ValueError(f"make_texts: needs train or val, and 0 or more, got {split!r}, {count}")
    made = Texts()
    for number, (language, phrases) in enumerate(load_phrases(split).items()):
        mixed = (seed * 0x9E3779B97F4A7C15 + 2 * number + (split == "val")) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        seen: set[str] = set()
        while len(seen) < count:
            text = _join(phrases, generator)
            if text not in seen:
                seen.add(text)
                made.texts.append(text)
                made.labels.append(language)
                made.places.append(f"{split}, {language}, text {len(seen)}")
    return made


def _join(phrases: list[str], generator: torch.Generator) -> str:
    """Different phrases up to a length that is drawn: as many as fit, one at least."""
    low, high = LENGTHS
    wanted = low * math.exp(float(torch.rand((), generator=generator)) * math.log(high / low))
    text = ""
    for i in torch.randperm(len(phrases), generator=generator).tolist():
        longer = f"{text}{JOINT}{phrases[i]}" if text else phrases[i]
        if len(longer) > wanted and text:
            break
        text = longer
    return text
