"""Replaces dynamic layers whose kernels hardly vary by the static convolutions they amount to."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynaconv.convert import select
from dynaconv.layers.base import DynamicConv
from dynaconv.modules import count_parameters, dynamic_layers, evaluating, put
from dynaconv.static.study import Error, FrozenLayer, Study

Where = Callable[[str, DynamicConv], bool]
# Of so many batches one is held out, the second first.
HELD_OUT = 4


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze` did, by layer, and what it cost.

    `error` is |frozen - original| / |original| of the whole model's output over the held-out
    batches.
    """

    layers: list[FrozenLayer]
    tolerance: float
    error: float
    parameters: tuple[int, int]

    def __str__(self) -> str:
        frozen, (before, after) = sum(r.frozen for r in self.layers), self.parameters
        head = (
            f"{frozen} of {len(self.layers)} dynamic layers became static at tolerance "
            f"{self.tolerance:g}; error of the model's output {self.error:.2g}; "
            f"parameters {before:,} -> {after:,}"
        )
        return "\n".join([head, *(f"  {row}" for row in self.layers)])


class Freezing(NamedTuple):
    """The model with its static convolutions, and the report."""

    model: nn.Module
    report: FreezeReport


def freeze(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    tolerance: float = 0.01,
    where: Where | str | None = None,
    *,
    inplace: bool = False,
) -> Freezing:
    """Replaces dynamic layers by static convolutions where the inputs hardly change their kernels.

        static, report = dynaconv.freeze(model, batches, tolerance=0.01)

    For each layer two static convolutions of its geometry are tried: its mean kernel, which is
    what it computes while all that follows the input is held at its mean over `inputs`, and the
    kernel that comes closest to the outputs on `inputs` in the least squares (up to 8,192 weights
    an output channel). One batch in four is held out of both; the error there decides which is
    better, and whether it is good enough. Layers are measured as they work in `model`, in
    evaluation mode.

    Args:
        model: any module; a dynamic layer itself too.
        inputs: batches like those the model will see: tensors, tuples of the model's arguments, or
            dicts of keyword arguments; at least two. A tensor (N, ...) is cut into up to four.
        tolerance: the largest error of a layer's output that it may be frozen with,
            |static - dynamic| / |dynamic|.
        where: which layers: a function of (name, module), a regular expression that is searched in
            the name, `dynaconv.select(...)`, or None for all.
        inplace: changes `model` itself instead of a copy.

    Returns:
        The model and a report: for each dynamic layer whether it became static, why, and the error.

    Raises:
        ValueError: the model has no (selected) dynamic layer, the inputs are fewer than two
            batches, or the tolerance is below 0.
        TypeError: a batch that is neither tensor, tuple nor dict.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0")
    batches = _batches(inputs)
    studies = _studies(model, where)
    with evaluating(model):
        _run(model, batches, studies, lambda i: not _held_out(i), Study.learn)
        for study in set(studies.values()):
            study.solve()
        _run(model, batches, studies, lambda i: True, Study.measure)
    rows = [study.row(name, tolerance) for name, study in studies.items()]
    frozen = copy.deepcopy(model)
    for row in rows:
        if row.frozen:
            frozen = put(frozen, row.name, studies[row.name].best.conv)
    with evaluating(model), evaluating(frozen):
        error = _model_error(model, frozen, batches)
    parameters = (count_parameters(model), count_parameters(frozen))
    if inplace:
        for row in rows:
            if row.frozen:
                model = put(model, row.name, studies[row.name].best.conv)
    return Freezing(model if inplace else frozen, FreezeReport(rows, tolerance, error, parameters))


def _studies(model: nn.Module, where: Where | str | None) -> dict[str, Study]:
    """By name, one for each selected dynamic layer; a layer with several names has one."""
    chosen = select(name=where) if isinstance(where, str) else where or (lambda name, layer: True)
    found: dict[str, Study] = {}
    made: dict[DynamicConv, Study] = {}
    for name, layer in dynamic_layers(model):
        if chosen(name, layer):
            study = found[name] = made.setdefault(layer, Study(layer))
            parent = model.get_submodule(name.rpartition(".")[0]) if name else None
            study.in_sequences &= isinstance(parent, nn.Sequential)
    if not found:
        what = "no dynamic layer" if where is None else "no dynamic layer that `where` selects"
        raise ValueError(f"{type(model).__name__} has {what}")
    return found


# Inputs and calls --------------------------------------------------------------------------


def _batches(inputs: Tensor | Iterable[Any]) -> list[tuple[tuple, dict[str, Any]]]:
    """The arguments of each call of the model."""
    if isinstance(inputs, Tensor):
        batches: list[Any] = list(inputs.split(max(1, -(-len(inputs) // HELD_OUT))))
        batches = batches if len(inputs) else []
    else:
        batches = list(inputs)
    if len(batches) < 2:
        raise ValueError(
            f"inputs hold {len(batches)} batches; give two or more (or a tensor of two samples or "
            "more): kernels are fitted to some and their error is measured on others"
        )
    return [_arguments(batch) for batch in batches]


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(
        f"a batch of inputs is a {type(batch).__name__}; give a tensor, a tuple of the model's "
        "arguments, or a dict of keyword arguments"
    )


def _held_out(index: int) -> bool:
    return index % HELD_OUT == 1


def _run(
    model: nn.Module,
    batches: list[tuple[tuple, dict[str, Any]]],
    studies: dict[str, Study],
    wanted: Callable[[int], bool],
    look: Callable[[Study, Tensor, Tensor, bool], None],
) -> None:
    """Shows `look` what goes in and out of every studied layer, sample sizes undone."""
    held_out = False

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        study = by_layer[layer]
        if not study.refuses(args, kwargs, output):
            for x, y in study.pairs(*args, **kwargs, output=output):
                if y.numel() and study.refusal is None:
                    look(study, x, y, held_out)

    by_layer: dict[nn.Module, Study] = {study.layer: study for study in studies.values()}
    handles = [
        layer.register_forward_hook(hook, with_kwargs=True)
        for layer, study in by_layer.items()
        if study.refusal is None
    ]
    try:
        for index, (args, kwargs) in enumerate(batches):
            if wanted(index):
                held_out = _held_out(index)
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _model_error(
    model: nn.Module, frozen: nn.Module, batches: list[tuple[tuple, dict[str, Any]]]
) -> float:
    error = Error()
    for index, (args, kwargs) in enumerate(batches):
        if _held_out(index):
            for given, expected in zip(
                *(tree_leaves(net(*args, **kwargs)) for net in (frozen, model)), strict=True
            ):
                if isinstance(expected, Tensor) and expected.is_floating_point():
                    error.add(given, expected)
    return error.value
