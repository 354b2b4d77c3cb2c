from collections import Counter

import pytest

from dynaconv.data import phrases
from dynaconv.data.phrases import (
    JOINT,
    LANGUAGES,
    LENGTH_BUCKETS,
    LENGTHS,
    load_phrases,
    make_texts,
    split_of,
)
from dynaconv.data.text import normal


def sources(split):
    """For each phrase of a side the sources that have it, from Babel."""
    kept = {(language, p) for language, given in load_phrases(split).items() for p in given}
    return {key for language, key, name in phrases._names() if (language, name) in kept}


def test_train_and_validation_share_neither_a_source_nor_a_phrase():
    train, val = sources("train"), sources("val")
    assert train
    assert val
    assert not train & val
    assert "territories FR" in train | val
    assert all(split_of(key) == "train" for key in train)
    texts = [{p for given in load_phrases(s).values() for p in given} for s in ("train", "val")]
    assert not texts[0] & texts[1]


def test_no_phrase_belongs_to_two_languages():
    every = [p for s in ("train", "val") for given in load_phrases(s).values() for p in given]
    count = Counter(phrase.casefold() for phrase in every)
    assert set(count.values()) == {1}
    names = Counter(name.casefold() for _, _, name in phrases._names())
    assert names["vietnam"] > 1  # such phrases there are
    assert all(names[phrase.casefold()] == 1 for phrase in every)


def test_phrases_are_real_and_many():
    assert len(LANGUAGES) == 22
    for split, least in (("train", 200), ("val", 50)):
        for language, found in load_phrases(split).items():
            assert len(found) >= least, language
    every = [set(load_phrases(split)["es"]) for split in ("train", "val")]
    assert "Arabia Saudí" in every[0] | every[1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_texts_are_phrases_of_one_language_and_side(split):
    made, known = make_texts(split, 25, seed=3), load_phrases(split)
    assert Counter(made.labels) == dict.fromkeys(LANGUAGES, 25)
    assert len(set(made.texts)) == len(made)
    for text, label in zip(made.texts, made.labels, strict=True):
        assert LENGTHS[0] <= len(text) <= LENGTHS[1]
        assert text == normal(text)
        rest = text
        for phrase in sorted((p for p in known[label] if p in text), key=len, reverse=True):
            rest = rest.replace(phrase, "")
        assert not rest.replace(JOINT, "").strip(", ")


def test_lengths_vary():
    lengths = [len(text) for text in make_texts("val", 40).texts]
    for low, high in LENGTH_BUCKETS.values():
        assert sum(low <= n < high for n in lengths) > 0.2 * len(lengths)
    assert max(lengths) > 150


def test_texts_depend_on_split_seed_and_place_alone():
    first, longer = make_texts("train", 5, seed=1), make_texts("train", 8, seed=1)
    assert first.texts[:5] == longer.texts[:5]
    assert first.texts == make_texts("train", 5, seed=1).texts
    assert first.texts != make_texts("train", 5, seed=2).texts


def test_refusals():
    with pytest.raises(ValueError, match="needs train or val"):
        make_texts("test", 3)
    with pytest.raises(ValueError, match="got 'val', -1"):
        make_texts("val", -1)
    assert not len(make_texts("val", 0))
