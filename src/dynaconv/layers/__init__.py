"""The families, one file each. Importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from dynaconv.layers.base import DynamicConv

for _found in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_found.name}")
    globals().update(
        (name, value)
        for name, value in vars(_module).items()
        if isinstance(value, type) and issubclass(value, DynamicConv)
    )

__all__ = sorted(
    name
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, DynamicConv)
)


def __getattr__(name: str) -> Any:
    # Here for type checkers: the classes by rank are made by the registry.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
