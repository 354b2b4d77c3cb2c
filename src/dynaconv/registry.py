"""The one list of families. Everything that runs over all of them reads it from here."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynaconv.layers.base import DynamicConv

ENTRY_POINTS = "dynaconv.families"
_families: dict[str, "Family"] = {}
_outside_loaded = False


@dataclass(frozen=True)
class Family:
    """One published kind of dynamic convolution and its classes by rank."""

    name: str
    primitive: str
    paper: str
    summary: str
    classes: dict[int, type["DynamicConv"]]
    transposed: dict[int, type["DynamicConv"]]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.classes)

    @property
    def all_classes(self) -> tuple[type["DynamicConv"], ...]:
        """Those of every rank, the transposed ones after the plain ones."""
        return (*self.classes.values(), *self.transposed.values())


def register_family(
    name: str,
    *,
    primitive: str,
    paper: str,
    ranks: tuple[int, ...] = (1, 2, 3),
    transposed: bool = False,
) -> Callable[[type["DynamicConv"]], type["DynamicConv"]]:
    """Class decorator: makes Name1d, Name2d, Name3d beside the class, and enrols the family.

    Args:
        name: what `dynaconv.convert(to=...)` and the command line call it.
        primitive: the function of `dynaconv.functional` that it computes with.
        paper: authors, venue and year.
        ranks: the dimensions in which the family exists.
        transposed: whether NameTranspose1d, 2d, 3d are made too; the family then convolves by
            `convolve_static`, `convolve_mixture`, `convolve_samples` or `convolve_deformed`.
    """

    texts = {"name": name, "primitive": primitive, "paper": paper}
    for what, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"register_family: {what}={text!r} must be a text")
    if not isinstance(ranks, tuple) or not ranks or not set(ranks) <= {1, 2, 3}:
        raise ValueError(f"register_family: ranks={ranks!r} must be a tuple of 1, 2 or 3")
    if not isinstance(transposed, bool):
        raise TypeError(f"register_family: transposed={transposed!r} must be True or False")

    def enrol(cls: type["DynamicConv"]) -> type["DynamicConv"]:
        if name in _families:
            raise ValueError(f"family {name!r} is registered already, by {_families[name]}")
        cls.family = name
        classes = {rank: _at_rank(cls, rank) for rank in ranks}
        enlarging = {rank: _transposed(cls, rank) for rank in ranks} if transposed else {}
        summary = (inspect.getdoc(cls) or "").split("\n")[0]
        _families[name] = Family(name, primitive, paper, summary, classes, enlarging)
        return cls

    return enrol


def _at_rank(
    cls: type["DynamicConv"], rank: int, form: str = "", *bases: type["DynamicConv"]
) -> type["DynamicConv"]:
    """cls with its number of dimensions fixed, placed in the module of cls."""
    name = f"{cls.__name__}{form}{rank}d"
    doc = f"{rank}-D :class:`{cls.__name__}`{form and ', transposed'}.\n\n"
    doc += inspect.getdoc(cls) or ""
    body = {"rank": rank, "__doc__": doc, "__module__": cls.__module__, "__qualname__": name}
    made = type(name, (*bases, cls), body)
    setattr(sys.modules[cls.__module__], name, made)
    return made


def _transposed(cls: type["DynamicConv"], rank: int) -> type["DynamicConv"]:
    from dynaconv.layers.transposed import Transposed

    return _at_rank(cls, rank, "Transpose", Transposed)


class Families(dict[str, Family]):
    """Families by name. As text: the table of what follows the input and what that costs.

    `dynaconv.catalogue(conv, size)` gives the costs for a convolution of yours.
    """

    def __str__(self) -> str:
        from dynaconv.catalogue import catalogue, table

        return table(entry for entry in catalogue() if entry.family.name in self)


def families() -> Families:
    """All families by name, those of other packages (entry points) included.

    `print(dynaconv.families())` shows them in a table.
    """
    global _outside_loaded
    if not _outside_loaded:
        _outside_loaded = True
        for entry in entry_points(group=ENTRY_POINTS):
            entry.load()
    return Families(_families)


def names() -> list[str]:
    """The families' names, in order of registration."""
    return list(families())


def family(name: str) -> Family:
    """The family called `name`. ValueError lists the names there are."""
    known = families()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"family {name!r} does not exist; there are {', '.join(known)}")
    return known[name]
