"""A folder of the reader's own images, one subfolder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from metautils.data.bank import ClassBank, Parts, split_classes
from metautils.data.images import SUFFIXES, read_image, visible
from metautils.files import DataError, listed


def bank(path: str | Path, size: int = 84, channels: int = 3) -> ClassBank:
    """Read `path/CLASS/IMAGE` into one bank.

    Each image is turned as its EXIF says, scaled so that its short side is `size`, and cropped
    to the middle square. Any mode is accepted: palettes, transparency (on white), CMYK, 16 bit.
    Hidden files and those that do not end like an image are passed over.

    Args:
        path: the folder.
        size: height and width, pixels; 84 as in miniImageNet.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: if the folder or a class is empty or missing, or an image cannot be read.
        ValueError: if channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (colour).")
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder: name one that holds a subfolder for each class.")
    folders = [p for p in listed(path) if p.is_dir() and visible(p.name)]
    if not folders:
        raise DataError(f"{path} has no subfolder: put the images of each class into one.")
    classes = []
    for folder in folders:
        files = [p for p in listed(folder) if _is_image(p)]
        if not files:
            raise DataError(f"{folder} holds no image: add some or remove the folder.")
        # (n_k, channels, size, size)
        classes.append(torch.stack([_read(file, size, channels) for file in files]))
    return ClassBank.from_classes(classes, [folder.name for folder in folders])


def load(path: str | Path, size: int = 84, channels: int = 3, seed: int = 0) -> Parts:
    """`bank`, its classes split 64 : 16 : 20 into train, validation and test with `seed`.

    Each part gets two classes or more, as one class alone makes no task.

    Raises:
        DataError: as `bank` does, and if there are fewer than six classes.
    """
    everything = bank(path, size, channels)
    total = len(everything)
    if total < 6:
        raise DataError(f"{path} has {total} classes; parts of two need 6: add some subfolders.")
    validation, test = max(2, round(0.16 * total)), max(2, round(0.2 * total))
    return split_classes(everything, (total - validation - test, validation, test), seed)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and visible(path.name)


def _read(file: Path, size: int, channels: int) -> Tensor:
    image = read_image(file).convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (size, size))
    # (size, size, channels) or (size, size) to (channels, size, size)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)
