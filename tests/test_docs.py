"""What the READMEs say holds: their examples run, their tables name what there is."""

import re
from pathlib import Path

import pytest
import torch

import dynaconv

ROOT = Path(__file__).parent.parent
README, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
both = pytest.mark.parametrize("path", [README, CHINESE], ids=lambda p: p.name)


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path, language):
    found = FENCED.findall(path.read_text(encoding="utf-8"))
    return [block for kind, block in found if kind == language]


def test_examples_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    first, *others = blocks(README, "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    exec(first, names)
    assert "1 convolutions became odconv" in capsys.readouterr().out
    x, model, dynamic = (names[key] for key in ("x", "model", "dynamic"))
    assert (dynamic(x) - model(x)).abs().max() < 1e-5
    for block in others:
        exec(block, names)
    assert "conv_per_sample" in capsys.readouterr().out


def test_both_languages_show_the_same_code():
    assert blocks(README, "python") == blocks(CHINESE, "python")
    commands = [
        [line.split("#")[0].strip() for block in blocks(path, "") for line in block.splitlines()]
        for path in (README, CHINESE)
    ]
    assert commands[0] == commands[1]


@both
def test_the_table_lists_the_families(path):
    text = path.read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)2d` \|", text, re.MULTILINE))
    assert listed == {
        name: family.classes[2].__name__.removesuffix("2d")
        for name, family in dynaconv.families().items()
    }


@both
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", FENCED.sub("", path.read_text(encoding="utf-8")))
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).exists(), f"{path.name} links to {link}"


@both
def test_the_short_table_is_that_of_the_benchmarks(path):
    """Numbers come from docs/benchmarks.md by benchmarks/run.py, not from a keyboard."""
    text = path.read_text(encoding="utf-8")
    table = text.split("<!-- benchmarks/run.py -->\n")[1].split("<!-- end -->")[0]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    lines = table.splitlines()[2:]
    assert len(lines) >= 4
    for line in lines:
        name, case, rival, *ratios = [cell.strip() for cell in line.strip("| ").split("|")]
        section = page.split(f"## {name.strip('`')}\n")[1].split(f"**{case}**")[1].split("**")[0]
        rows = {
            row.split("|")[1].strip(): [float(cell) for cell in row.split("|")[2:-1]]
            for row in section.strip().splitlines()[2:]
            if row.startswith("|")
        }
        for ratio, i in zip(ratios, (0, 2, 5), strict=True):
            assert ratio == f"{rows[rival][i] / rows['dynaconv'][i]:.1f}x"


def test_exports_of_the_deployment_page_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").split("## Freeze")[0]
    names = {}
    for kind, block in FENCED.findall(page):
        assert kind == "python"
        exec(block, names)
    saved = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(3, 3, 20, 24)
    torch.testing.assert_close(saved(x), names["model"](x))
    assert "onnxruntime differs by" in capsys.readouterr().out
