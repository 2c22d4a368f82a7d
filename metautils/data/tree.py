"""What lies in a folder of images: its parts, their classes, their images, and what is none.

One rule for every reader. An image is a visible file with an ending that Pillow knows; those in
subfolders of a class are of the class. A folder that holds nothing but one folder of folders is
read through: archives often hold `set/set`. One that holds files and no image is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metautils.data.images import UNREAD, suffixes, visible
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

    `note` has a sentence on files that were passed over, one on folders without any image, and one
    on classes that might have been meant as parts; or it is empty.

    Example:
        >>> Found._fields
        ('parts', 'split', 'note')
    """

    parts: dict[str, Part]
    split: bool
    note: str


@dataclass(frozen=True)
class _Folder:
    path: Path
    images: list[Path]
    others: list[Path]
    folders: list[_Folder]

    @property
    def name(self) -> str:
        return self.path.name

    def below(self) -> Iterator[_Folder]:
        """This folder and all in it."""
        yield self
        for each in self.folders:
            yield from each.below()

    def all_images(self) -> list[Path]:
        """Those in subfolders too, in the same order on every system.

        Raises:
            DataError: if that would put the images of several parts together.
        """
        for each in self.below():
            _check_one_part(each.path, {part_of(x.name) for x in each.filled()})
        found = (file for each in self.below() for file in each.images)
        return sorted(found, key=lambda file: (file.parent.as_posix(), file.name))

    def kind(self) -> str:
        """What it holds, at whatever depth: "images", other "files" alone, or "nothing".

        Photographs that cannot be read are nothing: a class of them must not be passed over.
        """
        if any(each.images for each in self.below()):
            return "images"
        others = (file for each in self.below() for file in each.others)
        return "files" if any(x.suffix.lower() not in UNREAD for x in others) else "nothing"

    def of(self, kind: str) -> list[_Folder]:
        """The folders in it of this kind."""
        return [each for each in self.folders if each.kind() == kind]

    def filled(self) -> list[_Folder]:
        """The folders in it that hold images, at whatever depth."""
        return self.of("images")

    def only(self) -> _Folder | None:
        """The one folder of classes in it, if it holds nothing else: no class is alone."""
        filled = self.filled()
        if len(filled) != 1 or self.images or self.of("nothing"):
            return None
        inner = filled[0].filled()
        return filled[0] if len(inner) > 1 or (inner and not filled[0].images) else None


def find(path: Path) -> Found:
    """Look through a folder of `CLASS/IMAGE`, of `PART/CLASS/IMAGE` or of `CLASS/PART/IMAGE`.

    Folders are parts if they are named like parts, there is one to train on, they hold folders of
    images, and either nothing lies beside them, or these folders recur from part to part, or there
    are all three parts. A folder that holds images beside classes is a class, whatever its name.

    Raises:
        DataError: if there is no such folder, or a class is empty, or two folders are for one part,
            or the parts have no classes, or it cannot be told whether a folder is a part or a
            class, or images of several parts would be put together.
    """
    with reading(path):
        there = path.is_dir()
    if not there:
        raise DataError(f"{path} is no folder: name one that holds a subfolder for each class.")
    whole = _look(path, {path.resolve()})
    top = _inside({"": whole})[""]
    folders = _parts(top)
    parts = {part: _part(each) for part, each in folders.items()} or _by_class(top)
    used = {f for part in parts.values() for files in part.classes.values() for f in files}
    unlike = [] if folders else [x for x in top.filled() if part_of(x.name) and not x.images]
    return Found(parts, bool(folders) or len(parts) > 1, _note(whole, used, unlike))


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


def _inside(parts: dict[str, _Folder]) -> dict[str, _Folder]:
    """Where the classes of the parts are: in `train/images` and so on, or `seg_train/seg_train`.

    One part alone is read through by the name of the part, else its only class might be.
    """
    only = {part: each.only() for part, each in parts.items()}
    named = all(only.values())
    down = {x: each for x, each in only.items() if each and (named or part_of(each.name) == x)}
    return _inside(parts | down) if down else parts


def _parts(top: _Folder) -> dict[str, _Folder]:
    """The folders of a split that was made already; none where the subfolders are classes."""
    named = {part: [x for x in top.filled() if part_of(x.name) == part] for part in WORDS}
    beside = [each for each in top.filled() if part_of(each.name) is None]
    held = {part: [x for x in folders if x.filled()] for part, folders in named.items()}
    parts = _inside({part: folders[0] for part, folders in held.items() if folders})
    if "train" not in parts:
        if named["train"] and not beside and sum(map(bool, named.values())) > 1:
            raise DataError(
                f"{named['train'][0].path} is named like a part, and holds images but no folder "
                "for each class: put those of each class into one."
            )
        return {}
    names = {part: {x.name for x in each.filled()} for part, each in parts.items()}
    recur = any(names["train"] & names[part] for part in parts if part != "train")
    if beside and not recur and len(parts) < len(WORDS):
        _check_class(top.path, [held[part][0] for part in parts], names, beside)
        return {}
    _check_one_each(top.path, held)
    return parts


def _check_class(
    path: Path, held: list[_Folder], names: dict[str, set[str]], beside: list[_Folder]
) -> None:
    """Folders named like parts, beside classes, are classes unless they would do as parts."""
    alike = any(names["train"] & {x.name for x in each.filled()} for each in beside)
    enough = min(map(len, names.values())) > 1 and (len(held) > 1 or len(beside) == 1)
    if (alike or enough) and not held[0].images:
        raise DataError(
            f"{path} has folders of images in {' and '.join(f'{x.name}/' for x in held)}, which "
            f"may be a part or a class, beside {beside[0].name}/: rename what is a class, or move "
            "away what is none."
        )


def _check_one_each(path: Path, held: dict[str, list[_Folder]]) -> None:
    for part, folders in held.items():
        if len(folders) > 1:
            first, second, *_ = (each.name for each in folders)
            raise DataError(f"{path} has {first}/ and {second}/, both for {part}: make them one.")


def _check_one_part(path: Path, found: set[str | None]) -> None:
    """Images to train on and to test on lie in folders of one class, and not so in all."""
    parts = [part for part in WORDS if part in found]
    if len(parts) > 1:
        raise DataError(
            f"{path} has folders for {' and '.join(parts)} below the classes, whose images would "
            "be put together: give every class the same ones and nothing else, or rename them."
        )


def _part(folder: _Folder) -> Part:
    for each in folder.of("nothing"):
        such = " that can be read, such as JPEG or PNG" if each.others else ""
        raise DataError(f"{each.path} holds no image{such}: add some or remove the folder.")
    return Part(folder.path, {each.name: each.all_images() for each in folder.filled()})


def _by_class(top: _Folder) -> dict[str, Part]:
    """The parts that every class holds, as `CLASS/train/IMAGE`; where they hold none, one part."""
    rows = {each.name: _parts_of_class(each) for each in top.filled()}
    parts = set().union(*rows.values())
    if "train" not in parts or len(parts) == 1 or top.of("nothing"):
        return {"train": _part(top)}
    if any(row.keys() != parts for row in rows.values()):
        _check_one_part(top.path, parts)
    return {
        part: Part(top.path, {name: row[part].all_images() for name, row in rows.items()})
        for part in WORDS
        if part in parts
    }


def _parts_of_class(folder: _Folder) -> dict[str | None, _Folder]:
    """Those that it holds, if it holds nothing else, in `CLASS/images/train` too."""
    inner = folder.only()
    held = inner if inner and part_of(inner.name) is None else folder
    row = {part_of(each.name): each for each in held.filled()}
    return {} if None in row or held.images or len(row) < len(held.filled()) else row


def _note(whole: _Folder, used: set[Path], unlike: list[_Folder]) -> str:
    """What was passed over, and what was not taken for a part."""
    held = [each for each in whole.below() if each is whole or each.kind() == "images"]
    every = (x for each in held for x in sorted(each.images + each.others, key=lambda x: x.name))
    files = [x for x in every if x not in used]
    bare = [x.path for each in held for x in each.of("files")]
    told = (
        (files, "file(s) that do not end like an image, or lie in no class, and are passed over"),
        (bare, "folder(s) that hold files and no image, and are passed over"),
        ([x.path for x in unlike], "folder(s) that are named like a part and read as a class"),
    )
    return " ".join(
        f"{whole.path} has {len(found)} {what}: {_first(found, whole.path)}."
        for found, what in told
        if found
    )


def _first(found: list[Path], path: Path) -> str:
    names = ", ".join(each.relative_to(path).as_posix() for each in found[:3])
    return names + (f" and {len(found) - 3} more" if len(found) > 3 else "")
