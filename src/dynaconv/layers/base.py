"""What every dynamic convolution shares: the arguments of nn.ConvNd, masks, conversion."""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.parameter import is_lazy

from dynaconv import masking
from dynaconv.dispatch import is_channels_last
from dynaconv.functional import conv as convolve
from dynaconv.functional import conv_mixture, conv_per_position, conv_per_sample, deform_conv
from dynaconv.functional._checks import (
    check_amount,
    check_bool,
    check_choice,
    check_floating,
    check_output,
    check_tensors,
)
from dynaconv.layers import causal as causality_of
from dynaconv.layers.arguments import (
    check_border,
    check_channels,
    check_options,
    check_place,
    room_for,
)
from dynaconv.layers.tracing import one_node
from dynaconv.shapes import Geometry, IntOrTuple, Padding, check_padding, ntuple, same_padding

CONVS: dict[int, type[ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}
PADDING_MODES["circular"] = "circular"


class DynamicConv(nn.Module):
    """A convolution whose kernel follows its input: a generator over one primitive.

    A family defines `build` (its parameters, its options as keywords), `generate` (the dynamic
    quantity, from the input), `convolve` (the primitive's call) and `init_from` (an exact start
    from a trained static convolution); `samples` gives small configurations for its tests.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype: as in torch.nn.ConvNd, in that order.
        causal: output p sees nothing after input p, and there is one for each input position:
            what the layer gives at the end of the input up to p. 1-D, where the family has it.
        **options: the family's own.

    Shapes:
        input (N, C_in, *L) or (C_in, *L), padding_mask (N, *L) bool, True where real;
        output (N, C_out, *L_out) or (C_out, *L_out).
    """

    rank: ClassVar[int]
    family: ClassVar[str]
    # The static convolution by rank that the family stands in for.
    static: ClassVar[dict[int, type[ConvNd]]] = CONVS
    # How a causal layer makes its kernel at a position: from the mean of the input up to there
    # ("pooled"), from that position ("pointwise"), or from the window that ends there ("window").
    causality: ClassVar[str | None] = None
    # Options under which a layer can start as a given static convolution.
    exact_options: ClassVar[dict[str, Any]] = {}
    # Learning-rate factors of submodules or parameters that the paper trains slower or faster.
    lr_factors: ClassVar[dict[str, float]] = {}
    # Of the buffer `temperature`, where a family has one, at the start and the end of annealing.
    temperatures: ClassVar[tuple[float, float]] = (30.0, 1.0)
    # Whether the output has the size that nn.ConvNd's has; if not, `output_mask` tells it.
    sized_like_conv: ClassVar[bool] = True
    # Submodules whose cost is the convolution itself, not the making of its kernel.
    convolving: ClassVar[tuple[str, ...]] = ()
    # Parameters that a norm behind them takes out again: their gradient is rounding at most.
    absorbed: ClassVar[tuple[str, ...]] = ()

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: Padding = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_channels(in_channels, out_channels, groups)
        check_bool(name, bias=bias, causal=causal)
        check_choice(name, list(PADDING_MODES), padding_mode=padding_mode)
        check_place(name, device, dtype)
        check_options(type(self), self.build, options)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.options = options
        self.kernel_size = self.resolve_kernel_size(kernel_size)
        self.stride = self.resolve_stride(stride)
        self.dilation = ntuple(dilation, self.rank, "dilation")
        self.padding = check_padding(padding, self.stride, self.rank)
        self.padding_mode = padding_mode
        self.causal = causal
        if causal:
            causality_of.check(self)
        self.register_parameter("bias", None)
        sizes = {"in_channels": in_channels, "out_channels": out_channels}
        with room_for(**sizes, kernel_size=kernel_size, stride=stride, **options):
            if bias:
                self.bias = nn.Parameter(self.initial_bias((out_channels,)))
            self.build(**options)
            self.to(device=device, dtype=dtype)

    # What a family defines -----------------------------------------------------------------

    def build(self) -> None:
        """Makes the family's parameters; its keyword arguments are the family's options."""
        raise NotImplementedError

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The dynamic quantities by name, from x (N, C_in, *L), zero where mask is False."""
        raise NotImplementedError

    def convolve(self, x: Tensor, **dynamic: Tensor) -> Tensor:
        """The family's primitive with what `generate` made."""
        raise NotImplementedError

    def init_from(self, conv: ConvNd) -> None:
        """Takes over a static convolution's function (its bias is copied already).

        ValueError says why that cannot be.
        """
        raise ValueError(f"{self.family} cannot express a static convolution")

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        """Small constructor arguments that cover the family's options."""
        return [{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}]

    @classmethod
    def limits(cls, arguments: dict[str, Any]) -> dict[str, str]:
        """The features (`dynaconv.testing.features`) that a layer of these arguments lacks.

        By name, each with the reason.
        """
        return {}

    # What a user calls ---------------------------------------------------------------------

    @one_node
    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        x, mask = self.prepare(input, padding_mask)
        return self.finish(self.compute(x, mask), x, input)

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the input made of the kernel, by name: coefficients, offsets, weights ..."""
        return self.generate(*self.prepare(input, padding_mask))

    @classmethod
    def like(cls, conv: ConvNd, **options: Any) -> Self:
        """A fresh layer with the arguments of `conv`; its weights are not used."""
        cls.check_static(conv)
        replaced = cls.static[cls.rank]
        names = set(inspect.signature(replaced).parameters) - {"bias", "device", "dtype"}
        arguments = {name: getattr(conv, name) for name in names}
        arguments |= {"device": conv.weight.device, "dtype": conv.weight.dtype}
        layer = cls(**arguments, bias=conv.bias is not None, **options)
        return layer.train(conv.training)

    @classmethod
    def check_static(cls, conv: nn.Module) -> None:
        """ValueError unless `conv` is of the kind that the family stands in for."""
        replaced = cls.static[cls.rank]
        if not isinstance(conv, replaced):
            raise ValueError(f"{cls.__name__} replaces nn.{replaced.__name__}, got {type(conv)}")

    @classmethod
    def from_conv(cls, conv: ConvNd, **options: Any) -> Self:
        """A layer that computes what the trained `conv` computes, until it is trained further.

        Raises:
            ValueError: the family cannot express this convolution; the text says why.
        """
        cls.check_static(conv)
        if options.get("causal"):
            raise ValueError("no nn.ConvNd pads before the input only, as causal=True does")
        layer = cls.like(conv, **(cls.exact_options | options))
        with torch.no_grad():
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
            layer.init_from(conv)
        return layer

    def output_mask(self, padding_mask: Tensor) -> Tensor:
        """The padding mask (N, *L_out) of the output: what each sample has when alone."""
        masking.check_spatial_mask(padding_mask, self.rank)
        if self.padding == "same" or self.causal:
            return padding_mask
        return masking.output_mask(padding_mask, self.geometry())

    @classmethod
    def as_static(cls, arguments: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
        """The part of constructor `arguments` that an nn.ConvNd takes.

        Its output has the shape of this layer's on an input of spatial shape `size`, unless
        `sized_like_conv` is False.
        """
        known = inspect.signature(cls.static[cls.rank]).parameters
        static = {name: value for name, value in arguments.items() if name in known}
        return static | {"padding": "same"} if arguments.get("causal") else static

    def step(
        self, x: Tensor, state: causality_of.State | None = None
    ) -> tuple[Tensor, causality_of.State]:
        """The output of a causal layer at the next position, in decoding.

        Step by step it gives what `forward` gives for the whole sequence.

        Args:
            x: (N, C_in), the next position.
            state: what the step before returned; None at the first position.

        Returns:
            The output (N, C_out), and the state: what the layer keeps of the past.

        Raises:
            ValueError: the layer is not causal, or x has another shape.
        """
        return causality_of.step(self, x, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """nn.Module's, by which `to` works.

        A memory format is refused by tensors of four or five axes that are no kernels, so that
        every tensor goes with as many axes as a kernel has.
        """

        def as_kernels(tensor: Tensor) -> Tensor:
            if is_lazy(tensor) or tensor.dim() < 4:
                return fn(tensor)
            stacked = tensor.dim() - (self.rank + 2)
            if stacked < 0:
                return fn(tensor.unsqueeze(0)).squeeze(0)
            return fn(tensor.flatten(0, stacked)).unflatten(0, tensor.shape[: stacked + 1])

        return super()._apply(as_kernels, recurse)

    # What families use ---------------------------------------------------------------------

    def resolve_kernel_size(self, kernel_size: IntOrTuple) -> tuple[int, ...]:
        """The constructor's kernel_size once a dimension; a family may allow more than ints."""
        return ntuple(kernel_size, self.rank, "kernel_size")

    def resolve_stride(self, stride: IntOrTuple) -> tuple[int, ...]:
        """The constructor's stride once a dimension; a family may allow more than ints."""
        return ntuple(stride, self.rank, "stride")

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """From the prepared input to the output."""
        if self.causal:
            return causality_of.whole(self, x, mask)
        return self.convolve(x, **self.generate(x, mask))

    def prepare(
        self, input: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Checks the input, adds the batch dimension, and zeroes what is not real."""
        name = type(self).__name__
        check_tensors(name, input=input)
        wanted = f"({self.in_channels}, *L) or (N, {self.in_channels}, *L)"
        if input.dim() - self.rank not in (1, 2) or input.shape[-1 - self.rank] != self.in_channels:
            raise ValueError(
                f"{name}: input has shape {tuple(input.shape)}; "
                f"give {wanted} with {self.rank} sizes in L"
            )
        if 0 in input.shape[-self.rank :]:
            raise ValueError(
                f"{name}: input has shape {tuple(input.shape)}; give at least 1 position"
            )
        self.check_alike(input=input)
        self.check_fits(input, tuple(input.shape[-self.rank :]))
        x = input if input.dim() == self.rank + 2 else input.unsqueeze(0)
        if padding_mask is None:
            return x, None
        if self.padding_mode != "zeros":
            raise ValueError(
                f"padding_mask goes with padding_mode='zeros'; with {self.padding_mode!r} a sample "
                "would see its padding, not its own border"
            )
        check_tensors(name, padding_mask=padding_mask)
        mask = padding_mask if padding_mask.dim() == self.rank + 1 else padding_mask.unsqueeze(0)
        masking.check_mask(mask, x)
        return x.masked_fill(~mask.unsqueeze(1), 0), mask

    def check_fits(self, input: Tensor, size: tuple[int, ...]) -> None:
        """The kernel fits into an input of spatial shape `size`, and memory holds the output."""
        if self.padding == "same" or self.causal:
            return
        name, geometry = type(self).__name__, self.geometry()
        padded = tuple(n + 2 * p for n, p in zip(size, geometry.padding, strict=True))
        check_amount(name, input, self.in_channels, padded)
        check_amount(name, input, self.out_channels, check_output(name, size, geometry))

    def check_alike(self, **tensors: Tensor) -> None:
        """The tensors live where the parameters do, and have their dtype."""
        name = type(self).__name__
        check_floating(name, **tensors)
        own = next(self.parameters(), None) if self.bias is None else self.bias
        for what, tensor in tensors.items():
            if own is None:
                return
            if tensor.device != own.device:
                raise ValueError(
                    f"{name}: {what} is on {tensor.device}, the layer on {own.device}; move one"
                )
            kind = own.device.type
            mixes = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            if tensor.dtype != own.dtype and not mixes:
                raise TypeError(
                    f"{name}: {what} has dtype {tensor.dtype}, the layer {own.dtype}; cast one, "
                    f"e.g. {what}.to({own.dtype})"
                )

    def finish(self, output: Tensor, x: Tensor, input: Tensor) -> Tensor:
        """The output in the input's layout, without the batch dimension that `prepare` added."""
        if is_channels_last(x):
            output = output.contiguous(memory_format=CHANNELS_LAST[self.rank])
        return output if input.dim() == x.dim() else output.squeeze(0)

    def pad(self, x: Tensor, geometry: Geometry | None = None) -> tuple[Tensor, Padding]:
        """x padded by padding_mode, and the padding that is left to the primitive.

        `geometry` is that of a kernel other than the layer's own. A causal layer is given its
        input with the past before it.
        """
        geometry = geometry or self.geometry()
        if self.causal:
            return x, 0
        words = isinstance(self.padding, str)
        if self.padding_mode == "zeros":
            return x, self.padding if words else geometry.padding
        before = after = geometry.padding
        if self.padding == "same":
            before, after = same_padding(geometry.kernel, geometry.dilation)
        check_border(self.padding_mode, before, after, tuple(x.shape[2:]))
        widths = [w for pair in zip(reversed(before), reversed(after), strict=True) for w in pair]
        return F.pad(x, widths, mode=PADDING_MODES[self.padding_mode]), 0

    def convolve_static(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One kernel (C_out, C_in / groups, *K) for all samples; bias (C_out,)."""
        x, padding = self.pad(x)
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def convolve_mixture(
        self, x: Tensor, weight: Tensor, coefficients: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Experts (E, C_out, C_in / groups, *K) mixed by (N, E); bias (C_out,) or (E, C_out)."""
        x, padding = self.pad(x)
        geometry = (self.stride, padding, self.dilation, self.groups)
        return conv_mixture(x, weight, coefficients, bias, *geometry)

    def convolve_samples(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A kernel for each sample (N, C_out, C_in / groups, *K); bias (C_out,) or (N, C_out)."""
        x, padding = self.pad(x)
        return conv_per_sample(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def convolve_positions(self, x: Tensor, weight: Tensor) -> Tensor:
        """A kernel for each output position (N, G, *K, *L_out); no bias."""
        x, padding = self.pad(x)
        return conv_per_position(x, weight, self.stride, padding, self.dilation)

    def convolve_deformed(
        self,
        x: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Taps of (C_out, C_in / groups, *K) at offset positions, laid out as in deform_conv."""
        x, padding = self.pad(x)
        geometry = (self.stride, padding, self.dilation, self.groups)
        return deform_conv(x, offset, weight, bias, *geometry, modulation=modulation)

    def add_bias(self, output: Tensor) -> Tensor:
        """output + bias[channel], for primitives without a bias of their own."""
        if self.bias is None:
            return output
        return output + self.bias.to(output.dtype).unflatten(0, (-1, *[1] * self.rank))

    def keep_inside(self) -> None:
        """Moves parameters that left their bounds back between them, where a family has any."""

    def geometry(self) -> Geometry:
        """Kernel, stride, padding and dilation as tuples ("same" of an odd kernel included)."""
        padding: tuple[int, ...] = (0,) * self.rank
        if self.padding == "same":
            padding = same_padding(self.kernel_size, self.dilation)[0]
        elif not isinstance(self.padding, str):
            padding = self.padding
        return Geometry(self.kernel_size, self.stride, padding, self.dilation)

    @property
    def sampled_channels(self) -> int:
        """Channels of what a deformable kernel samples, or adds to."""
        return self.in_channels

    def generator_geometry(self) -> dict[str, Any]:
        """Of a convolution that makes something for each position of the kernel."""
        padding = 0 if self.causal else self.padding
        place = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
        return place | {"padding_mode": self.padding_mode}

    def generate_next(self, seen: Tensor, real: Tensor) -> dict[str, Tensor]:
        """`generate` at the next position of a causal layer, from what `causality` names.

        real (1, past + 1) is True from the first position of the sequence on.
        """
        return self.generate(seen, None)

    @property
    def past(self) -> int:
        """How many positions before its own a causal kernel reaches."""
        return self.dilation[0] * (self.kernel_size[0] - 1)

    def kernel_size_at(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Taps of the kernel for an input of spatial shape `size`."""
        return self.kernel_size

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial shape of the output for an input of spatial shape `size`."""
        keeps = self.padding == "same" or self.causal
        return tuple(size) if keeps else self.geometry().output_size(size)

    def static_geometry(self, size: tuple[int, ...]) -> Geometry:
        """Of the static convolution nearest to this layer on inputs of spatial shape `size`."""
        return self.geometry()

    @property
    def static_groups(self) -> int:
        """Groups of that convolution: as many as channels where the kernel mixes none."""
        mixes_none = getattr(self, "project", self) is None
        return self.in_channels if mixes_none else self.groups

    def projection(self) -> ConvNd | None:
        """A 1x1 convolution to C_out channels for a kernel that mixes none; None for as many."""
        if self.in_channels == self.out_channels:
            return None
        channels = (self.in_channels, self.out_channels)
        return conv_nd(self.rank, *channels, 1, groups=self.groups, bias=False)

    def require_depthwise(self) -> None:
        """ValueError unless the layer is depthwise: what a kernel that mixes no channels can be."""
        if not self.groups == self.in_channels == self.out_channels:
            raise ValueError(
                f"{self.family} mixes no channels, so it can start only as a depthwise convolution "
                f"(groups = in_channels = out_channels), not groups={self.groups}, "
                f"{self.in_channels} to {self.out_channels} channels"
            )

    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of a static kernel: (C_out, C_in / groups, *K)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def initial_kernels(self, count: int | None = None) -> Tensor:
        """Fresh kernels as nn.ConvNd draws them, (count, C_out, C_in / groups, *K), or just one."""
        bound = 1 / math.sqrt(math.prod(self.kernel_shape()[1:]))
        shape = self.kernel_shape() if count is None else (count, *self.kernel_shape())
        return torch.empty(shape).uniform_(-bound, bound)

    def initial_bias(self, shape: tuple[int, ...]) -> Tensor:
        """A fresh bias as nn.ConvNd draws it."""
        bound = 1 / math.sqrt(math.prod(self.kernel_shape()[1:]))
        return torch.empty(shape).uniform_(-bound, bound)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {
            "stride": (1,) * self.rank,
            "padding": (0,) * self.rank,
            "dilation": (1,) * self.rank,
            "groups": 1,
            "padding_mode": "zeros",
        }
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]
        parts += ["bias=False"] if self.bias is None else []
        parts += ["causal=True"] if self.causal else []
        parts += [f"{name}={value!r}" for name, value in self.options.items()]
        return ", ".join(parts)


def conv_nd(rank: int, *args: Any, **kwargs: Any) -> ConvNd:
    """nn.Conv1d, nn.Conv2d or nn.Conv3d."""
    return CONVS[rank](*args, **kwargs)


def at_least(minimum: float, **values: float) -> None:
    """ValueError unless every value is a number of at least `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def positive(**values: float) -> None:
    """ValueError unless every value is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off; nothing to do on devices that have none."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def causal(rank: int, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A causal sample for a family's tests, in 1-D."""
    return [arguments | {"causal": True, "dilation": (2,)}] if rank == 1 else []
