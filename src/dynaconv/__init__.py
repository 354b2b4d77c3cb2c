"""Dynamic convolution for PyTorch: 1-D, 2-D and 3-D convolution whose kernel follows the input."""

from dynaconv import backends, functional, layers  # noqa: F401 - importing backends registers them
from dynaconv.analyze import analyze
from dynaconv.anneal import anneal, parameter_groups
from dynaconv.convert import convert, select
from dynaconv.dispatch import backend, explain
from dynaconv.layers import *  # noqa: F403 - made by the registry
from dynaconv.masking import mask_from_sizes
from dynaconv.registry import families, register_family

__version__ = "0.1.0"
__all__ = [
    "analyze",
    "anneal",
    "backend",
    "convert",
    "explain",
    "families",
    "functional",
    "layers",
    "mask_from_sizes",
    "parameter_groups",
    "register_family",
    "select",
    *layers.__all__,
]
