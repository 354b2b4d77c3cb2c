"""The list of features, and how one is checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dynaconv.layers.base import DynamicConv
from dynaconv.registry import families

Arguments = dict[str, Any]
Check = Callable[[type[DynamicConv], Arguments], None]


@dataclass(frozen=True)
class Feature:
    """One column of the table of features.

    The check raises AssertionError, or what torch raises, where a layer does not have the feature.
    `needs` are the packages without which it cannot be checked.
    """

    name: str
    title: str
    check: Check
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and this environment lacks."""
        return [package for package in self.needs if find_spec(package) is None]


FEATURES: dict[str, Feature] = {}


def feature(name: str, title: str, needs: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Decorator of a check: enrols it as the feature `name`; `title` heads its column."""

    def enrol(check: Check) -> Check:
        FEATURES[name] = Feature(name, title, check, needs)
        return check

    return enrol


def check_feature(name: str, cls: type[DynamicConv], arguments: Arguments) -> None:
    """AssertionError unless the layer has the feature, or `cls.limits` says why not and it fails.

    A reason that does not hold any more is an error as well.
    """
    reason = cls.limits(arguments).get(name)
    found = outcome(name, cls, arguments)
    if found is None and reason is not None:
        raise AssertionError(f"{cls.__name__} has {name}, though its limits say {reason!r}")
    if found is not None and reason is None:
        raise AssertionError(f"{cls.__name__}, {name}: {found!r}") from found


def outcome(name: str, cls: type[DynamicConv], arguments: Arguments) -> Exception | None:
    """None where the layer has the feature, otherwise what its check raised."""
    try:
        FEATURES[name].check(cls, arguments)
    except Exception as error:
        return error
    return None


def cases(samples: int | None = 1) -> Iterator[tuple[type[DynamicConv], Arguments]]:
    """Classes of every rank and form of every family, each with its first `samples` arguments."""
    for family in families().values():
        for cls in family.all_classes:
            for arguments in cls.samples(cls.rank)[:samples]:
                yield cls, arguments
