"""The kernel's size follows the input's shape; one set of weights serves every size."""

from collections.abc import Callable, Sequence
from math import prod, trunc
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.functional import conv, resample_kernel
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.layers.continuous import KernelNetwork
from dynaconv.masking import check_spatial_mask, each_size, mask_from_sizes, sizes_from_mask
from dynaconv.registry import register_family
from dynaconv.shapes import LARGEST, Geometry, ntuple, same_padding, surely

KERNELS = ("area", "pinv", "continuous")
SizeRule = int | float | Sequence[int | float] | Callable[[tuple[int, ...]], int | Sequence[int]]


@register_family(
    "shapeconv", primitive="conv", paper="Beyer, CVPR 2023 (FlexiViT); Romero, ICLR 2022 (CKConv)"
)
class ShapeConv(DynamicConv):
    """A convolution whose kernel grows with its input.

        K = kernel_size(L),    W = resample(base, K)   or   W[k] = network(k) |base| / |K|
        y = b + W * x

    `kernel_size` is a fraction of the input's size, a function of its spatial shape, or an int:

        ShapeConv2d(3, 64, 0.5)                       half its height by half its width
        ShapeConv2d(3, 64, lambda L: (L[0] // 4, 3))
        ShapeConv2d(3, 64, 3, reference=(32, 32))     3 at 32x32, 7 at 64x64, 1 at 8x8

    With a `reference`, ints grow and shrink by an even number, and the padding by half of it, so
    that the output has nn.ConvNd's size at every input size. The weights live on a grid of
    `base_size` taps and are resampled by `dynaconv.functional.resample_kernel`, or come from a
    network over coordinates, which no size is closer to. Both keep the taps' sum, so an enlarged
    image is answered as the original: layers trained at some sizes stay calibrated at others.

    Args:
        kernel_size: as above, or one int or fraction a dimension.
        kernel: "area" or "pinv", modes of resampling, or "continuous".
        base_size: taps of the base grid; default: the ints of kernel_size, 7 for the others.
        reference: the input's spatial shape at which an int kernel_size holds; "first" takes that
            of the first input (kept in the state_dict; give it where processes see different ones).
        hidden: hidden features of the network.
        omega_0: frequencies of the network's start: low ones are the same kernel at every size.
    """

    exact_options = {"reference": "first"}

    def resolve_kernel_size(self, kernel_size: Any) -> tuple[int, ...]:
        """Keeps the rule; the base grid's size stands in for a size of its own."""
        base = self.options.get("base_size")
        if not callable(kernel_size):
            given = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,)
            given = given * self.rank if len(given) == 1 else given
            for size in given:
                if isinstance(size, float) and not 0 < size < LARGEST:
                    raise ValueError(
                        f"kernel_size={kernel_size!r}: a fraction must be above 0, and finite"
                    )
            whole = tuple(1 if isinstance(size, float) else size for size in given)
            ntuple(whole, self.rank, "kernel_size")
            kernel_size = given
            own = tuple(7 if isinstance(size, float) else size for size in given)
            base = own if base is None else base
        self.size_rule: Any = kernel_size
        return ntuple(7 if base is None else base, self.rank, "base_size")

    def build(
        self,
        kernel: str = "area",
        base_size: int | Sequence[int] | None = None,
        reference: Sequence[int] | str | None = None,
        hidden: int = 32,
        omega_0: float = 0.25,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r}; choose from {KERNELS}")
        self.kernel, self.follows_first = kernel, reference == "first"
        self.reference: tuple[int, ...] | None = None
        if reference is not None and not self.follows_first:
            if isinstance(reference, str):
                raise ValueError(f"reference={reference!r}; give a shape or 'first'")
            self.reference = ntuple(reference, self.rank, "reference")
        if kernel == "continuous":
            channels = (self.out_channels, self.in_channels // self.groups)
            self.network = KernelNetwork(
                self.rank, channels, hidden, omega_0, taps=prod(self.kernel_size)
            )
        else:
            self.weight = nn.Parameter(self.initial_kernels())

    def kernel_size_at(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Taps of the kernel for an input of spatial shape `size`."""
        if callable(self.size_rule):
            return ntuple(self.size_rule(tuple(size)), self.rank, "kernel_size(shape)")
        reference = self.reference or size
        return tuple(
            max(1, trunc(k * n + 0.5)) if isinstance(k, float) else k + 2 * growth(k, n, r)
            for k, n, r in zip(self.size_rule, size, reference, strict=True)
        )

    def kernel_at(self, taps: tuple[int, ...]) -> Tensor:
        """The kernel (C_out, C_in / groups, *taps)."""
        if self.kernel != "continuous":
            return resample_kernel(self.weight, taps, self.kernel)
        made = self.network(taps) * (prod(self.kernel_size) / prod(taps))
        return made.to(self.network.output.weight.dtype)

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`size`: the kernel's extent for each sample, (N, D), in positions of the input."""
        self._refer(x.shape[2:])
        full = torch.tensor(x.shape[2:]).expand(x.shape[0], self.rank)
        sizes = (full if mask is None else sizes_from_mask(mask)).tolist()
        taps = torch.tensor([self.kernel_size_at(tuple(size)) for size in sizes])
        span = (taps.reshape(-1, self.rank) - 1) * torch.tensor(self.dilation)
        return {"size": (1 + span).to(x.device, torch.float32)}

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._refer(x.shape[2:])
        return self.at_one_size(x) if mask is None else each_size(self.at_one_size, x, mask).data

    def at_one_size(self, x: Tensor) -> Tensor:
        """The convolution of samples that all are of one size."""
        geometry = self.static_geometry(tuple(x.shape[2:]))
        # A kernel that shrank by more than the padding leaves out what its first taps saw.
        for d, p in enumerate(geometry.padding):
            if not surely(p >= 0):
                less = max(-p, 0)
                x = x.narrow(2 + d, less, x.shape[2 + d] - 2 * less)
        inner = geometry._replace(padding=tuple(max(p, 0) for p in geometry.padding))
        x, padding = self.pad(x, inner)
        kernel = self.kernel_at(geometry.kernel)
        return conv(x, kernel, self.bias, self.stride, padding, self.dilation, self.groups)

    def static_geometry(self, size: tuple[int, ...]) -> Geometry:
        """Kernel and padding for an input of spatial shape `size`."""
        kernel, own = self.kernel_size_at(size), self.geometry()
        padding = own.padding
        if self.padding == "same":
            padding = same_padding(kernel, self.dilation)[0]
        elif self.reference is not None and not isinstance(self.padding, str):
            padding = tuple(
                p if isinstance(rule, float) else p + d * (k - rule) // 2
                for p, d, k, rule in zip(padding, own.dilation, kernel, self.size_rule, strict=True)
            )
        return own._replace(kernel=kernel, padding=padding)

    def check_fits(self, input: Tensor, size: tuple[int, ...]) -> None:
        """The primitive sees to that: the kernel is another one for each size."""

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return (
            tuple(size) if self.padding == "same" else self.static_geometry(size).output_size(size)
        )

    def output_mask(self, padding_mask: Tensor) -> Tensor:
        check_spatial_mask(padding_mask, self.rank)
        self._refer(padding_mask.shape[1:])
        sizes = sizes_from_mask(padding_mask).tolist() or [list(padding_mask.shape[1:])]
        outputs = torch.tensor([self.output_size(tuple(size)) for size in sizes])
        shape = outputs.amax(0).tolist()
        return mask_from_sizes(outputs[: padding_mask.shape[0]].to(padding_mask.device), shape)

    def init_from(self, conv: ConvNd) -> None:
        """At the reference, or without one, the kernel is the convolution's own."""
        if self.kernel == "continuous":
            raise ValueError("a continuous kernel holds no given taps; use kernel='area' or 'pinv'")
        if self.kernel_size != tuple(conv.kernel_size):
            raise ValueError(
                f"base_size={self.kernel_size} resamples the kernel {tuple(conv.kernel_size)}; "
                "leave base_size out"
            )
        self.weight.copy_(conv.weight)

    def _refer(self, shape: Sequence[int]) -> None:
        """Takes the first input's shape as the reference."""
        if self.follows_first and self.reference is None:
            self.reference = tuple(shape)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.reference or (), dtype=torch.long)

    def set_extra_state(self, state: Tensor) -> None:
        if self.follows_first:
            self.reference = tuple(state.tolist()) or None

    def extra_repr(self) -> str:
        rule = self.size_rule
        shown = getattr(rule, "__name__", repr(rule)) if callable(rule) else tuple(rule)
        return super().extra_repr().replace(f"={self.kernel_size}", f"={shown}", 1)

    @classmethod
    def as_static(cls, arguments: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
        layer = cls(**arguments)
        geometry = layer.static_geometry(size)
        padding = layer.padding if isinstance(layer.padding, str) else geometry.padding
        known = super().as_static(arguments, size)
        return known | {"kernel_size": geometry.kernel, "padding": padding}

    @classmethod
    def limits(cls, arguments: dict[str, Any]) -> dict[str, str]:
        found = {"compile_mask": "each sample's real size decides the size of its own kernel"}
        if arguments.get("kernel") == "pinv":
            reason = "kernels that grow have another pseudo-inverse than those that shrink"
            found |= {"compile": reason, "export": reason, "onnx": reason}
        return super().limits(arguments) | found

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        shared = {"in_channels": 4, "out_channels": 6}
        reference = {1: (11,), 2: (9, 10), 3: (6, 7, 8)}[rank]
        # At sizes like that, kernels smaller than the base and larger ones.
        fraction, base = {1: (0.4, 5), 2: (0.5, (5, 6)), 3: (0.5, 4)}[rank]
        return [
            shared | {"kernel_size": 3, "padding": 1, "reference": reference},
            shared
            | {"kernel_size": fraction, "groups": 2, "bias": False}
            | {"kernel": "pinv", "base_size": base},
            shared | {"kernel_size": 0.3, "padding": 1, "kernel": "continuous", "hidden": 8},
        ]


def growth(taps: int, size: int, reference: int) -> int:
    """By how many taps on each side a kernel grows (or shrinks, to 1 or 2) with its input.

    round(taps (size / reference - 1) / 2), in whole numbers: of floats a compiler may make others.
    """
    grown = (taps * (size + reference) + reference) // (2 * reference)
    return max(-((taps - 1) // 2), grown - taps)
