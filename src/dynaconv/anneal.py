"""Schedules over whole models: softmax temperature, and learning rates of single parts."""

from typing import Any

from torch import nn

from dynaconv.layers.base import DynamicConv


def anneal(model: nn.Module, progress: float, start: float = 30.0, end: float = 1.0) -> float:
    """Sets the temperature of every layer that has one: linear from `start` to `end`.

    Call it before each step or epoch. There is no state to save: the temperature is a buffer of
    each layer, and progress follows from the step. Chen (CVPR 2020) anneals over the first 10
    epochs: `dynaconv.anneal(model, epoch / 10)`.

    Args:
        model: any module with dynamic layers.
        progress: 0 at the start, 1 at the end of the annealing; more counts as 1.
        start, end: temperatures, above 0.

    Returns:
        The temperature set.

    Raises:
        ValueError: a negative progress, or a temperature that is not above 0.
    """
    if not progress >= 0:
        raise ValueError(f"progress={progress} must be at least 0")
    if not (start > 0 and end > 0):
        raise ValueError(f"temperatures must be above 0, got start={start}, end={end}")
    temperature = start + (end - start) * min(float(progress), 1.0)
    for module in model.modules():
        if isinstance(module, DynamicConv) and hasattr(module, "temperature"):
            module.temperature.fill_(temperature)  # type: ignore[operator]
    return temperature


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, the parts that their papers train slower or faster apart.

        optimiser = torch.optim.AdamW(dynaconv.parameter_groups(model, lr=1e-3))

    Offset branches of deformable layers, for instance, train at a tenth of the rate.
    """
    factors: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, DynamicConv):
            for prefix, factor in module.lr_factors.items():
                part = getattr(module, prefix)
                found = part.parameters() if isinstance(part, nn.Module) else [part]
                factors |= dict.fromkeys(found, factor)
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in model.parameters():
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return [{"params": params, "lr": lr * factor} for factor, params in groups.items()]
