"""A reader's own folder of images becomes a bank, or a sentence says what is wrong with it."""

import numpy as np
import pytest
import torch
from helpers import IMAGE_SIZE, RED, fill, only_colour, read_one
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


def refuses(path, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        folder.bank(path, IMAGE_SIZE)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    refuses(tmp_path / "gone", "gone is no folder: name one that holds a subfolder for each class")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "file is no folder")


def test_folder_without_classes(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    refuses(tmp_path, "has no subfolder: put the images of each class into one")


def test_empty_class_is_named(tmp_path):
    fill(tmp_path, full=2, bare=0)
    (tmp_path / "bare" / "notes.txt").write_text("")
    refuses(tmp_path, "bare holds no image: add some or remove the folder")


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_are_1_or_3(tmp_path, channels):
    with pytest.raises(ValueError, match=f"channels is {channels}; it must be 1"):
        folder.bank(tmp_path, channels=channels)
