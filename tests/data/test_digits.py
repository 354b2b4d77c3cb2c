import pytest
import torch

from dynaconv.data.digits import (
    BACKGROUND,
    CLASS_NAMES,
    SCALES,
    SIZE_BUCKETS,
    DigitScenes,
    digit_ids,
    load_sources,
    make_scene,
    place,
)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_same_seed_gives_the_same_scenes_and_another_seed_others():
    first, again, other = (DigitScenes("train", 4, 32, seed) for seed in (3, 3, 4))
    assert all(equal(first[i], again[i]) for i in range(4))
    assert not any(torch.equal(first[i].image, other[i].image) for i in range(4))
    assert not torch.equal(first[0].image, first[1].image)


def test_an_item_depends_neither_on_the_order_nor_on_the_length():
    long, short = DigitScenes("val", 6, 32), DigitScenes("val", 3, 32)
    backwards = [long[i] for i in reversed(range(6))][::-1]
    assert all(equal(backwards[i], short[i]) for i in range(3))


def test_in_memory_holds_the_items():
    scenes = DigitScenes("train", 3, 32)
    memory = scenes.in_memory()
    assert len(memory) == 3
    assert all(equal(memory[i], scenes[i]) for i in range(3))


def test_train_and_validation_share_no_digit():
    train, val = load_sources("train"), load_sources("val")
    assert not set(train.digit_ids.tolist()) & set(val.digit_ids.tolist())
    assert len(train.digit_ids) + len(val.digit_ids) == 1797
    assert set(train.labels.tolist()) == set(val.labels.tolist()) == set(range(10))
    # No validation digit is a copy of a training one under another number.
    distance = torch.cdist(train.digits.flatten(1), val.digits.flatten(1))
    assert distance.min() > 0


def test_train_and_validation_share_no_column_of_a_photograph():
    train, val = load_sources("train"), load_sources("val")
    for (start, stop), (val_start, val_stop) in zip(train.columns, val.columns, strict=True):
        assert start == 0 < stop == val_start < val_stop == 640
    for sources in (train, val):
        for photo, (start, stop) in zip(sources.photos, sources.columns, strict=True):
            assert photo.shape == (3, 427, stop - start)


def test_scenes_draw_from_their_own_split_alone():
    train, val = load_sources("train"), load_sources("val")
    from_train = make_scene(train, 32, torch.Generator().manual_seed(0))
    from_val = make_scene(val, 32, torch.Generator().manual_seed(0))
    assert not torch.equal(from_train.image, from_val.image)
    assert equal(make_scene(val, 32, torch.Generator().manual_seed(0)), from_val)


def test_shapes_ranges_and_classes():
    for scene in DigitScenes("train", 5, 64):
        assert scene.image.shape == (3, 64, 64)
        assert scene.mask.shape == scene.sizes.shape == (64, 64)
        assert scene.mask.dtype == torch.long
        assert scene.image.min() >= 0
        assert scene.image.max() <= 1
        assert set(scene.mask.unique().tolist()) <= set(range(len(CLASS_NAMES)))
        assert (scene.mask == BACKGROUND).any()
        assert (scene.mask != BACKGROUND).any()


def test_sizes_are_those_of_the_digits_squares():
    sizes = torch.cat([s.sizes.unique() for s in DigitScenes("train", 60, 64)])
    widths = sizes[sizes > 0]
    assert widths.min() >= SCALES[0]
    assert widths.max() <= SCALES[1] + 1e-3
    for low, high in SIZE_BUCKETS.values():
        assert ((widths >= low) & (widths < high)).sum() > 5
    for scene in DigitScenes("val", 10, 64):
        assert (scene.sizes[scene.mask != BACKGROUND] > 0).all()
        for width in scene.sizes.unique().tolist():
            if width > 0:
                covered = float((scene.sizes == width).sum())
                assert 0.4 * width**2 < covered < 1.1 * (width + 1) ** 2


def test_a_placed_digit_is_the_digit():
    sources = load_sources("train")
    ink, square = place(sources.digits[7], 8, (4.0, 4.0), scale=8.0, turn=0.0)
    torch.testing.assert_close(ink, sources.digits[7], atol=1e-5, rtol=0)
    assert square.all()


def test_a_quarter_turn_turns_anticlockwise():
    digit = load_sources("train").digits[7]
    ink, _ = place(digit, 8, (4.0, 4.0), scale=8.0, turn=torch.pi / 2)
    torch.testing.assert_close(ink, digit.rot90(1), atol=1e-5, rtol=0)


def test_labels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    raw, sources = load_digits(), load_sources("val")
    ids = sources.digit_ids
    assert sources.labels.tolist() == raw.target[ids].tolist()
    torch.testing.assert_close(sources.digits * 16, torch.from_numpy(raw.images[ids]).float())


def test_every_class_is_split_alike():
    labels = load_sources("train").labels
    assert len(digit_ids(labels, "train")) == sum(
        int(0.8 * int((labels == digit).sum())) for digit in range(10)
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("test", 1), "split must be 'train' or 'val', got 'test'"),
        (("train", -1), "got -1 and 64"),
        (("train", 1, 15), "got 1 and 15"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        DigitScenes(*arguments)


def test_no_item_beyond_the_length():
    with pytest.raises(IndexError, match="index 2 of 2 scenes"):
        DigitScenes("train", 2)[2]
