"""FDConv: kernels of disjoint frequencies out of one spectrum (Chen, CVPR 2025)."""

import math
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.dispatch import has_fft
from dynaconv.layers.adaptive_dilation import FreqSelect, box
from dynaconv.layers.attention import Squeeze
from dynaconv.layers.base import ConvNd, DynamicConv, at_least, causal, positive, without_autocast
from dynaconv.layers.fourier import filtered, inverse_real
from dynaconv.layers.low_pass import low_pass, register_filter
from dynaconv.layers.sampling import zero_
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family

GRID = 64
GATES = ("channel", "filter", "spatial")


@register_family(
    "fdconv", primitive="conv_per_sample", paper="Chen et al., CVPR 2025", transposed=True
)
class FDConv(DynamicConv):
    """The frequencies of the kernel and of the input, weighted by the input.

        h = a relu(bn(fc(mean(x))))^2 + c
        W = irfft2(sum_e 2 sigmoid(kernel_fc(h) / T)_e S_e)                        (FDW)
        V[o, c, k] = W[o, c, k] f_o i_c t_k 2 sigmoid(local(mean(x)))[o, c, k]     (KSM)
        y = V * FBM(x) + b

    f, i, t = 2 sigmoid(. / T) of filter_fc, channel_fc, spatial_fc of h, for output channels, input
    channels and taps. The S_e are parts of one spectrum, the rfft2 of the kernel as a matrix
    (C_out k_1 ... k_{D-1}, C_in / groups k_D): its frequencies in the order of their distance from
    0, cut into E parts of one size. local normalises the mean over channels, and each (o, k) has a
    filter of its own that runs along the channels c. FBM weights bands of the input's spectrum at
    each position as FADC's FreqSelect does.

    The spectrum is a parameter in place of the kernel, divided by min(C_in, C_out) // 2 as
    published, which sets how fast it learns. In the published code filter_fc starts at the usual
    size, the other heads near 0. Groups, kernels other than 1 and 3, 1-D and 3-D follow the same
    rule; in the published code groups fail, and layers with 16 channels or less, or such kernels,
    are silently static convolutions: here no layer is. The authors' ResNets have E = C_out // 2,
    T = sqrt(E). The batch norm trains at batch 1 too.

    Args:
        experts: number of parts E, at most that of the frequencies; with 1 the spectrum is not
            weighted.
        global_gates: f, i and t (a depthwise layer has no f, a single tap no t).
        local_gates: the gate for each weight.
        bands: FBM's bands keep 1 / bands[i] of the spectrum; () leaves FBM out. None: (2, 4, 8),
            and none for a single tap, as published, or for a causal layer.
        low_band: a weight for the last band too.
        band_grid: FBM reads its bands off a grid of 64 frequencies, as published; False takes them
            at each size's own frequencies, as in the paper.
        reduction: hidden channels of h over input channels.
        min_hidden: hidden channels of h at least.
        temperature: T at the start, a buffer.
    """

    causality = "pooled"
    squeeze: Squeeze | None
    filter_fc: nn.Linear | None
    local: "LocalGates | None"
    part: Tensor

    def build(
        self,
        experts: int = 4,
        global_gates: bool = True,
        local_gates: bool = True,
        bands: Sequence[float] | None = None,
        low_band: bool = False,
        band_grid: bool = True,
        reduction: float = 1 / 16,
        min_hidden: int = 16,
        temperature: float = 1.0,
    ) -> None:
        at_least(1, experts=experts, min_hidden=min_hidden)
        positive(reduction=reduction, temperature=temperature)
        taps = prod(self.kernel_size)
        if bands is None:
            bands = (2, 4, 8) if taps > 1 and not self.causal else ()
        self._check(experts, global_gates, local_gates, bands)
        rows, columns = self._matrix_shape()
        self.experts = experts = min(experts, rows * (columns // 2 + 1))
        self.scale = max(min(self.in_channels, self.out_channels) // 2, 1)
        self.spectrum = nn.Parameter(self.spectrum_of(self.initial_kernels()))
        self.register_buffer("part", _parts(rows, columns, experts), persistent=False)
        hidden = max(int(self.in_channels * reduction), min_hidden)
        self._build_heads(hidden, taps, global_gates)
        self.local = LocalGates(self.in_channels, self.kernel_shape()) if local_gates else None
        self.modulate = None
        if bands:
            self.modulate = FrequencyBandModulation(
                self.rank, self.in_channels, bands, low_band, band_grid
            )
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def _check(self, experts: int, global_: bool, local: bool, bands: Sequence[float]) -> None:
        if experts == 1 and not (global_ or local or bands):
            raise ValueError(
                "experts=1 without gates and bands leaves nothing that follows the input"
            )
        if self.causal and bands:
            raise ValueError(
                "FBM's spectrum is that of the whole input, so it has no causal form; give bands=()"
            )

    def _build_heads(self, hidden: int, taps: int, global_gates: bool) -> None:
        """Modules of h and of what is made from it; None where the layer has no such head."""
        depthwise = self.groups == self.in_channels == self.out_channels
        sizes = {"kernel": self.experts if self.experts > 1 else 0, "channel": 0, "filter": 0}
        sizes["spatial"] = 0
        if global_gates:
            sizes["channel"] = self.in_channels
            sizes["filter"] = 0 if depthwise else self.out_channels
            sizes["spatial"] = taps if taps > 1 else 0
        used = any(sizes.values())
        self.squeeze = Squeeze(self.in_channels, hidden, norm=True) if used else None
        if self.squeeze is not None:
            nn.init.kaiming_normal_(self.squeeze.fc.weight, mode="fan_out", nonlinearity="relu")
            self.act_scale = nn.Parameter(torch.ones(1))
            self.act_bias = nn.Parameter(torch.zeros(1))
        for name, size in sizes.items():
            head = nn.Linear(hidden, size) if size else None
            self.register_module(f"{name}_fc", head)
            if head is not None:
                nn.init.normal_(head.weight, std=1e-6)
                nn.init.zeros_(head.bias)
        if self.filter_fc is not None:
            nn.init.kaiming_normal_(self.filter_fc.weight, mode="fan_out", nonlinearity="relu")

    # The spectrum --------------------------------------------------------------------------

    def _matrix_shape(self) -> tuple[int, int]:
        """The kernel as a matrix: (C_out k_1 ... k_{D-1}, C_in / groups k_D)."""
        out_channels, channels, *taps = self.kernel_shape()
        return out_channels * prod(taps[:-1]), channels * taps[-1]

    def spectrum_of(self, kernel: Tensor) -> Tensor:
        """A kernel's spectrum as the layer keeps it, (rows, columns // 2 + 1, 2)."""
        matrix = kernel.movedim(1, -2).reshape(self._matrix_shape())
        return torch.view_as_real(torch.fft.rfft2(matrix)) / self.scale

    def kernel_of(self, spectrum: Tensor) -> Tensor:
        """The kernels (N, C_out, C_in / groups, *K) of spectra (N, rows, columns // 2 + 1, 2)."""
        spectrum, shape = (spectrum * self.scale).contiguous(), self._matrix_shape()
        if has_fft():
            matrix = torch.fft.irfft2(torch.view_as_complex(spectrum), s=shape)
        else:
            matrix = inverse_real(spectrum, shape)
        out_channels, channels, *taps = self.kernel_shape()
        return matrix.reshape(-1, out_channels, *taps[:-1], channels, taps[-1]).movedim(-2, 2)

    # What is generated ---------------------------------------------------------------------

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        made, mean = {}, masked_mean(x, mask)
        if self.squeeze is not None:
            there = None if mask is None else mask.flatten(1).any(1, keepdim=True)
            hidden = self.squeeze(mean.unsqueeze(2), there)
            hidden = self.act_scale * hidden.square() + self.act_bias
            for name, key in (("kernel", "coefficients"), *zip(GATES, GATES, strict=True)):
                head = getattr(self, f"{name}_fc")
                if head is not None:
                    made[key] = 2 * torch.sigmoid(head(hidden) / self.temperature)
        if self.local is not None:
            made["local"] = 2 * torch.sigmoid(self.local(mean))
        return made

    def kernels(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`coefficients` (N, E), the gates, and `bands` (N, B, *L), FBM's weights."""
        x, mask = self.prepare(input, padding_mask)
        made = self.generate(x, mask)
        return made if self.modulate is None else made | {"bands": self.modulate.weights(x)}

    # The convolution -----------------------------------------------------------------------

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.modulate is None:
            return super().compute(x, mask)
        return self.convolve(self.modulate(x, mask), **self.generate(x, mask))

    def convolve(self, x: Tensor, **made: Tensor) -> Tensor:
        return self.convolve_samples(x, self.modulated(x.shape[0], made).to(x.dtype), self.bias)

    def modulated(self, batch: int, made: dict[str, Tensor]) -> Tensor:
        """The kernels V (N, C_out, C_in / groups, *K)."""
        ones = (1,) * self.rank
        with without_autocast(self.spectrum.device.type):
            # Half precision has no FFT.
            precise = torch.promote_types(self.spectrum.dtype, torch.float32)
            made = {name: gate.to(precise) for name, gate in made.items()}
            spectrum = self.spectrum.to(precise).unsqueeze(0).expand(batch, -1, -1, -1)
            if "coefficients" in made:
                spectrum = spectrum * made["coefficients"][:, self.part].unsqueeze(-1)
            # An FFT of nothing is an error.
            kernel = (
                self.kernel_of(spectrum) if batch else spectrum.new_zeros(0, *self.kernel_shape())
            )
            if "channel" in made:
                gate = made["channel"].unflatten(1, (self.groups, 1, -1, *ones))
                kernel = (kernel.unflatten(1, (self.groups, -1)) * gate).flatten(1, 2)
            if "filter" in made:
                kernel = kernel * made["filter"].unflatten(1, (-1, 1, *ones))
            if "spatial" in made:
                kernel = kernel * made["spatial"].unflatten(1, (1, 1, *self.kernel_size))
            return kernel * made["local"] if "local" in made else kernel

    def init_from(self, conv: ConvNd) -> None:
        """The kernel's spectrum; heads at 0, where every gate is 1."""
        self.spectrum.copy_(self.spectrum_of(conv.weight))
        zero_(*(getattr(self, f"{name}_fc") for name in ("kernel", *GATES)))
        if self.local is not None:
            nn.init.zeros_(self.local.weight)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "stride": 2,
                "groups": 2,
                "bias": False,
                "experts": 3,
                "local_gates": False,
                "bands": (2,),
                "low_band": True,
                "band_grid": False,
            },
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 1,
                "experts": 1,
                "global_gates": False,
            },
            *causal(rank, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "bands": ()}),
        ]


class LocalGates(nn.Module):
    """A number for each weight from the channels' means: (N, C_in) -> (N, C_out, C_in / g, *K).

    The number for (o, c, k) is a filter of (o, k)'s own over the normalised means around channel c.
    """

    def __init__(self, in_channels: int, kernel_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_shape = kernel_shape
        self.size = round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1
        out_channels, _, *taps = kernel_shape
        self.norm = nn.LayerNorm(in_channels)
        self.weight = nn.Parameter(torch.full((out_channels * prod(taps), self.size), 1e-6))

    def forward(self, mean: Tensor) -> Tensor:
        out_channels, channels, *taps = self.kernel_shape
        side = (self.size - 1) // 2
        around = F.pad(self.norm(mean), (side, side)).unfold(1, self.size, 1)
        around = around.unflatten(1, (-1, channels))
        weight = self.weight.unflatten(0, (around.shape[1], -1, prod(taps)))
        gates = torch.einsum("ngcj,gokj->ngock", around, weight)
        return gates.reshape(-1, out_channels, channels, *taps)


class FrequencyBandModulation(FreqSelect):
    """FreqSelect with FDConv's bands: frequencies below 1 / (2 band) in every dimension.

    With `grid`, frequency i of L is taken for frequency floor(64 i / L) of 64, and the limit lies
    1e-8 higher, which in float32 lets those at the limit in for a band of 4 or more.
    """

    def __init__(
        self, rank: int, channels: int, bands: Sequence[float], low_band: bool, grid: bool
    ) -> None:
        super().__init__(rank, channels, bands, low_band)
        self.grid = grid

    def below(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        return low_pass(x, mask, self.bands, "fdconv_grid" if self.grid else "fdconv")


def _low_frequencies(x: Tensor, bands: Sequence[float], grid: bool = False) -> list[Tensor]:
    kept = [_inside(x, band, grid) for band in bands]
    if not has_fft():
        return [filtered(x, inside, half=True) for inside in kept]
    over = tuple(range(2, x.dim()))
    spectrum = torch.fft.rfftn(x, dim=over)
    return [torch.fft.irfftn(spectrum * box(k), s=x.shape[2:], dim=over) for k in kept]


register_filter("fdconv")(_low_frequencies)
register_filter("fdconv_grid")(partial(_low_frequencies, grid=True))


def _inside(x: Tensor, band: float, grid: bool) -> list[Tensor]:
    """Which frequencies of rfftn(x) belong to the band, for each dimension."""
    kept = []
    for d, length in enumerate(x.shape[2:], start=2):
        half = d == x.dim() - 1
        entries = length // 2 + 1 if half else length
        known = _frequencies(GRID if grid else length, half, x.device)
        index = torch.arange(entries, device=x.device) * known.shape[0] // entries
        kept.append(known[index] < 0.5 / band + (1e-8 if grid else 0))
    return kept


def _frequencies(count: int, half: bool, device: torch.device) -> Tensor:
    """What torch.fft.fftfreq gives (rfftfreq for half), without the sign; ONNX has neither."""
    index = torch.arange(count // 2 + 1 if half else count, device=device)
    return torch.minimum(index, count - index).float() * (1 / count)


def _parts(rows: int, columns: int, experts: int) -> Tensor:
    """Which part each entry of a matrix's spectrum belongs to, by its distance from 0."""
    place = torch.meshgrid(torch.fft.fftfreq(rows), torch.fft.rfftfreq(columns), indexing="ij")
    distance = torch.stack(place, -1).norm(dim=-1)
    # As published, where rounding decides some ties; the order of the others is left open there.
    order = distance.flatten().sort(stable=True).indices
    part = torch.empty_like(order)
    for e, entries in enumerate(order.tensor_split(experts)):
        part[entries] = e
    return part.reshape(distance.shape)
