"""Dynamic snake convolution: a chain of taps that winds along an axis (Qi, ICCV 2023)."""

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import deform_conv
from dynaconv.functional._checks import check_output
from dynaconv.layers.attention import SafeBatchNorm, batch_norm, masked_group_norm
from dynaconv.layers.base import ConvNd, DynamicConv, conv_nd, positive, without_autocast
from dynaconv.layers.sampling import around_centres, fitted, repeated, zero_
from dynaconv.masking import sizes_from_mask
from dynaconv.registry import register_family
from dynaconv.shapes import IntOrTuple

BORDERS = ("clamp", "zeros")
NORMS = ("group", "batch")


@register_family("snake", primitive="deform_conv", paper="Qi et al., ICCV 2023", ranks=(2, 3))
class SnakeConv(DynamicConv):
    """A chain of taps along one axis; each swings on from its neighbour nearer the centre.

        d = tanh(norm(offset_conv(x)))
        o[0] = 0,    o[i] = o[i - 1] + d[i],    o[-i] = o[1 - i] + d[-i]
        y[p] = b + sum_i W[i] x(p + i e + extend_scope o[i, p])

    e is a step along the axis; o moves taps across it, in the other dimensions alone. There are
    kernel_size[axis] taps. The window's size in other dimensions counts for the output's shape, as
    that of nn.ConvNd, and the chain starts in its middle: a 9x9 window and padding 4 keep the size
    of the input. offset_conv is 3 wide and sees the window's centre. DSCNet's norm and ReLU after
    the convolution are not part of the layer.

    As published, norm is a group norm in 2-D, of neighbouring channels, so that they need not
    belong to one dimension, and a batch norm in 3-D; it sees offsets along the axis too, which then
    go unused. In 2-D positions outside the input are moved onto its border, here in 3-D as well:
    the published 3-D code reads 0 before it, and the border for one position after it. Published
    3-D chains along the first axis swing at their centre too, in one dimension; here none does.

    Args:
        axis: the chain's; by default where the window is longest, the last of equals. Published
            `morph` counts from the last axis: morph 0 is axis -1.
        extend_scope: how far, in positions, a tap swings from its neighbour at most.
        if_offset: False leaves the chain straight.
        border: "clamp" moves positions onto the border of the (padded) input, "zeros" reads 0
            outside. `from_conv` takes "zeros".
        norm: "group" or "batch"; by default as published.
    """

    exact_options = {"border": "zeros"}
    absorbed = ("offset_conv.bias",)
    offset_conv: ConvNd | None
    norm: nn.GroupNorm | SafeBatchNorm | None

    def build(
        self,
        axis: int | None = None,
        extend_scope: float = 1.0,
        if_offset: bool = True,
        border: str = "clamp",
        norm: str | None = None,
    ) -> None:
        positive(extend_scope=extend_scope)
        norm = norm or ("group" if self.rank == 2 else "batch")
        for name, value, known in (("border", border, BORDERS), ("norm", norm, NORMS)):
            if value not in known:
                raise ValueError(f"{name}={value!r}; choose from {list(known)}")
        if self.taps == 1:
            raise ValueError(
                f"a chain of one tap, kernel_size={self.kernel_size} along axis {self.axis}, has "
                "nothing to swing; give a larger kernel_size"
            )
        self.extend_scope, self.border = extend_scope, border
        self.weight = nn.Parameter(self.initial_kernels())
        self.offset_conv = self.norm = None
        if if_offset:
            made = self.rank * self.taps
            self.offset_conv = conv_nd(self.rank, self.in_channels, made, 3, self.stride)
            self.norm = nn.GroupNorm(self.taps, made) if norm == "group" else SafeBatchNorm(made)

    def resolve_kernel_size(self, kernel_size: IntOrTuple) -> tuple[int, ...]:
        """The window's size; settles the axis, for `kernel_shape`."""
        size, axis = super().resolve_kernel_size(kernel_size), self.options.get("axis")
        if axis is None:
            axis = max((k, d) for d, k in enumerate(size))[1]
        if axis not in range(-self.rank, self.rank):
            raise ValueError(f"axis={axis!r}; give {-self.rank} ... {self.rank - 1}")
        self.axis = axis % self.rank
        self.taps = size[self.axis]
        return size

    def kernel_shape(self) -> tuple[int, ...]:
        chain = (self.taps if d == self.axis else 1 for d in range(self.rank))
        return (self.out_channels, self.in_channels // self.groups, *chain)

    # Where the taps lie --------------------------------------------------------------------

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """offset (N, taps * D, *L_out), from the straight chain, as `deform_conv` lays it out."""
        if self.padding != "same":
            check_output(type(self).__name__, tuple(x.shape[2:]), self.geometry())
        # Positions need more digits than half precision has: no autocast here.
        with without_autocast(x.device.type):
            offset = self.extend_scope * self.swing(x, mask)
        if self.border == "clamp":
            straight = self.straight(offset)
            offset = _clamped(straight + offset, self.pad(x)[0], mask) - straight
        return {"offset": offset.flatten(1, 2)}

    def swing(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """o (N, taps, D, *L_out), 0 along the axis; float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.offset_conv is None:
            size = self.output_size(tuple(x.shape[2:]))
            return x.new_zeros(x.shape[0], self.taps, self.rank, *size, dtype=wide)
        seen = around_centres(self, x.to(self.offset_conv.weight.dtype), (3,) * self.rank)
        made, real = self.offset_conv(seen), None if mask is None else self.output_mask(mask)
        if isinstance(self.norm, nn.GroupNorm):
            made = masked_group_norm(self.norm, made, real)
        else:
            made = batch_norm(self.norm, made, real)  # type: ignore[arg-type]
        steps = torch.tanh(made).to(wide).unflatten(1, (self.rank, self.taps)).unbind(1)
        swung = [
            torch.zeros_like(step) if d == self.axis else _outward(step)
            for d, step in enumerate(steps)
        ]
        return torch.stack(swung, 2)

    def straight(self, offset: Tensor) -> Tensor:
        """Where taps lie without an offset, in the padded input: (taps, D, *L_out)."""
        before = self.geometry().padding if self.padding_mode == "zeros" else (0,) * self.rank
        middle = [d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        first = [m - b for m, b in zip(middle, before, strict=True)]
        first[self.axis] = -before[self.axis]
        chain = self.chain(offset.device, self.dilation[self.axis])
        before = tuple(-f for f in first)
        return repeated(chain, tuple(offset.shape[-self.rank :]), self.stride, before).to(offset)

    def chain(self, device: torch.device, dilation: int) -> Tensor:
        """The taps of a straight chain, (taps, D), from its first."""
        along = torch.arange(self.rank, device=device) == self.axis
        return dilation * torch.arange(self.taps, device=device).unsqueeze(1) * along

    # The convolution -----------------------------------------------------------------------

    def convolve(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        """`deform_conv` over all of x, whose windows need not be where the layer has them.

        They are as many, which a stride and zeros at the end see to; offsets lead from there to
        the chain. Windows of the chain alone, at the layer's places, may leave part of x out.
        """
        output = tuple(offset.shape[2:])
        x, stride = fitted(self.pad(x)[0], tuple(self.weight.shape[2:]), output)
        there = repeated(self.chain(x.device, 1), output, stride, (0,) * self.rank)
        offset = offset + (self.straight(offset) - there).flatten(0, 1)
        return deform_conv(x, offset, self.weight, self.bias, stride, groups=self.groups)

    def init_from(self, conv: ConvNd) -> None:
        """A straight chain: norm's weight and bias start at 0, and learn from there."""
        if self.weight.shape != conv.weight.shape:
            raise ValueError(
                f"the taps of a chain along axis {self.axis} cannot be those of kernel_size="
                f"{self.kernel_size}; only kernels of size 1 in the other dimensions"
            )
        padded = self.padding_mode == "zeros" and self.padding not in ((0,) * self.rank, "valid")
        if padded and self.border == "clamp":
            raise ValueError(
                "border='clamp' reads the border where the convolution reads zeros; "
                "border='zeros' starts as it"
            )
        self.weight.copy_(conv.weight)
        zero_(self.norm)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        small = {"in_channels": 4, "out_channels": 4, "groups": 2, "bias": False}
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            small
            | {"kernel_size": 2, "stride": 2, "axis": 0, "extend_scope": 1.5, "border": "zeros"},
            small
            | {
                "kernel_size": (3, *(1,) * (rank - 1)),
                "padding": "same",
                "dilation": (2,) * rank,
                "norm": "batch" if rank == 2 else "group",
            },
            small | {"kernel_size": 3, "axis": -2, "if_offset": False},
        ]


def _outward(steps: Tensor) -> Tensor:
    """Sums of steps (N, taps, *L) from the middle tap, which stays at 0, to each other one."""
    middle = (steps.shape[1] - 1) // 2
    before = steps[:, :middle].flip(1).cumsum(1).flip(1)
    after = steps[:, middle + 1 :].cumsum(1)
    return torch.cat([before, torch.zeros_like(steps[:, :1]), after], 1)


def _clamped(positions: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Positions (N, taps, D, *L_out) outside the real part of x (N, C, *L) moved to its border."""
    if mask is None:
        sizes = torch.tensor([x.shape[2:]], device=x.device)
    else:
        sizes = sizes_from_mask(mask).clamp(min=1)
    last = (sizes - 1)[:, None, :, *(None,) * (x.dim() - 2)]
    return positions.clamp(min=0).minimum(last.to(positions.dtype))
