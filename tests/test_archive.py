"""Images are read the same from an archive and a folder, and damage is told in one sentence."""

import io
import zipfile

import numpy as np
import pytest
from helpers import told_in_one_line, write_archives, write_files
from PIL import Image

from metautils.data.archive import images

STORES = pytest.mark.parametrize("store", ["archive", "folder"])


def png(pixels, mode=None):
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


def pixels(seed=0):
    """Four rows of six colours."""
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)


NAMES = [
    "shapes/angular/cube/0.png",
    "shapes/angular/cube/1.png",
    "shapes/angular/star/0.png",
    "shapes/round/0.png",
]
PNGS = {name: png(pixels(seed)) for seed, name in enumerate(NAMES)}


def stored(folder, store="archive", contents=PNGS):
    """The folder of a set with one part, in an archive or a folder."""
    if store == "folder":
        return write_files(folder, contents)
    return write_archives(folder, ["shapes"], contents)


def read(source, mode="RGB"):
    return list(images(source, "shapes", ".png", mode, "Shapes"))


def same(found, seeds=range(4)):
    """Whether these are the images of the seeds, each with its class, in this order."""
    classes = [NAMES[seed].rsplit("/", 1)[0] for seed in seeds]
    return [name for name, _ in found] == classes and all(
        np.array_equal(image, pixels(seed)) for (_, image), seed in zip(found, seeds, strict=True)
    )


# What is read


@STORES
def test_images_come_with_their_class(tmp_path, store):
    found = read(stored(tmp_path, store))
    assert [name for name, _ in found][2:] == ["shapes/angular/star", "shapes/round"]
    assert same(found)
    assert {x.dtype for _, x in found} == {np.dtype(np.uint8)}


def test_folder_and_archive_give_the_same(tmp_path):
    zips, folders = (read(stored(tmp_path / store, store)) for store in ("archive", "folder"))
    assert [name for name, _ in zips] == [name for name, _ in folders]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(zips, folders, strict=True))


@STORES
def test_order_is_by_name(tmp_path, store):
    """Not the order in which they were written."""
    assert same(read(stored(tmp_path, store, dict(reversed(PNGS.items())))))


@STORES
def test_other_files_are_passed_over(tmp_path, store):
    others = {"shapes/README": b"on shapes", "shapes/round/0.txt": b"round"}
    assert same(read(stored(tmp_path, store, PNGS | others)))


def test_archive_may_list_its_folders_and_those_of_others(tmp_path):
    archive = stored(tmp_path) / "shapes.zip"
    with zipfile.ZipFile(archive, "a") as file:
        file.mkdir("shapes/round")
        file.writestr("others/round/0.png", b"no image")
    assert same(read(tmp_path))


def test_archive_without_its_folder_level_holds_no_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "shapes.zip", "w") as file:
        for name, content in PNGS.items():
            file.writestr(name.removeprefix("shapes/"), content)
    assert read(tmp_path) == []


def test_folder_goes_before_the_archive(tmp_path):
    stored(tmp_path)
    stored(tmp_path, "folder", {NAMES[3]: PNGS[NAMES[3]]})
    assert same(read(tmp_path), [3])


@STORES
@pytest.mark.parametrize("saved", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize(("mode", "shape"), [("L", (4, 6)), ("RGB", (4, 6, 3))])
def test_image_is_converted_to_the_mode_asked_for(tmp_path, store, saved, mode, shape):
    black_and_white = np.where(pixels() < 128, 0, 255).astype(np.uint8)[..., :1].repeat(3, 2)
    contents = {NAMES[0]: png(black_and_white, saved)}
    ((_, found),) = read(stored(tmp_path, store, contents), mode)
    assert found.shape == shape
    assert np.array_equal(found, black_and_white if mode == "RGB" else black_and_white[..., 0])


# Damages


@pytest.mark.parametrize("part", ["shapes", "colours"])
def test_missing_part_tells_what_was_looked_for(tmp_path, part):
    sentence = (
        rf"^Neither {tmp_path}/{part}\.zip nor {tmp_path}/{part}/ exists: put Shapes's {part} "
        r"there, or unset METAUTILS_DATA to download it\.$"
    )
    told_in_one_line(lambda: list(images(tmp_path, part, ".png", "L", "Shapes")), sentence)


def archive_told(folder, damage, reason, method=zipfile.ZIP_STORED):
    """An archive whose bytes were damaged is named, with the reason and what to do."""
    archive = write_archives(folder, ["shapes"], PNGS, method) / "shapes.zip"
    content = bytearray(archive.read_bytes())
    damage(content)
    archive.write_bytes(content)
    sentence = rf"^{archive} is damaged \({reason}\): fetch it again\.$"
    told_in_one_line(lambda: read(folder), sentence)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_truncated_archive_is_named(tmp_path, share):
    def truncate(content):
        del content[int(share * len(content)) :]

    archive_told(tmp_path, truncate, "File is not a zip file")


@pytest.mark.parametrize(
    ("method", "reason"),
    [(zipfile.ZIP_STORED, "Bad CRC.*"), (zipfile.ZIP_DEFLATED, "Error -3 while decompressing.*")],
    ids=["stored", "deflated"],
)
def test_archive_damaged_inside_is_named(tmp_path, method, reason):
    def overwrite(content):
        start = content.index(NAMES[0].encode()) + len(NAMES[0])  # of the first image
        content[start : start + 40] = b"\xff" * 40

    archive_told(tmp_path, overwrite, reason, method)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (8, 1, ".*encrypted.*"),
        (10, 99, ".*compression method.*"),
        (42, 7, "Bad magic number for file header"),
        (45, 255, ".*"),
    ],
    ids=["password", "method", "start", "start beyond the end"],
)
def test_archive_whose_list_of_files_is_damaged_is_named(tmp_path, place, value, reason):
    def mislead(content):
        content[content.index(b"PK\x01\x02") + place] = value

    archive_told(tmp_path, mislead, reason)


def test_archive_that_starts_before_the_file_is_named(tmp_path):
    def move(content):
        content[content.index(b"PK\x05\x06") + 16] ^= 128  # where the list of files begins

    archive_told(tmp_path, move, ".*")


def altered(content, offset, value):
    """A PNG with another byte so far from the start of its pixels."""
    place = content.index(b"IDAT") + offset
    return content[:place] + bytes([value]) + content[place + 1 :]


CORRUPT = pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no image", id="text"),
        pytest.param(PNGS[NAMES[2]][:60], id="truncated"),
        pytest.param(altered(PNGS[NAMES[2]], 10, 0), id="pixels"),
        pytest.param(altered(PNGS[NAMES[2]], -1, 0), id="length of the pixels"),
    ],
)


@CORRUPT
def test_corrupt_image_in_an_archive_is_named(tmp_path, content):
    stored(tmp_path, "archive", PNGS | {NAMES[2]: content})
    sentence = rf"^{NAMES[2]} is no readable image \(.*\): fetch Shapes again\.$"
    told_in_one_line(lambda: read(tmp_path), sentence)


@CORRUPT
def test_corrupt_image_in_a_folder_is_named_with_its_path(tmp_path, content):
    stored(tmp_path, "folder", PNGS | {NAMES[2]: content})
    sentence = rf"^{tmp_path}/{NAMES[2]} is no readable image \(.*\): fetch Shapes again\.$"
    told_in_one_line(lambda: read(tmp_path), sentence)
