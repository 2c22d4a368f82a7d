"""A reader's own folder of images becomes a bank, or a sentence says what is wrong with it."""

import os

import numpy as np
import pytest
import torch
from helpers import IMAGE_SIZE, RED, fill, only_colour, read_one, told_in_one_line
from PIL import Image

from metautils.data import folder
from metautils.files import DataError
from metautils.sampling import EpisodeSampler


def test_grey(tmp_path):
    image = read_one(tmp_path, Image.new("RGB", (30, 20), RED), channels=1)
    assert only_colour(image) == (76,)  # the luma of red, 0.299 x 255


def test_middle_square_of_a_wide_and_of_a_tall_image(tmp_path):
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, 15:25] = RED
    # Resampling mixes the cut's very edge with its neighbours.
    assert only_colour(read_one(tmp_path / "wide", Image.fromarray(pixels))[..., 3:-3]) == RED
    tall = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    assert only_colour(read_one(tmp_path / "tall", Image.fromarray(tall))[:, 3:-3]) == RED


def test_same_size_changes_no_pixel_and_colours_keep_their_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    image = read_one(tmp_path, Image.fromarray(pixels))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_classes_are_the_folders_in_order(tmp_path):
    root = fill(tmp_path, zebra=2, ant=5, Cat=1)
    bank = folder.bank(root, IMAGE_SIZE)
    assert bank.names == ("Cat", "ant", "zebra")
    assert bank.counts.tolist() == [1, 5, 2]
    assert torch.equal(folder.bank(root, IMAGE_SIZE).images, bank.images)


def test_images_come_in_order_of_name(tmp_path):
    (tmp_path / "a").mkdir()
    for name, level in (("10.png", 10), ("b.png", 30), ("2.png", 20)):
        Image.new("L", (4, 4), level).save(tmp_path / "a" / name)
    bank = folder.bank(tmp_path, 4, channels=1)
    assert bank.images.flatten(1)[:, 0].tolist() == [10, 20, 30]


def test_other_files_are_passed_over(tmp_path):
    root = fill(tmp_path, a=2, b=3, **{".hidden": 1})
    (root / "README.txt").write_text("words")
    (root / "a" / "Thumbs.db").write_bytes(b"x")
    (root / "a" / "notes.txt").write_text("words")
    (root / "a" / "._0.png").write_bytes(b"what a Mac leaves beside an image")
    (root / "b" / "folder.png").mkdir()
    with pytest.warns(UserWarning, match=r"has 2 file\(s\) .* passed over: README.txt, a/notes"):
        bank = folder.bank(root, IMAGE_SIZE)
    assert (bank.names, bank.counts.tolist()) == (("a", "b"), [2, 3])


def test_ragged_classes_can_be_sampled(tmp_path):
    bank = folder.bank(fill(tmp_path, a=3, b=7, c=4, d=9), IMAGE_SIZE)
    episode = EpisodeSampler(bank, 4, 1, 2, tasks=3).sample()
    assert episode.query_x.shape == (3, 8, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_load_splits_by_class(tmp_path):
    root = fill(tmp_path, **{f"class{k:02d}": 1 for k in range(25)})
    parts = folder.load(root, IMAGE_SIZE)
    assert [len(part) for part in parts] == [16, 4, 5]
    assert len({name for part in parts for name in part.names}) == 25
    assert folder.load(root, IMAGE_SIZE, seed=1).test.names != parts.test.names


def in_parts(root, **classes):
    """A folder of parts, with two images in each of their classes, named by letters."""
    return fill(root, **{f"{part}/{name}": 2 for part, names in classes.items() for name in names})


def test_parts_of_other_classes_stay_as_they_lie(tmp_path):
    """miniImageNet's layout, whatever the seed."""
    root = in_parts(tmp_path, train="dbca", val="ef", test="ihg")
    for seed in (0, 1):
        parts = folder.load(root, IMAGE_SIZE, seed=seed)
        assert [part.names for part in parts] == [tuple("abcd"), tuple("ef"), tuple("ghi")]
    bank = folder.bank(root, IMAGE_SIZE)
    assert bank.names == tuple("abcdefghi")
    assert [part.digest for part in parts] == [
        bank.select(rows).digest for rows in (range(4), range(4, 6), range(6, 9))
    ]


def test_validation_is_a_fifth_of_the_classes_to_train_on_if_none_is_given(tmp_path):
    root = in_parts(tmp_path, train="abcdefghij", test="kl")
    parts = folder.load(root, IMAGE_SIZE)
    assert [len(part) for part in parts] == [8, 2, 2]
    assert parts.test.names == ("k", "l")
    assert sorted(parts.train.names + parts.validation.names) == list("abcdefghij")
    assert folder.load(root, IMAGE_SIZE, seed=1).validation.names != parts.validation.names


def test_images_of_a_class_are_put_together_where_all_parts_have_it(tmp_path):
    """Classes that a method learns must not be those that it is tested on."""
    root = in_parts(tmp_path, Training="abcdefgh", Testing="abcdefgh")
    parts = folder.load(root, IMAGE_SIZE)
    assert [len(part) for part in parts] == [4, 2, 2]
    assert sorted(name for part in parts for name in part.names) == list("abcdefgh")
    assert folder.bank(root, IMAGE_SIZE).counts.tolist() == [4] * 8


def test_parts_below_the_classes_are_parts(tmp_path):
    root = fill(tmp_path, **{f"{name}/{part}": 2 for part in ("train", "test") for name in "ab"})
    assert folder.bank(root, IMAGE_SIZE).counts.tolist() == [4, 4]
    fill(root, **{"c/train": 2})
    told_in_one_line(lambda: folder.bank(root, IMAGE_SIZE), "train and test below the classes")


def test_class_named_train_beside_classes(tmp_path):
    root = fill(tmp_path, **{"bus": 2, "car": 2, "train/a": 2, "train/b": 1})
    with pytest.warns(UserWarning, match="has 1 folder.* named like a part and read as a class: t"):
        bank = folder.bank(root, IMAGE_SIZE)
    assert (bank.names, bank.counts.tolist()) == (("bus", "car", "train"), [2, 2, 3])


def test_folder_of_files_is_no_class(tmp_path):
    root = fill(tmp_path, **{"set/a": 2, "set/b": 1, "set/docs": 0})
    (root / "set" / "docs" / "notes.txt").write_text("words")
    with pytest.warns(UserWarning, match="that hold files and no image, .* passed over: set/docs"):
        assert folder.bank(root, IMAGE_SIZE).names == ("a", "b")


def test_images_in_subfolders_are_of_the_class(tmp_path):
    root = fill(tmp_path, **{"a": 2, "a/more": 3, "b/deep/er": 1})
    assert folder.bank(root, IMAGE_SIZE).counts.tolist() == [5, 1]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"train": "abcd", "test": "ade"},
            "has the class 'a' in train and test, but 'b' in train: give all",
        ),
        (
            {"train": "ab", "val": "ab", "test": "cd"},
            "'a' in train and validation, but 'c' in test",
        ),
        ({"train": "abcd", "test": "ABCD"}, "has the classes 'A' and 'a' in its parts: give one"),
        ({"train": "abcd", "val": "ef"}, "train and validation and none for test: add a test fol"),
        ({"train": "abcd", "val": "e", "test": "fg"}, "1 classes for validation, which needs 2"),
        ({"train": "abc", "test": "fg"}, "has 3 classes for train, which needs 4 or more"),
        ({"train": "abc", "test": "abc"}, "has 3 classes; parts of two need 6"),
        ({"train": "ab", "bus": "ab", "car": "ab"}, "in train/, which may be .* beside bus/: ren"),
    ],
)
def test_parts_that_do_not_fit_are_told(tmp_path, parts, sentence):
    root = in_parts(tmp_path, **parts)
    told_in_one_line(lambda: folder.load(root, IMAGE_SIZE), sentence)


def test_bad_images_are_told_all_at_once(tmp_path):
    root = fill(tmp_path, a=2, b=2)
    for k in range(4):
        (root / "a" / f"{k}.jpg").write_text("words")
        (root / "b" / f"{k}.jpg").write_text("words")
    with pytest.raises(DataError, match=r"^8 images cannot be read, .* and 3 more") as caught:
        folder.bank(root, IMAGE_SIZE)
    for name in ("a/0", "a/1", "a/2", "a/3", "b/0"):
        assert str(root / f"{name}.jpg") in str(caught.value)
    assert f"b{os.sep}1.jpg" not in str(caught.value)


def refuses(path, sentence):
    told_in_one_line(lambda: folder.bank(path, IMAGE_SIZE), sentence)


def test_no_folder(tmp_path):
    refuses(tmp_path / "gone", "gone is no folder: name one that holds a subfolder for each class")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "file is no folder")


def test_folder_without_classes(tmp_path):
    refuses(tmp_path, "has no subfolder of images: put those of each class into one")
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.none").write_text("")
    refuses(
        tmp_path,
        r"has no subfolder of images: put those of each class into one\. .* passed over: loose\.png"
        r"\. .* that hold files and no image, and are passed over: a",
    )


def test_empty_class_is_named(tmp_path):
    fill(tmp_path, full=2, bare=0)
    refuses(tmp_path, "bare holds no image: add some or remove the folder")


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_are_1_or_3(tmp_path, channels):
    with pytest.raises(ValueError, match=f"channels is {channels}; it must be 1"):
        folder.bank(tmp_path, channels=channels)
