"""A family is one decorated class; the contract suite catches one that breaks a promise."""

import importlib.metadata
import sys
import types

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv import registry
from dynaconv.functional import conv_mixture
from dynaconv.layers.base import DynamicConv
from dynaconv.testing import families as contract


@pytest.fixture(autouse=True)
def _families_as_before(monkeypatch):
    monkeypatch.setattr(registry, "_families", dict(registry.families()))


class Routed(DynamicConv):
    """A family as somebody else might write it.

    Two experts, a softmax over the mean.
    """

    def build(self, scale: float = 1.0) -> None:
        self.weight = nn.Parameter(self.initial_kernels(2))
        self.routing = nn.Linear(self.in_channels, 2)

    def pooled(self, x, mask):
        return dynaconv.masking.masked_mean(x, mask)

    def generate(self, x, mask):
        return {"coefficients": torch.softmax(self.routing(self.pooled(x, mask)), 1)}

    def convolve(self, x, coefficients):
        x, padding = self.pad(x)
        geometry = (self.stride, padding, self.dilation, self.groups)
        return conv_mixture(x, self.weight, coefficients, self.bias, *geometry)

    def init_from(self, conv):
        self.weight.copy_(conv.weight)


def test_one_decorator_enrols_everywhere():
    registry.register_family("routed", primitive="conv_mixture", paper="None, 2026")(Routed)
    family = dynaconv.families()["routed"]
    assert [c.__name__ for c in family.classes.values()] == ["Routed1d", "Routed2d", "Routed3d"]
    assert family.summary == "A family as somebody else might write it."
    assert contract.check_family("routed") == 3 * len(contract.CHECKS)
    model, _ = dynaconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), to="routed")
    assert type(model[0]) is sys.modules[__name__].Routed2d


def test_names_are_unique():
    with pytest.raises(ValueError, match="family 'odconv' is registered already"):
        registry.register_family("odconv", primitive="conv_mixture", paper="")(Routed)


FAULTS = {
    "padding_promise": {"pooled": lambda self, x, mask: x.flatten(2).mean(2)},
    "batch_independence": {
        "pooled": lambda self, x, mask: x.flatten(2).mean(2).mean(0).expand(len(x), -1)
    },
    "from_conv": {"init_from": lambda self, conv: self.weight.copy_(conv.weight * 1.01)},
    "training": {"pooled": lambda self, x, mask: x.flatten(2).mean(2).detach() * 0},
    "shapes": {"pad": lambda self, x: (x, 0)},
    "kernels": {
        "generate": lambda self, x, mask: {"coefficients": torch.full((len(x), 2), torch.inf)}
    },
    "dtypes": {
        "convolve": lambda self, x, coefficients: Routed.convolve(self, x, coefficients).float()
    },
    "masked_training": {
        "prepare": lambda self, x, mask=None: (x, mask),
    },
    "state": {"extra_repr": lambda self: "nothing"},
    "layouts": {"pooled": lambda self, x, mask: x.flatten(2).mean(2) * sum(x.stride())},
    "refusals": {"prepare": lambda self, x, mask=None: (x, mask)},
}


@pytest.mark.parametrize("check", FAULTS)
def test_the_contract_has_teeth(check):
    broken = type("Broken1d", (Routed,), {"rank": 1, "family": "broken", **FAULTS[check]})
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "bias": False}
    arguments |= {"scale": 2.0}
    whole = type("Whole1d", (Routed,), {"rank": 1, "family": "whole"})
    run = getattr(contract, f"check_{check}")
    run(whole, arguments)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        run(broken, arguments)


def test_entry_points_of_other_packages(monkeypatch):
    module = types.ModuleType("elsewhere")
    module.Outside = type("Outside", (Routed,), {"__module__": "elsewhere"})
    monkeypatch.setitem(sys.modules, "elsewhere", module)

    class Entry:
        def load(self):
            registry.register_family("outside", primitive="conv_mixture", paper="")(module.Outside)

    def found(group):
        assert group == registry.ENTRY_POINTS
        return [Entry()]

    monkeypatch.setattr(registry, "entry_points", found)
    monkeypatch.setattr(registry, "_outside_loaded", False)
    assert "outside" in registry.names()
    assert module.Outside2d.rank == 2
    assert importlib.metadata.entry_points(group=registry.ENTRY_POINTS) is not None


def test_layers_are_importable_by_name():
    for family in dynaconv.families().values():
        for cls in family.classes.values():
            assert getattr(dynaconv, cls.__name__) is cls
            assert family.name == cls.family
            known = (dynaconv.functional, torch.nn.functional)
            assert any(hasattr(place, family.primitive) for place in known)
