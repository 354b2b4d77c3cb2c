import base64
import re
import statistics
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

from dynaconv.data.phrases import LANGUAGES, LENGTH_BUCKETS
from dynaconv.training.files import load_model
from dynaconv.training.text_demo import (
    TOGETHER,
    TextBudget,
    TextResult,
    agreement,
    demo_config,
    measure,
    promise,
    rows,
    run,
    text_data,
)
from dynaconv.training.text_report import write_text_report
from tests.training.test_text_model import ONE_D as LAYERS

TINY = TextBudget(texts=4, val=3, epochs=1, seeds=2, channels=8, blocks=2)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    with Progress(disable=True) as progress:
        results, config, val = run(LAYERS, TINY, 5, out, progress)
    return results, config, val, out


def test_each_layer_is_trained_with_each_seed(outcome):
    results, config, val, out = outcome
    assert [result.layer for result in results] == ["static", *LAYERS]
    assert len(val) == 3 * len(LANGUAGES)
    assert config.labels == list(LANGUAGES)
    for result in results:
        assert len(result.models) == len(result.accuracy) == 2
        assert all(len(values) == 2 for values in result.by_length.values())
        for seed in (5, 6):
            model, loaded = load_model(out / "models" / f"text-{result.layer}-{seed}.pt")
            assert (loaded.layer, loaded.seed) == (result.layer, seed)
            state = result.models[seed - 5].state_dict()
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_every_text_says_the_same_alone_and_padded(outcome):
    for result in outcome[0]:
        assert result.agree == 1
        assert 0 <= result.difference < 1e-4


def test_a_model_that_sees_its_padding_is_found_out(outcome):
    _, config, val, _ = outcome

    class Sees(torch.nn.Module):
        def forward(self, tokens, mask=None):
            long = torch.full((len(tokens),), int(tokens.shape[1] > 100))
            return torch.nn.functional.one_hot(long, len(LANGUAGES)).float()

    texts = val.texts[: 2 * TOGETHER]  # each batch has a text of more than 100 characters
    share, difference = agreement(Sees(), config, texts)
    assert share == pytest.approx(sum(len(text) > 100 for text in texts) / len(texts))
    assert 0 < share < 0.5
    assert difference == 1


def test_a_rerun_gives_the_same_numbers(outcome, tmp_path):
    first = {result.layer: result for result in outcome[0]}
    with Progress(disable=True) as progress:
        again, _, _ = run(["dyconv"], replace(TINY, seeds=1), 5, tmp_path, progress)
    for result in again:
        assert result.accuracy == first[result.layer].accuracy[:1]
        assert result.by_length == {k: v[:1] for k, v in first[result.layer].by_length.items()}


def test_the_tables_hold_what_was_measured(outcome):
    results, _, val, _ = outcome
    head, *lines = rows(results)
    assert head == ["layer", "accuracy %", *LENGTH_BUCKETS, "params", "ms/text"]
    for line, result in zip(lines, results, strict=True):
        assert line[0] == result.layer
        mean, spread = statistics.mean(result.accuracy), statistics.stdev(result.accuracy)
        assert line[1] == f"{100 * mean:.1f}±{100 * spread:.1f}"
        count = sum(p.numel() for p in result.models[0].parameters())
        assert int(line[5].replace(",", "")) == count
        assert float(line[6]) > 0
    told = promise([TextResult("a", agree=0.5, difference=0.25)], 10)
    assert told[1] == ["a", "5 of 10", "2.5e-01"]
    assert len(promise(results, len(val))) == len(results) + 1


def test_measure_against_counting(outcome):
    _, config, val, _ = outcome
    data = text_data(config, val)

    class Says(torch.nn.Module):
        """The first language, whatever the text."""

        def forward(self, tokens, mask=None):
            return torch.eye(len(LANGUAGES))[:1].expand(len(tokens), -1)

    result = TextResult("first")
    measure(result, Says(), config, val, data)
    assert result.accuracy == [pytest.approx(1 / len(LANGUAGES))]
    for name, (low, high) in LENGTH_BUCKETS.items():
        inside = [
            label
            for text, label in zip(val.texts, val.labels, strict=True)
            if low <= len(text) < high
        ]
        assert result.by_length[name] == [pytest.approx(inside.count("es") / len(inside))]


def test_the_page_is_self_contained(outcome, tmp_path):
    results, config, val, _ = outcome
    chosen = [r for r in results if r.layer in ("static", "dynamic_lightconv", "dyconv")]
    write_text_report(tmp_path / "text.html", chosen, config, val, "about <this> run")
    page = (tmp_path / "text.html").read_text(encoding="utf-8")
    sources = re.findall(r"src='([^']*)'", page)
    assert len(sources) == 2
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    markup = re.sub(r"src='[^']*'", "", page)
    assert not re.search(r"https?:|//|\bhref|\bsrc|<link|<script|@import|url\(", markup)
    assert "about &lt;this&gt; run" in page
    cells = re.findall(r"<td>([^<]*)</td>", page)
    tables = [*rows(chosen)[1:], *promise(chosen, len(val))[1:]]
    assert cells == [cell for line in tables for cell in line]
    assert page.count("<tr class=best>") == 1
    assert len(page) < 500_000


def test_settings_are_those_of_the_budget(outcome):
    _, config, _, _ = outcome
    assert (config.channels, config.blocks, config.epochs) == (8, 2, 1)
    assert config.layer == "static"
    other = demo_config("dyconv", TINY, 6, outcome[2])
    assert (other.layer, other.seed) == ("dyconv", 6)
