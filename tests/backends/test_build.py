"""Building the C++ library, and living without it."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import dynaconv
from dynaconv import dispatch
from dynaconv.backends import native
from dynaconv.backends.native import build, library
from dynaconv.functional import conv_per_sample

ROOT = Path(__file__).parents[2]
# Notes its arguments, and writes what it is told to make; what is in $FAIL, it cuts off half way.
COMPILER = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in *"${FAIL:-nothing}"*) broken=1;; esac
while [ "$1" != -o ]; do shift; done
if [ -n "$broken" ]; then
  echo half > "$2"; echo "a.cpp:1:2: fatal error: it is broken" >&2; exit 1
fi
echo whole > "$2"
"""


class Workshop:
    """Sources, a stand-in for the compiler, and a place to build in."""

    def __init__(self, root: Path) -> None:
        self.root, self.target, self.objects = root, root / "target", root / "objects"
        self.library = self.target / build.LIBRARY
        self.csrc = root / "csrc"
        (self.csrc / "kernels").mkdir(parents=True)
        for name in ("isa.h", "isa.cpp", "library.cpp", "kernels/one.cpp"):
            (self.csrc / name).write_text("")
            os.utime(self.csrc / name, (1, 1))
        self.compiler = root / "compiler"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)

    def build(self) -> Path:
        return build.build(self.target, self.objects)

    def calls(self) -> list[str]:
        """What was compiled or linked since the last question, by the name of what was made."""
        notes = self.root / "calls"
        made = [line.split(" -o ")[1].split()[0] for line in notes.read_text().splitlines()]
        notes.unlink()
        return sorted("library" if build.LIBRARY in m else Path(m).name for m in made)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    made = Workshop(tmp_path)
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.setenv("FAIL", "")
    monkeypatch.delenv("DYNACONV_FLAGS", raising=False)
    monkeypatch.setattr(build, "sources", lambda: made.csrc)
    monkeypatch.setattr(build, "INSTRUCTION_SETS", {})
    return made


@pytest.mark.parametrize("named", [True, False])
def test_a_missing_compiler_is_named(named, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent") if named else monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(GCC 11 or Clang 14"):
        build.build()


def test_a_missing_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNACONV_TORCH", str(tmp_path))
    with pytest.raises(build.BuildError, match=f"torch .*installed first; not in {tmp_path}"):
        build.build()
    monkeypatch.delenv("DYNACONV_TORCH")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build.BuildError, match=r"torch .*installed first"):
        build.build()
    (tmp_path / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "torch/include/torch/csrc/stable/library.h").touch()
    assert build.torch_root() == tmp_path / "torch"  # as pip's isolated build finds it


def test_missing_sources_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path / "a/b/c/d")
    with pytest.raises(build.BuildError, match=r"C\+\+ sources are not here"):
        build.build()


def test_the_sources_of_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/library.cpp").touch()
    assert build.sources() == tmp_path / "csrc"


def test_only_what_has_changed_is_compiled(workshop, monkeypatch):
    everything = ["isa.o", "library", "library.o", "one.portable.o"]
    assert workshop.build() == workshop.library
    assert workshop.library.read_text() == "whole\n"
    assert workshop.calls() == everything
    workshop.build()
    assert workshop.calls() == ["library"]
    os.utime(workshop.csrc / "kernels/one.cpp", (2**33, 2**33))
    workshop.build()
    assert workshop.calls() == ["library", "one.portable.o"]
    monkeypatch.setenv("DYNACONV_FLAGS", "-g")
    workshop.build()
    assert workshop.calls() == everything
    os.utime(workshop.csrc / "isa.h", (2**33, 2**33))
    workshop.build()
    assert workshop.calls() == everything


def test_a_broken_compiler_says_what_it_said(workshop, monkeypatch):
    monkeypatch.setenv("FAIL", "-c ")
    with pytest.raises(build.BuildError) as caught:
        workshop.build()
    assert str(caught.value).splitlines()[0].endswith("a.cpp:1:2: fatal error: it is broken")
    assert not list(workshop.target.iterdir())


@pytest.mark.parametrize("built_before", [True, False])
def test_the_library_is_whole_or_not_at_all(built_before, workshop, monkeypatch):
    if built_before:
        workshop.build()
    monkeypatch.setenv("FAIL", "-shared")
    with pytest.raises(build.BuildError, match="it is broken"):
        workshop.build()
    left = {f.name: f.read_text() for f in workshop.target.iterdir()}
    assert left == ({build.LIBRARY: "whole\n"} if built_before else {})


def test_what_was_cut_off_is_compiled_again(workshop, monkeypatch):
    workshop.build()
    (workshop.csrc / "library.cpp").touch()
    monkeypatch.setenv("FAIL", "library.cpp")
    os.utime(workshop.objects / "library.o", (2, 2))
    with pytest.raises(build.BuildError):
        workshop.build()
    assert (workshop.objects / "library.o").read_text() == "half\n"
    workshop.calls()
    monkeypatch.setenv("FAIL", "")
    workshop.build()
    assert workshop.calls() == ["library", "library.o"]


def test_a_library_that_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "HERE", tmp_path)
    monkeypatch.setattr(library, "outdated", lambda: False)
    assert "is not built; run `python -m dynaconv.backends.native`" in library.load()
    (tmp_path / build.LIBRARY).write_text("not a library")
    assert "does not load" in library.load()
    assert "python -m dynaconv.backends.native" in library.load()
    monkeypatch.setattr(library, "outdated", lambda: True)
    assert "older than its sources; run" in library.load()


def test_outdated(tmp_path, monkeypatch):
    made = tmp_path / "made.so"
    made.touch()
    monkeypatch.setattr(build, "HERE", tmp_path / "a/b/c/d")
    assert not build.outdated(made)  # an installed package: no sources to compare with
    (tmp_path / "csrc/kernels").mkdir(parents=True)
    for name in ("isa.h", "kernels/one.cpp"):
        source = tmp_path / "csrc" / name
        source.touch()
        os.utime(source, (1, 1))
        assert not build.outdated(made)
        os.utime(source, (2**33, 2**33))
        assert build.outdated(made)
        os.utime(source, (1, 1))


@pytest.fixture
def without(monkeypatch):
    """The native backend without its library."""
    others = [b for b in dispatch.BACKENDS if b.name != "native"]
    bare = dispatch.Backend("native", native.supports, {"conv_per_sample": conv_per_sample})
    monkeypatch.setattr(dispatch, "BACKENDS", [bare, *others])
    monkeypatch.setattr(library, "MISSING", "the C++ library is not built; run it")
    monkeypatch.setattr(library, "_said", [])
    return torch.randn(2, 4, 9), torch.randn(2, 6, 4, 3)


def test_without_the_library_eager_serves(without):
    text = dynaconv.explain(conv_per_sample, *without)
    assert "native: the C++ library is not built; run it" in text
    assert "eager: chosen" in text
    with dynaconv.backend("eager"):
        assert torch.equal(conv_per_sample(*without), conv_per_sample(*without))


def test_native_by_name_explains_itself(without):
    with (
        dynaconv.backend("native"),
        pytest.raises(RuntimeError, match=r"native: the C\+\+ library is not built; run it"),
    ):
        conv_per_sample(*without)


def test_it_is_said_once(without, caplog):
    with caplog.at_level(logging.WARNING, "dynaconv"):
        for _ in range(3):
            conv_per_sample(*without)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the C++ library is not built; run it. Until then, the slower eager path."]


def wheel(place: Path, compiler: str, wish: str | None) -> subprocess.CompletedProcess:
    """`setup.py bdist_wheel` on a copy of what it needs."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("src", "csrc"):
        kept_out = shutil.ignore_patterns("*.so", "objects", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, place / name, ignore=kept_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DYNACONV_")}
    environment |= {"CXX": compiler, "FAIL": "", **({"DYNACONV_BUILD": wish} if wish else {})}
    command = [sys.executable, "setup.py", "bdist_wheel"]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("compiles", "wish", "has_library"),
    [(True, None, True), (True, "1", True), (True, "0", False), (False, None, False)],
)
def test_the_wheel_says_what_it_holds(compiles, wish, has_library, workshop):
    place = workshop.root / "copy"
    place.mkdir()
    result = wheel(place, str(workshop.compiler) if compiles else "/nonexistent", wish)
    assert result.returncode == 0, result.stderr
    (made,) = (place / "dist").iterdir()
    assert made.name.endswith("-py3-none-any.whl") != has_library
    assert "-py3-none-" in made.name
    inside = [name.removeprefix("dynaconv/backends/native/") for name in ZipFile(made).namelist()]
    assert (build.LIBRARY in inside) == has_library
    sources = {f"csrc/{f.relative_to(ROOT / 'csrc')}" for f in (ROOT / "csrc").rglob("*.*")}
    assert sources <= set(inside)
    assert not [name for name in inside if name.endswith((".o", ".flags"))]
    told = "goes without its C++ library: there is no C++ compiler" in result.stdout
    assert told == (not compiles)


def test_a_wheel_that_must_have_the_library(workshop):
    place = workshop.root / "copy"
    place.mkdir()
    result = wheel(place, "/nonexistent", "1")
    assert result.returncode != 0
    assert "cannot build the C++ library: there is no C++ compiler" in result.stderr
    assert not (place / "dist").exists()
