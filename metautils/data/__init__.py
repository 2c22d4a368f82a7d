"""Sets of images as banks of classes, each with its train, validation and test classes."""

from __future__ import annotations

from pathlib import Path

from metautils.data import cifar_fs, digits, folder, glyphs, omniglot
from metautils.data.bank import Parts
from metautils.errors import BadArgument
from metautils.files import reading

NAMES = ("glyphs", "omniglot", "digits", "cifar_fs")


def load(name: str, seed: int = 0, split: str = "random", **read: int) -> Parts:
    """Load a set by name, or a folder of images by its path.

    Args:
        name: `"glyphs"`, `"omniglot"`, `"digits"`, `"cifar_fs"`, or a folder with a subfolder for
            each class.
        seed: of the split; for glyphs, of the alphabets themselves.
        split: of Omniglot, see `metautils.data.omniglot.load`.
        read: of a folder, how its images are read, such as `size=128`; see
            `metautils.data.folder.load`.

    Raises:
        DataError: if the set cannot be had.
        ValueError: if the name is neither a set nor a folder.
    """
    if name == "glyphs":
        return glyphs.load(seed)
    if name == "omniglot":
        return omniglot.load(split, seed)
    if name == "digits":
        return digits.load()
    if name == "cifar_fs":
        return cifar_fs.load()
    with reading(Path(name)):
        given = Path(name).is_dir()
    if given:
        return folder.load(name, seed=seed, **read)
    raise BadArgument(f"{name!r} is neither a folder nor one of {', '.join(NAMES)}.")
