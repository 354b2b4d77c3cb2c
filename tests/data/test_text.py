import json
import unicodedata

import pytest
import torch

from dynaconv.data.errors import InputError
from dynaconv.data.text import (
    Buckets,
    TextData,
    Texts,
    check_text,
    check_texts,
    collate,
    is_text,
    read_texts,
    split,
)

ROWS = [('café, "grand"\nou petit', "fr"), ("  Land ", "de"), ("日本語", "ja"), ("e\u0301", "7")]


def write_csv(path, rows, head="text,label"):
    def quoted(value):
        return '"' + str(value).replace('"', '""') + '"'

    lines = [head, *(",".join(map(quoted, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json(path, rows):
    lines = [json.dumps({"label": label, "text": text, "id": 3}) for text, label in rows]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("write", [write_csv, write_json], ids=["csv", "jsonl"])
def test_texts_come_as_written_and_normalised(tmp_path, write):
    name = "a.CSV" if write is write_csv else "a.jsonl"
    read = read_texts(write(tmp_path / name, ROWS))
    assert read.texts == [unicodedata.normalize("NFC", text) for text, _ in ROWS]
    assert read.texts[-1] == "é"
    assert read.labels == [label for _, label in ROWS]
    assert read_texts(tmp_path / name, labelled=False).labels == [""] * 4


def test_places_are_lines_of_the_file(tmp_path):
    read = read_texts(write_csv(tmp_path / "a.csv", ROWS))
    assert [place.rsplit(" ", 1)[1] for place in read.places] == ["2", "4", "5", "6"]
    read = read_texts(write_json(tmp_path / "a.ndjson", ROWS))
    assert read.places[1] == f"{tmp_path / 'a.ndjson'}, line 3"


def test_other_columns_order_marks_and_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbflabel,id,text\r\nx,1,one\r\n\r\ny,2,two\r\n")
    read = read_texts(path)
    assert (read.texts, read.labels) == (["one", "two"], ["x", "y"])
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one", "label": 0}\r\n{"text": "two", "label": 1}')
    assert read_texts(path).labels == ["0", "1"]


def test_texts_longer_than_the_csv_module_takes(tmp_path):
    import csv

    limit, long = csv.field_size_limit(), "wort " * 40_000
    assert len(long) > limit
    read = read_texts(write_csv(tmp_path / "a.csv", [(long, "de"), ("x", "en")]))
    assert read.texts[0] == long
    assert csv.field_size_limit() == limit


FAULTS = {
    "no column": ("a.csv", b"text,kind\na,b\n", "line 1: the header has not one column 'label', b"),
    "two columns": ("a.csv", b"text,label,text\na,b,c\n", "line 1: the header has not one .*but 2"),
    "too few": ("a.csv", b"text,label\na,b\nc\n", "line 3: has 1 fields, the header 2"),
    "too many": ("a.csv", b"text,label\na,b\nc,d,e\n", "line 3: has 3 fields, the header 2"),
    "empty text": ("a.csv", b"text,label\n ,b\nc,d", "line 2: its text is empty"),
    "empty label": ("a.csv", b'text,label\n"a\nb",x\nc,\n', "line 4: its label is empty"),
    "open quote": ("a.csv", b'text,label\na,b\n"c,d\n', r"line 3: not CSV \(unexpected end"),
    "bad quote": ("a.csv", b'text,label\n"a"b,c\n', r"line 2: not CSV \("),
    "latin-1": (
        "a.csv",
        b"text,label\na,b\ncaf\xe9,fr\n",
        "line 3: not UTF-8 .byte 0xe9 at",
    ),
    "utf-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
    "empty file": ("a.csv", b"", r"a\.csv: has no texts"),
    "head alone": ("a.csv", b"text,label\n", r"a\.csv: has no texts"),
    "bad JSON": ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": ', "line 2: not JSON"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "list": ("a.jsonl", b'["a", "b"]', "line 1: a JSON list, where an object"),
    "no key": ("a.jsonl", b'{"text": "a"}', "line 1: has no label"),
    "number": ("a.jsonl", b'{"text": 3, "label": "b"}', "line 1: its text is 3; give a string"),
    "true": ("a.jsonl", b'{"text": "a", "label": true}', "line 1: its label is true; give a"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800", "label": "b"}', "line 1: .*surrogate"),
    "one label": ("a.jsonl", b'{"text": "a", "label": "b"}', "has the label 'b' alone"),
    "suffix": ("a.txt", b"text,label\na,b", r"a\.txt: not a text file that is known; give \.csv"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named_with_file_and_line(tmp_path, name):
    file, content, text = FAULTS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=text) as refused:
        check_texts(tmp_path / file)
    assert str(tmp_path / file) in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no\.csv: no such file"):
        check_texts(tmp_path / "no.csv")


def test_all_faults_are_told_at_once_in_order_but_not_hundreds(tmp_path):
    rows = [("a", "x"), ("", "x")] * 30
    with pytest.raises(InputError) as refused:
        check_texts(write_csv(tmp_path / "a.csv", rows))
    lines = str(refused.value).split("\n")
    assert len(lines) == 21
    for i, line in enumerate(lines[:20]):
        assert line.endswith(f"line {2 * i + 3}: its text is empty")
    assert lines[-1] == "... and 10 more"


def many(count=60):
    return Texts(
        [f"text {i % 50}" for i in range(count)],
        ["abc"[i % 50 % 3] for i in range(count)],
        [f"line {i}" for i in range(count)],
    )


def test_the_split_is_of_texts_and_by_hash():
    train, val = split(many())
    assert not set(train.texts) & set(val.texts)
    assert sorted(train.texts + val.texts) == sorted(many().texts)
    pairs = set(zip(val.texts, val.labels, strict=True))
    assert sorted(label for _, label in pairs) == ["a", "b", "c"]  # a tenth of 16 or 17 of each
    assert pairs < set(zip(many().texts, many().labels, strict=True))
    turned = Texts(many().texts[::-1], many().labels[::-1], many().places[::-1])
    assert set(split(turned)[1].texts) == set(val.texts)


def test_check_texts(tmp_path):
    rows = zip(many().texts, many().labels, strict=True)
    found = check_texts(write_csv(tmp_path / "a.csv", rows))
    assert found.labels == ["a", "b", "c"]
    assert found.characters == "".join(sorted(set("".join(found.train.texts))))
    assert len(found.train) + len(found.val) == 60
    assert found.repeated == 0


def test_a_validation_file(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one", "x"), ("two", "y"), ("three", "y")])
    val = write_json(tmp_path / "b.jsonl", [("four", "x"), ("one", "x")])
    found = check_texts(path, val)
    assert found.train.texts == ["one", "two", "three"]
    assert found.val.texts == ["four", "one"]
    assert found.repeated == 1
    write_json(val, [("four", "x"), ("five", "z")])
    with pytest.raises(InputError, match=r"b\.jsonl, line 3: unknown label 'z'; .* 'x', 'y'"):
        check_texts(path, val)


def test_too_few_to_split(tmp_path):
    with pytest.raises(InputError, match="too few texts to keep some for validation; give --val"):
        check_texts(write_csv(tmp_path / "a.csv", [("one", "x"), ("two", "y")]))


def test_items_and_unknown_characters():
    data = TextData(["abc", "cz"], ["y", "x"], "abc", ["x", "y"])
    assert data[0][0].tolist() == [1, 2, 3]
    assert data[1][0].tolist() == [3, 0]
    assert [data[i][1] for i in range(2)] == [1, 0]
    tokens, mask, labels = collate([data[0], data[1]])
    assert tokens.tolist() == [[1, 2, 3], [3, 0, 0]]
    assert mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [1, 0]


def test_fingerprint_follows_texts_and_labels():
    def fingerprint(texts, labels):
        return TextData(texts, labels, "ab", ["x", "y"]).fingerprint()

    first = fingerprint(["a", "b"], ["x", "y"])
    assert fingerprint(["a", "b"], ["x", "y"]) == first
    assert fingerprint(["a", "ab"], ["x", "y"]) != first
    assert fingerprint(["a", "b"], ["y", "y"]) != first


def test_buckets_hold_every_text_once_and_similar_lengths():
    lengths = torch.randint(1, 200, (330,)).tolist()
    batches = list(Buckets(lengths, 8, seed=0))
    assert len(batches) == len(Buckets(lengths, 8, seed=0)) == 41
    indices = [i for batch in batches for i in batch]
    assert len(set(indices)) == len(indices) == 41 * 8
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 20  # of shuffled texts about 150
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)


def test_buckets_depend_on_seed_and_epoch_alone():
    lengths = torch.randint(1, 200, (100,)).tolist()

    def batches(seed, epoch):
        buckets = Buckets(lengths, 8, seed)
        buckets.sampler.set_epoch(epoch)
        return list(buckets)

    assert batches(0, 1) == batches(0, 1)
    assert batches(0, 1) != batches(0, 2)
    assert batches(0, 1) != batches(1, 1)


def test_a_batch_of_all_there_is():
    assert sorted(next(iter(Buckets([3, 1], 8, 0)))) == [0, 1]


def test_is_text(tmp_path):
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "file").write_text("")
    assert not is_text(tmp_path)
    assert not is_text(tmp_path / "a.csv")
    assert not is_text(tmp_path / "nowhere")
    assert is_text(tmp_path / "nowhere.csv")
    assert is_text(tmp_path / "file")


def test_check_text():
    check_text("--text", "a")
    with pytest.raises(InputError, match="--text: its text is empty"):
        check_text("--text", "\n")
