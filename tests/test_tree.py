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
        (["a/0.png", "b/"], "b holds no image: add some or remove the folder"),
        (["a/0.png", "b/empty/", "b/.gitkeep"], "b holds no image: add some or remove the folder"),
        (["a/0.png", "b/0.CR3", "b/1.cr3"], "b holds no image that can be read, such as JPE"),
        (["set/a/0.png", "set/b/0.png", "lost/"], "lost holds no image: add some or remove"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, files, sentence):
    told_in_one_line(lambda: tree.find(lay(tmp_path, *files)), sentence)


# Parts or classes


@pytest.mark.parametrize("name", ["train", "test", "val", "Training set"])
@pytest.mark.parametrize("folders", ["a", "ab"])
def test_class_may_be_named_like_a_part_and_hold_its_images_in_folders(tmp_path, name, folders):
    lay(tmp_path, "bus/0.png", "car/0.png", *(f"{name}/{x}/0.png" for x in folders))
    assert names(tmp_path) == {"train": sorted(["bus", "car", name])}
    assert parts(tmp_path)["train"][name] == [f"{name}/{x}/0.png" for x in folders]
    assert tree.find(tmp_path).note == (
        f"{tmp_path} has 1 folder(s) that are named like a part and read as a class: {name}."
    )


def test_classes_may_be_named_train_and_test_where_no_class_recurs_in_them(tmp_path):
    lay(tmp_path, "bus/0.png", "car/0.png", "train/by day/0.png", "test/in rain/0.png")
    assert names(tmp_path) == {"train": ["bus", "car", "test", "train"]}
    assert "has 2 folder(s) that are named like a part and read as a class: test, train." in (
        tree.find(tmp_path).note
    )


def test_one_class_beside_a_train_of_one_folder(tmp_path):
    """As a part to train on, it would have a single class."""
    lay(tmp_path, "bus/0.png", "train/by day/0.png")
    assert names(tmp_path) == {"train": ["bus", "train"]}


def test_parts_in_which_classes_recur_are_parts_whatever_lies_beside_them(tmp_path):
    split(tmp_path, "train", "test")
    lay(tmp_path, "train/cover.png", "samples/0.png", "more/1.png", "more/x/2.png")
    assert names(tmp_path) == {"train": ["a", "b"], "test": ["a", "b"]}
    assert "has 4 file(s) that do not end like an image, or lie in no class" in (
        tree.find(tmp_path).note
    )


def test_three_parts_of_other_classes_are_parts_whatever_lies_beside_them(tmp_path):
    split(tmp_path, "train")
    lay(tmp_path, "val/c/0.png", "val/d/0.png", "test/e/0.png", "test/f/0.png", "samples/0.png")
    assert names(tmp_path) == {"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f"]}
    assert "passed over: samples/0.png." in tree.find(tmp_path).note


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            ["train/a/0.png", "train/b/0.png", "new/0.png"],
            "has folders of images in train/, which may be a part or a class, beside new/: rename",
        ),
        (
            ["train/a/0.png", "bus/a/0.png", "car/a/0.png"],
            "in train/, which may be a part or a class, beside bus/",
        ),
        (
            ["train/a/0.png", "train/b/0.png", "val/c/0.png", "val/d/0.png", "x/0.png", "y/0.png"],
            "in train/ and val/, which may be a part or a class, beside x/: rename .* or move away",
        ),
    ],
)
def test_what_may_be_a_part_or_a_class_is_told(tmp_path, files, sentence):
    told_in_one_line(lambda: tree.find(lay(tmp_path, *files)), sentence)


# Folders around and below


@pytest.mark.parametrize("above", ["set", "set/set", "train", "archive/train/images"])
@pytest.mark.parametrize("beside", ["", "README.txt", "labels/0.txt", "__MACOSX/set/._0.png"])
def test_folder_that_holds_nothing_but_one_folder_is_read_through(tmp_path, above, beside):
    root = split(tmp_path / "plain", above)
    if beside:
        lay(root, beside)
    assert names(root) == {"train": ["a", "b"]}
    assert tree.find(root).parts["train"].path == root / above
    root = split(tmp_path / "parts", f"{above}/train", f"{above}/test", classes="abc")
    lay(root, f"{above}/cover.png")
    if beside:
        lay(root, beside)
    assert names(root) == {"train": ["a", "b", "c"], "test": ["a", "b", "c"]}
    assert (beside.split("/")[0] in tree.find(root).note) is (beside[:2] != "__")


@pytest.mark.parametrize(
    "folders",
    [
        ("train/images", "test/images"),
        ("train/train/images", "val/val/images", "test/test/images"),
        ("train/x", "val/y", "test/z"),
        ("train/images/train", "test/images/test"),
        ("seg_train", "seg_test/seg_test"),
    ],
)
@pytest.mark.parametrize("beside", ["", "labels/a/0.txt", "names.csv"])
def test_folder_of_a_part_that_holds_nothing_but_one_folder_is_read_through(
    tmp_path, folders, beside
):
    split(tmp_path, *folders)
    if beside:
        lay(tmp_path, *(f"{folder.split('/')[0]}/{beside}" for folder in folders))
    found = names(tmp_path)
    assert set(found) == {tree.part_of(folder.split("/")[0]) for folder in folders}
    assert all(classes == ["a", "b"] for classes in found.values())


def test_the_only_class_of_one_part_is_not_read_through(tmp_path):
    lay(tmp_path, "train/a/x/0.png", "train/b/x/0.png", "test/a/x/0.png", "test/a/y/0.png")
    assert names(tmp_path) == {"train": ["a", "b"], "test": ["a"]}


def test_one_class_of_images_is_a_class(tmp_path):
    lay(tmp_path, "a/0.png", "a/more/1.png")
    assert parts(tmp_path) == {"train": {"a": ["a/0.png", "a/more/1.png"]}}


@pytest.mark.parametrize("layout", ["{}", "train/{}", "set/{}"])
def test_folder_of_files_without_an_image_is_passed_over_with_a_note(tmp_path, layout):
    lay(tmp_path, *(layout.format(f"{name}/0.png") for name in "ab"))
    if "train" in layout:
        split(tmp_path, "test")
    lay(tmp_path, *(layout.format(x) for x in ("annotations/a/0.xml", "annotations/list.txt")))
    lay(tmp_path, layout.format("docs/x.pdf"), layout.format("a/meta/0.json"), "notes.txt")
    assert all(classes == ["a", "b"] for classes in names(tmp_path).values())
    bare = sorted(layout.format(x) for x in ("annotations", "docs", "a/meta"))
    note = tree.find(tmp_path).note
    assert note.startswith(
        f"{tmp_path} has 1 file(s) that do not end like an image, or lie in no class, and are "
        f"passed over: notes.txt. {tmp_path} has 3 folder(s) that hold files and no image, and "
        "are passed over: "
    )
    assert sorted(note.rsplit(": ", 1)[1].rstrip(".").split(", ")) == bare


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test"),
        ("Training", "valid", "my_test"),
        ("train/x", "val/y/z"),
        ("images/train", "images/test"),
    ],
)
def test_parts_below_the_classes_are_the_split(tmp_path, folders):
    lay(tmp_path, *(f"{name}/{folder}/{name}.png" for name in "ab" for folder in folders))
    lay(tmp_path, "labels/a.txt")
    assert parts(tmp_path) == {
        tree.part_of(folder.removeprefix("images/").split("/")[0]): {
            name: [f"{name}/{folder}/{name}.png"] for name in "ab"
        }
        for folder in folders
    }
    assert tree.find(tmp_path).split
    assert tree.find(tmp_path).parts["train"].path == tmp_path


def test_the_same_part_below_all_classes_is_no_split(tmp_path):
    lay(tmp_path, "a/train/0.png", "b/train/0.png")
    assert parts(tmp_path) == {"train": {"a": ["a/train/0.png"], "b": ["b/train/0.png"]}}
    assert not tree.find(tmp_path).split


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["a/train/0.png", "a/test/0.png", "b/0.png"], "set has folders for train and test below"),
        (["a/train/0.png", "a/test/0.png", "b/train/0.png"], "set has folders for train and test"),
        (["a/train/0.png", "b/test/0.png"], "set has folders for train and test below the cl"),
        (["a/train/0.png", "a/val/0.png", "b/train/0.png", "b/test/0.png"],
         "set has folders for train and validation and test below"),
        (["a/train/0.png", "a/test/0.png", "a/0.png", "b/train/0.png", "b/test/0.png"],
         "set has folders for train and test below"),
        (["a/train/0.png", "a/test/0.png", "a/x/0.png", "b/0.png"], "/a has folders for train an"),
        (["a/test/0.png", "a/val/0.png", "b/0.png"], "/a has folders for validation and test bel"),
        (["a/x/train/0.png", "a/x/test/0.png", "a/y/0.png", "b/0.png"], "/a/x has folders for tr"),
        (["train/a/train/0.png", "train/a/test/0.png", "train/b/0.png", "test/a/0.png"],
         "/train/a has folders for train and test below"),
    ],
)  # fmt: skip
def test_images_to_train_on_and_to_test_on_are_never_put_together(tmp_path, files, told):
    told_in_one_line(
        lambda: tree.find(lay(tmp_path / "set", *files)),
        f"{told}.*together: give every class the same ones and nothing else, or rename them",
    )


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
