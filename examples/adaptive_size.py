"""The kernel's size chosen per input: digits of many sizes, kernels that follow them.

    python examples/adaptive_size.py

Real handwritten digits (scikit-learn's) are shown 8 to 32 pixels wide on a 32x32 ground. The same
small network is trained with plain convolutions and with `AdaptiveSizeConv2d`, by dilation and by
mask; then each layer's kernel size is set beside the width of the digit that it saw.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynaconv

SIDE, SMALLEST = 32, 8


def shown(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Each digit at a random width and place: (N, 1, SIDE, SIDE), and the widths."""
    widths = torch.randint(SMALLEST, SIDE + 1, (len(digits),))
    images = torch.zeros(len(digits), 1, SIDE, SIDE)
    for image, digit, width in zip(images, digits, widths.tolist(), strict=True):
        top, left = torch.randint(0, SIDE - width + 1, (2,)).tolist()
        large = F.interpolate(digit[None], size=(width, width), mode="bilinear")[0]
        image[:, top : top + width, left : left + width] = large
    return images, widths


def network(field: str | None, taps: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 12, 1), (12, 16, 2), (16, 24, 2)):
        if field is None:
            conv = nn.Conv2d(inputs, outputs, taps, stride, taps // 2)
        else:
            conv = dynaconv.AdaptiveSizeConv2d(
                inputs, outputs, taps, stride, taps // 2, field=field
            )
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def train(model: nn.Module, digits: Tensor, labels: Tensor, steps: int) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(dynaconv.parameter_groups(model, lr=1e-2))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(digits), (32,))
        images, _ = shown(digits[pick])
        loss = F.cross_entropy(model(images), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def sizes(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """For each dynamic layer the kernel's extent, mean of height and width, (N,)."""
    found, x = [], images
    for layer in model:
        if isinstance(layer, dynaconv.AdaptiveSizeConv2d):
            found.append(layer.kernels(x)["size"].mean(1))
        x = layer(x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute")
    steps = 12 if parser.parse_args().quick else 300
    data = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(2)
    images, widths = shown(digits[1400:])
    for field, taps in ((None, 3), (None, 5), ("dilation", 3), ("mask", 5)):
        model = network(field, taps)
        train(model, digits[:1400], labels[:1400], steps)
        model.eval()
        with torch.no_grad():
            right = 100 * (model(images).argmax(1) == labels[1400:]).float().mean().item()
            found = sizes(model, images)
        print(f"{field or 'static'}, {taps}x{taps}: {right:.1f}% of the digits")
        for i, size in enumerate(found):
            small, large = size[widths < 16].mean(), size[widths > 24].mean()
            line = f"  layer {i + 1}: kernel {small:.2f} positions on digits below 16 px, "
            line += f"{large:.2f} above 24 px"
            if size.std() > 1e-3:
                related = torch.corrcoef(torch.stack([widths.float(), size]))[0, 1]
                line += f"; correlation with the width {related:+.2f}"
            print(line)


if __name__ == "__main__":
    main()
