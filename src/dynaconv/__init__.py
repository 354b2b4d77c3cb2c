"""Dynamic convolution for PyTorch: 1-D, 2-D and 3-D convolution whose kernel follows the input."""

from dynaconv import backends, functional, layers, masked  # noqa: F401 - importing backends registers them
from dynaconv.analyze import analyze
from dynaconv.anneal import anneal, keep_inside, parameter_groups
from dynaconv.catalogue import catalogue
from dynaconv.convert import convert, select
from dynaconv.dispatch import backend, explain
from dynaconv.export import export_onnx
from dynaconv.freeze import freeze
from dynaconv.layers import *  # noqa: F403 - made by the registry
from dynaconv.layers.costs import collect_costs
from dynaconv.layers.gated import sparsity_loss
from dynaconv.layers.learned_stride import stride_cost
from dynaconv.masked import MaskedSequential
from dynaconv.masking import Padded, mask_from_sizes, pad_batch, unpad_batch
from dynaconv.published import load_published
from dynaconv.registry import families, register_family
from dynaconv.warehouse import share_kernels

__version__ = "0.1.0"
__all__ = [
    "MaskedSequential",
    "Padded",
    "analyze",
    "anneal",
    "backend",
    "catalogue",
    "collect_costs",
    "convert",
    "explain",
    "export_onnx",
    "families",
    "freeze",
    "functional",
    "keep_inside",
    "layers",
    "load_published",
    "mask_from_sizes",
    "masked",
    "pad_batch",
    "parameter_groups",
    "register_family",
    "select",
    "share_kernels",
    "sparsity_loss",
    "stride_cost",
    "unpad_batch",
    *layers.__all__,
]
