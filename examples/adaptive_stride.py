"""The stride chosen per input: what a price on compute does to accuracy, and where it saves.

    python examples/adaptive_stride.py

Real handwritten digits (scikit-learn's) as images of 12 to 48 pixels, each of its own size, in
padded batches. A classifier's strides are learned with several prices on compute; beside them the
same network with fixed strides. Then a segmenter, whose outputs are resized back.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynaconv
from dynaconv import MaskedSequential, collect_costs, pad_batch

PRICES = (0.0, 0.3, 1.0)
SIZES = (12, 48)


def batches(digits: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Endless: digits enlarged each to a size of its own, and their labels."""
    while True:
        pick = torch.randint(len(digits), (batch,))
        widths = torch.randint(SIZES[0], SIZES[1] + 1, (batch,)).tolist()
        yield [enlarged(d, w) for d, w in zip(digits[pick], widths, strict=True)], labels[pick]


def enlarged(digit: Tensor, width: int) -> Tensor:
    return F.interpolate(digit[None], size=(width, width), mode="bilinear")[0]


def classifier(adaptive: bool, stride: int = 2) -> MaskedSequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 12), (12, 24)):
        if adaptive:
            conv = dynaconv.AdaptiveStrideConv2d(inputs, outputs, 5, stride, 2, low=1, high=5)
        else:
            conv = nn.Conv2d(inputs, outputs, 5, stride, 2)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    last = [nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return MaskedSequential(*layers, *last, nn.Linear(32, 10))


def train_classifier(
    model: nn.Module, digits: Tensor, labels: Tensor, steps: int, price: float
) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(dynaconv.parameter_groups(model, lr=1e-2))
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    source = batches(digits, labels, 32)
    for _ in range(steps):
        images, target = next(source)
        with collect_costs() as costs:
            logits, _ = model(*pad_batch(images))
        loss = F.cross_entropy(logits, target)
        if price and costs:
            loss = loss + price * torch.stack(costs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def measure(model: nn.Module, images: list[Tensor], labels: Tensor) -> tuple[float, float]:
    """Percent that are right, and MACs an image in millions, one image at a time."""
    right = 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for image, label in zip(images, labels, strict=True):
            right += int(model(image[None])[0].argmax(1) == label)
    return 100 * right / len(images), counter.get_total_flops() / 2e6 / len(images)


def strides(model: nn.Sequential, image: Tensor) -> str:
    """The strides, height by width, that each adaptive layer takes on an image."""
    found, x = [], image[None]
    for layer in model:
        if isinstance(layer, dynaconv.AdaptiveStrideConv2d):
            found.append("x".join(f"{s:.2f}" for s in layer.kernels(x)["stride"][0].tolist()))
        x = dynaconv.masked.apply(layer, x, None).data
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute")
    quick = parser.parse_args().quick
    steps, shown = (12, 40) if quick else (150, 150)
    data = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(2)
    images, truth = next(batches(digits[1400:], labels[1400:], shown))
    print("a classifier of digits, each image of its own size")
    for name, adaptive, stride, price in (
        ("static, stride 2", False, 2, 0.0),
        ("static, stride 3", False, 3, 0.0),
        *((f"adaptive, price {price}", True, 2, price) for price in PRICES),
    ):
        model = classifier(adaptive, stride)
        train_classifier(model, digits[:1400], labels[:1400], steps, price)
        model.eval()
        right, macs = measure(model, images, truth)
        line = f"  {name:20} {right:5.1f}% right, {macs:.3f} million MACs an image"
        if adaptive:
            with torch.no_grad():
                line += "".join(
                    f"; at {size} px {strides(model, enlarged(digits[1500], size))}"
                    for size in SIZES
                )
        print(line)
    segment(quick)


def segmenter(adaptive: bool) -> nn.Sequential:
    """Static stride 1 throughout; adaptive layers resize their outputs back to that."""
    torch.manual_seed(0)
    widths = [(3, 12), (12, 16), (16, 16)]
    layers: list[nn.Module] = []
    for inputs, outputs in widths:
        conv: nn.Module = nn.Conv2d(inputs, outputs, 5, padding=2)
        if adaptive:
            conv = dynaconv.AdaptiveStrideConv2d.from_conv(conv, high=4.0)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 2, 1))


def segment(quick: bool) -> None:
    """Ink against photograph, on scenes of digits of many sizes."""
    from dynaconv.data.digits import BACKGROUND, DigitScenes

    count, epochs = (8, 1) if quick else (96, 3)
    train, val = (DigitScenes(s, count, 48).in_memory() for s in ("train", "val"))
    print("a segmenter of ink, outputs resized back")
    for name, adaptive, price in (
        ("static", False, 0.0),
        ("adaptive, price 0.02", True, 0.02),
        ("adaptive, price 0.1", True, 0.1),
    ):
        model = segmenter(adaptive)
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(dynaconv.parameter_groups(model, lr=1e-2))
        for _ in range(epochs):
            for pick in torch.randperm(count).split(8):
                ink = (train.masks[pick] != BACKGROUND).long()
                with collect_costs() as costs:
                    loss = F.cross_entropy(model(train.images[pick]), ink)
                if costs:
                    loss = loss + price * torch.stack(costs).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            said = model(val.images).argmax(1) == 1
        truth = val.masks != BACKGROUND
        overlap = 100 * ((said & truth).sum() / (said | truth).sum()).item()
        macs = counter.get_total_flops() / 2e6 / count
        print(f"  {name:20} IoU {overlap:5.1f}%, {macs:.2f} million MACs an image")


if __name__ == "__main__":
    main()
