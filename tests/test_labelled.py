"""A folder of labelled images is split without leaks, or a sentence names what is wrong with it."""

import re
import shutil
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from helpers import elsewhere, told_in_one_line
from PIL import Image

from metautils.data import folder, labelled
from metautils.data.images import read_rgb, suffixes
from metautils.data.labelled import Images
from metautils.errors import ReaderError

GIVEN = ("train/a", "train/b", "test/a", "test/b")
RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(seed):
    """Of random pixels, so that no two are alike."""
    seed = list(seed) if isinstance(seed, bytes) else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(root, first=0, **counts):
    """Folders of so many PNGs, 0.png and so on, each with a picture of its own."""
    seeds = count(first)
    for name, number in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(number):
            picture(next(seeds)).save(root / name / f"{k}.png")
    return root


def files(part):
    return {file for file, _ in part.samples}


def tally(part):
    """Images of each class, by name; the label, the place in `targets` and the folder agree."""
    assert [label for _, label in part.samples] == part.targets
    names = [part.classes[label] for label in part.targets]
    assert names == [Path(file).parent.name for file, _ in part.samples]
    return dict(Counter(names))


# Splitting


def test_every_class_gives_about_a_fifth_to_validation_and_to_test(tmp_path):
    split = labelled.load(fill(tmp_path, pear=10, ant=5, Cat=3, bee=13))
    assert all(part.classes == ["Cat", "ant", "bee", "pear"] for part in split[:3])
    for part in split[1:3]:
        assert (tally(part)["Cat"], tally(part)["ant"]) == (1, 1)
        assert 1 <= tally(part)["pear"] <= 3 and 1 <= tally(part)["bee"] <= 3
    assert set.union(*map(files, split[:3])) == set(map(str, tmp_path.glob("*/*")))
    assert sum(map(len, split[:3])) == 31
    assert split.notes == ()


def test_split_follows_the_seed(tmp_path):
    fill(tmp_path, a=10, b=10)
    first, again, other = (labelled.load(tmp_path, seed) for seed in (3, 3, 4))
    assert [part.samples for part in first[:3]] == [part.samples for part in again[:3]]
    assert files(first.test) != files(other.test)
    drawn = [labelled.load(tmp_path, seed).test.samples for seed in range(40)]
    assert len({file for samples in drawn for file, _ in samples}) == 20  # any may be drawn


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("given", [(), ("test",)])
def test_added_picture_moves_no_other(tmp_path, seed, given):
    """Nor does its name, nor the order of the files, nor a class that comes or goes."""
    root = tmp_path / "set"
    for part in ("train", *given) if given else ("",):
        fill(root / part, first=100 * len(part), a=40, b=40)
    more = shutil.copytree(root, tmp_path / "more" / "set")
    where = more / "train" if given else more
    (where / "a" / "0.png").rename(where / "a" / "zz.png")
    picture(999).save(where / "a" / "00.png")
    before, after = labelled.load(root, seed), labelled.load(more, seed)
    assert sum(map(len, after[:3])) == sum(map(len, before[:3])) + 1
    for part, other in zip(before[:3], after[:3], strict=True):
        assert set(part.digests().values()) <= set(other.digests().values())


@pytest.mark.parametrize("seed", range(8))
def test_copies_of_a_picture_stay_together_and_count_once(tmp_path, seed):
    fill(tmp_path, a=5, b=5)
    copies = {tmp_path / "a" / name for name in ("x.png", "x.bmp", "y.tif", "z.ppm")}
    for path in copies:
        picture(0).save(path)
    split = labelled.load(tmp_path, seed)
    found = [files(part) for part in split[:3]]
    alike = {str(path) for path in copies | {tmp_path / "a" / "0.png"}}
    assert sorted(len(alike & part) for part in found) == [0, 0, 5]
    assert all(1 <= len(part - set(map(str, copies))) for part in found)
    assert all(len(part - alike) <= 2 for part in found[1:])


@pytest.mark.usefixtures("two_cases")
def test_classes_may_be_named_like_parts(tmp_path):
    """Where there is no train among them, they are none."""
    split = labelled.load(fill(tmp_path, test=3, Test=3, val=3))
    assert split.train.classes == ["Test", "test", "val"]


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_parts_that_are_given_stay_as_they_are(tmp_path, name):
    fill(tmp_path, **dict.fromkeys(GIVEN, 4), **{f"{name}/a": 2, f"{name}/b": 1, "notes": 1})
    split = labelled.load(tmp_path)
    for part, given in zip(split[:3], ("train", name, "test"), strict=True):
        assert part.classes == ["a", "b"]
        assert files(part) == set(map(str, (tmp_path / given).glob("*/*.png")))
    assert tally(split.validation) == {"a": 2, "b": 1}


def test_validation_is_a_fifth_of_train_if_only_that_and_test_are_given(tmp_path):
    fill(tmp_path, **dict.fromkeys(GIVEN, 10))
    first, other = (labelled.load(tmp_path, seed) for seed in (0, 1))
    assert files(first.test) == files(other.test) == set(map(str, tmp_path.glob("test/*/*")))
    assert all(1 <= tally(first.validation)[name] <= 3 for name in "ab")
    assert files(first.train) | files(first.validation) == set(map(str, tmp_path.glob("train/*/*")))
    assert files(first.validation) != files(other.validation)


def test_one_test_image_is_enough(tmp_path):
    fill(tmp_path, **{"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    assert list(map(len, labelled.load(tmp_path)[:3])) == [2, 2, 2]


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/x.png",
        "__MACOSX/x.png",
        "a/.DS_Store",
        "a/._0.png",
        "a/.ipynb_checkpoints/0-checkpoint.png",
    ],
)
def test_what_is_hidden_is_passed_over(tmp_path, name):
    fill(tmp_path, a=4, b=4)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    picture(99).save(tmp_path / name, format="PNG")
    split = labelled.load(tmp_path)
    assert split.train.classes == ["a", "b"]
    assert str(tmp_path / name) not in set.union(*map(files, split[:3]))
    assert sum(map(len, split[:3])) == 8
    assert split.notes == ()


def test_what_does_not_end_like_an_image_is_passed_over_with_a_note(tmp_path):
    fill(tmp_path, a=3, b=3)
    (tmp_path / "README.txt").write_text("beside the classes")
    (tmp_path / "a" / "labels.csv").write_text("words")
    split = labelled.load(tmp_path)
    assert sum(map(len, split[:3])) == 6
    (note,) = split.notes
    assert note.startswith(f"{tmp_path} has 2 file(s) that do not end like an image")
    assert note.endswith("passed over: README.txt, a/labels.csv.")


def test_both_readers_take_the_same_files(tmp_path):
    root = fill(tmp_path, **{"a": 2, "a/more": 2, "b": 3, "b/x/y": 1})
    for name in ("0.jfif", "1.JPE", "2.TIFF", "3.bmp", "4.avif", "5.jp2", "6.pgm", "7"):
        kind = {"7": "PNG", "0.jfif": "JPEG", "1.JPE": "JPEG"}.get(name)
        if kind or Path(name).suffix.lower() in suffixes():  # an older Pillow has no AVIF
            picture(ord(name[0])).convert("L").save(root / "b" / name, kind)
    ends = {path.suffix.lower() for path in root.rglob("*") if path.is_file()} & suffixes()
    split = labelled.load(root)
    with pytest.warns(UserWarning, match="passed over: .*b/7"):
        counts = folder.bank(root, 8).counts.tolist()
    assert counts == [4, 4 + len(ends) - 1]
    assert sum(map(len, split[:3])) == sum(counts)


@pytest.mark.parametrize("names", [("Training", "Testing"), ("seg_train/seg_train", "seg_test")])
def test_folders_of_a_split_are_no_classes(tmp_path, names):
    fill(tmp_path, **{f"{name}/{x}": 4 for name in names for x in "ab"})
    split = labelled.load(tmp_path)
    assert split.train.classes == split.test.classes == ["a", "b"]
    assert files(split.test) == set(map(str, tmp_path.glob(f"{names[1]}/*/*.png")))


@pytest.mark.parametrize("name", ["train", "train/x"])
def test_class_may_be_named_train(tmp_path, name):
    split = labelled.load(fill(tmp_path, bus=3, car=3, **{name: 3}))
    assert split.train.classes == ["bus", "car", "train"]
    assert ("read as a class: train" in " ".join(split.notes)) is ("/" in name)


def test_parts_below_the_classes_stay_as_they_are(tmp_path):
    fill(tmp_path, **{f"{name}/{part}": 4 for part in ("train", "test") for name in "ab"})
    split = labelled.load(tmp_path)
    assert split.train.classes == split.validation.classes == split.test.classes == ["a", "b"]
    assert files(split.test) == set(map(str, tmp_path.glob("*/test/*.png")))
    assert len(split.train.digests() | split.validation.digests()) == 8
    told_in_one_line(lambda: Images(tmp_path), "has train and test in it: read it with metautils")


def test_folder_around_the_classes_and_folders_of_files_are_passed_over(tmp_path):
    fill(tmp_path, **{"set/set/a": 3, "set/set/b": 3, "set/set/labels": 0})
    (tmp_path / "set" / "set" / "labels" / "a.txt").write_text("words")
    split = labelled.load(tmp_path)
    assert split.train.classes == Images(tmp_path).classes == ["a", "b"]
    (note,) = split.notes
    assert note.endswith("that hold files and no image, and are passed over: set/set/labels.")


def test_bad_images_are_told_all_at_once(tmp_path):
    """Whatever is wrong with them."""
    root = fill(tmp_path, a=3, b=3)
    (root / "a" / "0.png").write_text("words")
    animated("0.gif")(tmp_path / "other")
    (tmp_path / "other" / "a" / "0.gif").rename(root / "b" / "0.gif")
    shutil.rmtree(tmp_path / "other")
    told_in_one_line(
        lambda: labelled.load(root), r"^2 images cannot .*: \S+a/0\.png, \S+b/0\.gif; the first: "
    )


def test_part_of_a_set_leaves_the_set_whole(tmp_path):
    whole = Images(fill(tmp_path, a=3, b=2))
    part = whole.only([4, 0])
    assert part.samples == [whole.samples[4], whole.samples[0]]
    assert part.targets == [1, 0]
    assert (len(part), len(whole)) == (2, 5)
    assert np.array_equal(part[1][0], picture(0))


def test_progress_is_silent_unless_asked(tmp_path, capsys):
    labelled.load(fill(tmp_path, a=3, b=3))
    assert capsys.readouterr() == ("", "")
    labelled.load(tmp_path, progress=True)
    assert "read images" in capsys.readouterr().err


# Groups


def films(root, films=6, frames=4):
    """Two classes of films with some frames each."""
    fill(root, a=films * frames, b=films * frames)
    for path in sorted(root.glob("*/*.png")):
        k = int(path.stem)
        path.rename(path.with_name(f"film{k % films}-{k}.png"))
    return root


def groups_of(part, pattern=r"\w/film\d"):
    return {re.search(pattern, file)[0] for file in files(part)}


@pytest.mark.parametrize("seed", range(4))
def test_images_of_a_group_stay_together(tmp_path, seed):
    films(tmp_path)
    split = labelled.load(tmp_path, seed, groups=r"^([^/]+/film\d)-")
    found = [groups_of(part) for part in split[:3]]
    assert sum(map(len, found)) == len(set.union(*found)) == 12  # six films of each class
    for part in split[1:3]:
        assert set(tally(part)) == {"a", "b"} and max(tally(part).values()) <= 4
    assert split.notes == ()
    alone = [groups_of(part) for part in labelled.load(tmp_path, seed)[:3]]
    assert sum(map(len, alone)) > 12  # so that the pattern is what keeps them


@pytest.mark.parametrize("pattern", [r"film\d", r"(film\d)-"])
def test_groups_of_several_classes_stay_together(tmp_path, pattern):
    """A patient may have images of every class; without a bracket all that is found counts."""
    split = labelled.load(films(tmp_path, 9, 2), groups=pattern)
    found = [groups_of(part, r"film\d") for part in split[:3]]
    assert sum(map(len, found)) == len(set.union(*found)) == 9
    assert all(tally(part)["a"] == tally(part)["b"] for part in split[:3])


def test_group_and_copies_are_joined(tmp_path):
    """A picture that two groups share holds them together, whichever is read first."""
    films(tmp_path, 7, 3)
    for k in range(4):
        Image.open(tmp_path / "a" / "film0-0.png").save(tmp_path / "a" / f"film{k}-x.png")
    split = labelled.load(tmp_path, groups=r"\w/film\d")
    assert sum({"a/film0", "a/film3"} <= groups_of(part) for part in split[:3]) == 1
    assert sum("a/film1" in groups_of(part) for part in split[:3]) == 1


def test_group_stays_where_it_is_when_it_grows(tmp_path):
    before = labelled.load(films(tmp_path), groups=r"\w/film\d")
    for name in "ab":
        for k in range(6):
            picture(f"{name}{k}".encode()).save(tmp_path / name / f"film{k}-new.png")
    after = labelled.load(tmp_path, groups=r"\w/film\d")
    assert [*map(groups_of, before[:3])] == [*map(groups_of, after[:3])]
    assert sum(map(len, after[:3])) == sum(map(len, before[:3])) + 12


def test_images_without_a_group_are_told(tmp_path):
    split = labelled.load(fill(films(tmp_path), 500, c=9), groups=r"film\d-")
    assert split.notes == ("9 image(s) have no group and stand alone, such as c/0.png.",)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(film", r"--groups '\(film' is no regular expression: missing \)"),
        ("clip(\\d)", r"finds no group in any name, such as a/film0-0\.png: it is a regular"),
        ("(clip)?", r"finds no group in any name"),
        (
            "film(.)",
            r"film0-0\.png is one of only 2 group\(s\) of pictures of 'a': give at least 3",
        ),
    ],
)
def test_bad_groups_are_told(tmp_path, pattern, told):
    films(tmp_path, 2)
    with pytest.raises(ReaderError, match=told) as caught:
        labelled.load(tmp_path, groups=pattern)
    assert "\n" not in str(caught.value)


def test_groups_that_are_those_of_other_classes(tmp_path):
    """Wherever the three films go, one class or the other lacks an image."""
    for name, numbers in {"a": (0, 1, 2), "b": (0, 3, 4), "c": (1, 3, 5), "d": (2, 4, 5)}.items():
        fill(tmp_path, 10 * ord(name), **{name: 3})
        for k, number in enumerate(numbers):
            (tmp_path / name / f"{k}.png").rename(tmp_path / name / f"film{number}.png")
    told_in_one_line(
        lambda: labelled.load(tmp_path, groups=r"film\d"),
        r"No image of '\w' would be in \w+, as its groups are those of other classes too: give",
    )


def test_group_in_two_given_parts(tmp_path):
    fill(tmp_path, **dict.fromkeys(GIVEN, 4))
    told_in_one_line(
        lambda: labelled.load(tmp_path, groups=r"(\d)\.png"),
        r"test/a/0\.png is of group '0', as is .*train/a/0\.png: the test images must not",
    )
    assert labelled.load(tmp_path, groups=r"(\w+/\w/\d)\.png").notes == ()


# Pictures that look nearly alike


def scene(seed, size=(120, 90)):
    """Of soft shapes, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def scenes(root):
    for k, (part, name) in enumerate((p, n) for p in ("train", "val", "test") for n in "ab"):
        (root / part / name).mkdir(parents=True)
        for j in range(3):
            scene(10 * k + j).save(root / part / name / f"{j}.png")
    return root


def test_near_copies_in_two_parts_are_named(tmp_path):
    root = scenes(tmp_path)
    assert labelled.load(root).notes == ()
    scene(1).save(root / "train" / "a" / "again.jpg")  # of its own part: no harm to the test
    assert labelled.load(root).notes == ()
    scene(1).resize((60, 45)).save(root / "test" / "b" / "again.jpg", quality=60)
    (note,) = labelled.load(root).notes
    assert note.startswith("2 pair(s) of pictures in two parts look nearly alike, such as train/a/")
    assert "train/a/1.png (train) and test/b/again.jpg (test)" in note
    assert note.endswith("keep them together by --groups.")
    assert "\n" not in note


# Modes


def palette():
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, *RED])
    return image


@pytest.mark.parametrize(
    ("image", "name", "colour", "told"),
    [
        pytest.param(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "x.tif", RED, True, id="CMYK"),
        pytest.param(palette(), "x.png", RED, True, id="palette"),
        pytest.param(
            Image.fromarray(np.full((9, 9), 25700, np.uint16)), "x.png", (100,) * 3, True, id="16"
        ),
        pytest.param(Image.new("1", (9, 9), 1), "x.png", WHITE, True, id="1 bit"),
        pytest.param(Image.new("RGBA", (9, 9), (*RED, 0)), "x.png", WHITE, True, id="RGBA"),
        pytest.param(Image.new("L", (9, 9), 90), "x.png", (90,) * 3, False, id="L"),
        pytest.param(Image.new("RGB", (9, 9), RED), "x.bmp", RED, False, id="RGB"),
    ],
)
def test_any_mode_is_read_as_rgb_with_a_note(tmp_path, image, name, colour, told):
    fill(tmp_path, a=3, b=3)
    path = tmp_path / "b" / name
    image.save(path)
    split = labelled.load(tmp_path)
    with Image.open(path) as opened:
        note = f"{path} is of mode {opened.mode} and is read as RGB."
    assert split.notes == ((note,) if told else ())
    (found,) = [
        part[k][0] for part in split[:3] for k, (f, _) in enumerate(part.samples) if f == str(path)
    ]
    assert found.mode == read_rgb(path).mode == "RGB"
    assert found.getcolors() == [(81, colour)]


def test_photo_with_a_preview_beside_it_is_one_image(tmp_path):
    fill(tmp_path, a=3, b=3)
    more = {"save_all": True, "append_images": [picture(98)]}
    picture(99).save(tmp_path / "a" / "phone.jpg", format="MPO", **more)
    assert sum(map(len, labelled.load(tmp_path)[:3])) == 7


# What is refused


def gone(root):
    root.rmdir()


def a_file(root):
    root.rmdir()
    root.write_text("")


def loose(root):
    picture(0).save(root / "loose.png")


def few(**counts):
    return lambda root: fill(root, **counts)


def given(**counts):
    return lambda root: fill(root, **(dict.fromkeys(GIVEN, 4) | counts))


def only_hidden(root):
    fill(root, a=3, b=3, bare=0)
    (root / "bare" / ".DS_Store").write_text("")


def only_copies(root):
    fill(root, a=1, b=3)
    for name in ("x.png", "y.bmp", "z.png"):
        picture(0).save(root / "a" / name)


def leak(to):
    """The picture of train/a/2.png under another name and in another format."""

    def make(root):
        picture(2).save(given()(root) / to)

    return make


def two_classes(root):
    picture(1).save(fill(root, a=3, b=3) / "b" / "again.bmp")


def cut_off(root):
    path = fill(root, a=3, b=3) / "b" / "cut.jpg"
    picture(99).resize((90, 90)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:2000])


def with_file(name, content):
    return lambda root: (fill(root, a=3, b=3) / name).write_bytes(content)


def animated(name):
    def make(root):
        frames = [Image.new("RGB", (9, 9), colour) for colour in (RED, WHITE)]
        path = fill(root, a=3, b=3) / "a" / name
        frames[0].save(path, save_all=True, append_images=frames[1:])

    return make


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(gone, "set is no folder: name one", id="no folder"),
        pytest.param(a_file, "set is no folder: name one", id="a file"),
        pytest.param(few(), r"set has 0 subfolder\(s\)", id="empty"),
        pytest.param(loose, r"set has 0 subfolder\(s\)", id="loose images"),
        pytest.param(few(a=5), r"set has 1 subfolder\(s\)", id="one class"),
        pytest.param(few(a=5, **{".b": 5}), r"set has 1 subfolder\(s\)", id="one beside hidden"),
        pytest.param(few(a=3, bare=0), r"set/bare holds no image: add", id="empty class"),
        pytest.param(only_hidden, r"set/bare holds no image: add", id="class of hidden files"),
        pytest.param(
            few(a=3, b=1), r"set/b/0\.png is one of only 1 .* of 'b': give at least 3", id="single"
        ),
        pytest.param(
            few(a=2, b=9), r"set/a/0\.png is one of only 2 .* of 'a': give at least 3", id="two"
        ),
        pytest.param(only_copies, r"of only 1 different picture\(s\) of 'a'", id="copies of one"),
        pytest.param(
            given(**{"train/b": 1}), r"train/b/0\.png is one of only 1 .* least 2", id="given"
        ),
        pytest.param(
            given(**{"train/b": 1, "val/a": 1, "val/b": 1}),
            r"train/b/0\.png is one of only 1 .* least 2",
            id="all given",
        ),
        pytest.param(given(**{"test/b": 0}), r"test/b holds no image", id="empty in test"),
        pytest.param(
            given(**{"test/c": 1}), r"test/c is a class that .*train lacks", id="more in test"
        ),
        pytest.param(
            given(**{"train/c": 2}), r"train/c is a class that .*test lacks", id="less in test"
        ),
        pytest.param(
            given(**{"val/a": 1, "val/c": 1}), r"train/b is a class that .*val lacks", id="in val"
        ),
        pytest.param(
            few(**{"train/a": 4, "train/b": 4, "test/c": 4, "test/d": 4}),
            "set has no class that is in both train and test, as sets for few-shot",
            id="few-shot",
        ),
        pytest.param(
            few(**{"train/a": 4, "train/b": 4, "val/a": 4, "val/b": 4}),
            "set has images for train and validation and none for test: add a test folder, or put",
            id="no test",
        ),
        pytest.param(
            few(**{"a/train": 4, "b/train": 4, "a/val": 4, "b/val": 4}),
            "set has images for train and validation and none for test: add a test folder, or put",
            id="no test below the classes",
        ),
        pytest.param(
            leak("test/a/z.bmp"),
            r"test/a/z\.bmp is the same picture as .*train/a/2\.png: the test images must not",
            id="train in test",
        ),
        pytest.param(
            leak("test/b/z.bmp"),
            r"test/b/z\.bmp is the same picture as .*train/a/2\.png, of another class",
            id="train in test as another class",
        ),
        pytest.param(
            two_classes,
            r"set/b/again\.bmp is the same picture as .*set/a/1\.png, of another class",
            id="in two classes",
        ),
        pytest.param(cut_off, r"set/b/cut\.jpg is no readable image: mend", id="cut off"),
        pytest.param(
            with_file("a/page.jpg", b"<html>404</html>"), r"a/page\.jpg is no readable", id="page"
        ),
        pytest.param(with_file("b/0.png", b""), r"b/0\.png is no readable", id="no byte"),
        pytest.param(
            given(**{"Train/a": 4, "Train/b": 4}),
            "has Train/ and train/, both for train",
            id="case",
        ),
        pytest.param(
            given(**{"val/a": 1, "validation/b": 1}), "has val/ and validation/, both", id="two val"
        ),
        pytest.param(animated("x.gif"), r"a/x\.gif has 2 frames: save the one", id="GIF"),
        pytest.param(animated("x.tif"), r"a/x\.tif has 2 frames: save the one", id="TIFF"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, make, sentence, request):
    if "case" in request.node.name:
        request.getfixturevalue("two_cases")
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    told_in_one_line(lambda: labelled.load(root), sentence)


def test_default_device_plays_no_part(photos):
    here, there = labelled.load(photos, seed=3), elsewhere(lambda: labelled.load(photos, seed=3))
    assert [part.samples for part in here[:3]] == [part.samples for part in there[:3]]
