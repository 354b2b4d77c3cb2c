"""Loads state dicts of the published implementations: their key names and layouts onto ours."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynaconv.layers.base import DynamicConv
from dynaconv.modules import dynamic_layers

Shape = tuple[int, ...]
# Tensors that are not told apart by name where they are many.
SHOWN = 8


class Part(NamedTuple):
    """A published tensor: the first of `keys` that there is, of one of `shapes`.

    Keys are those below the layer's own; "../x" lies beside it, "_x" goes on from its name.
    """

    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]


# By our key the published tensors, which lie one after the other in it.
Layout = dict[str, list[Part]]
Rule = Callable[[DynamicConv], Layout]
SOURCES: dict[str, dict[str, Rule]] = {}


def load_published(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "odconv"
) -> nn.Module:
    """Loads a state dict of a published implementation into a layer, or into a whole model.

        model = resnet_with(dynaconv.ODConv2d)  # as published, with our layers in their places
        dynaconv.load_published(model, torch.load(file)["state_dict"], source="odconv")

    Dynamic layers are filled by the rule for their family; all else must have its own name. Keys
    that all begin with "module.", as DistributedDataParallel leaves them, are taken without it.
    What a checkpoint does not hold stays as it is: temperatures, the options of the layers.

    | source | implementation | layers |
    |---|---|---|
    | `odconv` | OSVAI/ODConv, `ODConv2d` | `ODConv`, bias=False |
    | `timm` | timm, `CondConv2d` with the block's `routing_fn`; `SelectiveKernel` | `CondConv`; \
`SelectiveKernelConv`, bias=False |
    | `involution` | d-li14/involution | `Involution`, bias=False |
    | `mmcv` | mmcv, `DeformConv2dPack`; `ModulatedDeformConv2dPack`; `CARAFEPack`; `SAConv2d` | \
`DeformConv`, bias=False; `ModulatedDeformConv`; `CARAFE`, bias=False; `SwitchableAtrousConv` |
    | `torchvision` | torchvision's `DeformConv2d` as `regular_conv`, with `offset_conv` and \
`modulator_conv` below or beside it | the same |
    | `fairseq` | fairseq, `LightweightConv`, `DynamicConv` and their `..Layer` | `LightConv`, \
`DynamicLightConv` |

    Args:
        model: a dynamic layer, or a module that holds some.
        state_dict: tensors by published key.
        source: the implementation that they are from, as above.

    Returns:
        The model.

    Raises:
        ValueError: no such source, a model without its layers, a layer of another family or with
            options that were not published, or keys that are missing, unknown or of another shape;
            all are named, and nothing is changed.
        TypeError: values that are not tensors.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r} does not exist; there are {', '.join(SOURCES)}")
    given = _tensors(model, state_dict)
    fit = _fit(model, given, SOURCES[source], source)
    problems = fit.problems(given)
    if problems:
        head = f"this state dict of {source!r} does not fit {type(model).__name__}; nothing changed"
        raise ValueError("\n".join([head, *(f"  {line}" for line in problems)]))
    with torch.no_grad():
        for target, tensors in fit.found:
            whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            target.copy_(whole.reshape(target.shape))
    return model


def _tensors(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict, checked, without the prefix that wrappers leave."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; give tensors by key")
    others = {key: v for key, v in state_dict.items() if not isinstance(v, Tensor)}
    if others:
        key, value = next(iter(others.items()))
        hint = "; give the mapping that it holds" if isinstance(value, Mapping) else ""
        raise TypeError(f"state_dict[{key!r}] is a {type(value).__name__}, not a tensor{hint}")
    wrapped = all(key.startswith("module.") for key in state_dict) and state_dict
    if wrapped and not hasattr(model, "module"):
        return {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    return dict(state_dict)


@dataclass
class Fit:
    """What goes where, and what does not."""

    found: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def take(self, target: Tensor, parts: list[Part], given: dict[str, Tensor]) -> None:
        """Finds the parts, under full keys, of one tensor of ours."""
        tensors = []
        for keys, shapes in parts:
            key = next((key for key in keys if key in given), None)
            if key is None:
                if not keys[0].endswith("num_batches_tracked"):  # old checkpoints are without
                    self.missing.append(keys[0])
                continue
            self.used.add(key)
            if tuple(given[key].shape) in shapes:
                tensors.append(given[key])
            else:
                wanted = " or ".join(map(str, shapes))
                self.others.append(f"{key} has shape {tuple(given[key].shape)}, not {wanted}")
        if len(tensors) == len(parts):
            self.found.append((target, tensors))

    def problems(self, given: dict[str, Tensor]) -> list[str]:
        unknown = [key for key in given if key not in self.used]
        lines = [
            f"{what}: {', '.join(keys[:SHOWN])}" + _rest(keys)
            for what, keys in (("missing", self.missing), ("unknown", unknown))
            if keys
        ]
        return lines + self.others[:SHOWN] + [rest for rest in [_rest(self.others)] if rest]


def _rest(names: list[str]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""


def _fit(model: nn.Module, given: dict[str, Tensor], rules: dict[str, Rule], source: str) -> Fit:
    fit, inside = Fit(), []
    for name, layer in dynamic_layers(model):
        inside.append(f"{name}." if name else "")
        if layer.family not in rules:
            where = f"{type(layer).__name__} at {name!r}" if name else type(layer).__name__
            raise ValueError(f"source={source!r} has no {where}; it has {', '.join(rules)}")
        ours = layer.state_dict()
        layout = rules[layer.family](layer)
        for key, tensor in ours.items():
            if key in layout:
                parts = [Part(tuple(_full(name, k) for k in p.keys), p.shapes) for p in layout[key]]
                fit.take(tensor, parts, given)
        for key, _ in layer.named_parameters():
            if key not in layout:
                full = f"{name}.{key}" if name else key
                fit.others.append(f"{full} of this layer has no published counterpart")
        fit.others += [f"{name or type(layer).__name__}: {text}" for text in _unlike(layer, source)]
    if not inside:
        raise ValueError(f"{type(model).__name__} has no dynamic layer; use load_state_dict")
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not key.startswith(tuple(inside)):
            fit.take(tensor, [Part((key,), (tuple(tensor.shape),))], given)
    return fit


def _full(layer: str, key: str) -> str:
    """A key of `Part` as one of the whole state dict."""
    if key.startswith("../"):
        layer, key = layer.rpartition(".")[0], key.removeprefix("../")
    if key.startswith("_"):
        return layer + key
    return f"{layer}.{key}" if layer else key


# Rules -------------------------------------------------------------------------------------


def _unlike(layer: DynamicConv, source: str) -> Iterator[str]:
    """Options with which the same weights are another function than the published one."""
    scale = getattr(layer, "gate_scale", 1.0)
    if scale != 1 and source != "torchvision":  # there it is the user's own
        yield f"gate_scale={scale} is not published; give gate_scale=1.0"
    if source == "mmcv" and getattr(layer, "offset_bound", None) is not None:
        yield f"offset_bound={layer.offset_bound} is not published; leave it out"


def rule(source: str, *families: str) -> Callable[[Rule], Rule]:
    """Decorator: the layout of these families in the published implementation `source`."""

    def enrol(given: Rule) -> Rule:
        SOURCES.setdefault(source, {}).update(dict.fromkeys(families, given))
        return given

    return enrol


def _named(layer: DynamicConv, names: dict[str, str], as_conv: bool = False) -> Layout:
    """ours -> theirs, as far as the layer has it; of its shape, linear layers perhaps 1x1."""
    ones = (1,) * layer.rank
    layout = {}
    for key, tensor in layer.state_dict().items():
        if key in names:
            shape = tuple(tensor.shape)
            shape = (*shape, *ones) if as_conv and len(shape) == 2 else shape
            layout[key] = [Part((names[key],), (shape,))]
    return layout


def _norm(ours: str, theirs: str) -> dict[str, str]:
    keys = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{ours}.{key}": f"{theirs}.{key}" for key in keys}


def _pair(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{key}": f"{theirs}.{key}" for key in ("weight", "bias")}


@rule("odconv", "odconv")
def _odconv(layer: DynamicConv) -> Layout:
    names = {"weight": "weight", "attention.fc.weight": "attention.fc.weight"}
    for head in ("channel_fc", "filter_fc", "spatial_fc", "kernel_fc"):
        names |= _pair(head, f"attention.{head}")
    return _named(layer, names | _norm("attention.bn", "attention.bn"), as_conv=True)


@rule("timm", "condconv")
def _condconv(layer: DynamicConv) -> Layout:
    """Experts are flat, and the routing is the block's."""
    shape = tuple(layer.weight.shape)
    flat = [Part(("weight",), ((shape[0], prod(shape[1:])),))]
    names = {"bias": "bias"} | _pair("routing", "../routing_fn")
    return {"weight": flat} | _named(layer, names)


@rule("timm", "selective_kernel")
def _selective_kernel(layer: Any) -> Layout:
    names = {"squeeze.fc.weight": "attn.fc_reduce.weight", "select.weight": "attn.fc_select.weight"}
    names |= _norm("squeeze.bn", "attn.bn")
    for b in range(len(layer.convs)):
        names |= {f"convs.{b}.weight": f"paths.{b}.conv.weight"}
        names |= _norm(f"norms.{b}", f"paths.{b}.bn")
    return _named(layer, names, as_conv=True)


@rule("involution", "involution")
def _involution(layer: DynamicConv) -> Layout:
    names = {"reduce.weight": "conv1.conv.weight"} | _norm("bn", "conv1.bn")
    return _named(layer, names | _pair("span", "conv2.conv"))


@rule("mmcv", "deform", "deform_v2")
def _mmcv(layer: DynamicConv) -> Layout:
    """`conv2.conv_offset` was `conv2_offset` in early versions."""
    own = {"weight": "weight"} | ({"bias": "bias"} if layer.family == "deform_v2" else {})
    layout = _named(layer, own)
    for key, ((name,), shapes) in _offset(layer, "conv_offset"):
        layout[key] = [Part((name, name.replace("conv_offset", "_offset")), shapes)]
    return layout


@rule("mmcv", "carafe")
def _carafe(layer: DynamicConv) -> Layout:
    convs = ("channel_compressor", "content_encoder")
    return _named(layer, _pair(convs[0], convs[0]) | _pair(convs[1], convs[1]))


@rule("mmcv", "switchable_atrous")
def _switchable_atrous(layer: DynamicConv) -> Layout:
    return _named(layer, {key: key for key in layer.state_dict()}, as_conv=True)


@rule("torchvision", "deform", "deform_v2")
def _torchvision(layer: Any) -> Layout:
    """The modulation has a convolution of its own, after the offset's in ours."""
    layout = {
        key: [Part((f"regular_conv.{key}", key), part.shapes)]
        for key, (part,) in _named(layer, {"weight": "weight", "bias": "bias"}).items()
    }
    for key, (_, ((rows, *rest),)) in _offset(layer, ""):
        sizes = {"offset_conv": layer.offset_channels}
        sizes |= {"modulator_conv": rows - layer.offset_channels} if layer.modulated else {}
        end = key.removeprefix("offset_conv.")
        layout[key] = [
            Part((f"{name}.{end}", f"../{name}.{end}"), ((size, *rest),))
            for name, size in sizes.items()
        ]
    return layout


def _offset(layer: DynamicConv, theirs: str) -> Iterator[tuple[str, Part]]:
    for key, (part,) in _named(layer, _pair("offset_conv", theirs)).items():
        yield key, part


@rule("fairseq", "lightconv")
def _lightconv(layer: DynamicConv) -> Layout:
    """The CUDA layer keeps its weight without the middle dimension."""
    heads, _, taps = layer.weight.shape
    kernel = [Part(("weight",), ((heads, 1, taps), (heads, taps)))]
    return {"weight": kernel} | _named(layer, {"bias": "bias"})


@rule("fairseq", "dynamic_lightconv")
def _dynamic_lightconv(layer: DynamicConv) -> Layout:
    """A linear layer over the channels, which is a 1x1 convolution here."""
    layout = _named(layer, {"bias": "conv_bias"} | _pair("weight_linear", "weight_linear"))
    ((keys, (shape,)),) = layout["weight_linear.weight"]
    return layout | {"weight_linear.weight": [Part(keys, (shape[:2],))]}
