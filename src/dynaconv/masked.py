"""Padding masks through a whole model: every module by its own rule.

    model = dynaconv.MaskedSequential(dynaconv.ODConv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    output, mask = model(x, padding_mask)

At real positions the output is what each sample gives alone and unpadded, whatever lies in the
padding. A module of your own takes part by a method `masked_forward(x, mask)` that returns a
`Padded`, or by a rule: `@dynaconv.masked.rule(MyPool)`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import conv, dropout, instancenorm, padding, pooling
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import masking
from dynaconv.functional._checks import check_tensors
from dynaconv.layers.attention import SafeBatchNorm, masked_batch_norm
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.masking import Padded, each_size, masked_mean
from dynaconv.shapes import Geometry, ntuple

Rule = Callable[[Any, Tensor, Tensor], Padded]
RULES: dict[type[nn.Module], Rule] = {}


def apply(module: nn.Module, x: Tensor, mask: Tensor | None) -> Padded:
    """`module` on x (N, C, *L) whose real positions are those of mask (N, *L).

    Values of the result outside of its own mask mean nothing: whatever comes next skips them.

    Raises:
        TypeError: there is no rule for a module of this kind.
    """
    if isinstance(module, nn.Sequential):
        for child in module:
            x, mask = apply(child, x, mask)
        return Padded(x, mask)
    if hasattr(module, "masked_forward"):
        return module.masked_forward(x, mask)  # type: ignore[operator]
    if mask is None:
        output = module(x)
        return output if isinstance(output, Padded) else Padded(output, None)
    for kind in type(module).__mro__:
        if kind in RULES:
            return RULES[kind](module, x, mask)
    raise TypeError(
        f"{type(module).__name__} has no rule for padded batches; give it a method "
        "masked_forward(x, mask) -> Padded, or register one: @dynaconv.masked.rule(...)"
    )


class MaskedSequential(nn.Sequential):
    """nn.Sequential for samples of different sizes in one padded batch.

    Shapes:
        input (N, C, *L), padding_mask (N, *L) bool or None; output `Padded`: (N, C_out, *L_out),
        zero where its mask is False. The mask is None once a module has pooled it away.
    """

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Padded:
        check_tensors("MaskedSequential", input=input)
        if input.dim() < 3:
            raise ValueError(
                f"MaskedSequential: input has shape {tuple(input.shape)}; give (N, C, *L)"
            )
        if padding_mask is not None:
            masking.check_mask(padding_mask, input)
        x, mask = apply(nn.Sequential(*self), input, padding_mask)
        return Padded(x, mask) if mask is None else Padded(_zeroed(x, mask), mask)


def rule(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers rule(module, x, mask) -> Padded for these classes and those derived from them."""

    def register(given: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, given))
        return given

    return register


def _zeroed(x: Tensor, mask: Tensor, value: float = 0) -> Tensor:
    return x.masked_fill(~mask.unsqueeze(1), value)


# Rules -------------------------------------------------------------------------------------


@rule(
    *(nn.Identity, nn.Threshold, nn.ReLU, nn.RReLU, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid),
    *(nn.Tanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.Hardshrink),
    *(nn.LeakyReLU, nn.LogSigmoid, nn.Softplus, nn.Softshrink, nn.PReLU, nn.Softsign),
    *(nn.Tanhshrink, dropout._DropoutNd),
)
def _pointwise(module: nn.Module, x: Tensor, mask: Tensor) -> Padded:
    return Padded(module(x), mask)


@rule(DynamicConv)
def _dynamic(module: DynamicConv, x: Tensor, mask: Tensor) -> Padded:
    output = module(x, mask)
    return output if isinstance(output, Padded) else Padded(output, module.output_mask(mask))


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _static(module: ConvNd, x: Tensor, mask: Tensor) -> Padded:
    if module.padding_mode != "zeros":
        return _alone(module, x, mask)
    output, padding = module(_zeroed(x, mask)), module.padding
    if padding == "same":
        return Padded(output, mask)
    pads = (0,) * (mask.dim() - 1) if isinstance(padding, str) else padding
    geometry = Geometry(module.kernel_size, module.stride, pads, module.dilation)
    return Padded(output, masking.output_mask(mask, geometry))


@rule(_BatchNorm)
def _batch_norm(module: _BatchNorm, x: Tensor, mask: Tensor) -> Padded:
    if isinstance(module, SafeBatchNorm):
        return Padded(module(x, mask), mask)
    by_batch = module.training or module.running_mean is None
    return Padded(masked_batch_norm(module, x, mask) if by_batch else module(x), mask)


@rule(pooling._MaxPoolNd)
def _max_pool(module: Any, x: Tensor, mask: Tensor) -> Padded:
    if module.ceil_mode or module.return_indices:
        return _alone(module, x, mask)
    lowest = torch.finfo(x.dtype).min
    return Padded(module(_zeroed(x, mask, lowest)), _pooled(module, mask))


@rule(pooling._AvgPoolNd)
def _mean_pool(module: Any, x: Tensor, mask: Tensor) -> Padded:
    if module.ceil_mode or not module.count_include_pad:
        return _alone(module, x, mask)
    return Padded(module(_zeroed(x, mask)), _pooled(module, mask))


def _pooled(module: Any, mask: Tensor) -> Tensor:
    """The mask after a window of the module's kernel, stride and padding."""
    rank = mask.dim() - 1
    names = ("kernel_size", "stride", "padding", "dilation")
    values = [getattr(module, name, 1) for name in names]
    sizes = [ntuple(v, rank, n, 0) for v, n in zip(values, names, strict=True)]
    return masking.output_mask(mask, Geometry(*sizes))


@rule(pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd)
def _adaptive_pool(module: Any, x: Tensor, mask: Tensor) -> Padded:
    wanted = module.output_size
    sizes = wanted if isinstance(wanted, tuple) else (wanted,)
    if isinstance(module, pooling._AdaptiveAvgPoolNd) and set(sizes) == {1}:
        mean = masked_mean(_zeroed(x, mask), mask)
        return Padded(mean.reshape(*mean.shape, *[1] * (mask.dim() - 1)), None)
    pooled, kept = _alone(module, x, mask)
    return Padded(pooled, kept if None in sizes else None)


@rule(
    *(nn.GroupNorm, instancenorm._InstanceNorm, nn.LocalResponseNorm, nn.Upsample),
    *(conv._ConvTransposeNd, pooling._LPPoolNd, nn.ChannelShuffle, nn.PixelShuffle),
    *(nn.PixelUnshuffle, padding._CircularPadNd, padding._ConstantPadNd),
    *(padding._ReflectionPadNd, padding._ReplicationPadNd, nn.Softmax2d),
)
def _alone(module: nn.Module, x: Tensor, mask: Tensor) -> Padded:
    """What treats each sample by itself is given each at its own size."""
    return each_size(module, x, mask)
