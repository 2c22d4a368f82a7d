"""A folder of labelled images to train a classifier on, checked before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from metautils.data import tree
from metautils.data.images import damage_told, read_each, read_rgb
from metautils.files import DataError
from metautils.progress import progress_bar

PARTS = ("train", "validation", "test")
SHARE = 0.2  # of a class, for validation and for test each
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

    def digests(self) -> dict[str, str]:
        """What is on each picture, in short, by its name below the root: the same for a copy."""
        contents = {
            file: self.contents.get(file) or _digest(read_rgb(file)) for file, _ in self.samples
        }
        root = Path(self.root)
        return {Path(file).relative_to(root).as_posix(): x[:16] for file, x in contents.items()}


class Split(NamedTuple):
    """Three sets of images of the same classes; no picture is in two of them.

    Learn from `train`, choose the epoch by `validation`, report on `test`, once. `notes` says
    what was passed over, if there is something, and has a sentence on each file that is read in
    another way than it was written.

    Example:
        >>> Split._fields
        ('train', 'validation', 'test', 'notes')
    """

    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()


def load(path: str | Path, seed: int = 0, progress: bool = False) -> Split:
    """Read `path/CLASS/IMAGE` and split it, or `path/train/CLASS/IMAGE` and so on as it lies.

    In the first layout every class gives a fifth of its pictures to validation and a fifth to
    test, at random; copies of a picture stay together. The second, which may lie as
    `path/CLASS/train/IMAGE` too, has `train` and `test`, and a fifth of `train` becomes the
    validation if there is no `validation` or `val`; names such as `training_set`, `seg_test` and
    `val2017` will do. A class needs three different pictures in the first layout; in the second,
    two in `train`, one in `test`.

    Args:
        path: the folder.
        seed: of the split.
        progress: show a bar while every image is read, once.

    Raises:
        DataError: if there are fewer than two classes, or too few pictures of one, or other
            classes in another part; if files are no images, are cut off or have several frames; if
            two parts or two classes hold the same picture. The sentence names the file.
    """
    found = tree.find(Path(path))
    _check_test(Path(path), found)
    sets = {name: Images(*part) for name, part in found.parts.items()}
    _check_classes(Path(path), sets)
    contents, notes = _read_all([f for each in sets.values() for f, _ in each.samples], progress)
    notes = (found.note, *notes) if found.note else notes
    for each in sets.values():
        each.contents = contents
    _check_pictures(sets, contents)
    missing = [part for part in PARTS if part not in sets]
    divided = _divide(sets["train"], contents, len(missing), seed)
    sets |= dict(zip(["train", *missing], divided, strict=True))
    return Split(*(sets[part] for part in PARTS), notes)


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


def _read_all(files: Sequence[str], progress: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """A hash of every picture's pixels, and notes on those that had to be converted."""
    rows = read_each(_read, progress_bar(files, show=progress, desc="read images"))
    contents = {file: content for file, (content, _) in zip(files, rows, strict=True)}
    odd = [(file, mode) for file, (_, mode) in zip(files, rows, strict=True) if mode not in PLAIN]
    return contents, tuple(f"{file} is of mode {mode} and is read as RGB." for file, mode in odd)


def _read(file: str) -> tuple[str, str]:
    """A hash of the pixels of a picture, and its mode."""
    content = _digest(read_rgb(file))
    with damage_told(file), Image.open(file) as opened:
        mode, frames = opened.mode, getattr(opened, "n_frames", 1)
        photo = opened.format == "MPO"  # a phone's is one photograph with previews beside it
    if frames > 1 and not photo:
        raise DataError(
            f"{file} has {frames} frames: save the one that you mean as an image of its own, or "
            "remove the file."
        )
    return content, mode


def _digest(image: Image.Image) -> str:
    size = "x".join(map(str, image.size)).encode()
    return hashlib.sha256(size + image.tobytes()).hexdigest()


def _check_pictures(sets: dict[str, Images], contents: dict[str, str]) -> None:
    """No picture in two parts, which would flatter the test, nor in two classes."""
    seen: dict[str, tuple[str, int, str]] = {}
    for part, each in sets.items():
        for file, label in each.samples:
            other, known, first = seen.setdefault(contents[file], (part, label, file))
            if known != label:
                raise DataError(
                    f"{file} is the same picture as {first}, of another class: remove one of them."
                )
            if other != part:
                raise DataError(
                    f"{file} is the same picture as {first}: the {part} images must not be among "
                    f"the {other} images, so remove one of them."
                )


def _divide(images: Images, contents: dict[str, str], parts: int, seed: int) -> list[Images]:
    """The images that remain, then `parts` sets of a fifth of each class's pictures."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = [[] for _ in range(1 + parts)]
    for label, name in enumerate(images.classes):
        copies: dict[str, list[int]] = {}
        for row, (file, own) in enumerate(images.samples):
            if own == label:
                copies.setdefault(contents[file], []).append(row)
        if len(copies) < 1 + parts + (parts == 0):
            file = images.samples[next(iter(copies.values()))[0]][0]
            raise DataError(
                f"{file} is one of only {len(copies)} different picture(s) of {name!r}: give at "
                f"least {max(2, 1 + parts)} of each class."
            )
        share = max(1, round(SHARE * len(copies)))
        groups = list(copies.values())
        order = torch.randperm(len(groups), generator=generator, device="cpu")
        for place, k in enumerate(order.tolist()):
            part = 1 + place // share
            rows[part if part <= parts else 0] += groups[k]
    return [images.only(sorted(each)) for each in rows]
