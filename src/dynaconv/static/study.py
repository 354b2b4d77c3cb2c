"""What is learnt about one dynamic layer: whether a static convolution can stand for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

from torch import Tensor

from dynaconv.convert import HOOKS
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.layers.upsampler import Upsampler
from dynaconv.masking import unpad_batch
from dynaconv.static.form import LeastSquares, StaticForm
from dynaconv.static.mean_kernel import Quantities, mean_kernel

Pair = tuple[Tensor, Tensor]
# Errors that say nothing about which kernel is better.
ROUNDING = 1e-6
# Unknowns of an output channel: their moments take 512 MB.
LARGEST = 8192


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
        self.squares: LeastSquares | None = None
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
            self.squares = LeastSquares(self.form) if self.form.unknowns <= LARGEST else None
        if self._fits(self.form, x, y):
            self.quantities.add(x)
            if self.squares is not None:
                self.squares.add(x, y)

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
        if self.squares is not None:
            origin = f"least squares over {self.squares.count:,} windows"
            self._propose(self.form, origin, *self.squares.solve(mean))
        if not self.candidates:
            count = f"{self.form.unknowns:,} unknowns a channel"
            self.refusal = f"{count} are too many for least squares"

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
        if not best.held_out.count:
            return FrozenLayer(name, family, False, "no batch that is held out reached it")
        best.conv.train(self.layer.training)
        error, seen = best.held_out.value, best.seen.value
        reason, frozen = best.origin, error <= tolerance
        if not frozen:
            reason = f"the error of {best.origin} is above the tolerance"
        return FrozenLayer(name, family, frozen, reason, error, seen, self.quantities.spread())
