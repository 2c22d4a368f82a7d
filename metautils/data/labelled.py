"""A folder of labelled images to train a classifier on, checked before anything is trained."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.datasets import ImageFolder

from metautils.data import tree
from metautils.data.assign import assign, joined
from metautils.data.images import damage_told, read_each, read_rgb
from metautils.data.near import Look, alike, look
from metautils.errors import BadArgument
from metautils.files import DataError

PARTS = ("train", "validation", "test")
PLAIN = {"RGB", "L"}  # modes that are read as they are


class Images(ImageFolder):
    """torchvision's ImageFolder with the package's reader of folders and of images.

    ImageFolder itself takes `.ipynb_checkpoints` for a class, and passes over files whose ending
    it does not know; see `metautils.data.tree` for what is read here.

    Args:
        root: a folder with a subfolder for each class.
        classes: the images of each class, where they are known; else the folder is looked through.

    Attributes:
        contents: a hash of the pixels of every file that was read, see `load`.

    Raises:
        DataError: if there are fewer than two classes, or a class is empty.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> root = Path(folder.name)
        >>> for name in ("ant", "bee"):
        ...     (root / name).mkdir()
        ...     Image.new("RGB", (8, 6)).save(root / name / "0.png")
        >>> images = Images(root)
        >>> images.classes, images.targets, images[0][0].size
        (['ant', 'bee'], [0, 1], (8, 6))
        >>> folder.cleanup()
    """

    def __init__(self, root: Path, classes: dict[str, list[Path]] | None = None) -> None:
        self._given = _classes(Path(root)) if classes is None else classes
        if len(self._given) < 2:
            raise DataError(
                f"{root} has {len(self._given)} subfolder(s) of images: a classifier needs two "
                "or more, one for each class."
            )
        super().__init__(str(root), loader=read_rgb)
        del self._given  # else it would be sent to every process that reads images
        self.contents: dict[str, str] = {}

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, sorted, and their labels."""
        return list(self._given), {name: k for k, name in enumerate(self._given)}

    def make_dataset(self, *arguments: object, **named: object) -> list[tuple[str, int]]:
        """Every image and its label."""
        return [(str(file), k) for k, files in enumerate(self._given.values()) for file in files]

    def only(self, rows: Sequence[int]) -> Images:
        """The same set with these rows of `samples` alone."""
        part = copy(self)
        part.samples = part.imgs = [self.samples[k] for k in rows]
        part.targets = [label for _, label in part.samples]
        return part

    def names(self) -> list[str]:
        """The name of each image below the root, with `/` on every system."""
        return [Path(file).relative_to(self.root).as_posix() for file, _ in self.samples]

    def digests(self) -> dict[str, str]:
        """What is on each picture, in short, by its name below the root: the same for a copy."""
        contents = (self.contents.get(file) or _digest(read_rgb(file)) for file, _ in self.samples)
        return {name: x[:16] for name, x in zip(self.names(), contents, strict=True)}


class Split(NamedTuple):
    """Three sets of images of the same classes; no picture is in two of them.

    Learn from `train`, choose the epoch by `validation`, report on `test`, once. `notes` says
    what was passed over, what has no group, which pictures of two parts look nearly alike, and
    which files are read in another way than they were written.

    Example:
        >>> Split._fields
        ('train', 'validation', 'test', 'notes')
    """

    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()


def load(
    path: str | Path, seed: int = 0, progress: bool = False, groups: str | None = None
) -> Split:
    """Read `path/CLASS/IMAGE` and split it, or `path/train/CLASS/IMAGE` and so on as it lies.

    In the first layout every class gives about a fifth of its pictures (of its groups, where there
    are some) to validation and a fifth to test, by what is on them, so that a picture that is added
    moves no other; see `metautils.data.assign`. Copies of a picture stay together. The second,
    which may lie as `path/CLASS/train/IMAGE` too, has `train` and `test`, and about a fifth of
    `train` becomes the validation if there is no `validation` or `val`; names such as
    `training_set`, `seg_test` and `val2017` will do. A class needs three different pictures in the
    first layout; in the second, two in `train`, one in `test`.

    Args:
        path: the folder.
        seed: of the split.
        progress: show a bar while every image is read, once.
        groups: a regular expression that is looked for in the name of each image below `path`, such
            as `cat/clip07-3.jpg`. Where the bracketed part of what it finds is the same (all of it,
            if no part is in brackets), the images stay together: `(clip\\d+)-` keeps the images of
            one film in one part. An image in which it finds nothing stands alone.

    Raises:
        DataError: if there are fewer than two classes, or too few pictures or groups of one, or
            other classes in another part; if files are no images, are cut off or have several
            frames; if two parts hold the same picture or images of one group, or two classes the
            same picture. The sentence names the file.
        BadArgument: if `groups` is no regular expression, or finds nothing in any name.
    """
    found = tree.find(Path(path))
    _check_test(Path(path), found)
    sets = {name: Images(*part) for name, part in found.parts.items()}
    _check_classes(Path(path), sets)
    files = [file for each in sets.values() for file, _ in each.samples]
    grouped, ungrouped = _groups(Path(path), files, groups)
    seen, odd = _read_all(files, progress)
    for each in sets.values():
        each.contents = {file: content for file, (content, *_) in seen.items()}
    _check_pictures(sets)
    _check_groups(sets, grouped)
    missing = [part for part in PARTS if part not in sets]
    sets |= _divide(sets["train"], grouped, missing, seed)
    near = _near(Path(path), sets, {file: each.look for file, each in seen.items()})
    notes = tuple(note for note in (found.note, ungrouped, near) if note)
    return Split(*(sets[part] for part in PARTS), (*notes, *odd))


def _classes(root: Path) -> dict[str, list[Path]]:
    found = tree.find(root)
    if found.split:
        raise DataError(
            f"{root} has {' and '.join(found.parts)} in it: read it with metautils.data.labelled."
            "load, or name the folder of one."
        )
    return found.parts["train"].classes


def _check_test(path: Path, found: tree.Found) -> None:
    if found.split and "test" not in found.parts:
        raise DataError(
            f"{path} has images for {' and '.join(found.parts)} and none for test: add a test "
            "folder, or put the classes directly into the folder to have them split."
        )


def _check_classes(path: Path, sets: dict[str, Images]) -> None:
    train = sets["train"]
    for part, each in sets.items():
        odd = sorted(set(each.classes) ^ set(train.classes))
        if not set(each.classes) & set(train.classes):
            raise DataError(
                f"{path} has no class that is in both train and {part}, as sets for few-shot "
                "learning have: a classifier needs the same classes in each part."
            )
        if odd:
            there = each.root if odd[0] in each.classes else train.root
            lacking = train.root if odd[0] in each.classes else each.root
            raise DataError(
                f"{Path(there) / odd[0]} is a class that {lacking} lacks: both need the same ones."
            )


def _groups(path: Path, files: Sequence[str], pattern: str | None) -> tuple[dict[str, str], str]:
    """The group of each file that has one, and a sentence on those that have none."""
    if pattern is None:
        return {}, ""
    try:
        looked_for = re.compile(pattern)
    except re.error as error:
        raise BadArgument(f"--groups {pattern!r} is no regular expression: {error}.") from error
    names = {file: Path(file).relative_to(path).as_posix() for file in files}
    matches = {file: looked_for.search(name) for file, name in names.items()}
    found = {file: match[bool(looked_for.groups)] for file, match in matches.items() if match}
    found = {file: group for file, group in found.items() if group}
    alone = [name for file, name in names.items() if file not in found]
    if not found:
        raise BadArgument(
            f"--groups {pattern!r} finds no group in any name, such as {alone[0]}: it is a regular "
            "expression, whose bracketed part names the group."
        )
    if not alone:
        return found, ""
    return found, f"{len(alone)} image(s) have no group and stand alone, such as {alone[0]}."


class _Seen(NamedTuple):
    """What is kept of a picture: a hash of its pixels, its look, the mode of its file."""

    content: str
    look: Look
    mode: str


def _read_all(files: Sequence[str], progress: bool) -> tuple[dict[str, _Seen], list[str]]:
    """What is kept of every picture, and notes on those that had to be converted."""
    rows = read_each(_read, files, progress)
    seen = dict(zip(files, rows, strict=True))
    odd = {file: each.mode for file, each in seen.items() if each.mode not in PLAIN}
    return seen, [f"{file} is of mode {mode} and is read as RGB." for file, mode in odd.items()]


def _read(file: str) -> _Seen:
    picture = read_rgb(file)
    with damage_told(file), Image.open(file) as opened:
        mode, frames = opened.mode, getattr(opened, "n_frames", 1)
        photo = opened.format == "MPO"  # a phone's is one photograph with previews beside it
    if frames > 1 and not photo:
        raise DataError(
            f"{file} has {frames} frames: save the one that you mean as an image of its own, or "
            "remove the file."
        )
    return _Seen(_digest(picture), look(picture), mode)


def _digest(image: Image.Image) -> str:
    size = "x".join(map(str, image.size)).encode()
    return hashlib.sha256(size + image.tobytes()).hexdigest()


def _check_pictures(sets: dict[str, Images]) -> None:
    """No picture in two parts, which would flatter the test, nor in two classes."""
    seen: dict[str, tuple[str, int, str]] = {}
    for part, each in sets.items():
        for file, label in each.samples:
            other, known, first = seen.setdefault(each.contents[file], (part, label, file))
            if known != label:
                raise DataError(
                    f"{file} is the same picture as {first}, of another class: remove one of them."
                )
            if other != part:
                raise DataError(
                    f"{file} is the same picture as {first}: the {part} images must not be among "
                    f"the {other} images, so remove one of them."
                )


def _check_groups(sets: dict[str, Images], groups: dict[str, str]) -> None:
    """No group in two parts that were given."""
    seen: dict[str, tuple[str, str]] = {}
    for part, each in sets.items():
        for file, _ in each.samples:
            other, first = seen.setdefault(groups.get(file, file), (part, file))
            if other != part:
                raise DataError(
                    f"{file} is of group {groups[file]!r}, as is {first}: the {part} images must "
                    f"not be of the groups of the {other} images, so move one of them."
                )


def _divide(
    images: Images, groups: dict[str, str], parts: Sequence[str], seed: int
) -> dict[str, Images]:
    """The images that remain, `train`, and `parts` with about a fifth of each class each."""
    names = [(f"picture {images.contents[file]}", file) for file, _ in images.samples]
    # A unit with a group has the group's name, which comes first in the alphabet.
    units = joined([
        (name, f"group {groups[file]}") if file in groups else (name,) for name, file in names
    ])  # fmt: skip
    _check_number(images, units, parts, bool(groups))
    given = assign(units, images.targets, parts, seed)
    sets = {
        part: images.only([row for row, other in enumerate(given) if other == part])
        for part in ("train", *parts)
    }
    for part, each in sets.items():
        lacking = sorted(set(range(len(images.classes))) - set(each.targets))
        if lacking:
            raise DataError(
                f"No image of {images.classes[lacking[0]]!r} would be in {part}, as its groups are "
                "those of other classes too: give another --split-seed, or more groups."
            )
    return sets


def _check_number(
    images: Images, units: Sequence[str], parts: Sequence[str], grouped: bool
) -> None:
    """Every part can have a picture of every class, and there are two or more to learn from."""
    own: list[dict[str, str]] = [{} for _ in images.classes]
    for unit, (file, label) in zip(units, images.samples, strict=True):
        own[label].setdefault(unit, file)
    for name, first in zip(images.classes, own, strict=True):
        if len(first) < max(2, 1 + len(parts)):
            what = "group(s) of pictures" if grouped else "different picture(s)"
            raise DataError(
                f"{next(iter(first.values()))} is one of only {len(first)} {what} of {name!r}: "
                f"give at least {max(2, 1 + len(parts))} of each class."
            )


def _near(path: Path, sets: dict[str, Images], looks: dict[str, Look]) -> str:
    """A sentence on pictures of two parts that look nearly alike, if there are some."""
    pairs = []
    for part, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
        one, two = ([file for file, _ in sets[each].samples] for each in (part, other))
        near = alike([looks[file] for file in one], [looks[file] for file in two])
        pairs += [(one[i], part, two[j], other) for i, j in near]
    if not pairs:
        return ""
    told = [
        f"{Path(a).relative_to(path).as_posix()} ({part}) and "
        f"{Path(b).relative_to(path).as_posix()} ({other})"
        for a, part, b, other in pairs[:3]
    ]
    return (
        f"{len(pairs)} pair(s) of pictures in two parts look nearly alike, such as "
        f"{'; '.join(told)}. If they are copies or neighbours in a film, the test flatters: remove "
        "some, or keep them together by --groups."
    )
