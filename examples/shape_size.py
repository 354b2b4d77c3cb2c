"""The kernel's size follows the input's shape: a classifier that is used at sizes it never saw.

    python examples/shape_size.py

Real handwritten digits (scikit-learn's, 8x8) are learned at 20 and 28 pixels. Then the same images
are shown at 14, 20, 28 and 40: a fixed kernel sees another pattern at each size, a kernel that is
a fraction of the image sees the same.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynaconv

TRAINED, SHOWN = (20, 28), (14, 20, 28, 40)
FRACTIONS = (0.2, 0.3)


def network(kind: str) -> nn.Sequential:
    """Two convolutions; `fixed` has the taps that the fractions mean at 24 pixels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, fraction in ((1, 8, FRACTIONS[0]), (8, 16, FRACTIONS[1])):
        taps = int(24 * fraction + 0.5)
        if kind == "fixed":
            conv = nn.Conv2d(inputs, outputs, taps, padding="same")
        else:
            conv = dynaconv.ShapeConv2d(
                inputs, outputs, fraction, padding="same", base_size=taps, kernel=kind
            )
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def at(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        pick = torch.randint(len(images), (48,))
        size = TRAINED[step % len(TRAINED)]
        loss = F.cross_entropy(model(at(images[pick], size)), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute")
    steps = 60 if parser.parse_args().quick else 400
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    cut = 1400
    print(f"trained at {TRAINED}; accuracy in percent, and by how much class scores move")
    print(f"{'kernel':12}" + "".join(f"{size:>5} px" for size in SHOWN) + "   moved by")
    for kind in ("fixed", "area", "pinv", "continuous"):
        model = network(kind)
        train(model, images[:cut], labels[:cut], steps)
        with torch.no_grad():
            scores = [model(at(images[cut:], size)).softmax(1) for size in SHOWN]
        right = [100 * (s.argmax(1) == labels[cut:]).float().mean().item() for s in scores]
        mean = torch.stack(scores).mean(0)
        moved = torch.stack([(s - mean).abs().sum(1) for s in scores]).mean().item()
        print(f"{kind:12}" + "".join(f"{value:8.1f}" for value in right) + f"{moved:11.3f}")
    print("moved by: the distance of the scores at a size from their mean over sizes, 0 to 2")


if __name__ == "__main__":
    main()
