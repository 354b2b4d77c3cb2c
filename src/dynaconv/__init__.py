"""Dynamic convolution for PyTorch: 1-D, 2-D and 3-D convolution whose kernel follows the input."""

from dynaconv import backends as _backends
from dynaconv import functional

__all__ = ["functional"]
