import base64
import re
import statistics
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

from dynaconv.data.digits import SIZE_BUCKETS
from dynaconv.registry import family, names
from dynaconv.training.demo import Budget, Result, demo_config, measure, percent, rows, run
from dynaconv.training.files import load_model
from dynaconv.training.report import over_scenes, varied_scenes, verdict, write_report

TINY = Budget(scenes=8, val=5, epochs=1, seeds=2, widths=(4, 8))
LAYERS = [name for name in names() if 2 in family(name).classes]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    with Progress(disable=True) as progress:
        results, val = run(LAYERS, TINY, 5, out, progress)
    return results, val, out


def test_each_layer_is_trained_with_each_seed(outcome):
    results, _, out = outcome
    assert [result.layer for result in results] == ["static", *LAYERS]
    for result in results:
        assert len(result.models) == len(result.miou) == 2
        assert all(len(values) == 2 for values in result.by_size.values())
        assert result.miou[0] != result.miou[1]
        for seed in (5, 6):
            model, config = load_model(out / "models" / f"{result.layer}-{seed}.pt")
            assert (config.layer, config.seed) == (result.layer, seed)
            state = result.models[seed - 5].state_dict()
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_rerun_gives_the_same_numbers(outcome, tmp_path):
    results, _, _ = outcome
    with Progress(disable=True) as progress:
        again, _ = run(["dyconv"], replace(TINY, seeds=1), 5, tmp_path, progress)
    first = {result.layer: result for result in results}
    for result in again:
        assert result.miou == first[result.layer].miou[:1]
        assert result.by_size == {k: v[:1] for k, v in first[result.layer].by_size.items()}


def test_the_table_holds_what_was_measured(outcome):
    results, _, _ = outcome
    head, *lines = rows(results)
    assert head[:5] == ["layer", "mIoU %", *SIZE_BUCKETS]
    for line, result in zip(lines, results, strict=True):
        assert line[0] == result.layer
        mean, spread = statistics.mean(result.miou), statistics.stdev(result.miou)
        assert line[1] == f"{100 * mean:.1f}±{100 * spread:.1f}"
        count = sum(p.numel() for p in result.models[0].parameters())
        assert int(line[5].replace(",", "")) == count
        assert float(line[6]) > 0
        assert float(line[7]) > 0


def test_measure_against_a_perfect_and_a_blind_model(outcome):
    _, val, _ = outcome
    config = demo_config("static", TINY, 0)

    class Says(torch.nn.Module):
        def __init__(self, masks):
            super().__init__()
            self.masks = masks

        def forward(self, x):
            return torch.nn.functional.one_hot(self.masks, 11).permute(0, 3, 1, 2).float()

    perfect, blind = Result("perfect"), Result("blind")
    measure(perfect, Says(val.masks), config, val)
    measure(blind, Says(torch.full_like(val.masks, 10)), config, val)
    assert perfect.miou == [1.0]
    assert all(value in ([1.0], [0.0]) for value in perfect.by_size.values())  # 0: no such digit
    assert blind.miou[0] < 0.2


def test_percent():
    assert percent([0.5]) == "50.0"
    assert percent([0.5, 0.6]) == "55.0±7.1"


def test_the_verdict_is_the_measurement_whoever_won():
    def result(layer, *miou):
        return Result(layer, miou=list(miou))

    assert "static convolutions won: mIoU 60.0" in verdict(
        [result("static", 0.6), result("a", 0.5)]
    )
    assert "a did best: mIoU 70.0, static convolutions 60.0" in verdict(
        [result("static", 0.6), result("a", 0.7), result("b", 0.1)]
    )


def test_the_report_is_self_contained(outcome, tmp_path):
    results, val, _ = outcome
    write_report(tmp_path / "report.html", results, val, "about <this> run")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"src='([^']*)'", page)
    assert len(sources) == 1 + 3 * len(LAYERS)
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    markup = re.sub(r"src='[^']*'", "", page)
    assert not re.search(r"https?:|//|\bhref|\bsrc|<link|<script|@import|url\(", markup)
    assert "about &lt;this&gt; run" in page
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert cells == [cell for line in rows(results)[1:] for cell in line]
    assert page.count("<tr class=best>") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_scenes_go_from_small_to_large(outcome):
    _, val, _ = outcome
    largest = [float(val.sizes[i].max()) for i in varied_scenes(val, 3)]
    assert largest == sorted(largest)
    assert largest[0] == val.sizes.flatten(1).amax(1).min()
    assert varied_scenes(val, 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_point_a_scene(outcome, layer):
    results, val, _ = outcome
    result = next(result for result in results if result.layer == layer)
    (axes,) = over_scenes(result, val).axes
    assert len(axes.collections[0].get_offsets()) == len(val)
    assert axes.get_ylabel()
