"""Finding and replacing the layers of a model, and running it as it is used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dynaconv.layers.base import DynamicConv


def dynamic_layers(model: nn.Module) -> Iterator[tuple[str, DynamicConv]]:
    """Every name of every dynamic layer that is not inside another."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicConv) and not name.startswith(inside):
            inside += (f"{name}." if name else "",)
            yield name, module


def put(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with `layer` at `name`; the layer itself where it was the whole model."""
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model's parameters, lazy ones left out."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
