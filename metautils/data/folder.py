"""A folder of the reader's own images, one subfolder for each class."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from metautils.data import tree
from metautils.data.bank import ClassBank, Parts, split_classes
from metautils.data.images import read_each, read_image
from metautils.files import DataError

Classes = dict[str, list[Path]]


def bank(path: str | Path, size: int = 84, channels: int = 3) -> ClassBank:
    """Read `path/CLASS/IMAGE` into one bank, or all parts of `path/PART/CLASS/IMAGE`.

    Each image is turned as its EXIF says, scaled so that its short side is `size`, and cropped
    to the middle square. Any mode is accepted: palettes, transparency (on white), CMYK, 16 bit.
    Images in subfolders of a class are of the class, and those of `path/CLASS/PART/IMAGE` as of
    `path/PART/CLASS/IMAGE`. Files that do not end like an image are passed over, and folders of
    them, and counted in a warning; those that systems leave behind are not worth one.

    Args:
        path: the folder.
        size: height and width, pixels; 84 as in miniImageNet.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: if the folder or a class is empty or missing, or images cannot be read.
        ValueError: if channels is neither 1 nor 3.
    """
    _check_channels(channels)
    return _bank(_parts(Path(path)), size, channels)


def load(path: str | Path, size: int = 84, channels: int = 3, seed: int = 0) -> Parts:
    """`bank`, its classes split 64 : 16 : 20 into train, validation and test with `seed`.

    A folder of parts, such as `train`, `val` and `test`, stays as it lies if each has classes of
    its own; without a `val`, a fifth of the training classes become the validation. If the parts
    have the same classes, the images of a class are put together and the classes split.

    Each part gets two classes or more, as one class alone makes no task.

    Raises:
        DataError: as `bank` does, and if there are fewer than six classes, or fewer than two in a
            part, or if parts share only some of their classes.
    """
    _check_channels(channels)
    parts = _parts(Path(path))
    if len(parts) == 1:
        total = sum(map(len, parts.values()))
        if total < 6:
            raise DataError(
                f"{path} has {total} classes; parts of two need 6: add some subfolders."
            )
        validation, test = max(2, round(0.16 * total)), max(2, round(0.2 * total))
        sizes = (total - validation - test, validation, test)
        return split_classes(_bank(parts, size, channels), sizes, seed)
    _check_parts(Path(path), parts)
    everything = _bank(parts, size, channels)
    sizes = [len(parts.get(part, {})) for part in Parts._fields]
    given = Parts(*map(everything.select, torch.arange(len(everything)).split(sizes)))
    if "validation" in parts:
        return given
    some = max(2, round(0.2 * sizes[0]))
    divided = split_classes(given.train, (sizes[0] - some, some, 0), seed)
    return given._replace(train=divided.train, validation=divided.validation)


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (colour).")


def _parts(path: Path) -> dict[str, Classes]:
    """The classes of each part; of one part alone where all have the same or there is one."""
    found = tree.find(path)
    parts = {name: part.classes for name, part in found.parts.items()}
    names = sorted(set(chain(*parts.values())))
    if len(parts) > 1:
        _check_spelling(path, names)
    if not names:
        told = f"{path} has no subfolder of images: put those of each class into one. {found.note}"
        raise DataError(told.rstrip())
    owners = {name: [part for part in parts if name in parts[part]] for name in names}
    shared = next((name for name in names if len(owners[name]) > 1), names[0])
    lone = next((name for name in names if owners[name] != owners[shared]), None)
    if len(owners[shared]) > 1 and lone is not None:
        raise DataError(
            f"{path} has the class {shared!r} in {' and '.join(owners[shared])}, but {lone!r} in "
            f"{' and '.join(owners[lone])}: give all parts the same classes, or each its own."
        )
    if found.note:
        warnings.warn(found.note, stacklevel=3)
    if len(owners[shared]) == 1:
        return parts
    return {"train": {name: [f for each in parts.values() for f in each[name]] for name in names}}


def _check_spelling(path: Path, names: list[str]) -> None:
    """Classes of other parts would be taken for other classes, and tested on as new ones."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(
                f"{path} has the classes {other!r} and {name!r} in its parts: give one class one "
                "name, or two classes names that differ in more than case."
            )


def _check_parts(path: Path, parts: dict[str, Classes]) -> None:
    if "test" not in parts:
        raise DataError(
            f"{path} has classes of its own for {' and '.join(parts)} and none for test: add a "
            "test folder, or put the classes directly into the folder to have them split."
        )
    for part, classes in parts.items():
        least = 4 if part == "train" and "validation" not in parts else 2
        if len(classes) < least:
            raise DataError(
                f"{path} has {len(classes)} classes for {part}, which needs {least} or more: add "
                "some, or put all classes directly into the folder to have them split."
            )


def _bank(parts: dict[str, Classes], size: int, channels: int) -> ClassBank:
    """All classes of all parts, in this order, so that bad images of all are told at once."""
    classes = {name: files for part in parts.values() for name, files in part.items()}
    files = [file for each in classes.values() for file in each]
    images = read_each(partial(_read, size=size, channels=channels), files)
    counts = torch.tensor([len(each) for each in classes.values()], device="cpu")
    return ClassBank(torch.stack(images), counts, tuple(classes))  # (images, channels, size, size)


def _read(file: Path, size: int, channels: int) -> Tensor:
    image = read_image(file).convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (size, size))
    # (size, size, channels) or (size, size) to (channels, size, size)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)
