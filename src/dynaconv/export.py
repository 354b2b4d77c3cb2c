"""Models as ONNX files, for runtimes without PyTorch."""

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from dynaconv.backends.onnx import DEFORM_OPSET, STANDARD, WITH_DEFORM
from dynaconv.dispatch import preferring
from dynaconv.files import whole
from dynaconv.modules import evaluating

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

NEEDS = ("onnx", "onnxscript")
DEFORM = {"operator": WITH_DEFORM, "standard": STANDARD}
# A protobuf file holds less than 2 GB.
MOST_BYTES = 2**31 - 2**26
Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Dynamic = str | Mapping[str, Sequence[int]]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written, and how its outputs compared with the model's.

    Sizes are numbers, or names where they are free. `compared` holds the shapes of each comparison
    that onnxruntime made, and `difference` the largest difference of an output, in parts of the
    largest value where that is above 1; None where nothing was compared.
    """

    path: Path
    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    compared: list[dict[str, tuple[int, ...]]]
    difference: float | None

    def __str__(self) -> str:
        shown = lambda named: ", ".join(f"{k} ({', '.join(map(str, v))})" for k, v in named.items())
        lines = [f"{self.path}: opset {self.opset}", f"  inputs: {shown(self.inputs)}"]
        lines.append(f"  outputs: {shown(self.outputs)}")
        if self.difference is None:
            return "\n".join([*lines, "  not compared with the model"])
        lines.append(f"  onnxruntime differs by {self.difference:.1e} at most, compared on")
        return "\n".join([*lines, *(f"    {shown(shapes)}" for shapes in self.compared)])


def export_onnx(
    model: nn.Module,
    example: Example,
    path: Path | str,
    dynamic: Dynamic = "sizes",
    *,
    deform: str = "operator",
    opset: int | None = None,
    check: bool = True,
    tolerance: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Writes `model`, in evaluation mode, as an ONNX file of standard operators.

        dynaconv.export_onnx(model, torch.randn(2, 3, 224, 224), "model.onnx")
        dynaconv.export_onnx(model, {"input": x, "padding_mask": mask}, "model.onnx")

    With onnxruntime installed the file is run, on several batches and sizes where they are free,
    and is written only if it gives what the model gives.

    Args:
        model: any module; layers of dynaconv and others.
        example: an input, the model's positional inputs, or its inputs by name. Values and sizes
            should be such as the model will see. One sample stands for batches of any size.
        path: of the file; written whole or not at all.
        dynamic: which sizes are free: "sizes" all but the channels (dimension 1 of floating-point
            inputs), "batch" the first, "none", or for each input by name its free dimensions.
        deform: "operator" for ONNX's DeformConv, in 1-D and 2-D, or "standard" for its formula in
            other operators, slower, for runtimes without DeformConv.
        opset: of ONNX, 18 or more, 19 where there is DeformConv; by default the exporter's.
        check: False leaves the comparison out.
        tolerance: the largest difference allowed, in parts of the largest value where that is
            above 1.
        metadata: texts by name that the file carries, e.g. what the classes are called.

    Returns:
        What was written: names and shapes of inputs and outputs, and the comparison.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model cannot be exported so, or what was exported differs.
    """
    _check_packages()
    if deform not in DEFORM:
        raise ValueError(f"deform={deform!r}; choose from {list(DEFORM)}")
    if sum(t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor)) > MOST_BYTES:
        raise ValueError("the model's parameters take more than the 2 GB of an ONNX file")
    with evaluating(model):
        inputs, named = _inputs(model, example, doubled=dynamic != "none")
        with preferring(DEFORM[deform]):
            program = _graph(model, inputs, named, _free(inputs, dynamic))
            onnx = _translated(program, opset)
        onnx.model.metadata_props.update(metadata or {})
        with whole(path) as temporary:
            onnx.save(temporary, external_data=False)
            compared: list[dict[str, tuple[int, ...]]] = []
            difference = None
            if check and importlib.util.find_spec("onnxruntime") is not None:
                compared, difference = _compare(model, program, inputs, named, temporary)
                if not difference <= tolerance:
                    raise ValueError(
                        f"onnxruntime differs from the model by {difference:.3g}, more than "
                        f"tolerance={tolerance}; nothing was written"
                    )
    graph = onnx.model.graph
    shapes = [
        {str(value.name): tuple(n if isinstance(n, int) else str(n) for n in value.shape or ())}
        for value in (*graph.inputs, *graph.outputs)
    ]
    count = len(graph.inputs)
    return Exported(
        Path(path),
        onnx.model.opset_imports[""],
        {k: v for shape in shapes[:count] for k, v in shape.items()},
        {k: v for shape in shapes[count:] for k, v in shape.items()},
        compared,
        difference,
    )


def _check_packages() -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx: {', '.join(missing)} missing; run: pip install 'dynaconv[onnx]'"
        )


# What goes in ------------------------------------------------------------------------------


def _inputs(model: nn.Module, example: Example, doubled: bool) -> tuple[Inputs, bool]:
    """The example's tensors by name, and whether the model is given them by name.

    A batch of one is `doubled` where it is to be free: torch.export takes a size of 1 for fixed.
    """
    named = isinstance(example, Mapping)
    if isinstance(example, Mapping):
        inputs = dict(example)
    else:
        tensors = (example,) if isinstance(example, Tensor) else tuple(example)
        names = list(inspect.signature(model.forward).parameters)
        names += [f"input_{i}" for i in range(len(names), len(tensors))]
        inputs = dict(zip(names, tensors, strict=False))
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"example: {name} is {type(tensor).__name__}; give tensors alone")
    if not inputs:
        raise ValueError("example: there is no input")
    if doubled and all(t.dim() and t.shape[0] == 1 for t in inputs.values()):
        inputs = {name: torch.cat([t, t]) for name, t in inputs.items()}
    return inputs, named


def _free(inputs: Inputs, dynamic: Dynamic) -> dict[str, list[int]]:
    """The free dimensions of each input."""
    if isinstance(dynamic, Mapping):
        free = {name: [d % inputs[name].dim() for d in dynamic.get(name, ())] for name in inputs}
        unknown = dynamic.keys() - inputs.keys()
        if unknown:
            raise ValueError(f"dynamic: no inputs {sorted(unknown)}; there are {list(inputs)}")
    elif dynamic in FREE:
        free = {name: FREE[dynamic](tensor) for name, tensor in inputs.items()}
    else:
        raise ValueError(f"dynamic={dynamic!r}; choose from {list(FREE)}, or give dimensions")
    for name, dims in free.items():
        single = [d for d in dims if inputs[name].shape[d] < 2]
        if single:
            raise ValueError(
                f"example: {name} has shape {tuple(inputs[name].shape)}, but dimensions {single} "
                "are to be free; give sizes of 2 or more there"
            )
    return free


def _all_but_channels(tensor: Tensor) -> list[int]:
    return [d for d in range(tensor.dim()) if d != 1 or not tensor.is_floating_point()]


FREE: dict[str, Callable[[Tensor], list[int]]] = {
    "sizes": _all_but_channels,
    "batch": lambda tensor: list(range(min(tensor.dim(), 1))),
    "none": lambda tensor: [],
}


# The graph ---------------------------------------------------------------------------------


def _graph(
    model: nn.Module, inputs: Inputs, named: bool, free: dict[str, list[int]]
) -> ExportedProgram:
    shapes = {name: dict.fromkeys(dims, Dim.DYNAMIC) for name, dims in free.items()}
    args, kwargs = ((), inputs) if named else (tuple(inputs.values()), {})
    try:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=shapes if named else tuple(shapes.values())
        )
    except ValueError:
        raise
    except Exception as error:  # torch has no one class for what it cannot export
        raise ValueError(f"torch.export refuses the model: {error}") from error


def _translated(program: ExportedProgram, opset: int | None) -> "ONNXProgram":
    names = list(program.graph_signature.user_outputs)
    outputs = ["output"] if len(names) == 1 else [f"output_{i}" for i in range(len(names))]
    deforms = any("onnx_symbolic" in str(node.target) for node in program.graph.nodes)
    if deforms and opset is not None and opset < DEFORM_OPSET:
        raise ValueError(
            f"opset={opset} has no DeformConv; give {DEFORM_OPSET} or more, or deform='standard'"
        )
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                (),
                input_names=list(program.graph_signature.user_inputs),
                output_names=outputs,
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        cause = str(error.__cause__ or error).strip()
        raise ValueError(f"torch.onnx.export refuses the model: {cause}") from error
    return made  # type: ignore[return-value]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings of itself, and of packages that are not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


# Comparison --------------------------------------------------------------------------------


def _compare(
    model: nn.Module, program: ExportedProgram, inputs: Inputs, named: bool, path: Path
) -> tuple[list[dict[str, tuple[int, ...]]], float]:
    """The shapes at which onnxruntime ran the file, and the largest difference."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime refuses what was exported: {error}") from error
    compared: list[dict[str, tuple[int, ...]]] = []
    worst = 0.0
    for trial in _trials(program, inputs):
        try:
            expected = tree_leaves(model(**trial) if named else model(*trial.values()))
        except (ValueError, RuntimeError):
            if not compared:  # the example itself
                raise
            continue  # too small for the model
        feed = {name: t.cpu().numpy() for name, t in trial.items()}
        try:
            actual = session.run(None, feed)
        except Exception as error:
            raise ValueError(f"onnxruntime cannot run what was exported: {error}") from error
        for y, given in zip(expected, actual, strict=True):
            worst = max(worst, _difference(torch.from_numpy(given), y.cpu()))
        compared.append({name: tuple(t.shape) for name, t in trial.items()})
    return compared, worst


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, in parts of the largest value where that is above 1; inf for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    return error / max(1.0, expected.double().abs().max().item())


def _trials(program: ExportedProgram, inputs: Inputs) -> Iterator[Inputs]:
    """The example, and what it becomes at other batches and sizes."""
    names = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    shapes = [
        [n.node.expr if isinstance(n, torch.SymInt) else n for n in values[name].shape]
        for name in names
    ]
    yield inputs
    given = {
        size: (d, tensor.shape[d])
        for shape, tensor in zip(shapes, inputs.values(), strict=True)
        for d, size in enumerate(shape)
        if not isinstance(size, int) and size.is_Symbol
    }
    if not given:
        return
    for batch, change in ((1, lambda n: n + n // 3 + 1), (5, lambda n: n - n // 3)):
        sizes = {s: batch if d == 0 else change(n) for s, (d, n) in given.items()}
        for symbol, bounds in program.range_constraints.items():
            if symbol in sizes and given[symbol][0]:
                sizes[symbol] = int(min(max(sizes[symbol], bounds.lower), bounds.upper))
        yield {
            name: _resized(tensor, [n if isinstance(n, int) else int(n.subs(sizes)) for n in shape])
            for (name, tensor), shape in zip(inputs.items(), shapes, strict=True)
        }


def _resized(tensor: Tensor, shape: list[int]) -> Tensor:
    """Values over again, or the last where they are bool: a mask's real positions stay a block."""
    for d, n in enumerate(shape):
        index = torch.arange(n, device=tensor.device)
        end = tensor.shape[d]
        repeats = tensor.dtype != torch.bool or d == 0
        tensor = tensor.index_select(d, index % end if repeats else index.clamp(max=end - 1))
    return tensor
