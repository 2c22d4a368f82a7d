"""Pictures that were saved again, resized or cut a little are found; others are not."""

import io
import zipfile

import numpy as np
import pytest
from helpers import real_data
from PIL import Image

from metautils.data import near
from metautils.data.near import alike, look


def scene(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)


def saved_again(image):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=40)
    return Image.open(file)


CHANGES = {
    "saved again": saved_again,
    "half as large": lambda image: image.resize((100, 75)),
    "cut on all sides": lambda image: image.crop((3, 3, 197, 147)),
    "cut at a corner": lambda image: image.crop((3, 3, 200, 150)),
    "brighter": lambda image: image.point(lambda x: min(255, int(1.2 * x))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_copies_are_found_and_no_others(change):
    scenes = [scene(k) for k in range(40)]
    copies = [change(each) for each in scenes]
    assert sorted(alike(list(map(look, scenes)), list(map(look, copies)))) == [
        (k, k) for k in range(40)
    ]


def test_parts_of_the_table_are_those_of_the_whole(monkeypatch):
    looks = [look(scene(k % 7)) for k in range(20)]
    whole = alike(looks, looks[:9])
    monkeypatch.setattr(near, "AT_ONCE", 3)
    assert alike(looks, looks[:9]) == whole
    assert len(whole) == sum((k % 7) == (j % 7) for k in range(20) for j in range(9))


def test_closest_come_first():
    first = look(scene(0))
    pairs = alike([look(scene(0).crop((4, 4, 200, 150))), first], [first])
    assert pairs == [(1, 0), (0, 0)]


def test_flat_pictures_are_like_none():
    """Of a blank page there is nothing to compare."""
    flat = look(Image.new("RGB", (30, 20), "white"))
    assert alike([flat], [flat]) == []
    assert alike([], [flat]) == alike([flat], []) == []


def test_drawings_of_a_hash_alike_are_not_taken_for_copies():
    """Most places of a drawing are white, so its hash says little."""
    pages = []
    for k in range(20):
        page = np.full((105, 105), 255, np.uint8)
        page[20 + 3 * k : 23 + 3 * k, 10:95] = 0
        pages.append(look(Image.fromarray(page)))
    bits = np.stack([each.bits for each in pages])
    assert ((bits @ bits.T) >= 64 - 2 * near.BITS).sum() > 40
    assert {(i, j) for i, j in alike(pages, pages) if abs(i - j) > 2} == set()


@pytest.fixture(scope="module")
def cats_and_dogs():
    """The photographs by name."""
    path = real_data() / "dogs-vs-cats" / "dogs-vs-cats.zip"
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return {
            name.rsplit("/")[-1]: Image.open(archive.open(name)).convert("RGB") for name in names
        }


def test_cats_and_dogs_hold_one_copy(cats_and_dogs):
    names, looks = [*cats_and_dogs], [*map(look, cats_and_dogs.values())]
    pairs = [(names[i], names[j]) for i, j in alike(looks, looks) if i < j]
    assert pairs == [("dog.180.jpg", "dog.74.jpg")]


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (saved_again, 100),
        (lambda image: image.resize((image.width // 2, image.height // 2)), 100),
        (lambda image: image.crop((5, 5, image.width - 5, image.height - 5)), 98),
        (lambda image: image.crop((5, 5, image.width, image.height)), 98),
    ],
    ids=["saved again", "halved", "cut on all sides", "cut at a corner"],
)
def test_copies_of_cats_and_dogs_are_found(cats_and_dogs, change, least):
    """As many as the comment in the module says, and none in place of another."""
    names, images = [*cats_and_dogs], [*cats_and_dogs.values()]
    pairs = alike([*map(look, images)], [look(change(each)) for each in images])
    assert sum(i == j for i, j in pairs) >= least / 100 * len(images)
    assert {names[i] for i, j in pairs if i != j} == {"dog.180.jpg", "dog.74.jpg"}
