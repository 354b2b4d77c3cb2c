"""Runs every benchmark, writes docs/benchmarks.md, and the short table of both READMEs from it.

python benchmarks/run.py            # half an hour on two cores
python benchmarks/run.py conv       # this section anew, the others from the file that is there
python benchmarks/run.py --summary  # only the short table, from the file that is there
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
SCRIPTS = (
    *("conv_per_sample", "conv_mixture", "conv_per_position", "deform_conv", "conv"),
    *("linear", "models"),
)
BEGIN, END = "<!-- benchmarks/run.py -->", "<!-- end -->"
# What the READMEs show: section, start of the case's title, what people copy, or run instead.
SHOWN = (
    ("conv_per_sample", "2-D, batch 32, 256 channels", "copied: batch in groups"),
    ("conv_per_sample", "2-D, batch 32, 512 channels", "copied: batch in groups"),
    ("conv_mixture", "2-D, batch 32, 512 channels, size 7", "copied: batch in groups"),
    ("conv_per_position", "2-D, batch 8, 64 channels", "copied: unfold"),
    ("deform_conv", "2-D, batch 4, 64 channels", "torchvision"),
    ("conv", "2-D, batch 1, 16 channels depthwise, size 224, kernel 31", "F.conv2d"),
)
HEAD = (
    "| primitive | case | against | forward | with backward | peak memory |\n"
    "|---|---|---|---:|---:|---:|\n"
)


def main() -> None:
    if "--summary" not in sys.argv:
        anew = sys.argv[1:] or SCRIPTS
        sections = [section(name) if name in anew else kept(name) for name in SCRIPTS]
        PAGE.parent.mkdir(exist_ok=True)
        new = PAGE.with_suffix(".new")
        new.write_text("# Benchmarks\n\n" + "\n".join(filter(None, sections)), encoding="utf-8")
        new.replace(PAGE)
    table = HEAD + "".join(line(*shown) for shown in SHOWN)
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        path.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")
    print(table)


def section(name: str) -> str:
    """What a script prints."""
    command = [sys.executable, str(Path(__file__).parent / f"{name}.py")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kept(name: str) -> str:
    """The section of a script as it stands on the page; nothing where it is not there yet."""
    _, *found = PAGE.read_text(encoding="utf-8").split(f"## {name}\n")
    text = found[0].split("\n## ")[0] if found else ""
    return f"## {name}\n{text.rstrip()}\n" if found else ""


def line(name: str, case: str, rival: str) -> str:
    """One line of the short table: the rival's time and memory over ours."""
    title, rows = measured(name, case)
    head = f"| `{name}` | {title} | {rival} |"
    if rival not in rows:
        return f"{head} not installed | | |\n"
    ratios = [f"{rows[rival][i] / rows['dynaconv'][i]:.1f}x" for i in (0, 2, 5)]
    return f"{head} {' | '.join(ratios)} |\n"


def measured(name: str, case: str) -> tuple[str, dict[str, list[float]]]:
    """A table of the page: its title, and the numbers of each row by its name."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {name}\n")[1].split("\n## ")[0]
    tables = re.findall(r"\*\*(.+?)\*\*\n\n(.+?)(?:\n\n|\Z)", section, re.DOTALL)
    title, body = next((t, b) for t, b in tables if t.startswith(case))
    rows = [re.split(r"\s*\|\s*", row.strip("| ")) for row in body.strip().splitlines()[2:]]
    return title, {first: [float(cell) for cell in cells] for first, *cells in rows}


if __name__ == "__main__":
    main()
