"""Builds the C++ library with the package where a C++ compiler and an installed torch are at hand.

DYNACONV_BUILD=1 in the environment fails where it cannot, =0 never builds; else the package goes
without, and `python -m dynaconv.backends.native` builds later. Nothing is downloaded for it.
"""

import os
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "src/dynaconv/backends/native"
spec = spec_from_file_location("dynaconv_build", SOURCE / "build.py")
native = module_from_spec(spec)
spec.loader.exec_module(native)


class BuildWithLibrary(build_py):
    """The Python files, the C++ sources, and the library made of them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            build_library(SOURCE, SOURCE / "objects")
            return
        place = Path(self.build_lib) / "dynaconv/backends/native"
        for left_over in (place / "csrc", place / native.LIBRARY):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
        shutil.copytree(ROOT / "csrc", place / "csrc")
        temporary = Path(self.get_finalized_command("build").build_temp)
        build_library(place, temporary / "dynaconv_native")


class WheelWithLibrary(bdist_wheel):
    """py3-none-PLATFORM with the library, py3-none-any without."""

    def run(self) -> None:
        self.run_command("build")
        place = Path(self.get_finalized_command("build").build_lib)
        self.root_is_pure = not any(place.rglob(native.LIBRARY))
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def build_library(target: Path, objects: Path) -> None:
    wish = os.environ.get("DYNACONV_BUILD")
    if wish == "0":
        return
    try:
        native.build(target, objects)
    except native.BuildError as error:
        if wish == "1":
            raise SystemExit(f"DYNACONV_BUILD=1: cannot build the C++ library: {error}") from None
        print(f"dynaconv goes without its C++ library: {str(error).splitlines()[0]}")


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelWithLibrary})
