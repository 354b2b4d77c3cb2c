"""The compiled library: loaded once, or the reason why it is not at hand."""

import logging

import torch

from dynaconv.backends.native.build import HERE, LIBRARY, outdated

HOW = "run `python -m dynaconv.backends.native` (needs a C++ compiler, takes a minute)"
_said: list[str] = []


def load() -> str | None:
    """Loads the library: None, or why it is not at hand."""
    path = HERE / LIBRARY
    if not path.exists():
        return f"the C++ library is not built; {HOW}"
    if outdated():
        return f"the C++ library is older than its sources; {HOW}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ library does not load ({error}); {HOW}"
    return None


MISSING = load()


def say_once() -> None:
    """Logs, once a process, that the library is missing."""
    if not _said and not torch.compiler.is_compiling():
        _said.append(HOW)
        logging.getLogger("dynaconv").warning("%s. Until then, the slower eager path.", MISSING)


def instruction_set() -> str | None:
    """What the kernels run with: "portable", "avx2" or "avx512"; None without the library."""
    if MISSING:
        return None
    return ("portable", "avx2", "avx512")[torch.ops.dynaconv_native.instruction_set()]
