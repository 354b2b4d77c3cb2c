"""Any arguments of the tools over whole models: right, or refused by name."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynaconv
from dynaconv import masking, registry
from dynaconv.layers.base import DynamicConv
from dynaconv.testing import families as checks
from tests.reliability import broken
from tests.reliability.judge import QUIET, count, outcome

WORDS = ("odconv", "nowhere", "(", r"\d", "0", "eager", "native")
FUNCTIONS = (lambda name, module: True, lambda name, module: False)


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))


def dynamic():
    return dynaconv.convert(model(), "dyconv").model


def warehouses():
    return dynaconv.convert(model(), "kernel_warehouse").model


def strided():
    return nn.Sequential(dynaconv.LearnedStrideConv1d(2, 2, 3))


def masked(input, padding_mask):
    return dynaconv.MaskedSequential(dynaconv.DyConv1d(2, 3, 3), nn.ReLU())(input, padding_mask)


def forced(name):
    with dynaconv.backend(name):
        return dynaconv.functional.conv_per_sample(torch.ones(1, 1, 3), torch.ones(1, 1, 1, 2))


def registered(name, primitive, paper, ranks, transposed):
    decorate = registry.register_family(
        name, primitive=primitive, paper=paper, ranks=ranks, transposed=transposed
    )
    try:
        decorate(type("Strange", (dynaconv.layers.condconv.CondConv,), {"__module__": __name__}))
    finally:
        registry._families.pop("strange", None)


def costs():
    with dynaconv.collect_costs() as found:
        dynaconv.GatedConv1d(2, 2, 3)(torch.ones(1, 2, 5))
    return found


def mask():
    return masking.mask_from_sizes([3, 2], (3,))


# Each tool, and arguments that are right.
TOOLS = {
    "convert": (
        dynaconv.convert,
        lambda: {
            "model": model(), "to": "odconv", "where": None, "inplace": False, "exact": True,
            "reduction": 0.25, "stride": None,
        },
    ),
    "select": (
        dynaconv.select,
        lambda: {
            "name": "layer", "kernel_size": 3, "type": nn.Conv2d, "stage": "layer1",
            "min_channels": 2,
        },
    ),
    "anneal": (
        dynaconv.anneal, lambda: {"model": dynamic(), "progress": 0.5, "start": 9.0, "end": 1.0}
    ),
    "keep_inside": (dynaconv.keep_inside, lambda: {"model": dynamic()}),
    "parameter_groups": (dynaconv.parameter_groups, lambda: {"model": dynamic(), "lr": 0.1}),
    "analyze": (dynaconv.analyze, lambda: {"model": dynamic()}),
    "explain": (dynaconv.explain, lambda: {"call": dynamic()}),
    "backend": (forced, lambda: {"name": "eager"}),
    "share_kernels": (
        dynaconv.share_kernels,
        lambda: {
            "model": warehouses(), "where": None, "budget": 1, "in_ratio": 1.0, "out_ratio": 1.0,
            "spatial_partition": True, "basis_ratio": 1.0,
        },
    ),
    "pad_batch": (
        dynaconv.pad_batch,
        lambda: {"samples": [torch.ones(2, 3), torch.ones(2, 1)], "value": 0, "multiple": 2},
    ),
    "unpad_batch": (dynaconv.unpad_batch, lambda: {"data": torch.ones(2, 4, 3), "mask": mask()}),
    "mask_from_sizes": (dynaconv.mask_from_sizes, lambda: {"sizes": [1, 3], "shape": (4,)}),
    "catalogue": (dynaconv.catalogue, lambda: {"conv": nn.Conv1d(2, 2, 1), "size": 3}),
    "MaskedSequential": (
        masked, lambda: {"input": torch.ones(2, 2, 3), "padding_mask": mask()}
    ),
    "sparsity_loss": (
        dynaconv.sparsity_loss,
        lambda: {"costs": costs(), "target": 0.5, "progress": 0.5, "work": [1.0]},
    ),
    "stride_cost": (dynaconv.stride_cost, lambda: {"model": strided()}),
    "register_family": (
        registered,
        lambda: {
            "name": "strange", "primitive": "conv", "paper": "", "ranks": (1,), "transposed": False
        },
    ),
}  # fmt: skip


def replaced(data, value):
    """Something else in the place of a right argument."""
    if torch.is_tensor(value):
        ways = broken.of_tensor(value)
        way = data.draw(st.sampled_from([*ways, "nothing alike"]))
        if way != "nothing alike":
            return broken.made(ways[way])
    if isinstance(value, list) and value and torch.is_tensor(value[0]) and data.draw(st.booleans()):
        return [*value[1:], replaced(data, value[0])]
    many = (*broken.SCALARS, *broken.NO_TENSORS, *WORDS, *FUNCTIONS, nn.ReLU(), nn.LazyConv2d(2, 1))
    return data.draw(st.sampled_from(many))


# A family is what `to` names; analyze and explain call what they are given.
OTHERS = (
    "KernelWarehouseConv",
    "no convolution",
    "family",
    "backend",
    "input",
    "padding_mask",
    "no option",
)


def strange(name, value):
    """A function of other arguments than the tool gives it."""
    return callable(value) and (name == "call" or value not in FUNCTIONS)


def run(data, name):
    function, make = TOOLS[name]
    arguments = make()
    if name == "convert":
        option = data.draw(st.sampled_from(["reduction", "stride", None]))
        for other in {"reduction", "stride"} - {option}:
            del arguments[other]
    changed = data.draw(st.permutations(list(arguments)))[
        : data.draw(st.sampled_from([0, 1, 1, 2]))
    ]
    for argument in changed:
        arguments[argument] = replaced(data, arguments[argument])
    if any(strange(one, arguments[one]) for one in {"call", "where"} & set(changed)):
        return  # what it raises is its own
    names = [*inspect.signature(function).parameters, *arguments, *OTHERS]
    result, refusal = outcome(function, arguments, names, name)
    if refusal is None:
        count(name, "computed")
        check(name, arguments, result)
    else:
        assert changed or name in ("convert", "analyze", "explain"), f"{name}: {refusal}"


def check(name, arguments, result):
    """What of the result can be told from the arguments."""
    if name == "convert":
        layers = [m for m in result.model.modules() if isinstance(m, DynamicConv)]
        assert len(layers) == len(result.report.converted) > 0
    elif name == "select":
        assert result("a.layer1.conv", nn.Conv2d(4, 4, 3)) in (True, False)
    elif name in ("pad_batch", "MaskedSequential"):
        assert result.data.isfinite().all()
    elif name == "unpad_batch":
        assert len(result) == len(arguments["data"])
    elif name == "mask_from_sizes":
        assert result.shape[1:] == tuple(arguments["shape"])
        assert result.dtype == torch.bool
    elif name in ("sparsity_loss", "stride_cost"):
        assert result.is_meta or result.isfinite()
    elif name == "parameter_groups":
        found = [p for group in result for p in group["params"]]
        assert set(found) == set(arguments["model"].parameters())


# With checks and tests of their own; not drawn here yet.
# Whose refusals have tests of their own.
ELSEWHERE = {"export_onnx", "freeze", "load_published"}
TRIALS = {"catalogue": (1, 10)}


@pytest.mark.parametrize("name", TOOLS)
def test_some(name):
    @settings(max_examples=TRIALS.get(name, (12, 0))[0], derandomize=True, **QUIET)
    @given(st.data())
    def check(data):
        run(data, name)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_many(name):
    @settings(max_examples=TRIALS.get(name, (0, 400))[1], derandomize=True, **QUIET)
    @given(st.data())
    def check(data):
        run(data, name)

    check()


def test_every_public_tool_is_here():
    """A function that is added to the package has to be added here."""
    others = {"families", "collect_costs", "Padded"} | ELSEWHERE
    public = {
        name
        for name in dynaconv.__all__
        if callable(getattr(dynaconv, name)) and name not in dynaconv.layers.__all__
    }
    assert public - others == set(TOOLS)
    assert checks.CHECKS
