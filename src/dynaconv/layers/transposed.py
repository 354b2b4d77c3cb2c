"""Transposed forms: nn.ConvTransposeNd whose kernel follows the input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv_transpose_per_sample, deform_conv_transpose
from dynaconv.functional._checks import check_amount, check_enlarged, check_output_padding
from dynaconv.layers.base import ConvNd, DynamicConv, conv_nd
from dynaconv.masking import check_spatial_mask, mask_from_sizes, sizes_from_mask
from dynaconv.shapes import IntOrTuple, enlarged_size, mixed, ntuple

CONV_TRANSPOSES: dict[int, type[ConvNd]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Transposed(DynamicConv):
    """The arguments of nn.ConvTransposeNd in that order; the kernel is generated as by the family.

    y = (the family's convolution, as a matrix)^T x, output size
    (L - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1.
    Kernels are kept and shown as those of nn.ConvNd, (C_out, C_in / groups, *K).
    """

    static = CONV_TRANSPOSES

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: IntOrTuple = 0,
        output_padding: IntOrTuple = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: IntOrTuple = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if padding_mode != "zeros" or isinstance(padding, str):
            raise ValueError(
                "a transposed convolution takes numbers as padding and padding_mode='zeros', not "
                f"{padding!r}, {padding_mode!r}"
            )
        self.output_padding = ntuple(output_padding, self.rank, "output_padding", minimum=0)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
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
        check_output_padding(type(self).__name__, self.output_padding, self.geometry())

    @property
    def sampled_channels(self) -> int:
        return self.out_channels

    def generator_geometry(self) -> dict[str, Any]:
        """The kernel's positions are the input's."""
        return {"padding": "same", "dilation": self.dilation}

    def convolve_static(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = swap_channels(weight, self.groups, 0)
        return FUNCTIONS[self.rank](x, weight, bias, *self._geometry())

    def convolve_mixture(
        self, x: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None
    ) -> Tensor:
        if bias is not None and bias.dim() == 2:
            bias = coefficients @ bias
        return self.convolve_samples(x, mixed(weight, coefficients), bias)

    def convolve_samples(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = swap_channels(weight, self.groups, 1)
        return conv_transpose_per_sample(x, weight, bias, *self._geometry())

    def convolve_deformed(
        self,
        x: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        weight = swap_channels(weight, self.groups, 0)
        geometry = (*self._geometry(), modulation)
        return deform_conv_transpose(x, offset, weight, bias, *geometry)

    def _geometry(self) -> tuple[Any, ...]:
        """stride, padding, output_padding, groups and dilation, as torch.nn.functional has them."""
        return (self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def check_fits(self, input: Tensor, size: tuple[int, ...]) -> None:
        name = type(self).__name__
        output = check_enlarged(name, size, self.geometry(), self.output_padding)
        check_amount(name, input, self.out_channels, output)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return enlarged_size(size, self.geometry(), self.output_padding)

    def output_mask(self, padding_mask: Tensor) -> Tensor:
        check_spatial_mask(padding_mask, self.rank)
        self.check_fits(padding_mask, tuple(padding_mask.shape[1:]))
        columns = self.output_size(sizes_from_mask(padding_mask).unbind(1))  # type: ignore[arg-type]
        shape = self.output_size(tuple(padding_mask.shape[1:]))
        return mask_from_sizes(torch.stack(columns, 1).clamp(min=0), shape)  # type: ignore[arg-type]

    def init_from(self, conv: ConvNd) -> None:
        channels = (self.in_channels, self.out_channels)
        plain = conv_nd(self.rank, *channels, self.kernel_size, groups=self.groups, bias=False)
        plain.weight = nn.Parameter(swap_channels(conv.weight, self.groups, 0))
        super().init_from(plain)

    def extra_repr(self) -> str:
        extra = f", output_padding={self.output_padding}" if any(self.output_padding) else ""
        return super().extra_repr() + extra

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        """The family's own, enlarging."""
        changes: list[dict[str, Any]] = [
            {"stride": 2, "padding": 1, "output_padding": 1},
            {"dilation": (2,) * rank},
        ]
        chosen = [a for a in super().samples(rank) if not a.get("causal")]
        plain = [
            {k: v for k, v in a.items() if k not in ("padding", "padding_mode")} for a in chosen
        ]
        return [a | c for a, c in zip(plain, changes, strict=False)]


def swap_channels(weight: Tensor, groups: int, dim: int) -> Tensor:
    """Kernels of nn.ConvNd as those of nn.ConvTransposeNd, or back.

    (C_a, C_b / groups, *K), the channels from `dim` on, to (C_b, C_a / groups, *K).
    """
    return weight.unflatten(dim, (groups, -1)).transpose(dim + 1, dim + 2).flatten(dim, dim + 1)
