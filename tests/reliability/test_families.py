"""Any arguments of any family's constructor and calls: right, or refused by name."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynaconv.dispatch import backends, down_from
from dynaconv.layers.base import DynamicConv
from dynaconv.masking import mask_from_sizes
from dynaconv.registry import families
from dynaconv.testing.families import static_conv
from dynaconv.testing.tolerance import TOLERANCE
from tests.reliability import broken
from tests.reliability.judge import QUIET, count, outcome

FAMILIES = list(families())
SIZES = {1: (9,), 2: (7, 6), 3: (5, 6, 4)}
ARGUMENTS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("bias", "padding_mode", "device", "dtype", "causal"),
)
PLACES = ("meta", "cpu", "cuda", "nowhere", 7, torch.float64, torch.int8, torch.complex64, "cpu:9")
# What a refusal of a call names: the tensors, or the geometry that they do not fit.
CALLED = ("input", "padding_mask", "x", "state", "guide", "style", *ARGUMENTS)
LARGE = (10**9, 2**31 - 1, (2**31 - 1,), 10**5)


def option_names(cls):
    return [name for name in inspect.signature(cls.build).parameters if name != "self"]


def construct(data, cls, arguments):
    """A layer of arguments of which up to two are broken, and their names; None if refused."""
    arguments, names = dict(arguments), [*ARGUMENTS, *option_names(cls)]
    if "output_padding" in inspect.signature(cls).parameters:
        names.append("output_padding")
    changed = data.draw(st.permutations(names))[: data.draw(st.sampled_from([0, 0, 1, 1, 2]))]
    for name in changed:
        values = [*broken.SCALARS, *LARGE, *(PLACES if name in ("device", "dtype") else ())]
        arguments[name] = data.draw(st.sampled_from(values))
    label = cls.family
    layer, refusal = outcome(cls, arguments, [*names, "temperature"], label)
    if refusal is not None:
        assert changed, f"{cls.__name__}: right arguments {arguments} are refused: {refusal}"
        if len(changed) == 1 and not broken.plausible(arguments[changed[0]]):
            assert changed[0] in str(refusal), f"{changed[0]} is broken, the text is {refusal}"
        return None, changed
    count(label, "constructed")
    return layer, changed


def example(data, layer):
    """An input, and a padding mask or none, in the layer's dtype."""
    parameter = next(layer.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    shape = (data.draw(st.integers(0, 2)), layer.in_channels, *SIZES[layer.rank])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    x = broken.LAYOUTS[data.draw(st.sampled_from(list(broken.LAYOUTS)))](x)
    mask = None
    if data.draw(st.integers(0, 2)) == 2:
        least = data.draw(st.integers(0, 3))
        sizes = [[data.draw(st.integers(min(least, n), n)) for n in shape[2:]] for _ in x]
        sizes = torch.tensor(sizes, dtype=torch.long).reshape(len(x), layer.rank)
        mask = mask_from_sizes(sizes, shape[2:])
    return x, mask


def randomize(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn)
    return layer.eval()


def call(data, cls, layer, backend):
    """One method of the layer, up to one argument broken; its result against float64's."""
    x, mask = example(data, layer)
    method = data.draw(st.sampled_from(["forward", "forward", "kernels", "output_mask", "step"]))
    arguments = {"input": x, "padding_mask": mask}
    if method == "step":
        arguments = {"x": x.flatten(2)[..., :1].squeeze(2), "state": None}
    if method == "output_mask":
        whole = torch.ones(len(x), *x.shape[2:], dtype=torch.bool)
        arguments = {"padding_mask": whole if mask is None else mask}
    if method in ("forward", "kernels"):
        known = inspect.signature(getattr(layer, method)).parameters
        if "guide" in known:
            arguments["guide"] = data.draw(st.sampled_from([None, x]))
        if "style" in known and layer.style_channels == layer.in_channels:
            arguments["style"] = data.draw(st.sampled_from([None, x.flatten(2).sum(2)]))
    changed = data.draw(st.booleans()) and data.draw(st.sampled_from(list(arguments)))
    if changed:
        tensor = arguments[changed]
        ways = broken.of_tensor(tensor) if torch.is_tensor(tensor) else {}
        way = data.draw(st.sampled_from([*ways, "nothing alike"]))
        strange = st.sampled_from(broken.NO_TENSORS)
        value = data.draw(strange) if way == "nothing alike" else broken.made(ways[way])
        if value is None and way != "nothing alike":
            return
        arguments[changed] = value
    label, names = cls.family, [*CALLED, *option_names(cls)]
    with down_from(backend):
        result, refusal = outcome(getattr(layer, method), arguments, names, label)
    if refusal is None:
        count(label, "computed")
        check_result(label, layer, method, arguments, result)


def check_result(label, layer, method, arguments, result):
    """Finite, and what the layer gives in float64 on the reference."""
    tensors = lambda t: torch.is_tensor(t) and not t.is_meta
    found = {"output": result[0] if isinstance(result, tuple) else result}
    found = result if isinstance(result, dict) else found
    if not all(tensors(t) for t in found.values()):
        return
    double = lambda t: t.detach().double() if torch.is_tensor(t) and t.is_floating_point() else t
    with torch.no_grad(), down_from("reference"):
        again = copy.deepcopy(layer).double()
        expected = getattr(again, method)(**{k: double(v) for k, v in arguments.items()})
    expected = expected if isinstance(expected, dict) else {"output": expected}
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    for name, tensor in found.items():
        wanted = expected[name]
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        assert tensor.shape == wanted.shape, f"{label}.{method}: {tensor.shape}, {wanted.shape}"
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        assert tensor.isfinite().all(), f"{label}.{method}: {name} is not finite, {layer}"
        scale = wanted.abs().max().clamp(min=1e-3)
        error = (tensor.detach().double() - wanted).abs().max() / scale
        if dtype in (torch.float32, torch.float64) and label not in ROUGH:
            assert error <= 100 * TOLERANCE[dtype], f"{label}.{method} is off by {error:.3g}"
    count(label, "checked")


# Decisions (a gate, a region, a size) that rounding may change.
ROUGH = ("gated", "drconv", "learned_stride", "adaptive_stride", "shapeconv", "flexconv")


def take_over(data, cls, arguments):
    """from_conv and like, of a right or another conv."""
    maker = data.draw(st.sampled_from(["from_conv", "like"]))
    options = {k: v for k, v in arguments.items() if k in option_names(cls)}
    conv = static_conv(cls, arguments)
    others = (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.LazyConv2d(3, 1), None, 3)
    others += (nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d, nn.Sequential(conv))
    conv = data.draw(st.sampled_from([conv, *others]))
    if options and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(list(options)))
        options[name] = data.draw(st.sampled_from(broken.SCALARS))
    names = [*CALLED, *option_names(cls), "replaces", cls.family, "conv", "nn.ConvNd"]
    made, refusal = outcome(getattr(cls, maker), {"conv": conv} | options, names, cls.family)
    if refusal is None:
        count(cls.family, f"made {maker}")
        assert isinstance(made, DynamicConv)


def run(data, name):
    cls = data.draw(st.sampled_from(families()[name].all_classes))
    arguments = data.draw(st.sampled_from(cls.samples(cls.rank)))
    if data.draw(st.integers(0, 4)) == 4:
        take_over(data, cls, arguments)
        return
    layer, changed = construct(data, cls, arguments)
    if layer is None or any(p.is_meta or p.numel() > 10**6 for p in layer.parameters()):
        return
    backend = data.draw(st.sampled_from(backends()))
    call(data, cls, layer.eval() if changed else randomize(layer), backend)


@pytest.mark.parametrize("name", FAMILIES)
def test_some(name):
    @settings(max_examples=4, derandomize=True, **QUIET)
    @given(st.data())
    def check(data):
        run(data, name)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_many(name):
    @settings(max_examples=200, derandomize=True, **QUIET)
    @given(st.data())
    def check(data):
        run(data, name)

    check()
