"""Parameters and multiply-accumulates of a model, by layer, beside static convolutions."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from dynaconv.functional._checks import check_module
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.layers.upsampler import Upsampler
from dynaconv.modules import evaluating

PARTS = ("generation", "mixing", "convolution")


@dataclass(frozen=True)
class Row:
    """One layer. `static_*` is the nn.ConvNd of the same arguments (the same for a static one).

    The cost of a dynamic layer is in three parts: making the kernels from the input (generation),
    combining them, e.g. experts or the values that a tap samples (mixing), and the convolution.
    """

    name: str
    kind: str
    parameters: int
    static_parameters: int
    generation_macs: int
    mixing_macs: int
    convolution_macs: int
    static_macs: int

    @property
    def macs(self) -> int:
        return self.generation_macs + self.mixing_macs + self.convolution_macs


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found: `rows` by layer, totals of the whole model."""

    rows: list[Row]
    parameters: int
    macs: int
    static_parameters: int
    static_macs: int

    def __str__(self) -> str:
        head = ("layer", "kind", "parameters", "static", "MACs", *PARTS, "static")
        body: list[tuple[str | int, ...]] = [
            (
                *(r.name, r.kind, r.parameters, r.static_parameters, r.macs),
                *(r.generation_macs, r.mixing_macs, r.convolution_macs, r.static_macs),
            )
            for r in self.rows
        ]
        parts = [sum(getattr(r, f"{part}_macs") for r in self.rows) for part in PARTS]
        total = ("total (with all else)", "", self.parameters, self.static_parameters, self.macs)
        body.append((*total, *parts, self.static_macs))
        cells = [head] + [
            tuple(f"{c:,}" if isinstance(c, int) else c for c in line) for line in body
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        pad = lambda i, c: c.ljust(widths[i]) if i < 2 else c.rjust(widths[i])
        return "\n".join("  ".join(pad(i, c) for i, c in enumerate(line)) for line in cells)


def analyze(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> Analysis:
    """Counts what one call `model(*inputs)` costs, in evaluation mode.

    MACs are those of convolutions and matrix products for the whole batch: making the kernels
    (routing, attention, offsets), mixing them, and convolving. Elementwise work is not counted.

        print(dynaconv.analyze(model, torch.randn(1, 3, 224, 224)))
    """
    check_module("analyze", model=model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DynamicConv | ConvNd) and not _inside_dynamic(model, name)
    }
    static_macs: Counter[str] = Counter()

    def count_static(name: str) -> Callable:
        def hook(layer: DynamicConv | ConvNd, given: tuple, output: Any) -> None:
            static_macs[name] += _static_macs(layer, given[0], output)

        return hook

    hooks = [m.register_forward_hook(count_static(name)) for name, m in layers.items()]
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), counter:
            model(*inputs, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    rows = [
        _row(name, module, counts, f"{root}.{name}" if name else root, static_macs[name])
        for name, module in layers.items()
        if name in static_macs
    ]
    parameters, macs = _parameters(model), counter.get_total_flops() // 2
    return Analysis(
        rows,
        parameters,
        macs,
        parameters + sum(r.static_parameters - r.parameters for r in rows),
        macs + sum(r.static_macs - r.macs for r in rows),
    )


def _static_macs(layer: DynamicConv | ConvNd, x: Tensor, output: Any) -> int:
    """Those of the static convolution with this kernel and output."""
    kernel = layer.kernel_size
    if isinstance(layer, Upsampler):
        kernel = layer.stride  # as in `as_static`
    if _enlarges(layer):
        return x.numel() * layer.out_channels // layer.groups * prod(kernel)
    if isinstance(layer, DynamicConv):
        kernel = layer.kernel_size_at(tuple(x.shape[-layer.rank :]))
    data = output[0] if isinstance(output, tuple) else output
    return data.numel() * layer.in_channels // layer.groups * prod(kernel)


def _enlarges(layer: DynamicConv | ConvNd) -> bool:
    static = layer.static[layer.rank] if isinstance(layer, DynamicConv) else type(layer)
    return issubclass(static, _ConvTransposeNd)


def _row(
    name: str, layer: DynamicConv | ConvNd, counts: dict[str, int], key: str, whole: int
) -> Row:
    """One layer's row; `whole` are the static convolution's MACs."""
    kernel = layer.stride if isinstance(layer, Upsampler) else layer.kernel_size
    window = layer.in_channels // layer.groups * prod(kernel)
    static = layer.out_channels * (window + (layer.bias is not None))
    total = counts.get(key, 0)
    convolving = getattr(layer, "convolving", ())
    generation = sum(
        counts.get(f"{key}.{child}", 0)
        for child, _ in layer.named_children()
        if child not in convolving
    )
    rest = total - generation
    # Layers that convolve by submodules, and those that mix no channels, have nothing beyond.
    mixing = 0 if convolving else max(0, rest - whole)
    kind, parameters = type(layer).__name__, _parameters(layer)
    return Row(name, kind, parameters, static, generation, mixing, rest - mixing, whole)


def _inside_dynamic(model: nn.Module, name: str) -> bool:
    """Whether a part of the dotted name before the last is a dynamic layer."""
    parts = name.split(".")
    return (
        any(
            isinstance(model.get_submodule(".".join(parts[:i])), DynamicConv)
            for i in range(len(parts))
        )
        if name
        else False
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
