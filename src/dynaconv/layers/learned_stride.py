"""DiffStride: a convolution that learns its stride (Riad, ICLR 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import conv, spectral_resize
from dynaconv.functional._checks import check_module
from dynaconv.functional.spectral_resize import resized_shape
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, positive
from dynaconv.masking import each_size, fill_up, mask_from_sizes, sizes_from_mask
from dynaconv.registry import register_family
from dynaconv.shapes import Geometry


@register_family("learned_stride", primitive="spectral_resize", paper="Riad et al., ICLR 2022")
class LearnedStrideConv(DynamicConv):
    """A convolution at stride 1, then a crop of its spectrum whose size is learned.

        s = max(L / strides, 2),    y = spectral_resize(conv(x) + b, s, smoothness)

    `strides` holds one number a dimension, a parameter that starts at `stride`, the same for every
    input. Its gradient comes from the crop's soft edge, see `dynaconv.functional.spectral_resize`:
    a ramp of `smoothness` frequencies, so that the output has more than L / strides positions.
    In training each call first moves `strides` back between `min_stride` and `max_stride`.
    Weight decay would pull the strides down: leave them out of it.

    By default the layer computes what the authors' code does, in 2-D, and the same arithmetic in
    1-D and 3-D: where L > smoothness, strides count as at least L / (L - smoothness), which keeps
    part of the ramp inside the spectrum, and the gradient passes through that bound and those
    above. Their code stores the raised stride, this layer only computes with it: an input's size
    leaves no trace. Such a layer is never the identity after the convolution, scales its values
    with the stride, and treats odd sizes unevenly. `published=False` keeps the scale, treats all
    frequencies alike, and at stride 1 is the identity, from which the stride still grows by the
    gradient at the highest frequency; `from_conv` takes it.

    `cost` and `stride_cost` give the paper's regulariser. Branches that are added need the same
    strides: `shortcut.strides = main.strides`.

    Args:
        stride: where the strides start, floats of at least 1.
        smoothness: the ramp's length in frequencies. As published, one of 2 or less leaves no ramp
            in the last dimension at the lowest stride, which then cannot learn.
        min_stride, max_stride: bounds of the strides. Without max_stride there is none above, and
            a stride beyond L / 2, which changes nothing more, does not come back by itself.
        shared: one stride for all dimensions.
        published: the authors' arithmetic.
    """

    sized_like_conv = False
    exact_options = {"published": False}

    def build(
        self,
        smoothness: float = 4.0,
        min_stride: float = 1.0,
        max_stride: float | None = None,
        shared: bool = False,
        published: bool = True,
    ) -> None:
        positive(smoothness=smoothness)
        at_least(1, min_stride=min_stride)
        if max_stride is not None:
            at_least(min_stride, max_stride=max_stride)
        top = float("inf") if max_stride is None else max_stride
        if not all(min_stride <= s <= top for s in self.stride):
            raise ValueError(
                f"stride={self.stride} must lie between min_stride={min_stride} and "
                f"max_stride={max_stride}"
            )
        if shared and len(set(self.stride)) > 1:
            raise ValueError(f"stride={self.stride}: shared=True needs one stride for all")
        self.smoothness, self.min_stride, self.max_stride = smoothness, min_stride, max_stride
        self.shared, self.published = shared, published
        self.weight = nn.Parameter(self.initial_kernels())
        self.strides = nn.Parameter(torch.tensor(self.stride[:1] if shared else self.stride))

    def resolve_stride(self, stride: float | Sequence[float]) -> tuple[float, ...]:  # type: ignore[override]
        """Floats of at least 1, one a dimension."""
        values = tuple(stride) if isinstance(stride, Sequence) else (stride,)
        values = values * self.rank if len(values) == 1 else values
        if len(values) != self.rank:
            raise ValueError(f"stride={stride!r} has {len(values)} entries; give 1 or {self.rank}")
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise TypeError(f"stride={stride!r} must be a number or a tuple of {self.rank} numbers")
        if not all(1 <= v < float("inf") for v in values):
            raise ValueError(f"stride={stride!r} must be at least 1, and finite")
        return tuple(float(v) for v in values)

    @classmethod
    def as_static(cls, arguments: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
        """With the nearest whole stride."""
        static = super().as_static(arguments, size)
        if "stride" in static:
            stride = static["stride"]
            many = isinstance(stride, Sequence)
            static["stride"] = tuple(round(s) for s in stride) if many else round(stride)
        return static

    def geometry(self) -> Geometry:
        """That of the convolution: its stride is 1."""
        return super().geometry()._replace(stride=(1,) * self.rank)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return self.resized_shape(super().output_size(size))

    @torch.no_grad()
    def keep_inside(self) -> None:
        """Moves the strides back between `min_stride` and `max_stride`."""
        self.strides.clamp_(self.min_stride, self.max_stride)

    def bounded_strides(self) -> Tensor:
        """The strides (D,) between their bounds; the gradient passes as if there were none."""
        if self.training:
            self.keep_inside()
        # Half precision cannot hold a size.
        strides = self.strides.float() if self.strides.dtype.itemsize < 4 else self.strides
        return _straight_through(strides, strides.clamp(self.min_stride, self.max_stride)).expand(
            self.rank
        )

    def cropped_size(self, shape: Sequence[int]) -> Tensor:
        """s: the fractional size (D,) that a convolution output of shape L is cropped to."""
        strides = self.bounded_strides()
        lengths = torch.tensor(shape, dtype=strides.dtype, device=strides.device)
        if self.published:
            room = lengths - self.smoothness
            least = torch.where(room > 0, lengths / room, 1)
            least = least.max() if self.shared else least
            raised = torch.maximum(strides, least).clamp(max=self.max_stride or float("inf"))
            strides = _straight_through(strides, raised)
        # Two positions at least, as published, so that no dimension vanishes.
        return (lengths / strides).clamp(min=2)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"stride": self.bounded_strides().expand(x.shape[0], -1)}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x, padding = self.pad(x)
        y = conv(x, self.weight, self.bias, 1, padding, self.dilation, self.groups)
        return self.resize(y) if mask is None else self.resize_each(y, mask)

    def resize(self, y: Tensor) -> Tensor:
        """The convolution's output (N, C, *L) at the learned stride."""
        size = self.cropped_size(y.shape[2:])
        return spectral_resize(y, size, self.smoothness, self.published)

    def resize_each(self, y: Tensor, mask: Tensor) -> Tensor:
        """Each sample's real part at the learned stride, samples of one size together."""
        shape = self.output_mask(mask).shape[1:]
        dense = super().output_mask(mask)
        if not dense.any():
            return y.new_zeros(*y.shape[:2], *shape)
        return fill_up(each_size(self.resize, y, dense).data, shape)

    def output_mask(self, padding_mask: Tensor) -> Tensor:
        """The padding mask (N, *L_out) of the output, at least as large as the full size gives."""
        mask = super().output_mask(padding_mask)
        sizes, of_sample = sizes_from_mask(mask).unique(dim=0, return_inverse=True)
        resized = [self.resized_shape(size) for size in [*sizes.tolist(), mask.shape[1:]]]
        shape = [max(column) for column in zip(*resized, strict=True)]
        return mask_from_sizes(torch.tensor(resized, device=mask.device)[of_sample], shape)

    def resized_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The output's spatial shape for a convolution output of spatial shape `shape`."""
        if min(shape) < 1:
            return (0,) * self.rank
        with torch.no_grad():
            size = self.cropped_size(shape)
        return resized_shape(shape, size, self.smoothness, self.published)

    def cost(self) -> Tensor:
        """prod_d 1 / strides_d: the share of positions that the layer keeps, differentiable."""
        return self.bounded_strides().reciprocal().prod()

    def init_from(self, conv: ConvNd) -> None:
        if any(s != 1 for s in self.stride):
            raise ValueError(
                f"stride {conv.stride}: a convolution takes every s-th value, learned_stride a "
                "smooth version of all of them, so only stride 1 starts as the same function"
            )
        if self.published:
            raise ValueError(
                "with published=True even stride 1 damps high frequencies; give published=False"
            )
        self.weight.copy_(conv.weight)

    @classmethod
    def limits(cls, arguments: dict[str, Any]) -> dict[str, str]:
        return super().limits(arguments) | {
            "onnx": "ONNX has no stable sort and no FFT of a size that a parameter decides",
            "vmap": "stacked layers whose strides differ have outputs of different sizes",
            "compile_mask": "each sample's real size and the strides decide the output's size",
        }

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 2,
                "stride": 1.5,
                "groups": 2,
                "bias": False,
                "smoothness": 3.0,
                "max_stride": 3.0,
                "shared": True,
            },
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 3,
                "padding": "same",
                "smoothness": 2.5,
                "published": False,
            },
        ]


def stride_cost(model: nn.Module) -> Tensor:
    """The paper's regulariser over a whole model, for `loss + weight * stride_cost(model)`.

        J = sum_l prod_{i <= l} cost_i,    cost_i = prod_d 1 / strides_i,d

    Each term is proportional to the positions that are left after layer l, and with them to what
    the layers there compute and store. The order of the layers is that of `model.modules()`;
    layers that share their strides count once.

    Raises:
        ValueError: the model has no LearnedStrideConv.
    """
    check_module("stride_cost", model=model)
    layers = [m for m in model.modules() if isinstance(m, LearnedStrideConv)]
    if not layers:
        raise ValueError("stride_cost: the model has no LearnedStrideConv layer")
    distinct = {layer.strides: layer for layer in layers}.values()
    return torch.stack([layer.cost() for layer in distinct]).cumprod(0).sum()


def _straight_through(value: Tensor, replaced: Tensor) -> Tensor:
    """`replaced`, exactly, with the gradient of `value`."""
    return replaced.detach() + (value - value.detach())
