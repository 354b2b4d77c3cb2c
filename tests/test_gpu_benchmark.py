"""benchmarks/gpu.py: its page is that of the results, and its cases compute what they say."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = {
    "conv_per_position": {1: [(1, 4, 9, 3, 2)], 2: [(1, 4, 5, 3, 2)], 3: [(1, 4, 4, 3, 2)]},
    "conv_per_sample": {1: [(1, 4, 9, 3)], 2: [(1, 4, 5, 3)]},
    "conv_mixture": {1: [(1, 4, 9, 3)], 2: [(1, 4, 5, 3)]},
    "deform_conv": {1: [(1, 4, 9)], 2: [(1, 4, 5)], 3: [(1, 4, (3, 4, 5))]},
}


@pytest.fixture
def gpu(monkeypatch):
    """The script, on small cases, with a clock that needs no GPU."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("gpu")
    for name, cases in SMALL.items():
        monkeypatch.setattr(getattr(script, name), "CASES", cases)
    monkeypatch.setattr(script, "EIGHT", 2)
    monkeypatch.setattr(script, "ROUNDS", 2)
    monkeypatch.setattr(script, "milliseconds", lambda call, device: (call(), 2.0)[1])
    monkeypatch.setattr(script, "memory", lambda call, device: (call(), 3.0)[1])
    monkeypatch.setattr(script, "rates", lambda dtype, device: (1e9, 1e12))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return script


def test_the_page_is_that_of_the_results(gpu):
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8") == gpu.page()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_runs(gpu, dtype):
    tables = [table for primitive in gpu.PRIMITIVES for table in primitive(dtype, "cpu")]
    assert len(tables) == 10
    for table in tables:
        names = [row.name for row in table.rows]
        assert names[:3] == ["dynaconv", "floor", "dynaconv, eager"]
        assert all(row.forward > 0 and row.both >= row.forward for row in table.rows)


def test_the_kernels_of_others(gpu, monkeypatch):
    plain = gpu.conv_per_position.unfolded
    monkeypatch.setattr(gpu.PEERS, "involution", plain, raising=False)
    monkeypatch.setattr(gpu.PEERS, "dynamicconv", plain, raising=False)
    for dtype, expected in ((torch.float32, 2), (torch.bfloat16, 0)):
        rows = [row for table in gpu.per_position(dtype, "cpu") for row in table.rows]
        assert sum("CUDA kernel" in row.name for row in rows) == expected


def test_what_no_graph_records_is_called(gpu, monkeypatch):
    right = lambda x, o, w, padding, mask: gpu.functional.deform_conv(
        x, o, w, padding=padding, modulation=mask
    )
    monkeypatch.setattr(gpu.deform_conv, "deform_conv2d", right)
    tables = list(gpu.deformable(torch.float32, "cpu"))
    rows = [row for table in tables for row in table.rows if row.name == "torchvision"]
    assert len(rows) == 1
    assert rows[0].called > 0
    called = []
    contender = gpu.Contender("torchvision", lambda: called.append(1), ())
    gpu.recorded(contender, contender.forward, "cuda")()  # without a graph, which needs a GPU
    assert called == [1]


def test_a_time_that_is_not_there(gpu):
    table = gpu.Table("a case", "float32", rows=[gpu.Row("ours", 2.0, 4.0, 5.0, 1.0)])
    table.rows.append(gpu.Row("torchvision", None, None, 2.0, 3.0))
    assert any("| torchvision |  |  |  |  | 2.000 |" in line for line in gpu.text(table))


def test_a_wrong_contender_stops_it(gpu, monkeypatch):
    right = gpu.conv_per_position.unfolded
    monkeypatch.setattr(gpu.conv_per_position, "unfolded", lambda *a: 1.1 * right(*a))
    with pytest.raises(AssertionError, match="unfold is off by"):
        list(gpu.per_position(torch.float32, "cpu"))


def test_results_become_a_page(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    rows = [{"name": "dynaconv", "forward": 2.0, "both": 4.0, "called": 5.0, "memory": 1.0}]
    rows.append({"name": "floor", "forward": 1.0, "both": 1.0, "called": 1.0, "memory": 0.5})
    content = {"device": "Some GPU", "torch": "2.11", "triton": "3.6"}
    case = {"title": "a case", "dtype": "bfloat16", "commit": "abc", "note": "Why.", "rows": rows}
    content["tables"] = [case]
    gpu.write(tmp_path / "Some-GPU.json", json.dumps(content))
    page = gpu.page()
    assert "## Some GPU" in page
    assert "| floor | 1.000 | 0.50 | 1.000 | 0.25 | 1.000 | 0.5 |" in page
    assert "Commit abc. Why." in page
    assert "conv_mixture in bfloat16, conv_mixture in float32, deform_conv in bfloat16" in page
    assert "No run on a GPU" not in page


def test_tables_of_earlier_runs_remain(gpu, monkeypatch, tmp_path):
    """Until the same is measured again, or with another torch."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    for title, commit in (("one", "a"), ("two", "a"), ("one", "b")):
        gpu.keep(gpu.Table(title, "float32", commit=commit), "Some GPU")
    path = tmp_path / "Some-GPU.json"
    known = json.loads(path.read_text())
    assert [(t["title"], t["commit"]) for t in known["tables"]] == [("one", "b"), ("two", "a")]
    gpu.write(path, json.dumps(known | {"torch": "1.0"}))
    gpu.keep(gpu.Table("two", "float32", commit="c"), "Some GPU")
    assert [t["commit"] for t in json.loads(path.read_text())["tables"]] == ["c"]


def test_a_part_is_measured(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    kind = torch.get_device_module("cpu")
    monkeypatch.setattr(kind, "get_device_name", lambda: "Some GPU", raising=False)
    gpu.run("cpu", [torch.float32], ["mixture"])
    known = json.loads((tmp_path / "Some-GPU.json").read_text())
    assert {t["title"].split(",")[0] for t in known["tables"]} == {"conv_mixture"}
