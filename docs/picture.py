"""The READMEs' picture, from the models that `dynaconv demo` has trained.

make demo && python docs/picture.py demo docs/picture.png
"""

import sys
from pathlib import Path

import torch

from dynaconv.data.digits import BACKGROUND, DigitScenes
from dynaconv.training.files import load_model, whole
from dynaconv.training.kernel_pictures import Ground, capture, draw_offsets, draw_shares, draw_taps
from dynaconv.training.model import dynamic_layers, predict
from dynaconv.training.pictures import frame, paint, panels, show_image

SCENES, SEED = 60, 1
# Column: title, family, layer, quantity, how it is drawn.
KERNELS = (
    (
        "offsets\n(deform_v2)",
        "deform_v2",
        "encoder.0.0.conv",
        "offset",
        draw_offsets,
    ),
    (
        "chosen sizes\n(selective_kernel)",
        "selective_kernel",
        "encoder.0.1.conv",
        "coefficients",
        draw_shares,
    ),
    ("weight of each tap\n(odconv)", "odconv", "encoder.0.0.conv", "spatial", draw_taps),
)


def main(demo: Path, target: Path) -> None:
    names = ("static", "deform_v2", "selective_kernel", "odconv")
    models = {name: load_model(demo / "models" / f"{name}-{SEED}.pt")[0] for name in names}
    scenes = DigitScenes("val", SCENES).in_memory()
    said = {name: predict(models[name], scenes.images) for name in ("static", "deform_v2")}
    figure, axes = panels(2, 4 + len(KERNELS), 1.75, 2.0)
    for row, index in zip(axes, two_scenes(scenes.sizes), strict=True):
        image, top = scenes.images[index], row[0] is axes[0, 0]
        masks = [scenes.masks[index], said["static"][index], said["deform_v2"][index]]
        show_image(frame(row[0], "image" if top else ""), image)
        titles = ("truth", "static", "deform_v2")
        for cell, title, mask in zip(row[1:4], titles, masks, strict=True):
            frame(cell, title if top else "").imshow(paint(mask, BACKGROUND + 1, BACKGROUND))
        for cell, (title, family, layer, key, draw) in zip(row[4:], KERNELS, strict=True):
            values = capture(models[family], image)[layer][key][0].float()
            window = dynamic_layers(models[family])[layer].kernel_size
            draw(cell, values, Ground(image, tuple(image.shape[1:]), window))
            cell.set_title(title if top else "")
    with whole(target) as temporary:
        figure.savefig(temporary, dpi=130)


def two_scenes(sizes: torch.Tensor) -> list[int]:
    """The scene with the largest digits, and the one with the most digits."""
    widths = [set(scene[scene > 0].tolist()) for scene in sizes]
    large = max(range(len(widths)), key=lambda i: sum(widths[i]) / len(widths[i]))
    return [large, max(range(len(widths)), key=lambda i: len(widths[i]))]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
