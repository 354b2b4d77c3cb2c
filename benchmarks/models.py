"""Whole models: images a second with static layers, with ours, and as the layers were published.

python benchmarks/models.py                  # all
python benchmarks/models.py odconv deform_v2  # these
"""

import copy
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynaconv
from common import Line, batch_in_groups, header, keep_freed_memory, peak, rounds
from dynaconv.layers.base import DynamicConv

try:
    from torchvision.ops import deform_conv2d
except (ImportError, RuntimeError):  # RuntimeError: built for another torch
    deform_conv2d = None

BATCH, SIZE, EXPERTS = 8, 224, 4
# Relative, of output in training, output and gradient: a sum that is zero but for its rounding
# opens or closes a ReLU, and with it a part of the gradient.
TOLERANCES = {"output in training": 1e-3, "output": 1e-3, "gradient": 1e-2}


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))"""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def chain(*layers: nn.Module) -> nn.Sequential:
    """Layers with a batch norm each, and ReLUs between them."""
    steps = [step for layer in layers for step in (layer, batch_norm(layer), nn.ReLU())]
    return nn.Sequential(*steps[:-1])


def batch_norm(layer: nn.Module) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(layer.out_channels)


def residual(body: nn.Module, c_in: int, c_out: int, stride: int) -> Residual:
    same = c_in == c_out and stride == 1
    return Residual(body, nn.Identity() if same else chain(conv(c_in, c_out, 1, stride)))


def network(
    stem: nn.Module, width: int, blocks: list[int], expansion: int, block: Callable
) -> nn.Module:
    """Stem, four stages of blocks(c_in, channels, c_out, stride), and a classifier."""
    parts = {"stem": nn.Sequential(stem, nn.ReLU(), nn.MaxPool2d(3, 2, 1))}
    for stage, count in enumerate(blocks):
        channels, layers = 64 * 2**stage, []
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            body = block(width, channels, expansion * channels, stride)
            layers.append(residual(body, width, expansion * channels, stride))
            width = expansion * channels
        parts[f"layer{stage + 1}"] = nn.Sequential(*layers)
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))
    return nn.Sequential(OrderedDict(parts))


def resnet18() -> nn.Module:
    basic = lambda c_in, c, c_out, stride: chain(conv(c_in, c, 3, stride), conv(c, c_out, 3))
    return network(chain(conv(3, 64, 7, 2)), 64, [2, 2, 2, 2], 1, basic)


def rednet26(spatial: Callable[[int, int, int], nn.Module]) -> nn.Module:
    """ResNet-26 with `spatial(channels, kernel, stride)` in the stem and in every bottleneck."""
    stem = chain(conv(3, 32, 3, 2), spatial(32, 3, 1), conv(32, 64, 3))
    bottleneck = lambda c_in, c, c_out, stride: chain(
        conv(c_in, c), spatial(c, 7, stride), conv(c, c_out)
    )
    return network(stem, 64, [1, 2, 4, 1], 4, bottleneck)


# As published: the same parameters, the way of computing of the papers' code -----------------


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def per_sample(x: Tensor, kernels: Tensor, layer: DynamicConv) -> Tensor:
    return batch_in_groups(x, kernels, layer.padding[0], layer.stride[0])


def mixed(coefficients: Tensor, weight: Tensor) -> Tensor:
    return (coefficients @ weight.flatten(1)).unflatten(1, weight.shape[1:])


def condconv(layer: DynamicConv, x: Tensor) -> Tensor:
    routing = torch.sigmoid(layer.routing(pooled(x)))
    return per_sample(x, mixed(routing, layer.weight), layer)


def dyconv(layer: DynamicConv, x: Tensor) -> Tensor:
    logits = layer.mix(F.relu(layer.squeeze.fc(pooled(x))))
    return per_sample(x, mixed((logits / layer.temperature).softmax(1), layer.weight), layer)


def odconv(layer: DynamicConv, x: Tensor) -> Tensor:
    hidden = F.relu(layer.attention.bn(layer.attention.fc(pooled(x))))
    gate = lambda head: layer.gate_scale * torch.sigmoid(head(hidden) / layer.temperature)
    x = x * gate(layer.channel_fc)[:, :, None, None]
    taps = gate(layer.spatial_fc).unflatten(1, (1, 1, 1, *layer.kernel_size))
    experts = (layer.kernel_fc(hidden) / layer.temperature).softmax(1)
    kernels = (taps * experts[:, :, None, None, None, None] * layer.weight).sum(1)
    return per_sample(x, kernels, layer) * gate(layer.filter_fc)[:, :, None, None]


def involution(layer: DynamicConv, x: Tensor) -> Tensor:
    stride = layer.stride[0]
    seen = F.avg_pool2d(x, stride) if stride > 1 else x
    weight = layer.span(F.relu(layer.bn(layer.reduce(seen))))
    groups, size = layer.kernel_groups, weight.shape[2:]
    windows = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=stride)
    windows = windows.reshape(len(x), groups, x.shape[1] // groups, -1, *size)
    return (weight.reshape(len(x), groups, 1, -1, *size) * windows).sum(3).flatten(1, 2)


def deform_v2(layer: DynamicConv, x: Tensor) -> Tensor:
    offset, logits = layer.offset_conv(x).split([layer.offset_channels, 9], 1)
    modulation = layer.gate_scale * torch.sigmoid(logits)
    settings = {"stride": layer.stride, "padding": layer.padding, "mask": modulation}
    return deform_conv2d(x, offset, layer.weight, None, **settings)


class AsPublished(nn.Module):
    """A layer's parameters under another way of computing."""

    def __init__(self, layer: DynamicConv, run: Callable[[DynamicConv, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layer, x)


def as_published(model: nn.Module, run: Callable) -> nn.Module:
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DynamicConv):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AsPublished(layer, run))
    return model


# What is compared ----------------------------------------------------------------------------


def converted(to: str, **where) -> Callable[[], tuple[nn.Module, nn.Module]]:
    """A static ResNet-18, and the same with its 3x3 convolutions made dynamic."""

    def make() -> tuple[nn.Module, nn.Module]:
        options = {} if to == "deform_v2" else {"experts": EXPERTS}
        static, chosen = resnet18(), dynaconv.select(kernel_size=3, **where)
        return static, dynaconv.convert(static, to=to, where=chosen, **options).model

    return make


def rednets() -> tuple[nn.Module, nn.Module]:
    ours = lambda c, kernel, stride: dynaconv.Involution2d(
        c, c, kernel, stride, kernel // 2, bias=False, group_channels=16
    )
    return rednet26(lambda c, kernel, stride: conv(c, c, 3, stride)), rednet26(ours)


CASES = {
    "condconv": ("ResNet-18, CondConv", converted("condconv"), condconv),
    "dyconv": ("ResNet-18, DyConv", converted("dyconv"), dyconv),
    "odconv": ("ResNet-18, ODConv", converted("odconv"), odconv),
    "involution": ("RedNet-26, Involution", rednets, involution),
    "deform_v2": (
        "ResNet-18, DCNv2 in the last two stages",
        converted("deform_v2", stage=("layer3", "layer4")),
        deform_v2 if deform_conv2d else None,
    ),
}


@dataclass
class Net:
    """A model with its optimiser: what is timed of it."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def infer(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.images)

    def gradients(self) -> list[Tensor]:
        self.optimiser.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        return [p.grad for p in self.model.parameters()]

    def step(self) -> None:
        self.gradients()
        self.optimiser.step()


def stir(model: nn.Module) -> None:
    """Draws what makes the kernels anew, and sets experts apart: a fresh start has neither."""
    for layer in model.modules():
        if isinstance(layer, DynamicConv):
            for name, parameter in layer.named_parameters():
                if name == "weight":
                    parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
                elif parameter.dim() > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def same(ours: Net, published: Net, title: str) -> None:
    """AssertionError unless both give the same outputs and gradients.

    Gradients are those in evaluation: a batch norm over a few pooled values, as in ODConv's
    attention, makes rounding errors large.
    """
    found = []
    for net in (ours, published):
        in_training = net.model.train() and net.infer()
        output = net.model.eval() and net.infer()
        found.append((in_training, output, torch.cat([g.flatten() for g in net.gradients()])))
    for (what, tolerance), a, b in zip(TOLERANCES.items(), *found, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        if not error <= tolerance:
            raise AssertionError(f"{title}: {what} differs by {error}")


def run(title: str, make: Callable, published: Callable | None) -> None:
    torch.manual_seed(0)
    data = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))
    static, ours = make()
    stir(ours)
    nets = [Net("static", static, *data), Net("dynaconv", ours, *data)]
    if published:
        nets.append(Net("as published", as_published(ours, published), *data))
        same(*nets[1:], title)
    keep_freed_memory(True)
    lines = [Line(net.name) for net in nets]
    memory = []
    for training, step in ((False, Net.infer), (True, Net.step)):
        for net in nets:
            net.model.train(training)
        rounds(nets, step, [line.both if training else line.forward for line in lines])
        memory.append([peak(lambda net=net, step=step: step(net), warm=False) for net in nets])
    for line, *used in zip(lines, *memory, strict=True):
        line.memory = tuple(used)
    show(f"{title}, {SIZE}x{SIZE}, batch {BATCH}", lines)


def show(title: str, lines: list[Line]) -> None:
    """Images a second, time over the static model's, and memory."""
    print(f"\n**{title}**\n")
    print("| | inference, images/s | time | training, images/s | time | peak MB | in training |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for line in lines:
        cells = [f"{line.name:12}"]
        for ms, ratio in zip((line.forward, line.both), line.ratios(lines[0]), strict=True):
            cells += [f"{1e3 * BATCH / statistics.median(ms):6.1f}", f"{ratio:5.2f}"]
        print(f"| {' | '.join([*cells, *[f'{m:7.0f}' for m in line.memory]])} |", flush=True)
    if len(lines) > 2:
        inference, training = lines[2].ratios(lines[1])
        print(f"\nAs published it takes {inference:.2f} times as long, {training:.2f} in training.")
    else:
        print("\nThe published operator is torchvision's, which is not installed.")


if __name__ == "__main__":
    header(__file__)
    print("Time: over that of the static model. Training: forward, backward and SGD.")
    for name in sys.argv[1:] or CASES:
        run(*CASES[name])
