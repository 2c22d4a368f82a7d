"""CIFAR-FS is read the same from every source, split by class, and damage leaves no cache."""

import hashlib
import io
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import told_of_folder, told_without_a_trace, write_archives, write_files
from PIL import Image

from metautils import data
from metautils.data import cifar_fs
from metautils.files import DataError

IMAGES = 3
CLASSES = {
    "train": [f"thing_{k:02d}" for k in range(64)],
    "val": sorted(cifar_fs.VALIDATION),
    "test": sorted(cifar_fs.TEST),
}


@cache
def photos():
    """Path inside the archives, and pixels, of every image of a tiny CIFAR-FS."""
    random = np.random.default_rng(0)
    return {
        f"{part}/{name}/{k:04d}.webp": random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for part, names in CLASSES.items()
        for name in names
        for k in range(IMAGES)
    }


@cache
def webps():
    return {name: webp(pixels) for name, pixels in photos().items()}


def webp(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, method=0)
    return file.getvalue()


def zipped(root: Path, contents=None) -> Path:
    """The folder of data, with CIFAR-FS's archives."""
    return write_archives(root / "cifar-fs", CLASSES, contents or webps()).parent


def torchvision_set(root, train, download):
    """Two of each class's images for training and one for testing, in an order of its own."""
    assert download
    names = [name for part in ("test", "train", "val") for name in CLASSES[part]][::-1]
    rows = []
    for k, (path, pixels) in enumerate(photos().items()):
        if (k % IMAGES < 2) == train:
            rows.append((names.index(path.split("/")[1]), pixels))
    order = np.random.default_rng(1).permutation(len(rows))
    return SimpleNamespace(
        data=np.stack([rows[k][1] for k in order]),
        targets=[rows[k][0] for k in order],
        classes=names,
    )


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """A cache of its own for each test, and the size of the tiny CIFAR-FS."""
    if "real" not in request.fixturenames:
        request.getfixturevalue("empty_cache")
        monkeypatch.setattr(cifar_fs, "IMAGES", IMAGES)


def load(monkeypatch, root):
    monkeypatch.setenv("METAUTILS_DATA", str(root))
    return cifar_fs.load()


# Loading fails with one sentence of one line, and no cache is left.
told = partial(told_of_folder, cifar_fs.load)


def same(first, second):
    """Bit for bit, in all three parts."""
    return all(
        a.names == b.names and torch.equal(a.counts, b.counts) and torch.equal(a.images, b.images)
        for a, b in zip(first, second, strict=True)
    )


def test_archives_give_the_images(tmp_path, monkeypatch):
    """Of every class its own, upright, with red first, in some order."""
    parts = load(monkeypatch, zipped(tmp_path / "data"))
    for part, bank in zip(CLASSES, parts, strict=True):
        assert bank.images.shape == (IMAGES * len(bank), 3, 32, 32)
        assert bank.images.dtype == torch.uint8
        for k, name in enumerate(bank.names):
            originals = [photos()[f"{part}/{name}/{n:04d}.webp"] for n in range(IMAGES)]
            found = bank[k].permute(0, 2, 3, 1).numpy()
            assert {x.tobytes() for x in found} == {x.tobytes() for x in originals}


def test_split_is_by_class(tmp_path, monkeypatch):
    parts = load(monkeypatch, zipped(tmp_path / "data"))
    assert [len(bank) for bank in parts] == [64, 16, 20]
    assert [list(bank.names) for bank in parts] == list(CLASSES.values())
    assert all((bank.counts == IMAGES).all() for bank in parts)


def test_held_out_classes_are_36():
    assert (len(cifar_fs.VALIDATION), len(cifar_fs.TEST)) == (16, 20)
    assert not cifar_fs.VALIDATION & cifar_fs.TEST


def test_every_source_gives_the_same_bits(tmp_path, monkeypatch):
    first = load(monkeypatch, zipped(tmp_path / "a"))
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "other"))
    folders = write_files(tmp_path / "b/cifar-fs", webps())
    assert same(load(monkeypatch, folders.parent), first)
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "third"))
    monkeypatch.delenv("METAUTILS_DATA")
    monkeypatch.setattr("torchvision.datasets.CIFAR100", torchvision_set)
    assert same(cifar_fs.load(), first)


def test_names_of_the_files_do_not_matter(tmp_path, monkeypatch):
    first = load(monkeypatch, zipped(tmp_path / "a"))
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "other"))
    turned = {
        f"{name[:-9]}{IMAGES - int(name[-9:-5])}.webp": content for name, content in webps().items()
    }
    assert same(load(monkeypatch, zipped(tmp_path / "b", turned)), first)


def test_load_by_name(tmp_path, monkeypatch):
    first = load(monkeypatch, zipped(tmp_path / "data"))
    assert "cifar_fs" in data.NAMES
    assert same(data.load("cifar_fs"), first)
    assert same(data.load("cifar_fs", seed=1), first)


def test_cache_is_enough_the_second_time(tmp_path, empty_cache, monkeypatch):
    first = load(monkeypatch, zipped(tmp_path / "data"))
    assert (empty_cache / "cifar-fs-32.pt").exists()
    monkeypatch.delenv("METAUTILS_DATA")
    monkeypatch.setattr("torchvision.datasets.CIFAR100", None)
    assert same(cifar_fs.load(), first)


def test_wrong_data_folder_is_told_even_with_a_cache(tmp_path, empty_cache, monkeypatch):
    load(monkeypatch, zipped(tmp_path / "data"))
    with pytest.raises(DataError, match="METAUTILS_DATA is .*gone', which is no folder"):
        load(monkeypatch, tmp_path / "gone")
    assert (empty_cache / "cifar-fs-32.pt").exists()


# Damages


def lose_an_image(contents):
    del contents["val/beaver/0001.webp"]


def gain_an_image(contents):
    contents["train/thing_07/more.webp"] = webps()["train/thing_08/0000.webp"]


def lose_a_class(contents):
    for k in range(IMAGES):
        del contents[f"test/whale/{k:04d}.webp"]


def misspell_a_class(contents):
    for k in range(IMAGES):
        contents[f"test/wale/{k:04d}.webp"] = contents.pop(f"test/whale/{k:04d}.webp")


def gain_a_class(contents):
    for k in range(IMAGES):
        contents[f"train/unicorn/{k:04d}.webp"] = webps()["train/thing_08/0000.webp"]


def lose_all(contents):
    contents.clear()
    contents["train/README"] = b""


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lose_an_image, "100 classes (2 of beaver)"),
        (gain_an_image, "100 classes (4 of thing_07)"),
        (lose_a_class, "99 classes (whale)"),
        (misspell_a_class, "100 classes (whale)"),
        (gain_a_class, "101 classes (other classes)"),
        (lose_all, "0 classes (baby, beaver, bed)"),
    ],
)
def test_wrong_classes_and_numbers_are_told(tmp_path, monkeypatch, damage, found):
    contents = dict(webps())
    damage(contents)
    found = found.replace("(", r"\(").replace(")", r"\)")
    sentence = rf"CIFAR-100 has 3 images of each of 100 classes, here are {found}: fetch it again"
    told(monkeypatch, zipped(tmp_path / "data", contents), sentence)


def test_damaged_archive_leaves_no_cache(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "data") / "cifar-fs" / "test.zip"
    archive.write_bytes(archive.read_bytes()[:1000])
    told(monkeypatch, tmp_path / "data", r"cifar-fs/test\.zip is damaged")


def test_image_of_another_size_is_told(tmp_path, monkeypatch):
    contents = webps() | {"test/rose/0000.webp": webp(np.zeros((48, 48, 3), np.uint8))}
    root = zipped(tmp_path / "data", contents)
    told(monkeypatch, root, "An image of rose is not 32x32 in colour: fetch CIFAR-100 again")


@pytest.mark.parametrize("part", CLASSES)
def test_missing_part_is_told(tmp_path, monkeypatch, part):
    root = zipped(tmp_path / "data")
    (root / "cifar-fs" / f"{part}.zip").unlink()
    told(monkeypatch, root, rf"data/cifar-fs/{part}/ exists: put CIFAR-FS's {part} there")


def test_no_network_is_told(empty_cache, offline, capfd):
    sentence = (
        rf"CIFAR-100 is not in {empty_cache}/\S+ and could not be downloaded .* set METAUTILS_DATA "
        r"to a folder that holds cifar-fs/train\.zip, val\.zip .*, or use data='glyphs'"
    )
    told_without_a_trace(cifar_fs.load, capfd, sentence)


# With the real images

NAMES = {  # sha256 of the names, in order, in the lists of Bertinetto et al. as torchmeta has them
    "train": "9c1c5737bdab74307285ebc33ef9d9c7c5c6a05c2f948477f05d018f433fa031",
    "validation": "a4d5a75dcb3fc7d1430824e4fe2b16719fc8ca0a4d043eafda1e8034fb6f8b94",
    "test": "fa4f899ce87368b0abee8cd0c4f525244d460dc4b4462eea60d3421401521104",
}


@pytest.fixture(scope="module")
def real(real_folder):
    """The three parts of the real images."""
    return cifar_fs.load()


def test_real_sizes(real):
    assert [len(bank) for bank in real] == [64, 16, 20]
    for bank in real:
        assert (bank.counts == 600).all()
        assert bank.images.shape == (600 * len(bank), 3, 32, 32)
        assert bank.images.dtype == torch.uint8


def test_real_classes_are_disjoint(real):
    assert len({name for bank in real for name in bank.names}) == 100


def test_real_split_is_the_published_one(real):
    for part, names in NAMES.items():
        joined = " ".join(getattr(real, part).names)
        assert hashlib.sha256(joined.encode()).hexdigest() == names
    assert real.train.names[:3] == ("apple", "aquarium_fish", "bear")
    assert real.test.names[-3:] == ("whale", "woman", "worm")


def test_real_colours_are_red_green_and_blue(real):
    """The means over CIFAR-100 that are known everywhere."""
    images = torch.cat([bank.images[::10] for bank in real])
    means = images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.507, 0.487, 0.441]), atol=0.01, rtol=0)
