"""How it is computed. Importing a backend registers it; the last registered is preferred."""

from dynaconv.backends import reference

__all__ = ["reference"]
