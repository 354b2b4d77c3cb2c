import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dynaconv.data.errors import InputError
from dynaconv.data.folder import FolderData, augment, check_folder
from dynaconv.data.images import read_mask
from tests.data.folders import make_folder, save_image, save_mask


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data")


def test_a_good_folder(folder):
    found = check_folder(folder)
    assert [image.name for image, _ in found.train] == ["0.png", "1.png", "2.png"]
    assert [mask.parent.name for _, mask in found.val] == ["masks", "masks"]
    assert found.classes == 2
    assert check_folder(folder, classes=5).classes == 5


def test_ignored_pixels_and_hidden_or_other_files_are_no_fault(folder):
    save_mask(folder / "val/masks/0.png", np.full((24, 24), 255))
    (folder / "train/images/._0.png").write_text("not an image")
    (folder / "train/images/notes.txt").write_text("not an image")
    assert check_folder(folder).classes == 2


def broken(name):
    def break_folder(root):
        if name == "no folder":
            shutil.rmtree(root)
        elif name == "no split":
            shutil.rmtree(root / "val/masks")
        elif name == "empty":
            for path in (root / "train").rglob("*.png"):
                path.unlink()
        elif name == "no mask":
            (root / "train/masks/1.png").unlink()
        elif name == "no image":
            (root / "val/images/1.png").unlink()
        elif name == "two of a name":
            shutil.copy(root / "train/images/1.png", root / "train/images/1.jpg")
        elif name == "unreadable image":
            (root / "val/images/0.png").write_bytes(b"\x89PNG no more")
        elif name == "unreadable mask":
            (root / "val/masks/0.png").write_text("")
        elif name == "coloured mask":
            save_image(root / "train/masks/0.png", torch.rand(3, 24, 24))
        elif name == "other size":
            save_mask(root / "train/masks/2.png", np.zeros((24, 20)))
        elif name == "unknown in val":
            save_mask(root / "val/masks/1.png", np.full((24, 24), 7))
        elif name == "one class":
            for path in root.glob("*/masks/*.png"):
                save_mask(path, 255 * (read_mask(path) > 0))

    return break_folder


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("no folder", r"data: no such folder"),
        ("no split", r"val/masks: no such folder"),
        ("empty", r"train/images: no images"),
        ("no mask", r"train/images/1\.png: has no mask .*train/masks/1\.png"),
        ("no image", r"val/masks/1\.png: has no image in .*val/images"),
        ("two of a name", r"1\.png: has the name of 1\.jpg"),
        ("unreadable image", r"val/images/0\.png: not a readable image"),
        ("unreadable mask", r"val/masks/0\.png: not a readable mask"),
        ("coloured mask", r"train/masks/0\.png: not a readable mask .*RGB"),
        ("other size", r"train/masks/2\.png: is 20x24, its image 2\.png is 24x24"),
        ("unknown in val", r"val/masks/1\.png: unknown class 7; known are 0 to 1, and 255"),
        ("one class", r"train/masks: has the values 0, 255 alone, where 255 means no class"),
    ],
)
def test_every_fault_is_named_with_its_file(folder, fault, text):
    broken(fault)(folder)
    with pytest.raises(InputError, match=text):
        check_folder(folder)


def test_more_classes_than_said(folder):
    save_mask(folder / "train/masks/1.png", np.full((24, 24), 4))
    with pytest.raises(InputError, match=r"train/masks/1\.png: unknown class 4; known are 0 to 2"):
        check_folder(folder, classes=3)


def test_all_faults_are_told_at_once_but_not_hundreds(folder):
    broken("unreadable image")(folder)
    broken("other size")(folder)
    with pytest.raises(InputError, match=r"train/masks/2\.png(.|\n)*val/images/0\.png"):
        check_folder(folder)
    for i in range(30):
        (folder / f"val/images/x{i}.png").write_text("")
    with pytest.raises(InputError) as refused:
        check_folder(folder)
    lines = str(refused.value).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "... and 10 more"


def test_fingerprint_follows_the_files(folder):
    def fingerprint(root):
        return FolderData(check_folder(root).train, 255).fingerprint()

    first = fingerprint(folder)
    moved = shutil.move(folder, folder.with_name("moved"))
    assert fingerprint(moved) == first
    Image.new("RGB", (24, 24)).save(moved / "train/images/1.png")
    assert fingerprint(moved) != first


def test_crops_depend_on_seed_epoch_and_index_alone(folder):
    pairs = check_folder(folder).train
    data, again = (FolderData(pairs, 255, size=16, seed=3) for _ in range(2))
    again[0]
    assert all(torch.equal(a, b) for a, b in zip(data[2], again[2], strict=True))
    first = data[2][0]
    data.set_epoch(1)
    assert not torch.equal(data[2][0], first)
    assert not torch.equal(FolderData(pairs, 255, size=16, seed=4)[2][0], first)


def test_without_a_size_items_are_whole(folder):
    image, mask = FolderData(check_folder(folder).val, 255)[0]
    assert image.shape == (3, 24, 24)
    assert mask.shape == (24, 24)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 70), (40, 40)])
def test_image_and_mask_stay_together(height, width):
    """The mask is drawn into the image, so after any crop it can be read off the image again."""
    mask = (torch.arange(height * width).view(height, width) // 8) % 2
    image = mask.float().expand(3, -1, -1)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        crop, labels = augment(image, mask, 32, 255, generator)
        assert crop.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        real = labels != 255
        assert (crop[0][~real] == 0).all()
        said = crop[0][real] > 0.5
        assert (said == (labels[real] == 1)).float().mean() > 0.8
