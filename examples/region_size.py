"""How large does a kernel grow inside digits of different sizes?

Trains one tiny network twice on scenes of real digits, with static convolutions and with
`AdaptiveDilationConv2d` in their place; prints what was measured.

    python examples/region_size.py [--quick] [--picture sizes.png]

Needs scikit-learn (the digits), and matplotlib for the picture.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynaconv
from dynaconv.data.digits import BACKGROUND, CLASS_NAMES, SIZE_BUCKETS, DigitScenes, InMemory

STRIDE = 4  # of the stem; the kernels of the body live on its grid


def network(conv: Callable[..., nn.Module], channels: int = 32, layers: int = 3) -> nn.Module:
    """A stem at a quarter of the resolution, a body of 3x3 `conv`, a class for every pixel."""
    unit = lambda conv: nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
    stem = nn.Sequential(
        unit(nn.Conv2d(3, channels, 3, 2, 1, bias=False)),
        unit(nn.Conv2d(channels, channels, 3, 2, 1, bias=False)),
    )
    body = [unit(conv(channels, channels, 3, padding=1, bias=False)) for _ in range(layers)]
    head = nn.Conv2d(channels, len(CLASS_NAMES), 1)
    up = nn.Upsample(scale_factor=STRIDE, mode="bilinear")
    return nn.Sequential(stem, nn.Sequential(*body), head, up)


def train(model: nn.Module, scenes: InMemory, steps: int, batch: int = 8) -> float:
    """Trains in place; the seconds it took."""
    start = time.perf_counter()
    # Most pixels are background: a weight keeps it from being all that is learned.
    weight = torch.ones(len(CLASS_NAMES))
    weight[BACKGROUND] = 0.3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        pick = torch.randint(len(scenes), (batch,), generator=generator)
        loss = F.cross_entropy(model(scenes.images[pick]), scenes.masks[pick], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def mean_iou(model: nn.Module, scenes: InMemory) -> float:
    """Intersection over union, the mean over classes."""
    predicted = torch.cat([model.eval()(x).argmax(1) for x in scenes.images.split(16)])
    scores = []
    for c in range(len(CLASS_NAMES)):
        is_c, was_c = predicted == c, scenes.masks == c
        scores.append(((is_c & was_c).sum() / (is_c | was_c).sum().clamp(min=1)).item())
    return sum(scores) / len(scores)


@torch.no_grad()
def size_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """For each dynamic layer its kernel's extent in pixels, (N, H / STRIDE, W / STRIDE)."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda layer, args: found.__setitem__(
            name, STRIDE * layer.kernels(*args)["size"][:, 0]
        )

    hooks = [
        layer.register_forward_pre_hook(keep(f"layer {name.split('.')[1]}"))
        for name, layer in model.eval().named_modules()
        if isinstance(layer, dynaconv.AdaptiveDilationConv2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def report_sizes(model: nn.Module, scenes: InMemory) -> None:
    """Prints the mean kernel size inside small, medium and large digits, and outside of them."""
    widths = scenes.sizes[:, ::STRIDE, ::STRIDE]
    places = {
        f"{name} ({low:g}-{high:g} px)": (widths >= low) & (widths < high)
        for name, (low, high) in SIZE_BUCKETS.items()
    } | {"background": widths == 0}
    print("\nmean size of the kernel in pixels inside digits of this width")
    print(f"{'layer':10}" + "".join(f"{name:>20}" for name in places))
    for layer, sizes in size_maps(model, scenes.images).items():
        means = "".join(f"{sizes[inside].mean():20.2f}" for inside in places.values())
        print(f"{layer:10}{means}")


def draw(model: nn.Module, scenes: InMemory, path: str, rows: int = 3) -> None:
    """Scenes, and over them the size of each layer's kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images = scenes.images[:rows]
    maps = size_maps(model, images)
    figure, axes = plt.subplots(rows, 1 + len(maps), figsize=(3 * (1 + len(maps)), 2.8 * rows))
    height, width = images.shape[2:]
    for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        axes[row, 0].imshow(image)
        axes[row, 0].set_title("scene")
        for column, (name, sizes) in enumerate(maps.items(), start=1):
            panel = axes[row, column]
            panel.imshow(image)
            drawn = panel.imshow(
                sizes[row].numpy(), extent=(0, width, height, 0), alpha=0.7, cmap="viridis"
            )
            panel.set_title(f"kernel size in pixels, {name}")
            figure.colorbar(drawn, ax=panel, fraction=0.046)
    for panel in axes.flat:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds; too short to learn much")
    parser.add_argument("--picture", metavar="FILE", help="draw the size maps over scenes")
    arguments = parser.parse_args()
    steps, length = (30, 48) if arguments.quick else (300, 400)
    scenes = DigitScenes("train", length).in_memory()
    unseen = DigitScenes("val", 32 if arguments.quick else 64).in_memory()
    for name, conv in (
        ("static", nn.Conv2d),
        ("adaptive dilation", dynaconv.AdaptiveDilationConv2d),
    ):
        torch.manual_seed(0)
        model = network(conv)
        seconds = train(model, scenes, steps)
        score = 100 * mean_iou(model, unseen)
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:18} mean IoU {score:5.1f}%  {count:6,} parameters  {seconds:5.1f} s")
    report_sizes(model, unseen)
    if arguments.picture:
        draw(model, unseen, arguments.picture)


if __name__ == "__main__":
    main()
