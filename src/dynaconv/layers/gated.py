"""GatedConv: a convolution computed only where the input asks for it (Verelst, CVPR 2020)."""

from collections.abc import Sequence
from math import cos, pi, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.dispatch import values_unknown
from dynaconv.functional._checks import (
    check_alike,
    check_finite,
    check_floating,
    check_list,
    check_number,
    check_shape,
    check_tensors,
)
from dynaconv.layers.base import ConvNd, DynamicConv, conv_nd, positive, without_autocast
from dynaconv.layers.costs import add_cost
from dynaconv.layers.framed import framed
from dynaconv.layers.sampling import zero_
from dynaconv.masking import masked_mean
from dynaconv.registry import register_family
from dynaconv.shapes import windows

OPEN = 2.0  # the logit of a gate that starts open: a sigmoid of 0.88, not yet flat
# Up to this share of active positions picking their windows is the faster way.
SPARSE = 0.25


@register_family("gated", primitive="conv", paper="Verelst and Tuytelaars, CVPR 2020")
class GatedConv(DynamicConv):
    """A convolution that a gate switches on or off at each position.

        m[p] = gate(x)[p] + gate_fc(mean(x)),    g[p] = 1 if m[p] >= 0 else 0
        y[p] = g[p] (b + sum_k W[k] x[p + k])

    gate is a convolution to one channel with the layer's geometry (published: 3x3, in front of a
    residual block of 3x3 convolutions). In training the output is computed everywhere, logistic
    noise is added to m (`noise`, an attribute; the authors switch it off in the last fifth of the
    epochs) and g has the gradient of sigmoid(m / T); on ImageNet T falls from 5 to 1
    (`dynaconv.anneal(model, progress)`). In evaluation g is the plain threshold, and
    where at most a quarter of the positions is active only those are computed (with one group, more
    than one tap, outside torch.compile, where it is the faster way).

    The gates stay open unless they cost something: `with dynaconv.collect_costs() as costs:`
    around a forward pass collects the active share of every layer, and `sparsity_loss` makes the
    published loss of it. `from_conv` takes `noise=False` and starts with every gate open at
    m = 2, in training too: noise would close one in eight. Set `layer.noise = True` later.

    Args:
        noise: logistic noise on m in training.
        temperature: T at the start, a buffer.
    """

    exact_options = {"noise": False}
    temperatures = (5.0, 1.0)
    temperature: Tensor

    def build(self, noise: bool = True, temperature: float = 1.0) -> None:
        positive(temperature=temperature)
        self.noise = noise
        self.weight = nn.Parameter(self.initial_kernels())
        geometry = self.generator_geometry()
        self.gate = conv_nd(self.rank, self.in_channels, 1, self.kernel_size, **geometry)
        self.gate_fc = nn.Linear(self.in_channels, 1)
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def generate(self, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`gate` (N, 1, *L_out), 0 or 1."""
        # Half precision would decide otherwise where m is near 0.
        with without_autocast(x.device.type):
            seen = x.to(self.gate.weight.dtype)
            everywhere = self.gate_fc(masked_mean(seen, mask))
            gate = self._decided(self.gate(seen) + everywhere.unflatten(1, (1, *(1,) * self.rank)))
        if mask is not None:
            gate = gate.masked_fill(~self.output_mask(mask).unsqueeze(1), 0)
        return {"gate": gate}

    def _decided(self, logits: Tensor) -> Tensor:
        """0 or 1; in training with a sigmoid's gradient."""
        if not self.training:
            return (logits >= 0).to(logits.dtype)
        if self.noise:
            uniform = torch.rand_like(logits, dtype=torch.float32).clamp(1e-7, 1 - 1e-7)
            logits = logits + torch.logit(uniform).to(logits.dtype)
        soft = torch.sigmoid(logits / self.temperature)
        return (logits >= 0).to(soft.dtype) + (soft - soft.detach())

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        gate = self.generate(x, mask)["gate"]
        real = gate.numel() if mask is None else self.output_mask(mask).sum().clamp(min=1)
        # Half precision does not bear the count of all positions.
        wide = torch.promote_types(gate.dtype, torch.float32)
        add_cost(lambda: gate.sum(dtype=wide) / real)
        return self.convolve(x, gate)

    def convolve(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        if self._picks() and gate.numel():
            active = gate.squeeze(1) > 0
            if active.sum() <= SPARSE * active.numel():
                return self._where(active, x)
        output = self.convolve_static(x, self.weight, self.bias)
        return output * gate.to(output.dtype)

    def _picks(self) -> bool:
        """Whether computing few positions alone can be faster: not for one tap or few channels."""
        deep = self.groups == 1 and prod(self.kernel_size) > 1
        return deep and not self.training and not values_unknown()

    def _where(self, active: Tensor, x: Tensor) -> Tensor:
        """The convolution at the active positions (N, *L_out) alone, 0 elsewhere."""
        x = framed(self, x)
        cells = prod(x.shape[2:])
        index = torch.arange(cells, device=x.device).reshape(1, 1, *x.shape[2:])
        taps = windows(index, self.geometry()).flatten(2, 1 + self.rank).flatten(3)[0, 0]
        sample, position = active.flatten(1).nonzero(as_tuple=True)
        places = taps.T[position] + sample.unsqueeze(1) * cells
        # Rows of channels lie together, so that a tap is one copy.
        seen = x.movedim(1, -1).reshape(-1, self.in_channels)[places]
        kernel = self.weight.flatten(2).transpose(1, 2).flatten(1)
        made = F.linear(seen.flatten(1), kernel, self.bias)
        output = made.new_zeros(*active.shape, self.out_channels)
        output[active] = made
        return output.movedim(-1, 1)

    def init_from(self, conv: ConvNd) -> None:
        """The kernel, with every gate open."""
        if self.noise:
            raise ValueError(
                "noise=True closes gates at random in training; start with noise=False and set "
                "layer.noise = True later"
            )
        self.weight.copy_(conv.weight)
        zero_(self.gate, self.gate_fc)
        nn.init.constant_(self.gate.bias, OPEN)  # type: ignore[arg-type]

    @classmethod
    def samples(cls, rank: int) -> list[dict[str, Any]]:
        # Noise differs from call to call, so what is compared goes without.
        quiet = {"noise": False}
        return [
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1} | quiet,
            {
                "in_channels": 4,
                "out_channels": 4,
                "kernel_size": 2,
                "groups": 2,
                "bias": False,
                "temperature": 2.0,
            }
            | quiet,
        ]


def sparsity_loss(
    costs: Sequence[Tensor],
    target: float,
    progress: float = 1.0,
    work: Sequence[float] | None = None,
) -> Tensor:
    """What Verelst and Tuytelaars (CVPR 2020) add to the loss so that gates close.

        (c - target)^2 + mean_l (max(0, c_l - upper)^2 + max(0, lower - c_l)^2)

    c_l is the active share of layer l and c that of the whole model. The bounds keep every layer
    near the target at first and let go of it: with a = cos(progress pi / 2)^2,
    upper = 1 - a (1 - target) and lower = a target. The authors take the sum as it is, with
    progress = epoch / (a third of the epochs).

    Args:
        costs: c_l, from `dynaconv.collect_costs`.
        target: the share of positions to compute, 0 to 1.
        progress: 0 at the start, 1 when the bounds are gone; more counts as 1.
        work: multiply-adds of each layer with all gates open, the weights of c_l in c; all the
            same where it is not given.

    Raises:
        ValueError: no costs, a target outside 0 to 1, a negative progress, or work of another
            length.
    """
    check_list("sparsity_loss", Tensor, "tensors", costs=costs)
    check_finite("sparsity_loss", target=target, progress=progress)
    if work is not None:
        check_list("sparsity_loss", int | float, "numbers", work=work)
        check_number("sparsity_loss", **{f"work[{i}]": w for i, w in enumerate(work)})
    if not costs:
        raise ValueError("sparsity_loss: costs is empty; run the model inside collect_costs()")
    if not 0 <= target <= 1 or not progress >= 0:
        raise ValueError(f"target={target} must lie in 0 ... 1, progress={progress} be at least 0")
    if work is not None and len(work) != len(costs):
        raise ValueError(f"work has {len(work)} entries for {len(costs)} costs")
    for i, cost in enumerate(costs):
        check_tensors("sparsity_loss", **{f"costs[{i}]": cost})
        check_shape("sparsity_loss", f"costs[{i}]", cost, ())
        check_floating("sparsity_loss", **{f"costs[{i}]": cost})
        check_alike("sparsity_loss", costs[0], **{f"costs[{i}]": cost})
    shares = torch.stack(list(costs))
    weights = shares.new_ones(len(costs)) if work is None else shares.new_tensor(work)
    tight = cos(min(progress, 1.0) * pi / 2) ** 2
    upper, lower = 1 - tight * (1 - target), tight * target
    network = ((weights * shares).sum() / weights.sum() - target).square()
    return network + (F.relu(shares - upper).square() + F.relu(lower - shares).square()).mean()
