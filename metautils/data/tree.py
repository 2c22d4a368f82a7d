"""What lies in a folder of images: its parts, their classes, their images, and what is none.

One rule for every reader. An image is a visible file with an ending that Pillow knows; those in
subfolders of a class are of the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metautils.data.images import suffixes, visible
from metautils.files import DataError, listed, reading

# A folder that has one of these words in its name may be a part of a split.
WORDS = {
    "train": {"train", "training", "trn"},
    "validation": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing", "eval"},
}


class Part(NamedTuple):
    """A part of a set: its folder, and the images of each class by the name of the class.

    Example:
        >>> Part._fields
        ('path', 'classes')
    """

    path: Path
    classes: dict[str, list[Path]]


class Found(NamedTuple):
    """The parts of a set by name; all of it is `train` where it is not `split`.

    `beside` are folders of images that are not named like parts, where there is a split; `note` is
    a sentence on files that were passed over, or empty.

    Example:
        >>> Found._fields
        ('parts', 'split', 'beside', 'note')
    """

    parts: dict[str, Part]
    split: bool
    beside: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class _Folder:
    path: Path
    images: list[Path]
    others: list[Path]
    folders: list[_Folder]

    def below(self) -> Iterator[_Folder]:
        """This folder and all in it."""
        yield self
        for each in self.folders:
            yield from each.below()

    def all_images(self) -> list[Path]:
        """Those in subfolders too, in the same order on every system."""
        found = (file for each in self.below() for file in each.images)
        return sorted(found, key=lambda file: (file.parent.as_posix(), file.name))

    def filled(self) -> list[_Folder]:
        """The folders in it that hold images, at whatever depth."""
        return [each for each in self.folders if any(x.images for x in each.below())]


def find(path: Path) -> Found:
    """Look through a folder of `CLASS/IMAGE`, or of `PART/CLASS/IMAGE`.

    Folders are parts if they are named like parts, there is one to train on, and they hold folders
    of images; a folder that holds images is a class, whatever its name.

    Raises:
        DataError: if there is no such folder, or a class is empty, or two folders are for one part,
            or the parts have no classes.
    """
    with reading(path):
        there = path.is_dir()
    if not there:
        raise DataError(f"{path} is no folder: name one that holds a subfolder for each class.")
    top = _look(path, {path.resolve()})
    folders = _parts(top)
    parts = {part: _part(each) for part, each in (folders or {"train": top}).items()}
    used = {f for part in parts.values() for files in part.classes.values() for f in files}
    every = (f for each in top.below() for f in sorted(each.images + each.others, key=_name))
    unused = [file for file in every if file not in used]
    names = (each.path.name for each in top.filled()) if folders else ()
    beside = tuple(name for name in names if part_of(name) is None)
    return Found(parts, bool(folders), beside, _note(path, unused))


def images_in(path: Path) -> list[Path]:
    """All images in a folder and in those below it; a file is itself, whatever its name.

    Raises:
        DataError: if it is a folder without any image, or cannot be read.
    """
    with reading(path):
        folder = path.is_dir()
    found = _look(path, {path.resolve()}).all_images() if folder else [path]
    if not found:
        raise DataError(f"{path} holds no image: name images, or folders with some in them.")
    return found


def part_of(name: str) -> str | None:
    """The part that a folder of this name holds: `seg_train`, `Training`, `val2017`; or None."""
    words = set(re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name))
    lower = {word.lower() for word in words}
    return next((part for part, known in WORDS.items() if known & lower), None)


def _look(path: Path, above: set[Path]) -> _Folder:
    """A folder with all in it; links that lead back to one above are not followed."""
    found = _Folder(path, [], [], [])
    for entry in listed(path):
        if not visible(entry.name):
            continue
        with reading(entry):
            folder, odd = entry.is_dir(), entry.exists() and not entry.is_file()
        if folder:
            real = entry.resolve()
            if real not in above:
                found.folders.append(_look(entry, above | {real}))
        # A broken link is told when it is read.
        elif entry.suffix.lower() in suffixes() and not odd:
            found.images.append(entry)
        else:
            found.others.append(entry)
    return found


def _parts(top: _Folder) -> dict[str, _Folder]:
    """The folders of a split that was made already; none where the subfolders are classes."""
    names = {each.path: part_of(each.path.name) for each in top.filled()}
    held: dict[str, list[_Folder]] = {part: [] for part in WORDS}
    for each in top.filled():
        if names[each.path] and each.filled():
            held[names[each.path]].append(each)
    # A stray image beside the classes of a part does not make a class of it, if all else is a part.
    all_named = None not in names.values() and len(set(names.values())) > 1
    if not all(each.images for each in held["train"]) or (held["train"] and all_named):
        _check_one_each(top.path, held)
        return {part: _inner(each[0], part) for part, each in held.items() if each}
    if all_named and "train" in names.values():
        loose = next(each for each in top.filled() if names[each.path] == "train")
        raise DataError(
            f"{loose.path} is named like a part, and holds images but no folder for each class: "
            "put those of each class into one."
        )
    return {}


def _check_one_each(path: Path, held: dict[str, list[_Folder]]) -> None:
    for part, folders in held.items():
        if len(folders) > 1:
            first, second, *_ = (each.path.name for each in folders)
            raise DataError(f"{path} has {first}/ and {second}/, both for {part}: make them one.")


def _inner(folder: _Folder, part: str) -> _Folder:
    """The folder of the classes: archives often hold `seg_train/seg_train/CLASS`."""
    filled = folder.filled()
    if len(filled) != 1 or folder.images or not filled[0].filled():
        return folder
    return _inner(filled[0], part) if part_of(filled[0].path.name) == part else folder


def _part(folder: _Folder) -> Part:
    classes = {each.path.name: each.all_images() for each in folder.folders}
    for name, files in classes.items():
        if not files:
            raise DataError(f"{folder.path / name} holds no image: add some or remove the folder.")
    return Part(folder.path, classes)


def _name(file: Path) -> str:
    return file.name


def _note(path: Path, unused: list[Path]) -> str:
    if not unused:
        return ""
    names = ", ".join(file.relative_to(path).as_posix() for file in unused[:3])
    more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
    return (
        f"{path} has {len(unused)} file(s) that do not end like an image, or lie in no class, and "
        f"are passed over: {names}{more}."
    )
