"""What training does to whole models: temperatures, bounds, learning rates of single parts."""

from typing import Any

from torch import Tensor, nn

from dynaconv.functional._checks import check_finite, check_module
from dynaconv.layers.base import DynamicConv


def anneal(
    model: nn.Module, progress: float, start: float | None = None, end: float | None = None
) -> None:
    """Sets the temperature of every layer that has one: linear from `start` to `end`.

    Call it before each step or epoch. There is no state to save: the temperature is a buffer of
    each layer, and progress follows from the step. Chen (CVPR 2020) anneals over the first 10
    epochs: `dynaconv.anneal(model, epoch / 10)`.

    Args:
        model: any module with dynamic layers.
        progress: 0 at the start, 1 at the end of the annealing; more counts as 1.
        start, end: temperatures; None takes the family's own: 30 and 1 for a softmax, 1 and 0
            where a temperature only blends (`DynamicConv.temperatures`).

    Raises:
        ValueError: a negative progress, or a temperature below 0, or of 0 for a softmax.
    """
    check_module("anneal", model=model)
    check_finite("anneal", progress=progress)
    given = {"start": start, "end": end}
    check_finite("anneal", **{name: t for name, t in given.items() if t is not None})
    if not progress >= 0:
        raise ValueError(f"progress={progress} must be at least 0")
    layers = [m for m in model.modules() if isinstance(m, DynamicConv)]
    temperatures: dict[DynamicConv, float] = {}
    for layer in layers:
        own_start, own_end = layer.temperatures
        first, last = own_start if start is None else start, own_end if end is None else end
        if min(first, last) < 0 or (min(first, last) == 0 and own_end > 0):
            raise ValueError(f"temperatures must be above 0, got start={first}, end={last}")
        temperatures[layer] = first + (last - first) * min(float(progress), 1.0)
    for layer, temperature in temperatures.items():
        if hasattr(layer, "temperature"):
            layer.temperature.fill_(temperature)  # type: ignore[operator]


def keep_inside(model: nn.Module) -> None:
    """Moves parameters that have bounds back between them: learned strides, positions of DCLS.

    In training the layers do so themselves before they compute. fully_shard undoes that, as it
    gathers the parameter anew: there, call this after each step of the optimiser.
    """
    check_module("keep_inside", model=model)
    for module in model.modules():
        if isinstance(module, DynamicConv):
            module.keep_inside()


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, the parts that their papers train slower or faster apart.

        optimiser = torch.optim.AdamW(dynaconv.parameter_groups(model, lr=1e-3))

    Offset branches of deformable layers, for instance, train at a tenth of the rate.
    """
    check_module("parameter_groups", model=model)
    if not isinstance(lr, Tensor):
        check_finite("parameter_groups", lr=lr)
    elif lr.numel() != 1 or not lr.is_floating_point():
        raise TypeError(f"parameter_groups: lr={lr!r} must be a number")
    if not lr >= 0:
        raise ValueError(f"parameter_groups: lr={lr} must be at least 0")
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
