"""Replaces dynamic layers whose kernels hardly vary by the static convolutions they amount to."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynaconv.convert import HOOKS, select
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.layers.upsampler import Upsampler
from dynaconv.masking import unpad_batch
from dynaconv.mean_kernel import Quantities, mean_kernel
from dynaconv.modules import count_parameters, dynamic_layers, put
from dynaconv.static_form import LeastSquares, StaticForm

Where = Callable[[str, DynamicConv], bool]
Pair = tuple[Tensor, Tensor]
# Of so many batches one is held out, the second first.
HELD_OUT = 4
ROUNDING = 1e-6


@dataclass(frozen=True)
class FrozenLayer:
    """What `freeze` found out about one dynamic layer.

    `error` is |static - dynamic| / |dynamic| of the layer's output (Euclidean norms) over the
    batches that are held out, `seen` that over the others; None where nothing was measured.
    `varies` has, by name, each quantity that the layer makes from its input: its size (root mean
    square) and how far it lies from its mean over samples and positions.
    """

    name: str
    family: str
    frozen: bool
    reason: str
    error: float | None = None
    seen: float | None = None
    varies: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = "static" if self.frozen else "kept"
        parts = [f"{self.name or '(the model)'}: {self.family}, {verdict}, {self.reason}"]
        if self.error is not None:
            parts.append(f"error {self.error:.2g}, seen {self.seen:.2g}")
        parts += [f"{name} {size:.2g} ± {off:.2g}" for name, (size, off) in self.varies.items()]
        return "; ".join(parts)


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
    kernel that comes closest to the outputs on `inputs` in the least squares. One batch in four is
    held out of both; the error there decides which is better, and whether it is good enough.
    Layers are measured as they work in `model`, in evaluation mode.

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
    with _evaluating(model):
        _run(model, batches, studies, lambda i: not _held_out(i), Study.learn)
        for study in set(studies.values()):
            study.solve()
        _run(model, batches, studies, lambda i: True, Study.measure)
    rows = [study.row(name, tolerance) for name, study in studies.items()]
    frozen = copy.deepcopy(model)
    for row in rows:
        if row.frozen:
            frozen = put(frozen, row.name, studies[row.name].best.conv)
    with _evaluating(model), _evaluating(frozen):
        error = _model_error(model, frozen, batches)
    parameters = (count_parameters(model), count_parameters(frozen))
    if inplace:
        for row in rows:
            if row.frozen:
                model = put(model, row.name, studies[row.name].best.conv)
    return Freezing(model if inplace else frozen, FreezeReport(rows, tolerance, error, parameters))


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _run(
    model: nn.Module,
    batches: list[tuple[tuple, dict[str, Any]]],
    studies: dict[str, "Study"],
    wanted: Callable[[int], bool],
    look: Callable[["Study", Tensor, Tensor, bool], None],
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


# One layer ---------------------------------------------------------------------------------


def _studies(model: nn.Module, where: Where | str | None) -> dict[str, "Study"]:
    """By name, one for each selected dynamic layer; a layer with several names has one."""
    chosen = select(name=where) if isinstance(where, str) else where or (lambda name, layer: True)
    found: dict[str, Study] = {}
    made: dict[DynamicConv, Study] = {}
    for name, layer in dynamic_layers(model):
        if chosen(name, layer):  # type: ignore[arg-type]
            study = found[name] = made.setdefault(layer, Study(layer))
            parent = model.get_submodule(name.rpartition(".")[0]) if name else None
            study.in_sequences &= isinstance(parent, nn.Sequential)
    if not found:
        what = "no dynamic layer" if where is None else "no dynamic layer that `where` selects"
        raise ValueError(f"{type(model).__name__} has {what}")
    return found


def _reason_against(layer: DynamicConv) -> str | None:
    """Why no static convolution can stand for this layer whatever its inputs, or None."""
    if layer.causal:
        return "no nn.Conv1d pads before the input only, as causal=True does"
    if isinstance(layer, Upsampler):
        return "it enlarges by windows over its input, as no nn.ConvTranspose does"
    if not layer.sized_like_conv:
        return "its output has a size of its own"
    if any(getattr(layer, hooks) for hooks in HOOKS):
        return "it has hooks, which would be lost"
    return None


@dataclass
class Error:
    """|given - expected| / |expected| over all that was added."""

    off: float = 0.0
    whole: float = 0.0
    count: int = 0

    def add(self, given: Tensor, expected: Tensor) -> None:
        self.count += expected.numel()
        self.off += (given.double() - expected.double()).square().sum().item()
        self.whole += expected.double().square().sum().item()

    @property
    def value(self) -> float:
        """NaN where nothing was added."""
        if not self.off:
            return 0.0 if self.count else nan
        return (self.off / self.whole) ** 0.5 if self.whole else inf


@dataclass
class Candidate:
    """A static convolution, where it comes from, and its errors."""

    origin: str
    conv: ConvNd
    held_out: Error = field(default_factory=Error)
    seen: Error = field(default_factory=Error)


class Study:
    """What is learnt about one dynamic layer from its inputs and outputs."""

    def __init__(self, layer: DynamicConv) -> None:
        self.layer, self.in_sequences = layer, True
        self.refusal = _reason_against(layer)
        self.form: StaticForm | None = None
        self.quantities = Quantities(layer)
        self.candidates: list[Candidate] = []

    def refuses(self, args: tuple, kwargs: dict[str, Any], output: Any) -> bool:
        """Whether a call shows why the layer cannot be frozen; `refusal` says it."""
        if self.refusal is None:
            self.refusal = self._reason(args, kwargs, output)
        return self.refusal is not None

    def _reason(self, args: tuple, kwargs: dict[str, Any], output: Any) -> str | None:
        kind = self.layer.static[self.layer.rank].__name__
        given = dict(zip(("input", "padding_mask"), args, strict=False)) | kwargs
        more = [name for name, value in given.items() if value is not None]
        more = [name for name in more if name not in ("input", "padding_mask")]
        if len(args) > 2 or more:
            return f"it is given more than its input: {', '.join(more) or 'a third argument'}"
        if given.get("padding_mask") is not None and not self.in_sequences:
            return f"it is called with a padding mask, which nn.{kind} takes in sequences only"
        if not isinstance(output, Tensor):
            return f"it returns a {type(output).__name__}, nn.{kind} a tensor"
        return None

    def pairs(
        self, input: Tensor, padding_mask: Tensor | None = None, *, output: Tensor
    ) -> Iterator[Pair]:
        """Inputs (N, C_in, *L) and outputs (N, C_out, *L_out) without padding.

        In a padded batch that is each sample by itself, at its own size.
        """
        x, mask = self.layer.prepare(input, padding_mask)
        y = output if output.dim() == x.dim() else output.unsqueeze(0)
        if mask is None:
            yield x, y
            return
        outputs = unpad_batch(y, self.layer.output_mask(mask))
        for alone, made in zip(unpad_batch(x, mask), outputs, strict=True):
            if alone.numel():
                yield alone.unsqueeze(0), made.unsqueeze(0)

    def learn(self, x: Tensor, y: Tensor, held_out: bool) -> None:
        """Takes in an input and its output."""
        if self.form is None:
            self.form = StaticForm(self.layer, tuple(x.shape[2:]))
            self.squares = LeastSquares(self.form)
        if self._fits(self.form, x, y):
            self.squares.add(x, y)
            self.quantities.add(x)

    def measure(self, x: Tensor, y: Tensor, held_out: bool) -> None:
        """Adds up the errors of the candidates."""
        if self.form is not None and self._fits(self.form, x, y):
            for candidate in self.candidates:
                error = candidate.held_out if held_out else candidate.seen
                error.add(candidate.conv(x), y)

    def _fits(self, form: StaticForm, x: Tensor, y: Tensor) -> bool:
        """Whether the static convolution can have the output y; if not, `refusal` says why."""
        size, made = tuple(x.shape[2:]), tuple(y.shape[2:])
        geometry, wanted = self.layer.static_geometry(size), form.output_size(size)
        if geometry != form.geometry:
            self.refusal = f"its kernel is {form.geometry.kernel} or {geometry.kernel} by the input"
        elif min(geometry.padding) < 0:
            self.refusal = f"its kernel of {geometry.kernel} leaves out the border of the input"
        elif made != wanted:
            self.refusal = f"its output is {made}, that of a static convolution {wanted}"
        elif not y.isfinite().all():
            self.refusal = "its output is not finite"
        return self.refusal is None

    def solve(self) -> None:
        """Makes the candidates."""
        if self.refusal is None and self.form is None:
            self.refusal = "the inputs did not reach it"
        if self.refusal is not None or self.form is None:
            return
        mean = mean_kernel(self.form, self.quantities)
        if mean is not None:
            self._propose(self.form, "its mean kernel", *mean)
        origin = f"least squares over {self.squares.count:,} windows"
        self._propose(self.form, origin, *self.squares.solve(mean))

    def _propose(self, form: StaticForm, origin: str, weight: Tensor, bias: Tensor) -> None:
        negligible = bias.abs().max() <= 1e-6 * weight.flatten(1).norm(dim=1).max()
        kept = None if self.layer.bias is None and negligible else bias
        self.candidates.append(Candidate(origin, form.make(weight, kept).eval()))

    @property
    def best(self) -> Candidate:
        """The candidate of least error; the mean kernel where both errors are rounding."""
        return min(self.candidates, key=lambda candidate: max(candidate.held_out.value, ROUNDING))

    def row(self, name: str, tolerance: float) -> FrozenLayer:
        """The decision."""
        family = self.layer.family
        if self.refusal is not None:
            return FrozenLayer(name, family, False, self.refusal)
        best = self.best
        best.conv.train(self.layer.training)
        error, seen = best.held_out.value, best.seen.value
        reason, frozen = best.origin, error <= tolerance
        if not best.held_out.count:
            reason = "no batch that is held out reached it"
        elif not frozen:
            reason = f"the error of {best.origin} is above the tolerance"
        return FrozenLayer(name, family, frozen, reason, error, seen, self.quantities.spread())
