"""Strides that are learned: a small classifier of digits from strides chosen badly.

    python examples/learned_stride.py          # under a minute on two cores
    python examples/learned_stride.py --quick  # a few seconds, too short to learn much

Trains the same network on scikit-learn's 8x8 digits, enlarged to 24x24: with plain strided
convolutions, with learned strides from the same start, and with the paper's cost in the loss.
Needs scikit-learn.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import dynaconv
from dynaconv.layers.learned_stride import stride_cost

BAD_STRIDES = [(1.0, 6.0), (6.0, 1.0)]  # rows and columns: one finely, the other hardly looked at


def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 1, size, size) and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.3, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def network(learned: bool) -> nn.Sequential:
    """Two strided convolutions and a linear classifier over a 3x3 grid of means."""
    layers: list[nn.Module] = []
    for channels, stride in zip([(1, 12), (12, 24)], BAD_STRIDES, strict=True):
        if learned:
            conv = dynaconv.LearnedStrideConv2d(
                *channels, 3, stride, 1, smoothness=2.0, max_stride=6.0, published=False
            )
        else:
            conv = nn.Conv2d(*channels, 3, tuple(map(int, stride)), 1)
        layers += [conv, nn.GroupNorm(4, channels[1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 24, 10))


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, cost_weight: float
) -> None:
    # Strides are few and far from their goal: they take larger steps here than the weights.
    strides = [p for name, p in model.named_parameters() if name.endswith("strides")]
    others = [p for name, p in model.named_parameters() if not name.endswith("strides")]
    groups = [{"params": others}, {"params": strides, "lr": 6e-2}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=6e-3)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if cost_weight:
                loss = loss + cost_weight * stride_cost(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def strides_of(model: nn.Module) -> str:
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            found.append(module.stride)
        elif isinstance(module, dynaconv.LearnedStrideConv2d):
            found.append(module.bounded_strides().tolist())
    return "  ".join(f"({row:.2f}, {column:.2f})" for row, column in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    epochs = 1 if arguments.quick else 24
    x, y, x_test, y_test = digits(24)
    print(
        f"{len(x)} training and {len(x_test)} test images, epochs: {epochs}, seed: {arguments.seed}"
    )
    print("MACs: convolutions and matrix products for one image; Fourier transforms not counted\n")
    head = ("network", "strides before", "strides after", "accuracy", "MACs", "seconds")
    line = "{:<26}{:<28}{:<28}{:>9}{:>12}{:>9}"
    print(line.format(*head))
    runs = [("strided convolutions", False, 0.0), ("learned strides", True, 0.0)]
    runs += [(f"learned, {weight:g} * cost", True, weight) for weight in (0.03, 0.3)]
    for name, learned, cost_weight in runs:
        torch.manual_seed(arguments.seed)
        model, start = network(learned), time.perf_counter()
        before = strides_of(model)
        train(model, x, y, epochs, cost_weight)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            accuracy = (model.eval()(x_test).argmax(1) == y_test).float().mean().item()
        macs = dynaconv.analyze(model, x_test[:1]).macs
        after = strides_of(model)
        print(line.format(name, before, after, f"{accuracy:.3f}", f"{macs:,}", f"{seconds:.1f}"))


if __name__ == "__main__":
    main()
