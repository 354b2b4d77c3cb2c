"""How it is computed. Importing a backend registers it; the last registered is preferred."""

from dynaconv.backends import reference  # isort: skip - the last resort comes first
from dynaconv.backends import eager, triton, native  # isort: skip - the faster one comes last

__all__ = ["eager", "native", "reference", "triton"]
