"""Omniglot is read the same from every source, split as asked, and damage leaves no cache."""

import io
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import told_of_folder, told_without_a_trace, write_archives, write_files
from PIL import Image

from metautils.data import omniglot
from metautils.files import DataError

ALPHABETS = {"images_background": ("Aa", "Bb_(x)", "Cc"), "images_evaluation": ("Dd",)}
CHARACTERS, DRAWINGS = 2, 3


def png(seed):
    """A drawing like the originals: 105x105, 1 bit, black on white, some lines."""
    random = np.random.default_rng(seed)
    paper = np.full((105, 105), True)
    for _ in range(3):
        a, b = random.integers(10, 90, 2)
        paper[a : a + 4, b : b + 15] = False
    file = io.BytesIO()
    Image.fromarray(paper).save(file, "PNG")
    return file.getvalue()


@cache
def drawings():
    """PNG of every drawing of a tiny Omniglot, by its path inside the archives."""
    characters = [
        f"{part}/{alphabet}/character{c:02d}"
        for part, alphabets in ALPHABETS.items()
        for alphabet in alphabets
        for c in range(1, CHARACTERS + 1)
    ]
    paths = [(character, d) for character in characters for d in range(1, DRAWINGS + 1)]
    return {
        f"{character}/{seed:04d}_{d:02d}.png": png(seed)
        for seed, (character, d) in enumerate(paths, start=1)
    }


def zipped(root: Path) -> Path:
    """The folder of data, with Omniglot's archives."""
    source = root / "omniglot-py"
    return write_archives(source, ALPHABETS, drawings(), zipfile.ZIP_DEFLATED).parent


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """A cache of its own for each test, and the sizes of the tiny Omniglot."""
    if "real" not in request.fixturenames:
        request.getfixturevalue("empty_cache")
        a_class = CHARACTERS * DRAWINGS
        sizes = {part: len(alphabets) * a_class for part, alphabets in ALPHABETS.items()}
        monkeypatch.setattr(omniglot, "DRAWINGS", sizes)
        monkeypatch.setattr(omniglot, "RANDOM_SPLIT", (4, 1, 3))
        monkeypatch.setattr(omniglot, "VALIDATION_ALPHABETS", 1)


def everything(monkeypatch, root):
    monkeypatch.setenv("METAUTILS_DATA", str(root))
    return omniglot.everything()


# Loading fails with one sentence of one line, and no cache is left.
told = partial(told_of_folder, omniglot.everything)


def test_archives_give_the_images(tmp_path, monkeypatch):
    bank = everything(monkeypatch, zipped(tmp_path / "data"))
    assert bank.images.shape == (24, 1, 28, 28)
    assert bank.images.dtype == torch.uint8
    assert bank.counts.tolist() == [DRAWINGS] * 8
    assert bank.names[:3] == (
        "images_background/Aa/character01",
        "images_background/Aa/character02",
        "images_background/Bb_(x)/character01",
    )
    assert bank.names[-1] == "images_evaluation/Dd/character02"
    originals = [np.asarray(Image.open(io.BytesIO(content))) for content in drawings().values()]
    for image, original in zip(bank.images, originals, strict=True):
        ink = np.where(original, 0, 255)
        assert float(image.float().mean()) == pytest.approx(ink.mean(), abs=1)
        # Each of the 7x7 parts of the page holds its share of the ink, so nothing is turned.
        coarse = image[0].float().view(7, 4, 7, 4).mean((1, 3))
        parts = torch.from_numpy(ink).float().view(7, 15, 7, 15).mean((1, 3))
        assert (coarse - parts).abs().max() < 16


def test_ink_is_high_on_0(tmp_path, monkeypatch):
    images = everything(monkeypatch, zipped(tmp_path / "data")).images.flatten(1)
    assert (images == 0).float().mean() > 0.8
    assert images.amax(1).min() > 150


def test_unpacked_equals_zipped(tmp_path, monkeypatch):
    first = everything(monkeypatch, zipped(tmp_path / "a"))
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "other"))
    second = everything(monkeypatch, write_files(tmp_path / "b/omniglot-py", drawings()).parent)
    assert first.names == second.names
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.counts, second.counts)


def test_cache_is_enough_the_second_time(tmp_path, empty_cache, monkeypatch):
    first = everything(monkeypatch, zipped(tmp_path / "data"))
    assert (empty_cache / "omniglot-28.pt").exists()
    monkeypatch.delenv("METAUTILS_DATA")
    second = omniglot.everything()
    assert second.names == first.names
    assert torch.equal(second.images, first.images)


@pytest.mark.parametrize("part", ALPHABETS)
def test_missing_set_is_told(tmp_path, monkeypatch, part):
    root = zipped(tmp_path / "data")
    (root / "omniglot-py" / f"{part}.zip").unlink()
    told(monkeypatch, root, rf"data/omniglot-py/{part}/ exists: put Omniglot's {part} there")


def test_missing_drawings_are_counted(tmp_path, monkeypatch):
    fewer = dict(drawings())
    del fewer["images_evaluation/Dd/character01/0019_01.png"]
    root = write_files(tmp_path / "data/omniglot-py", fewer).parent
    told(monkeypatch, root, r"images_evaluation holds 5 drawings, not 6: fetch Omniglot again")


def test_damaged_archive_leaves_no_cache(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "data") / "omniglot-py" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:1000])
    told(monkeypatch, tmp_path / "data", r"omniglot-py/images_evaluation\.zip is damaged")


def test_no_network_is_told(empty_cache, offline, capfd):
    sentence = (
        rf"Omniglot is not in {empty_cache}/\S+ and could not be downloaded .* set METAUTILS_DATA "
        r"to a folder that holds omniglot-py/images_background\.zip .*, or use data='glyphs'"
    )
    told_without_a_trace(omniglot.load, capfd, sentence)


def test_download_is_read_like_a_folder(tmp_path, monkeypatch):
    def arrives(root, background, download):
        assert download
        if background:
            zipped(Path(root))

    monkeypatch.setattr("torchvision.datasets.Omniglot", arrives)
    assert len(omniglot.everything()) == 8


def test_wrong_data_folder_is_told_even_with_a_cache(tmp_path, empty_cache, monkeypatch):
    everything(monkeypatch, zipped(tmp_path / "data"))
    with pytest.raises(DataError, match="METAUTILS_DATA is .*gone', which is no folder"):
        everything(monkeypatch, tmp_path / "gone")
    assert (empty_cache / "omniglot-28.pt").exists()


def test_unknown_split_is_told():
    with pytest.raises(ValueError, match="split is 'lake'; it must be 'random' or 'background'"):
        omniglot.load("lake")


def test_page_of_ink_and_page_of_paper():
    pages = torch.stack([torch.full((105, 105), level, dtype=torch.uint8) for level in (255, 0)])
    assert omniglot._shrink(pages).flatten(1).unique(dim=1).flatten().tolist() == [255, 0]


# Lake et al.'s one-shot task


def runs_folder(root, contents):
    """The folder of data, with an archive of runs."""
    source = root / "omniglot-one-shot"
    source.mkdir(parents=True)
    with zipfile.ZipFile(source / "all_runs.zip", "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return root


def two_runs():
    """Files of two runs of two classes; in the second the answers stand the other way round."""
    files = {}
    for run, answers in (("run01", (1, 2)), ("run02", (2, 1))):
        lines = [f"{run}/test/item0{k}.png {run}/training/class0{a}.png"
                 for k, a in enumerate(answers, 1)]  # fmt: skip
        files[f"{run}/class_labels.txt"] = "\n".join([*lines, ""]).encode()
        for k, a in enumerate(answers, 1):
            files[f"{run}/training/class0{k}.png"] = png(k)
            files[f"{run}/test/item0{k}.png"] = png(a)  # the same drawing as its class
    return files


def test_one_shot_runs_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("METAUTILS_DATA", str(runs_folder(tmp_path, two_runs())))
    found = omniglot.one_shot_runs()
    assert [run.query_y.tolist() for run in found] == [[0, 1], [1, 0]]
    for run in found:
        assert run.support_x.shape == run.query_x.shape == (2, 1, 28, 28)
        assert torch.equal(run.query_x, run.support_x[run.query_y])
        assert run.support_x.flatten(1).amax(1).min() > 150


@pytest.mark.parametrize(
    "spoilt",
    [
        {"run02/test/item01.png": None},
        {"run01/test/item02.png": b"x"},
        {"run01/class_labels.txt": b"one two three"},
    ],
)
def test_spoilt_runs_are_told(tmp_path, monkeypatch, spoilt):
    files = {name: x for name, x in (two_runs() | spoilt).items() if x is not None}
    sentence = r"(all_runs.zip is damaged|item02.png is no readable image).*: fetch .* again"
    told_of_folder(omniglot.one_shot_runs, monkeypatch, runs_folder(tmp_path, files), sentence)


@pytest.mark.parametrize("known", [True, False])
def test_missing_runs_are_told(tmp_path, monkeypatch, known):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METAUTILS_DATA", raising=False)
    if known:
        monkeypatch.setenv("METAUTILS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"all_runs.zip does not exist: set METAUTILS_DATA to a"):
        omniglot.one_shot_runs()


# With the real images


def test_real_runs_are_of_the_evaluation_alphabets(real):
    runs, test = omniglot.one_shot_runs(), omniglot.load("background").test
    known = {image.numpy().tobytes() for image in test.images}
    assert len(runs) == 20
    for run in runs:
        assert run.query_y.sort().values.tolist() == list(range(20))
        for image in (*run.support_x, *run.query_x):
            assert image.numpy().tobytes() in known


@pytest.fixture(scope="module")
def real(real_folder):
    """All characters of the real images."""
    return omniglot.everything()


@pytest.mark.parametrize("split", ["random", "background"])
def test_real_classes_are_disjoint_and_complete(real, split):
    parts = omniglot.load(split)
    names = [name for part in parts for name in part.names]
    assert len(names) == len(set(names)) == 1623
    assert set(names) == set(real.names)
    for part in parts:
        assert (part.counts == 20).all()
        assert part.images.shape == (20 * len(part), 1, 28, 28)


def test_real_sizes_of_the_random_split(real):
    assert [len(part) for part in omniglot.load()] == [1028, 172, 423]


def test_real_background_split_keeps_alphabets_apart(real):
    train, validation, test = (
        {tuple(name.split("/")[:2]) for name in part.names} for part in omniglot.load("background")
    )
    assert [len(train), len(validation), len(test)] == [25, 5, 20]
    assert not (train & validation or train & test or validation & test)
    assert {part for part, _ in train | validation} == {"images_background"}
    assert {part for part, _ in test} == {"images_evaluation"}
    assert len(omniglot.load("background").test) == 659


@pytest.mark.parametrize("split", ["random", "background"])
def test_real_split_hangs_on_the_seed(real, split):
    first, again, other = (omniglot.load(split, seed) for seed in (0, 0, 1))
    assert [part.names for part in first] == [part.names for part in again]
    assert first.train.names != other.train.names
    assert torch.equal(first.test.images, again.test.images)


def test_real_images_are_ink_on_0(real):
    ink = real.images.float().mean((1, 2, 3)) / 255
    assert 0.002 < ink.min()
    assert ink.max() < 0.35
    assert real.images.flatten(1).amax(1).min() > 100
