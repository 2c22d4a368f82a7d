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
from tqdm import tqdm

from metautils.data.images import read_rgb, visible
from metautils.files import DataError, listed

PARTS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
SHARE = 0.2  # of a class, for validation and for test each
PLAIN = {"RGB", "L"}  # modes that are read as they are


class Images(ImageFolder):
    """torchvision's ImageFolder with a reader for every mode, blind to hidden files and folders.

    ImageFolder itself takes `.ipynb_checkpoints` for a class, and passes over files whose ending
    it does not know; here every file of a class counts, those in subfolders of it too.

    Args:
        root: a folder with a subfolder for each class.

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

    def __init__(self, root: Path) -> None:
        def shown(file: str) -> bool:
            return all(map(visible, Path(file).relative_to(root).parts))

        super().__init__(str(root), loader=read_rgb, is_valid_file=shown, allow_empty=True)
        self.contents: dict[str, str] = {}
        # torchvision orders subfolders by their path, whose separator is another on Windows.
        self.samples.sort(key=lambda sample: (sample[1], *_place(sample[0])))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the subfolders, sorted, and their labels."""
        if not Path(directory).is_dir():
            raise DataError(
                f"{directory} is no folder: name one that holds a subfolder for each class."
            )
        names = [p.name for p in listed(Path(directory)) if p.is_dir() and visible(p.name)]
        if len(names) < 2:
            raise DataError(
                f"{directory} has {len(names)} subfolder(s): a classifier needs two or more, one "
                "for the images of each class."
            )
        return names, {name: k for k, name in enumerate(names)}

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

    Learn from `train`, choose the epoch by `validation`, report on `test`, once. `notes` has a
    sentence on each file that is read in another way than it was written.

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
    test, at random; copies of a picture stay together. The second has `train` and `test`, and a
    fifth of `train` becomes the validation if there is no `validation` or `val`. A class needs
    three different pictures in the first layout; in the second, two in `train`, one in `test`.

    Args:
        path: the folder.
        seed: of the split.
        progress: show a bar while every image is read, once.

    Raises:
        DataError: if there are fewer than two classes, or too few pictures of one, or other
            classes in another part; if a file is no image, is cut off or has several frames; if
            two parts or two classes hold the same picture. The sentence names the file.
    """
    path = Path(path)
    folders = _parts(path) or {"train": path}
    sets = {part: Images(folder) for part, folder in folders.items()}
    _check_classes(sets)
    contents, notes = _read_all([f for each in sets.values() for f, _ in each.samples], progress)
    for each in sets.values():
        each.contents = contents
    _check_pictures(sets, contents)
    missing = [part for part in PARTS if part not in sets]
    divided = _divide(sets["train"], contents, len(missing), seed)
    sets |= dict(zip(["train", *missing], divided, strict=True))
    return Split(*(sets[part] for part in PARTS), notes)


def _parts(path: Path) -> dict[str, Path]:
    """The folders of a split that was made already; none where the subfolders are classes."""
    there = [p for p in listed(path) if p.is_dir()] if path.is_dir() else []
    found = {part: [p for p in there if p.name.lower() in names] for part, names in PARTS.items()}
    if not found["train"]:
        return {}
    for part, folders in found.items():
        if len(folders) > 1:
            first, second, *_ = (p.name for p in folders)
            raise DataError(f"{path} has {first}/ and {second}/, both for {part}: make them one.")
    if not found["test"]:
        raise DataError(
            f"{path} has {found['train'][0].name}/ and no test/: add images to test on, or put the "
            "classes directly into the folder to have them split."
        )
    return {part: folders[0] for part, folders in found.items() if folders}


def _check_classes(sets: dict[str, Images]) -> None:
    train = sets["train"]
    for each in sets.values():
        odd = sorted(set(each.classes) ^ set(train.classes))
        if odd:
            there = each.root if odd[0] in each.classes else train.root
            lacking = train.root if odd[0] in each.classes else each.root
            raise DataError(
                f"{Path(there) / odd[0]} is a class that {lacking} lacks: both need the same ones."
            )
        empty = set(range(len(each.classes))) - set(each.targets)
        if empty:
            folder = Path(each.root) / each.classes[min(empty)]
            raise DataError(f"{folder} holds no file: add images of this class or remove it.")


def _place(file: str) -> tuple[str, str]:
    """A file's folder and name, to sort by."""
    return Path(file).parent.as_posix(), Path(file).name


def _read_all(files: Sequence[str], progress: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """A hash of every picture's pixels, and notes on those that had to be converted."""
    contents, notes = {}, []
    for file in tqdm(files, desc="read images", disable=not progress, leave=False):
        image = read_rgb(file)
        with Image.open(file) as opened:
            # A phone's MPO is one photograph with previews beside it.
            if getattr(opened, "is_animated", False) and opened.format != "MPO":
                raise DataError(
                    f"{file} has {opened.n_frames} frames: save the one that you mean as an image "
                    "of its own, or remove the file."
                )
            if opened.mode not in PLAIN:
                notes.append(f"{file} is of mode {opened.mode} and is read as RGB.")
        contents[file] = _digest(image)
    return contents, tuple(notes)


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
