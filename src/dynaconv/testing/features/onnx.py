"""ONNX: one file for all batch and spatial sizes; onnxruntime gives the layer's values."""

from pathlib import Path
from tempfile import TemporaryDirectory

from dynaconv.export import export_onnx
from dynaconv.layers.base import DynamicConv
from dynaconv.testing.families import Arguments, example, randomized, require
from dynaconv.testing.features.registry import feature


@feature("onnx", "ONNX", needs=("onnx", "onnxscript", "onnxruntime"))
def check_onnx(cls: type[DynamicConv], arguments: Arguments) -> None:
    """`export_onnx` with free batch and spatial sizes; it compares at three of them."""
    layer, x = randomized(cls, arguments).float(), example(cls, arguments).float()
    with TemporaryDirectory() as folder:
        made = export_onnx(layer, x, Path(folder) / "layer.onnx")
    (shape,) = made.inputs.values()
    fixed = [d for d, size in enumerate(shape) if isinstance(size, int)]
    require(fixed == [1], f"{cls.__name__}: dimensions {fixed} of the input are fixed")
    require(len(made.compared) == 3, f"{cls.__name__}: compared on {made.compared} alone")
