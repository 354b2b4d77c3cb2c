"""Kernel sizes learned from data: handwritten digits read as sequences of 64 pixels.

    python examples/learned_size.py [--quick]

Trains three networks of equal depth, one with static kernels, one with FlexConv, whose kernels
end where a learned mask does, and one with DCLSConv, whose taps move inside a large kernel.
Prints the learned sizes before and after, the accuracy on held-out digits and the time of a step.
Needs scikit-learn for the digits (UCI, 1797 pictures of 8 x 8, part of the library).
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynaconv import DCLSConv1d, DynamicConv, FlexConv1d, parameter_groups

WIDTH, DEPTH, BATCH, TEST = 24, 3, 64, 360
# Largest extent of the learned kernels, and taps of those that have a fixed number.
EXTENT, TAPS = 33, 5
Layer = Callable[[int, int], nn.Module]
LAYERS: dict[str, Layer] = {
    "static": lambda i, o: nn.Conv1d(i, o, TAPS, padding=TAPS // 2),
    "flexconv": lambda i, o: FlexConv1d(i, o, EXTENT, padding=EXTENT // 2),
    "dcls": lambda i, o: DCLSConv1d(i, o, EXTENT, padding=EXTENT // 2, taps=TAPS),
}


def network(layer: Layer) -> nn.Sequential:
    """DEPTH convolutions, each with batch norm and GELU, a mean over the sequence, a classifier."""
    parts: list[nn.Module] = []
    for depth in range(DEPTH):
        channels = WIDTH if depth else 1
        parts += [layer(channels, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def sizes(model: nn.Module) -> list[float]:
    """The extent of every learned kernel, in pixels of its input."""
    layers = [module for module in model.modules() if isinstance(module, DynamicConv)]
    with torch.no_grad():
        found = [layer.kernels(torch.zeros(1, layer.in_channels, 64))["size"] for layer in layers]
    return [size.item() for size in found]


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int) -> float:
    """Trains the model; the median time of a step in milliseconds."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=5e-3), weight_decay=0)
    times = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            start = time.perf_counter()
            loss = F.cross_entropy(model(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
    return 1000 * torch.tensor(times).median().item()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 epochs instead of 15")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(arguments.seed)
    order = torch.randperm(len(x))
    test, training = order[:TEST], order[TEST:]
    for name, layer in LAYERS.items():
        torch.manual_seed(arguments.seed)
        model = network(layer)
        before = sizes(model)
        step = train(model, x[training], labels[training], 2 if arguments.quick else 15)
        correct = accuracy(model, x[test], labels[test])
        count = sum(p.numel() for p in model.parameters())
        print(f"{name:9} {count:6} parameters, {step:5.1f} ms a step, accuracy {correct:.3f}")
        for depth, (old, new) in enumerate(zip(before, sizes(model), strict=True), 1):
            print(f"          layer {depth}: size {old:5.1f} -> {new:5.1f} pixels")


if __name__ == "__main__":
    main()
