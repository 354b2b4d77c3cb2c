"""Compiles csrc/ into one library beside this file: `python -m dynaconv.backends.native`.

Needs a C++ compiler and an installed torch, whose headers and libraries are all that is used;
nothing is downloaded. setup.py runs this file by its path, where torch cannot be imported: no
import of dynaconv or torch here.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "libdynaconv_native.so"
# The oldest release that the library runs with: 2.11, as the headers write it.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", TARGET]
# By instruction set; the kernels are compiled for each and chosen at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "portable": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
}


class CannotBuild(Exception):
    """What is missing, in words for the user."""


def sources() -> Path:
    """csrc/ of the repository, or the copy that an installed package carries."""
    for place in (HERE / "csrc", HERE.parents[3] / "csrc"):
        if (place / "library.cpp").exists():
            return place
    raise CannotBuild("the C++ sources are not here")


def torch_root() -> Path:
    """Where torch is installed: $DYNACONV_TORCH, or where this environment's packages are."""
    named = os.environ.get("DYNACONV_TORCH")
    spec = None if named else find_spec("torch")
    places = [named] if named else list(spec.submodule_search_locations or []) if spec else []
    # An isolated build does not see the environment's packages, but knows where they are.
    places += [str(Path(sysconfig.get_path("purelib")) / "torch")]
    for place in map(Path, places):
        if (place / "include/torch/csrc/stable/library.h").exists():
            return place
    raise CannotBuild("torch (2.11 or later) has to be installed first")


def compiler() -> list[str]:
    """$CXX, or the first of the usual ones."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name.split()
    raise CannotBuild("there is no C++ compiler (GCC 11 or Clang 14, or later)")


def build(target: Path = HERE, flags: tuple[str, ...] = ()) -> Path:
    """Compiles what has changed and links the library into the folder `target`.

    CannotBuild: something that it needs is missing, or the compiler fails.
    """
    csrc, torch, cxx = sources(), torch_root(), compiler()
    objects = target / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    flags = (*flags, *os.environ.get("DYNACONV_FLAGS", "").split())
    jobs = [
        (source, objects / f"{source.stem}.o", [*COMMON, *include, *flags])
        for source in sorted(csrc.glob("*.cpp"))
    ]
    sets = INSTRUCTION_SETS.get(platform.machine(), {"portable": []})
    for name, special in sets.items():
        jobs += [
            (
                source,
                objects / f"{source.stem}.{name}.o",
                [*COMMON, f"-I{csrc}", f"-DDYNACONV_ISA={name}", *special, *flags],
            )
            for source in sorted((csrc / "kernels").glob("*.cpp"))
        ]
    newest = max(h.stat().st_mtime for h in csrc.rglob("*.h"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _compile(cxx, newest, *job), jobs))
    library = target / LIBRARY
    new = library.with_suffix(".new")
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", *flags]
    _run([*cxx, *[str(o) for _, o, _ in jobs], *link, "-o", str(new)])
    new.replace(library)
    return library


def _compile(cxx: list[str], newest: float, source: Path, target: Path, flags: list[str]) -> None:
    made_by = target.with_suffix(".flags")
    command = [*cxx, "-c", str(source), "-o", str(target), *flags]
    same = made_by.exists() and made_by.read_text() == " ".join(command)
    if same and target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
        return
    _run(command)
    made_by.write_text(" ".join(command))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CannotBuild(f"{' '.join(command)}\n{result.stderr[-4000:]}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
