"""Half precision, plain and under autocast: as float64 but for rounding, and training stays sound.

A user trains either with autocast (and for float16 with a GradScaler), or a layer that is
half precision itself.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.layers.base import DynamicConv
from dynaconv.masking import Padded, mask_from_sizes
from dynaconv.testing.families import SIZES, example, randomized, require
from dynaconv.testing.features.learning import Classifier, examples
from dynaconv.testing.features.registry import Arguments, feature
from dynaconv.testing.tolerance import TOLERANCE

STEPS = 200
# The loss at the end, over that at the start.
LEARNED = 0.85
# GradScaler starts at 2^16, and halves where a gradient is not finite.
LEAST_SCALE = 2.0**8
# Sums on the way to a gradient are larger than itself.
NEAR_THE_END = 100


@feature("fp16", "float16")
def check_float16(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Output, range and training in float16."""
    _check_precision(cls, arguments, torch.float16)


@feature("bf16", "bfloat16")
def check_bfloat16(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Output, range and training in bfloat16."""
    _check_precision(cls, arguments, torch.bfloat16)


def _check_precision(cls: type[DynamicConv], arguments: Arguments, dtype: torch.dtype) -> None:
    for autocast in (True, False):
        check_accuracy(cls, arguments, dtype, autocast)
        check_range(cls, arguments, dtype, autocast)
        check_learning(cls, arguments, dtype, autocast)


def check_accuracy(
    cls: type[DynamicConv], arguments: Arguments, dtype: torch.dtype, autocast: bool
) -> None:
    """The output is that of float64, from the same rounded parameters and input.

    At 95 % of the positions: a hard choice, of a region or a gate, may fall otherwise at a few.
    Beside rounding an error is as large as the step between the smallest numbers of `dtype`.
    """
    layer = randomized(cls, arguments).to(dtype).double()
    x = example(cls, arguments).to(dtype).double()
    expected, actual = (_data(made) for made in (layer(x), _in(dtype, autocast, layer, x)))
    require(actual.dtype == dtype, f"{cls.__name__} in {dtype} gives {actual.dtype}")
    error = (actual.double() - expected).abs().flatten().quantile(0.95)
    largest, step = expected.abs().max(), torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    where = f"{cls.__name__} in {dtype}{' by autocast' if autocast else ''}"
    within = error <= TOLERANCE[dtype] * largest + step
    require(within, f"{where} is off by {error / largest:.3g} of the largest value")


def check_range(
    cls: type[DynamicConv], arguments: Arguments, dtype: torch.dtype, autocast: bool
) -> None:
    """No infinity and no NaN, in output and gradients, from large, small and blank samples.

    Unless float64 says that the gradients themselves come near the end of the range, as behind a
    batch norm over blank samples alone.
    """
    x, full = example(cls, arguments), torch.tensor(SIZES[cls.rank])
    mask = mask_from_sizes(torch.stack([full, full - 1, full - 2]), SIZES[cls.rank])
    blank = torch.cat([torch.zeros_like(x[:1]), x[1:]])
    run = partial(_output_and_gradients, cls, arguments)
    for what, data in {"large": 10 * x, "small": 1e-3 * x, "blank": blank}.items():
        for real in (None, mask):
            seed = int(torch.randint(2**31, ()))
            in_half = run(data, real, seed, dtype, autocast)
            lost = [name for name, tensor in in_half.items() if not tensor.isfinite().all()]
            if lost:
                sound = run(data, real, seed, torch.float64, False)
                largest = max(float(tensor.abs().max()) for tensor in sound.values())
                where = f"{cls.__name__} in {dtype}, {'masked ' if real is not None else ''}{what}"
                near = largest > torch.finfo(dtype).max / NEAR_THE_END
                require(near, f"{where} x, values up to {largest:.3g}: not finite are {lost}")


def _output_and_gradients(
    cls: type[DynamicConv],
    arguments: Arguments,
    x: Tensor,
    mask: Tensor | None,
    seed: int,
    dtype: torch.dtype,
    autocast: bool,
) -> dict[str, Tensor]:
    """What a layer in training gives, and the gradients of x and its parameters, by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = randomized(cls, arguments).train()
        x = x.detach().requires_grad_()
        output = _data(_in(dtype, autocast, layer, x, mask))
        if mask is not None:
            output = output.masked_fill(~layer.output_mask(mask).unsqueeze(1), 0)
        inputs = {"x": x, **dict(layer.named_parameters())}
        weight = torch.randn(output.shape).to(output.dtype)
        gradients = torch.autograd.grad(output, [*inputs.values()], weight, allow_unused=True)
    pairs = zip(inputs, gradients, strict=True)
    return {"the output": output.detach()} | {name: g for name, g in pairs if g is not None}


def _in(
    dtype: torch.dtype,
    autocast: bool,
    layer: DynamicConv,
    x: Tensor,
    mask: Tensor | None = None,
) -> Tensor | Padded:
    """layer(x, mask) in `dtype`, of a layer and input in float64 that gradients go back to."""
    given = torch.float32 if autocast else dtype
    parameters = {name: p.to(given) for name, p in layer.named_parameters()}
    buffers = {n: b.to(given) if b.is_floating_point() else b for n, b in layer.named_buffers()}
    with torch.autocast(x.device.type, dtype, enabled=autocast):
        call = partial(torch.func.functional_call, copy.copy(layer), parameters | buffers)
        return call((x.to(given), mask))


def _data(output: Tensor | Padded) -> Tensor:
    return output.data if isinstance(output, Padded) else output


def check_learning(
    cls: type[DynamicConv], arguments: Arguments, dtype: torch.dtype, autocast: bool
) -> None:
    """200 steps of a fresh layer lower the loss, and neither loss nor parameters leave the range.

    Adam's squares of gradients vanish in half precision: hence its epsilon where it runs in it.
    """
    where = f"{cls.__name__} in {dtype}{' by autocast' if autocast else ''}"
    model, (x, labels) = Classifier(cls, arguments), examples(cls, arguments)
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast and dtype == torch.float16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, eps=1e-8 if autocast else 1e-4)
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), labels)
        require(loss.isfinite(), f"{where}: the loss is {loss} at step {step}")
        losses.append(loss.item())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, parameter in model.named_parameters():
        require(parameter.isfinite().all(), f"{where}: {name} is not finite")
    require(losses[-1] < LEARNED * losses[0], f"{where}: {losses[0]:.3f} to {losses[-1]:.3f}")
    enough = not scaler.is_enabled() or scaler.get_scale() >= LEAST_SCALE
    require(enough, f"{where}: GradScaler fell to {scaler.get_scale()}")
