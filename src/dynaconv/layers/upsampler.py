"""What layers that enlarge their input share: `stride` says how many times."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dynaconv.functional._checks import check_amount
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.layers.transposed import CONV_TRANSPOSES
from dynaconv.masking import check_spatial_mask
from dynaconv.shapes import IntOrTuple, Padding, check_padding


class Upsampler(DynamicConv):
    """(N, C_in, *L) to (N, C_out, *L * stride).

    The arguments of nn.ConvNd (`kernel_size` may be left out), with `stride` as in
    nn.ConvTransposeNd: output positions for each input position. Windows are centred and dense,
    so padding and dilation stay at their defaults.
    """

    static = CONV_TRANSPOSES
    # The published kernel_size.
    window: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple | None = None,
        stride: IntOrTuple = 2,
        padding: Padding = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            self.window if kernel_size is None else kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            **options,
        )
        given = check_padding(padding, (1,) * self.rank, self.rank)
        if given not in ("same", (0,) * self.rank) or max(self.dilation) > 1:
            raise ValueError(
                f"{self.family} enlarges its input {self.stride} times by windows that are centred "
                f"and dense; leave padding=0 and dilation=1, not {padding}, {dilation}"
            )

    @classmethod
    def as_static(cls, arguments: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
        """nn.ConvTransposeNd without overlap: the same output size."""
        known = ("in_channels", "out_channels", "groups", "bias")
        stride = arguments.get("stride", 2)
        kept = {name: arguments[name] for name in known if name in arguments}
        return kept | {"kernel_size": stride, "stride": stride}

    def check_fits(self, input: Tensor, size: tuple[int, ...]) -> None:
        channels = max(self.in_channels, self.out_channels)
        check_amount(type(self).__name__, input, channels, self.output_size(size))

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n * s for n, s in zip(size, self.stride, strict=True))

    def output_mask(self, padding_mask: Tensor) -> Tensor:
        check_spatial_mask(padding_mask, self.rank)
        self.check_fits(padding_mask, tuple(padding_mask.shape[1:]))
        for d, s in enumerate(self.stride):
            padding_mask = padding_mask.repeat_interleave(s, 1 + d)
        return padding_mask

    @classmethod
    def like(cls, conv: ConvNd, **options: Any) -> Self:
        """A fresh layer that enlarges as `conv` does (an nn.ConvTransposeNd), by its own window.

        ValueError: conv's output is not `stride` times its input.
        """
        cls.check_static(conv)
        sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.output_padding)
        for k, s, p, d, extra in zip(*sizes, strict=True):
            if d * (k - 1) + 1 + extra - 2 * p != s:  # type: ignore[operator]
                raise ValueError(
                    f"{cls.family} makes an output of stride times the input's size; {conv} does "
                    "not"
                )
        place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        kept = {name: getattr(conv, name) for name in ("stride", "groups")}
        kept |= place | {"bias": conv.bias is not None} | options
        return cls(conv.in_channels, conv.out_channels, **kept).train(conv.training)

    @classmethod
    def from_conv(cls, conv: ConvNd, **options: Any) -> Self:
        """ValueError: no family of up-samplers starts as a given nn.ConvTransposeNd."""
        cls.check_static(conv)
        raise ValueError(
            f"{cls.family} enlarges by weights that follow the input; it mixes no channels as "
            "nn.ConvTransposeNd does"
        )
