"""Continuous kernels: networks from relative coordinates to kernel values."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.layers.base import at_least, positive, without_autocast
from dynaconv.shapes import ntuple

# SIREN: as published for both papers. MAGNet: FlexConv's input scale of 25.6, which its published
# code divides by the square root of the number of filters; the factor 2 pi is in the formula here.
OMEGA_0 = {"siren": 30.0, "magnet": 25.6 / (2 * math.pi * math.sqrt(4))}


class KernelNetwork(nn.Module):
    """A kernel as a function of relative coordinates x in [-1, 1]^D (Romero, ICLR 2022, twice).

        kernel(x) = W h(x) + b, (C_out, C_in / groups) values at each x
        siren, of CKConv:     h_1 = sin(w0 (W_1 x + b_1)),   h_l = sin(w0 (W_l h_{l-1} + b_l))
        magnet, of FlexConv:  h_0 = g_0(x),   h_l = g_l(x) (W_l h_{l-1} + b_l)
                              g_l(x) = exp(-|gamma_l (x - mu_l)|^2 / 2) sin(U_l x + c_l)

    Layers and start are those of the authors' later code (Knigge, ICLR 2023): W is uniform with a
    variance of 1 / hidden / (C_in / groups * taps), so that a convolution over `taps` taps gives
    values of its input's size at most; U_l is uniform times 2 pi w0 gamma_l, gamma_l drawn from
    Gamma(6 / (l + 1), 1), mu_l uniform in [-spread, spread]. Computed in float32 at least, for
    coordinates times w0 do not fit into half precision.

    Args:
        rank: D.
        channels: C_out and C_in / groups.
        hidden: values of each h.
        omega_0: w0, the frequencies of the start; None for what the authors used with `kind`.
        kind: "magnet" or "siren".
        layers: matrices W_l between filters (magnet), or sines plus one (siren).
        taps: at how many taps the kernel will be sampled, for the scale of the start.
        spread: where the Gabor functions of magnet lie at first.
    """

    def __init__(
        self,
        rank: int,
        channels: tuple[int, int],
        hidden: int = 32,
        omega_0: float | None = None,
        kind: str = "magnet",
        layers: int = 3,
        taps: int = 1,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in OMEGA_0:
            raise ValueError(f"kind={kind!r}; choose from {list(OMEGA_0)}")
        at_least(1, rank=rank, hidden=hidden, taps=taps)
        at_least(2 if kind == "siren" else 1, layers=layers)
        omega_0 = OMEGA_0[kind] if omega_0 is None else omega_0
        positive(omega_0=omega_0, spread=spread)
        self.rank, self.channels = rank, channels
        self.hidden: nn.Module
        if kind == "siren":
            self.hidden = SIREN(rank, hidden, omega_0, layers)
        else:
            self.hidden = MAGNet(rank, hidden, omega_0, layers, spread)
        bound = math.sqrt(3 / (hidden * channels[1] * taps))
        self.output = Linear(hidden, channels[0] * channels[1], bound)

    def forward(self, size: Sequence[int]) -> Tensor:
        """The kernel (C_out, C_in / groups, *size) at `size` taps over [-1, 1] a dimension."""
        size = ntuple(tuple(size), self.rank, "size")
        axes = [axis(length, self.output.weight) for length in size]
        return self.at(grid(axes)).unflatten(2, size)

    def at(self, coordinates: Tensor) -> Tensor:
        """The kernel (C_out, C_in / groups, T) at coordinates (T, D), float32 at least."""
        if coordinates.dim() != 2 or coordinates.shape[1] != self.rank:
            raise ValueError(
                f"KernelNetwork: coordinates have shape {tuple(coordinates.shape)}; "
                f"give (T, {self.rank})"
            )
        with without_autocast(coordinates.device.type):
            x = coordinates.to(at_least_float32(self.output.weight))
            values = self.output(self.hidden(x))
        return values.t().unflatten(0, self.channels)


class Linear(nn.Linear):
    """nn.Linear in the dtype of its input, which may be finer than that of its weight.

    Weights start uniform in [-bound, bound], biases at `bias`.
    """

    def __init__(self, inputs: int, outputs: int, bound: float, bias: float = 0.0) -> None:
        super().__init__(inputs, outputs)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class SIREN(nn.Module):
    """h of sines: (T, D) -> (T, hidden)."""

    def __init__(self, rank: int, hidden: int, omega_0: float, layers: int) -> None:
        super().__init__()
        self.omega_0 = omega_0
        bound = math.sqrt(6 / hidden) / omega_0
        later = [Linear(hidden, hidden, bound) for _ in range(layers - 2)]
        self.linears = nn.ModuleList([Linear(rank, hidden, 1 / rank), *later])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.linears:
            x = torch.sin(self.omega_0 * layer(x))
        return x


class MAGNet(nn.Module):
    """h of products of Gabor functions, each with a width a dimension: (T, D) -> (T, hidden)."""

    def __init__(self, rank: int, hidden: int, omega_0: float, layers: int, spread: float) -> None:
        super().__init__()
        self.filters = nn.ModuleList(
            Gabor(rank, hidden, omega_0, 6 / (i + 1), spread) for i in range(layers + 1)
        )
        bound = math.sqrt(3 / hidden)
        self.linears = nn.ModuleList(Linear(hidden, hidden, bound, 1.0) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = self.filters[0](x)
        for gabor, layer in zip(self.filters[1:], self.linears, strict=True):
            h = gabor(x) * layer(h)
        return h


class Gabor(nn.Module):
    """g: sines under Gaussian windows with centres mu and inverse widths gamma."""

    def __init__(self, rank: int, hidden: int, omega_0: float, alpha: float, spread: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(spread * (2 * torch.rand(hidden, rank) - 1))
        gamma = torch.distributions.Gamma(alpha, 1.0).sample((hidden, rank))
        self.gamma = nn.Parameter(gamma)
        self.linear = Linear(rank, hidden, 1 / math.sqrt(rank))
        with torch.no_grad():
            self.linear.weight *= 2 * math.pi * omega_0 * gamma

    def forward(self, x: Tensor) -> Tensor:
        distance = self.gamma.to(x.dtype) * (x.unsqueeze(1) - self.mu.to(x.dtype))
        return torch.exp(-0.5 * distance.square().sum(2)) * torch.sin(self.linear(x))


def axis(size: int, like: Tensor) -> Tensor:
    """Coordinates (size,) of taps in one dimension, -1 to 1; of a single tap, 0."""
    index = torch.arange(size, device=like.device, dtype=at_least_float32(like))
    return (2 * index - (size - 1)) / max(size - 1, 1)


def grid(axes: Sequence[Tensor]) -> Tensor:
    """Coordinates (T, D) of the taps where the axes cross, the last dimension fastest."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype in which coordinates that go with `tensor` are kept."""
    return torch.promote_types(tensor.dtype, torch.float32)
