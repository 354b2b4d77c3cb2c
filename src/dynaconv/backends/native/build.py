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
COMMON = ["-std=c++20", "-O3", "-Wno-psabi", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", TARGET]
# By instruction set; the kernels are compiled for each and chosen at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "portable": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
}


class BuildError(Exception):
    """What is missing, in words for the user."""


def sources() -> Path:
    """csrc/ of the repository, or the copy that an installed package carries."""
    for place in (HERE / "csrc", HERE.parents[3] / "csrc"):
        if (place / "library.cpp").exists():
            return place
    raise BuildError("the C++ sources are not here")


def outdated(library: Path = HERE / LIBRARY) -> bool:
    """Whether a checkout's C++ sources have changed since the library was built."""
    csrc = HERE.parents[3] / "csrc"
    newest = max((f.stat().st_mtime for f in csrc.rglob("*.[ch]*")), default=0.0)
    return newest > library.stat().st_mtime


def torch_root() -> Path:
    """Where torch is installed: $DYNACONV_TORCH, or where this environment's packages are."""
    named = os.environ.get("DYNACONV_TORCH")
    spec = None if named else find_spec("torch")
    places = [named] if named else list(spec.submodule_search_locations or []) if spec else []
    # pip's isolated build does not see the environment's packages, but knows where they are.
    places = places or [str(Path(sysconfig.get_path("purelib")) / "torch")]
    for place in map(Path, places):
        if (place / "include/torch/csrc/stable/library.h").exists():
            return place
    raise BuildError(f"torch (2.11 or later) has to be installed first; not in {places[0]}")


def compiler() -> list[str]:
    """$CXX, or the first of the usual ones."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name.split()
    raise BuildError("there is no C++ compiler (GCC 11 or Clang 14, or later)")


def build(target: Path = HERE, objects: Path = HERE / "objects") -> Path:
    """Compiles what has changed into `objects` and links the library into the folder `target`.

    BuildError: something that it needs is missing, or the compiler fails.
    """
    csrc, torch, cxx = sources(), torch_root(), compiler()
    for folder in (target, objects):
        folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    flags = os.environ.get("DYNACONV_FLAGS", "").split()
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
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", *flags]
    new = target / f"{LIBRARY}.{os.getpid()}"  # under its own name only once it is whole
    try:
        _run([*cxx, *[str(o) for _, o, _ in jobs], *link, "-o", str(new)])
        new.replace(target / LIBRARY)
    finally:
        new.unlink(missing_ok=True)
    return target / LIBRARY


def _compile(cxx: list[str], newest: float, source: Path, target: Path, flags: list[str]) -> None:
    made_by = target.with_suffix(".flags")
    command = [*cxx, "-c", str(source), "-o", str(target), *flags]
    same = made_by.exists() and made_by.read_text() == " ".join(command)
    if same and target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
        return
    made_by.unlink(missing_ok=True)  # what is cut off half way is not taken for whole
    _run(command)
    made_by.write_text(" ".join(command))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip()[-4000:]
        error = next((line for line in said.splitlines() if "error" in line), said[:200])
        raise BuildError(f"the C++ compiler fails: {error}\n{' '.join(command)}\n{said}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
