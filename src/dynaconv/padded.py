"""Convolutions of other libraries that pad their input in their own forward, taken apart.

TensorFlow's "SAME" gives ceil(L / stride) outputs whatever L is, so how much it pads follows the
input's size. With stride 1 that is torch's padding="same"; with a larger one it is a module that
pads, before a convolution that does not.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import CONVS, ConvNd
from dynaconv.layers.tracing import one_node
from dynaconv.masked import rule
from dynaconv.masking import Padded, each_size


class Parts(NamedTuple):
    """What pads, if anything does, and a plain nn.ConvNd with the weights of the original."""

    pad: nn.Module | None
    conv: ConvNd


class SamePad(nn.Module):
    """Zeros around x (N, C, *L) for ceil(L / stride) outputs, the odd one after it."""

    def __init__(self, span: Sequence[int], stride: Sequence[int]) -> None:
        """span: positions from the kernel's first tap to its last."""
        super().__init__()
        self.span, self.stride = tuple(span), tuple(stride)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        widths: list[int] = []
        for length, span, stride in zip(x.shape[2:], self.span, self.stride, strict=True):
            last = (-(-length // stride) - 1) * stride
            total = torch.sym_max(last + span - length, 0)
            widths = [total // 2, total - total // 2, *widths]
        return F.pad(x, widths)

    def extra_repr(self) -> str:
        return f"span={self.span}, stride={self.stride}"


@rule(SamePad)
def _masked(module: SamePad, x: Tensor, mask: Tensor) -> Padded:
    return each_size(module, x, mask)


def _same(conv: ConvNd) -> Parts:
    span = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if set(span) == {1}:
        return Parts(None, _plain(conv, (0,) * len(span)))
    if set(conv.stride) == {1}:
        return Parts(None, _plain(conv, "same"))
    return Parts(SamePad(span, conv.stride), _plain(conv, (0,) * len(span)))


def _static(conv: ConvNd) -> Parts:
    pad = conv.get_submodule("static_padding")
    return Parts(None if isinstance(pad, nn.Identity) else pad, _plain(conv, conv.padding))


# By the package that defines the class, and the class's name.
FORMS: dict[tuple[str, str], Callable[[ConvNd], Parts]] = {
    ("timm", "Conv2dSame"): _same,
    ("timm", "Conv2dSameExport"): _same,
    ("segmentation_models_pytorch", "Conv2dDynamicSamePadding"): _same,
    ("segmentation_models_pytorch", "Conv2dStaticSamePadding"): _static,
    ("efficientnet_pytorch", "Conv2dDynamicSamePadding"): _same,
    ("efficientnet_pytorch", "Conv2dStaticSamePadding"): _static,
}


def parts(conv: ConvNd) -> Parts | None:
    """The convolution taken apart; None unless its class is one of those above."""
    kind = type(conv)
    form = FORMS.get((kind.__module__.partition(".")[0], kind.__name__))
    return form and form(conv)


def _plain(conv: ConvNd, padding: str | tuple[int, ...]) -> ConvNd:
    """An nn.ConvNd that shares the weights of `conv`."""
    names = ("in_channels", "out_channels", "kernel_size", "dilation", "groups")
    arguments = {name: getattr(conv, name) for name in names}
    plain = CONVS[conv.weight.dim() - 2](
        **arguments, stride=tuple(conv.stride), padding=padding, bias=False, device="meta"
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain.train(conv.training)
