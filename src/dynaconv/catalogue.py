"""All families in one table: what follows the input, and what it costs for a given convolution."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dynaconv.analyze import analyze
from dynaconv.layers.base import ConvNd
from dynaconv.layers.transposed import CONV_TRANSPOSES
from dynaconv.registry import Family, families
from dynaconv.shapes import ntuple

INTRODUCTION = """# Families

What `dynaconv families --markdown` prints. Classes exist with the dimension at the end of their
name: `DyConv2d`, transposed `DyConvTranspose2d`; causal ones take `causal=True`. Parameters and
MACs are those beyond the static convolution's (nn.Conv2d(64, 64, 3, padding=1) on 56x56, if no
other is given), with the family's defaults; below zero where a family mixes no channels. Layers
that enlarge are compared with nn.ConvTranspose2d(64, 64, 2, stride=2)."""
HEAD = ("family", "class", "what", "forms", "parameters", "MACs", "paper")


@dataclass(frozen=True)
class Entry:
    """One family. Parameters and MACs are those beyond the static convolution's.

    They are None where the family cannot stand in for that convolution; `note` says why.
    """

    family: Family
    parameters: int | None
    macs: int | None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """As strings, in the order of HEAD."""
        costs = ("–" if n is None else f"{n:+,}" for n in (self.parameters, self.macs))
        family = self.family
        first = next(iter(family.classes.values()))
        name = first.__name__.removesuffix(f"{first.rank}d")
        what = family.summary.rstrip(".")
        return (family.name, name, what, forms(family), *costs, family.paper)


def forms(family: Family) -> str:
    """The dimensions, and which further forms there are."""
    ranks = [f"{rank}-D" for rank in family.ranks]
    causal = any(cls.causality for cls in family.classes.values())
    ranks += ["transposed"] if family.transposed else []
    return ", ".join(ranks + (["causal"] if causal else []))


def catalogue(conv: ConvNd | None = None, size: Sequence[int] | int = 56) -> list[Entry]:
    """An entry for each family that has this convolution's dimensions.

    Args:
        conv: the convolution that the families stand in for; None takes
            nn.Conv2d(64, 64, 3, padding=1). Its weights are not used.
        size: spatial shape of the input. Up-samplers are compared with nn.ConvTransposeNd of
            kernel and stride 2 on an input of this size.
    """
    conv = nn.Conv2d(64, 64, 3, padding=1) if conv is None else conv
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_lazy(conv.weight):
        raise TypeError(f"catalogue: conv={conv!r} must be an nn.Conv1d, nn.Conv2d or nn.Conv3d")
    rank = conv.weight.dim() - 2
    shape = ntuple(size, rank, "size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what gates let through depends on weights and input
        x = torch.randn(1, conv.in_channels, *shape, dtype=conv.weight.dtype)
        return [_entry(f, conv, x) for f in families().values() if rank in f.classes]


def _entry(family: Family, conv: ConvNd, x: torch.Tensor) -> Entry:
    cls = family.classes[x.dim() - 2]
    if cls.static is CONV_TRANSPOSES:
        make: Callable[..., ConvNd] = CONV_TRANSPOSES[cls.rank]
        conv = make(conv.in_channels, conv.in_channels, 2, stride=2)
    try:
        row = analyze(cls.like(conv).eval(), x)
    except ValueError as reason:
        return Entry(family, None, None, str(reason))
    static = analyze(conv, x)
    return Entry(family, row.parameters - static.parameters, row.macs - static.macs)


def table(entries: Iterable[Entry]) -> str:
    """The table in Markdown."""
    lines: list[tuple[str, ...]] = [HEAD, ("---",) * 4 + ("---:",) * 2 + ("---",)]
    lines += [(f"`{name}`", f"`{cls}`", *rest) for name, cls, *rest in (e.cells() for e in entries)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(entries: Sequence[Entry]) -> str:
    """The table as a page in Markdown, with the reasons why some have no costs."""
    notes = [f"- `{e.family.name}`: {e.note}" for e in entries if e.note]
    parts = [INTRODUCTION, table(entries)]
    if notes:
        parts.append("\n".join(["Without costs:", "", *notes]))
    return "\n\n".join(parts) + "\n"
