import numpy as np
import pytest
import torch
from PIL import Image

from dynaconv.data.errors import InputError
from dynaconv.data.images import read_image, read_mask

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
RGB = np.stack([GREY, GREY // 2, 255 - GREY], axis=2)


def saved(folder, array, name="a.png", **options):
    path = folder / name
    Image.fromarray(array).save(path, **options)
    return path


def expected(rgb):
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_rgb(tmp_path, name):
    path = saved(tmp_path, RGB, name, **({"lossless": True} if name == "a.webp" else {}))
    image = read_image(path)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected(RGB))


def test_grey_becomes_three_equal_channels(tmp_path):
    torch.testing.assert_close(
        read_image(saved(tmp_path, GREY)), expected(np.stack([GREY] * 3, axis=2))
    )


def test_one_pixel(tmp_path):
    assert read_image(saved(tmp_path, RGB[:1, :1])).shape == (3, 1, 1)
    assert read_mask(saved(tmp_path, GREY[:1, :1])).shape == (1, 1)


def test_alpha_is_dropped(tmp_path):
    rgba = np.concatenate([RGB, GREY[..., None]], axis=2)
    torch.testing.assert_close(read_image(saved(tmp_path, rgba)), expected(RGB))


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(GREY // 60).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "a.png", transparency=bytes([0, 255, 255, 255]))
    read = read_image(tmp_path / "a.png")
    assert (read[:, 0, 0] * 255).round().tolist() == [10, 20, 30]
    assert (read[:, -1, -1] * 255).round().tolist() == [100, 110, 120]


def test_sixteen_bits_keep_their_range(tmp_path):
    deep = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    read = read_image(saved(tmp_path, deep))
    torch.testing.assert_close(read[1, 0], torch.tensor([0, 256, 32768, 65535]) / 65535)


def test_exif_orientation_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    path = saved(tmp_path, RGB, exif=exif)
    torch.testing.assert_close(read_image(path), expected(np.rot90(RGB, -1).copy()))


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path, GREY.astype(np.float32), "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: not a readable image \(floating-point pixels"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_truncated_files_are_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, noise, name)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=rf"{name}: not a readable image \(.*truncated"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_other_files_are_named(tmp_path, read):
    path = tmp_path / "a.png"
    path.write_text("no image at all")
    with pytest.raises(InputError, match=r"a\.png: not a readable \w+ \(unknown format\)"):
        read(path)
    with pytest.raises(InputError, match=r"b\.png: no such file"):
        read(tmp_path / "b.png")
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        read_image(path)


def test_mask_values_are_class_indices(tmp_path):
    mask = read_mask(saved(tmp_path, GREY))
    assert mask.dtype == torch.long
    assert mask.tolist() == GREY.tolist()


def test_palette_mask_gives_indices_not_colours(tmp_path):
    image = Image.fromarray(GREY // 60).convert("P")
    image.putdata((GREY // 60).flatten().tolist())
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    image.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == (GREY // 60).tolist()


def test_one_bit_and_sixteen_bit_masks(tmp_path):
    assert read_mask(saved(tmp_path, GREY > 100)).tolist() == (GREY > 100).astype(int).tolist()
    deep = GREY.astype(np.uint16) * 100
    assert read_mask(saved(tmp_path, deep)).tolist() == deep.tolist()


def test_a_coloured_mask_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.png: .*single channel of class indices.* RGB"):
        read_mask(saved(tmp_path, RGB))
