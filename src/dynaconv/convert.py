"""Swaps the convolutions of a model for dynamic ones; weights and function are kept."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dynaconv import padded
from dynaconv.functional._checks import check_bool, check_count, check_list, check_module
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.modules import count_parameters, put
from dynaconv.registry import Family, family
from dynaconv.shapes import IntOrTuple, ntuple

Where = Callable[[str, Any], bool]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Report:
    """What `convert` did: the names it converted, and those it kept with the reason."""

    family: str
    converted: list[str] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{len(self.converted)} convolutions became {self.family}, {len(self.kept)} were kept; "
            f"parameters {before:,} -> {after:,}"
        ]
        lines += [f"  {name or '(the model)'}: {self.family}" for name in self.converted]
        lines += [f"  {name or '(the model)'}: kept, {reason}" for name, reason in self.kept]
        return "\n".join(lines)


class Conversion(NamedTuple):
    """The converted model and the report."""

    model: nn.Module
    report: Report


def convert(
    model: nn.Module,
    to: str,
    where: Where | str | None = None,
    *,
    inplace: bool = False,
    exact: bool = True,
    **options: Any,
) -> Conversion:
    """Replaces nn.Conv1d/2d/3d (and transposed ones) in `model` by layers of a family.

        model, report = dynaconv.convert(model, to="odconv", where=r"layer[34]")

    Args:
        model: any module; a convolution itself too.
        to: the family's name, see `dynaconv.families()`.
        where: which convolutions: a function of (name, module), a regular expression that is
            searched in the name, `dynaconv.select(...)`, or None for all.
        inplace: changes `model` itself instead of a copy.
        exact: keeps convolutions that the family cannot start from with the same function.
            False swaps those too, with fresh weights.
        **options: the family's own, e.g. experts=4.

    Returns:
        The model and a report of what was converted, and what was kept and why.

    Raises:
        ValueError: no such family, or not one convolution was converted; the text says why.
        TypeError: an option that the family does not have.
    """
    check_module("convert", model=model)
    check_bool("convert", inplace=inplace, exact=exact)
    target, chosen = family(to), chooser("convert", where)
    model = model if inplace else copy.deepcopy(model)
    report = Report(to)
    before = count_parameters(model)
    swapped: dict[nn.Module, nn.Module] = {}
    for name, module in list(_convolutions(model)):
        reason = _reason_against(module, target)
        if module in swapped:
            report.converted.append(name)
        elif reason or not chosen(name, module):
            report.kept.append((name, reason or "not selected by `where`"))
            continue
        else:
            try:
                swapped[module] = _replacement(module, target, exact, options)
            except ValueError as error:
                report.kept.append((name, str(error)))
                continue
            report.converted.append(name)
        model = put(model, name, swapped[module])
    report.parameters = (before, count_parameters(model))
    if not report.converted:
        raise ValueError(f"no convolution was converted\n{report}")
    return Conversion(model, report)


def select(
    name: str | None = None,
    kernel_size: IntOrTuple | None = None,
    type: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    stage: str | Sequence[str] | None = None,
    min_channels: int = 0,
) -> Where:
    """A `where` for `convert`: convolutions that fit every condition given.

    Args:
        name: a regular expression searched in the dotted name.
        kernel_size: this kernel, an int for all dimensions.
        type: an instance of this class.
        stage: one part of the dotted name, or several: "layer4" fits "backbone.layer4.0.conv1".
        min_channels: at least so many input and output channels.
    """
    pattern = _pattern(name, "select: name")
    _check_conditions(kernel_size, type)
    check_count("select", min_channels=min_channels)
    stages = [] if stage is None else [stage] if isinstance(stage, str) else stage
    names = set(check_list("select", str, "texts", stage=stages))

    def where(dotted: str, module: ConvNd) -> bool:
        kernel = module.kernel_size
        return bool(
            pattern.search(dotted)
            and (kernel_size is None or kernel == ntuple(kernel_size, len(kernel), "kernel_size"))
            and (type is None or isinstance(module, type))
            and (not names or names & set(dotted.split(".")))
            and min(module.in_channels, module.out_channels) >= min_channels
        )

    return where


def _pattern(given: str | None, what: str) -> re.Pattern[str]:
    if not isinstance(given, str | None):
        raise TypeError(f"{what}={given!r} must be a text")
    try:
        return re.compile(given or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}={given!r} is no regular expression: {error}") from None


def _check_conditions(kernel_size: Any, kind: Any) -> None:
    if kernel_size is not None:
        rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
        if not 1 <= rank <= 3:
            raise ValueError(f"select: kernel_size={kernel_size!r} must have 1 to 3 entries")
        ntuple(kernel_size, rank, "select: kernel_size")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if kind is not None and not all(isinstance(one, type) for one in kinds):
        raise TypeError(f"select: type={kind!r} must be a class, or several")


def chooser(name: str, where: Where | str | None) -> Where:
    """`where` as a function; a text is a regular expression searched in the dotted name."""
    if where is None:
        return lambda dotted, module: True
    if isinstance(where, str):
        pattern = _pattern(where, f"{name}: where")
        return lambda dotted, module: bool(pattern.search(dotted))
    if not callable(where):
        raise TypeError(f"{name}: where={where!r} must be a function, a regular expression or None")
    return where


def _convolutions(model: nn.Module) -> Iterator[tuple[str, ConvNd]]:
    """Every name of every convolution outside of dynamic layers, shared ones repeated."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside):
            continue
        if isinstance(module, DynamicConv):
            inside += (f"{name}.",)
        if isinstance(module, ConvNd):
            yield name, module


def _reason_against(module: ConvNd, target: Family) -> str | None:
    """Why this convolution cannot be replaced whatever the family's options, or None."""
    if any(is_lazy(p) for p in module.parameters()):
        return "its lazy parameters have no shape yet; run the model once"
    rank = module.weight.dim() - 2
    if rank not in target.classes:
        return f"{target.name} exists in {target.ranks} dimensions"
    cls = _class_for(module, target)
    if cls is None:
        if isinstance(module, _ConvTransposeNd):
            return f"{target.name} has no transposed form"
        return f"{target.name} enlarges its input, as nn.ConvTranspose{rank}d does"
    base, kind = cls.static[rank], type(module)
    methods = [f for f in ("forward", "_conv_forward") if hasattr(base, f)]
    own = [f for f in methods if getattr(kind, f) is not getattr(base, f)]
    if own and padded.parts(module) is None:
        return f"{kind.__name__} has a {own[0]} of its own"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which would be lost"
    return None


def _class_for(module: ConvNd, target: Family) -> type[DynamicConv] | None:
    """The family's class that stands in for this kind of convolution, if it has one."""
    kinds = (cls for cls in target.all_classes if isinstance(module, cls.static[cls.rank]))
    return next(kinds, None)


def _replacement(conv: ConvNd, target: Family, exact: bool, options: dict[str, Any]) -> nn.Module:
    """The layer for `conv`, behind what pads its input where `conv` did that itself."""
    pad, conv = padded.parts(conv) or (None, conv)
    cls = _class_for(conv, target)
    if cls is None:
        raise ValueError(f"{target.name} has no form for {type(conv).__name__}")
    try:
        layer = cls.from_conv(conv, **options)
    except ValueError:
        if exact:
            raise
        layer = cls.like(conv, **options)
    return layer if pad is None else nn.Sequential(pad, layer).train(conv.training)
