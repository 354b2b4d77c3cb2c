"""PAC: pixel-adaptive convolution (Su, CVPR 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.functional import conv_per_position
from dynaconv.functional._checks import DTYPES, check_tensors
from dynaconv.layers.base import ConvNd, DynamicConv, without_autocast
from dynaconv.layers.framed import framed
from dynaconv.layers.tracing import one_node
from dynaconv.registry import register_family
from dynaconv.shapes import Geometry, windows

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
EPSILON = 1e-4  # keeps the power of a distance of 0 finite


@register_family("pac", primitive="conv", paper="Su et al., CVPR 2019")
class PACConv(DynamicConv):
    """A convolution whose taps count by how alike a guide is there and at the window's centre.

        y_i = sum_j K(f_i, f_j) W[p_i - p_j] x_j + b,    K = exp(-|f_i - f_j|^2 / 2)

    f is the guide (N, C_guide, *L) of `forward(input, padding_mask, guide)`, any features that
    lie over the input, by default the input itself. The centre of an even kernel is tap k // 2.

    `kernel="inv"` takes K = alpha + (|f_i - f_j|^2 + 1e-4)^(power / 2), both learned; published
    without defaults for them, and only a negative power favours what is alike. `asymmetric` counts
    only channels in which f_j exceeds f_i. With `normalize` the K of a window are divided by their
    sum over real positions, which of "inv" vanishes where alpha is learned to below 0: start well
    above. With `shared_filters` one filter W serves every channel by itself.
    `blend` = g is not published: it takes 1 + g (K - 1) for K with a learned g, so that
    `from_conv`, which takes g = 0, starts from the plain convolution.

    Args:
        kernel: "gaussian" or "inv".
        alpha, power: of "inv", at the start.
        fixed: alpha and power are not learned.
        asymmetric: relu(f_j - f_i) for f_j - f_i.
        smooth: f_i is taken from the smoothed guide: "gaussian" (1, 2, 1), "average_n" over n
            positions a dimension, or "full_n", the same but learned; n odd.
        normalize: divide K by its sum over the window.
        shared_filters: one filter for all channels.
        blend: g at the start; None for g = 1, not learned, as published.
    """

    exact_options = {"blend": 0.0}
    alpha: Tensor
    power: Tensor
    smoother: Tensor

    def build(
        self,
        kernel: str = "gaussian",
        alpha: float = 0.0,
        power: float = 1.0,
        fixed: bool = False,
        asymmetric: bool = False,
        smooth: str | None = None,
        normalize: bool = False,
        shared_filters: bool = False,
        blend: float | None = None,
    ) -> None:
        if kernel not in ("gaussian", "inv"):
            raise ValueError(f"kernel={kernel!r}; choose from 'gaussian', 'inv'")
        if shared_filters and (self.in_channels != self.out_channels or self.groups > 1):
            raise ValueError(
                "shared_filters=True keeps each channel to itself: it needs as many output as "
                f"input channels and groups=1, not {self.in_channels} to {self.out_channels} "
                f"channels in {self.groups} groups"
            )
        self.kernel, self.asymmetric = kernel, asymmetric
        self.normalize, self.shared_filters = normalize, shared_filters
        # One entry each, not none: fully_shard takes no parameter without dimension.
        if kernel == "inv":
            _hold(self, "alpha", torch.tensor([float(alpha)]), learned=not fixed)
            _hold(self, "power", torch.tensor([float(power)]), learned=not fixed)
        self.smooth = smooth
        if smooth is not None:
            learned = smooth.startswith("full")
            _hold(self, "smoother", _smoother(smooth, self.rank), learned)
        self.blend = None if blend is None else nn.Parameter(torch.tensor([float(blend)]))
        kernels = self.initial_kernels()
        # As published, a shared filter has C_in times the bound of one over C_in channels.
        self.weight = nn.Parameter(
            self.in_channels * kernels[:1, :1] if shared_filters else kernels
        )

    @one_node
    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, guide: Tensor | None = None
    ) -> Tensor:
        x, mask = self.prepare(input, padding_mask)
        output = self.convolve(x, **self.generate(x, mask, guide))
        return self.finish(output, x, input)

    def kernels(
        self, input: Tensor, padding_mask: Tensor | None = None, guide: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`weight` (N, 1, *K, *L_out): K, the factor on each tap of each position's window."""
        return self.generate(*self.prepare(input, padding_mask), guide)

    # What differs in the transposed form ---------------------------------------------------

    def frame(self, x: Tensor) -> Tensor:
        """x with its padding: what windows of `steps()` move over."""
        return framed(self, x)

    def frame_guide(self, guide: Tensor) -> Tensor:
        """The guide likewise."""
        return framed(self, guide)

    def steps(self) -> Geometry:
        """How windows move over what is framed."""
        return self.geometry()._replace(padding=(0,) * self.rank)

    def filters(self) -> Tensor:
        """W in the order in which windows see the input."""
        return self.weight

    def guide_mask(self, mask: Tensor) -> Tensor:
        """Which positions of the guide are real."""
        return mask

    def default_guide(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The guide where none is given; any other has its size."""
        return x

    # K and the convolution -----------------------------------------------------------------

    def generate(
        self, x: Tensor, mask: Tensor | None, guide: Tensor | None = None
    ) -> dict[str, Tensor]:
        real = None if mask is None else self.guide_mask(mask)
        # A distance needs more digits than half precision has.
        with without_autocast(x.device.type):
            guide = _real(self._guide(x, mask, guide), real)
            centre = guide if self.smooth is None else _real(self._smoothed(guide), real)
            seen, middle = (windows(self.frame_guide(g), self.steps()) for g in (guide, centre))
            for d, k in enumerate(self.kernel_size):
                middle = middle.narrow(2 + d, k // 2, 1)
            weight = self.affinity(seen - middle)
            if self.normalize:
                ones = guide.new_ones(1, *x.shape[2:]) if mask is None else mask.to(guide.dtype)
                weight = weight * windows(self.frame(ones.unsqueeze(1)), self.steps())
                total = weight.sum(tuple(range(2, 2 + self.rank)), keepdim=True)
                weight = weight / total.masked_fill(total == 0, 1)
        return {"weight": weight.to(x.dtype)}

    def affinity(self, difference: Tensor) -> Tensor:
        """K (N, 1, *K, *L_out) of f_j - f_i (N, C_guide, *K, *L_out)."""
        if self.asymmetric:
            difference = F.relu(difference)
        distance = difference.square().sum(1, keepdim=True)
        if self.kernel == "gaussian":
            weight = torch.exp(-distance / 2)
        else:
            weight = self.alpha + (distance + EPSILON) ** (self.power / 2)
        return weight if self.blend is None else 1 + self.blend * (weight - 1)

    def _guide(self, x: Tensor, mask: Tensor | None, guide: Tensor | None) -> Tensor:
        """The guide (N, C_guide, *L_guide), in float32 at least."""
        given = default = self.default_guide(x, mask)
        if guide is not None:
            check_tensors(type(self).__name__, guide=guide)
            given = guide if guide.dim() == self.rank + 2 else guide.unsqueeze(0)
        alike = given.shape[:1] + given.shape[2:] == default.shape[:1] + default.shape[2:]
        if not alike or given.device != x.device or given.dtype not in DTYPES:
            wanted = ", ".join(map(str, (x.shape[0], "C_guide", *default.shape[2:])))
            raise ValueError(
                f"{type(self).__name__}: guide has shape {tuple(given.shape)}, {given.dtype}, on "
                f"{given.device}; give ({wanted}) in floating point on {x.device}"
            )
        return given.to(torch.promote_types(given.dtype, torch.float32))

    def _smoothed(self, guide: Tensor) -> Tensor:
        """The guide, each channel smoothed, zero beyond its border."""
        kernel = self.smoother.to(guide.dtype)
        conv = CONVOLUTIONS[self.rank - 1]
        return conv(guide.flatten(0, 1).unsqueeze(1), kernel, padding="same").reshape(guide.shape)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        x, steps, filters = self.frame(x), self.steps(), self.filters()
        ones = (1,) * self.rank
        if self.shared_filters:
            weight = weight * filters.reshape(1, 1, *self.kernel_size, *ones)
            return self.add_bias(conv_per_position(x, weight, steps.stride, 0, steps.dilation))
        columns = (windows(x, steps) * weight).flatten(1, 1 + self.rank)
        conv = CONVOLUTIONS[self.rank - 1]
        flat = filters.flatten(1).unflatten(1, (-1, *ones))
        return conv(columns, flat, self.bias, groups=self.groups)

    def init_from(self, conv: ConvNd) -> None:
        """The kernel itself, K at 1 by blend = 0."""
        if self.blend is None or self.blend.item() != 0:
            raise ValueError(
                "K follows the guide; only with blend=0.0 does the layer start as a plain "
                f"convolution, not blend={self.options.get('blend')}"
            )
        if self.normalize or self.shared_filters:
            raise ValueError(
                "with normalize=True taps are divided by their number within the input, and with "
                "shared_filters=True all channels have one filter; a plain convolution does neither"
            )
        self.weight.copy_(conv.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes alpha and power without dimension too, as published."""
        for name in (prefix + "alpha", prefix + "power"):
            if name in state_dict:
                state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        plain = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
        square = plain | {"out_channels": 4}
        return [
            plain | {"blend": 0.5},
            square
            | {"kernel": "inv", "alpha": 3.0, "power": 0.5, "smooth": "full_3", "normalize": True}
            | {"groups": 2},
            square | {"asymmetric": True, "smooth": "gaussian", "shared_filters": True},
            square | {"kernel_size": 2, "bias": False, "stride": 2},
        ]


def _hold(module: nn.Module, name: str, value: Tensor, learned: bool) -> None:
    """`value` as a parameter, or as a buffer."""
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def _smoother(name: str, rank: int) -> Tensor:
    """The smoothing kernel (1, 1, *S) that the option `smooth` names."""
    kind, _, size = name.partition("_")
    if name == "gaussian":
        line = torch.tensor([0.25, 0.5, 0.25])
    elif kind in ("average", "full") and size.isdecimal() and int(size) % 2:
        line = torch.full((int(size),), 1 / int(size))
    else:
        raise ValueError(
            f"smooth={name!r}; choose from 'gaussian', 'average_n', 'full_n' with an odd n"
        )
    kernel = line
    for _ in range(rank - 1):
        kernel = kernel.unsqueeze(-1) * line
    return kernel[None, None].clone()


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, zero where the mask is False."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0)
