"""What lies in a folder of images is told apart by where the images lie, not by names alone."""

import os

import pytest
from helpers import told_in_one_line

from metautils.data import tree
from metautils.data.images import suffixes


def lay(root, *names):
    """Empty files; a name that ends with a slash is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def parts(root):
    """Names of the images of each class of each part, below the root."""
    return {
        part: {
            name: [file.relative_to(root).as_posix() for file in files]
            for name, files in classes.items()
        }
        for part, (_, classes) in tree.find(root).parts.items()
    }


def names(root):
    """Names of the classes of each part."""
    return {part: [*classes] for part, classes in parts(root).items()}


def split(root, *folders, classes="ab"):
    """Folders with an image in each class."""
    return lay(root, *(f"{folder}/{name}/0.png" for folder in folders for name in classes))


# Parts


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "val", "test"),
        ("Training", "Valid", "Testing"),
        ("training_set", "validation_set", "test_set"),
        ("seg_train", "seg_dev", "seg_test"),
        ("TRAIN", "VAL", "TEST"),
        ("train2017", "val2017", "test2017"),
        ("trainImages", "valImages", "evalImages"),
        ("my trn", "my-dev", "my.eval"),
        ("mini-imagenet-train", "mini-imagenet-val", "mini-imagenet-test"),
    ],
)
def test_folders_of_a_split_are_no_classes(tmp_path, folders):
    found = names(split(tmp_path, *folders))
    assert found == {part: ["a", "b"] for part in ("train", "validation", "test")}


@pytest.mark.parametrize(
    "name",
    ["strain", "trainer", "contest", "latest", "valley", "interval", "device", "étrain", "protest"],
)
def test_parts_are_named_by_whole_words(name):
    assert tree.part_of(name) is None


def test_archive_holds_each_part_in_a_folder_of_its_name(tmp_path):
    """As Kaggle's do, with images to predict beside them."""
    split(tmp_path, "seg_train/seg_train", "seg_test/seg_test")
    lay(tmp_path, "seg_pred/seg_pred/1.jpg")
    assert names(tmp_path) == {"train": ["a", "b"], "test": ["a", "b"]}
    found = tree.find(tmp_path)
    assert found.parts["train"].path == tmp_path / "seg_train" / "seg_train"
    assert "1 file(s) that do not end like an image, or lie in no class" in found.note


def test_class_may_be_named_like_a_part(tmp_path):
    lay(tmp_path, "bus/0.png", "car/0.png", "train/0.png")
    assert names(tmp_path) == {"train": ["bus", "car", "train"]}
    lay(tmp_path, "train/at night/1.png", "test/0.png")
    assert names(tmp_path) == {"train": ["bus", "car", "test", "train"]}
    assert parts(tmp_path)["train"]["train"] == ["train/0.png", "train/at night/1.png"]


def test_classes_of_a_part_may_be_named_like_parts(tmp_path):
    found = names(split(tmp_path, "train", "test", classes=["test", "train", "val"]))
    assert found == {part: ["test", "train", "val"] for part in ("train", "test")}


def test_without_a_train_there_are_no_parts(tmp_path):
    assert names(split(tmp_path, "val", "test")) == {"train": ["test", "val"]}


def test_stray_image_beside_the_classes_of_a_part(tmp_path):
    split(tmp_path, "train", "test")
    lay(tmp_path, "train/sample.png")
    assert names(tmp_path) == {"train": ["a", "b"], "test": ["a", "b"]}
    assert "train/sample.png" in tree.find(tmp_path).note


def test_part_without_folders_of_classes_is_none(tmp_path):
    """Such as images without labels, or lists of names."""
    split(tmp_path, "train", "val")
    lay(tmp_path, "test/0.png", "testing/names.txt")
    assert names(tmp_path) == {"train": ["a", "b"], "validation": ["a", "b"]}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train/a/0.png", "Training/a/0.png"], "has Training/ and train/, both for train: make"),
        (["train/a/0.png", "test1/a/0.png", "test2/a/0.png"], "test1/ and test2/, both for test"),
        (["train/0.png", "test/0.png"], "train is named like a part, and holds images but no fold"),
        (["train/a/0.png", "train/b/", "test/a/0.png"], "train/b holds no image: add some or rem"),
        (["a/0.png", "b/x.txt"], "b holds no image: add some or remove the folder"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, files, sentence):
    told_in_one_line(lambda: tree.find(lay(tmp_path, *files)), sentence)


# Images


def test_endings_are_those_of_pillow(tmp_path):
    ends = ["JPG", "jfif", "jpe", "tif", "TIFF", "png", "bmp", "gif", "webp", "jp2", "pgm", "tga"]
    assert {f".{end.lower()}" for end in ends} <= suffixes()
    assert not {".pdf", ".eps", ".ps", ".mpg", ".txt", ".csv", ".db", ".ini"} & suffixes()
    lay(tmp_path, *(f"a/x.{end}" for end in ends), "b/0.png")
    assert len(parts(tmp_path)["train"]["a"]) == len(ends)
    assert tree.find(tmp_path).note == ""


def test_images_in_subfolders_are_of_the_class(tmp_path):
    lay(tmp_path, "a/z.png", "a/10/y.png", "a/9/8/x.png", "b/deep/er/0.png")
    assert parts(tmp_path)["train"] == {
        "a": ["a/z.png", "a/10/y.png", "a/9/8/x.png"],
        "b": ["b/deep/er/0.png"],
    }


@pytest.mark.parametrize(
    "name",
    [
        "__MACOSX/a/._0.png",
        "Thumbs.db",
        "a/Thumbs.db",
        "a/desktop.ini",
        "Desktop.ini",
        ".ipynb_checkpoints/x.png",
        "a/.ipynb_checkpoints/0-checkpoint.png",
        "a/.DS_Store",
        "a/._0.png",
        "@eaDir/a/x.png",
        "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
        "$RECYCLE.BIN/x.png",
        "System Volume Information/x",
    ],
)
def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path, name):
    lay(tmp_path, "a/0.png", "b/0.png", name)
    assert parts(tmp_path) == {"train": {"a": ["a/0.png"], "b": ["b/0.png"]}}
    assert tree.find(tmp_path).note == ""


def test_what_is_passed_over_is_counted_and_named(tmp_path):
    lay(tmp_path, "a/0.png", "b/0.png", "labels.csv", "loose.png")
    assert tree.find(tmp_path).note == (
        f"{tmp_path} has 2 file(s) that do not end like an image, or lie in no class, and are "
        "passed over: labels.csv, loose.png."
    )
    lay(tmp_path, *(f"a/{k}.txt" for k in range(3)))
    assert "has 5 file(s)" in tree.find(tmp_path).note
    assert tree.find(tmp_path).note.endswith(": labels.csv, loose.png, a/0.txt and 2 more.")


def link(place, to):
    try:
        os.symlink(to, place)
    except OSError:
        pytest.skip("this system makes no links")


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = lay(tmp_path / "set", "a/0.png", "b/0.png")
    lay(tmp_path / "other", "1.png")
    link(root / "a" / "back", root)
    link(root / "c", tmp_path / "other")
    link(root / "c" / "gone.png", tmp_path / "gone.png")
    found = parts(root)["train"]
    assert found == {"a": ["a/0.png"], "b": ["b/0.png"], "c": ["c/1.png", "c/gone.png"]}


def test_images_in_are_those_of_all_folders_below(tmp_path):
    for name in ("b/x.png", "b/a/y.JPG", "a.bmp", ".hidden/z.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in tree.images_in(tmp_path)]
    assert found == ["a.bmp", "b/x.png", "b/a/y.JPG"]
    assert tree.images_in(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    assert tree.images_in(tmp_path / "gone.png") == [tmp_path / "gone.png"]  # told when it is read


def test_folder_without_images_is_told(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("")
    told_in_one_line(lambda: tree.images_in(tmp_path / "new"), "new holds no image: name images")
