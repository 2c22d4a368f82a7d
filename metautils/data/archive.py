"""Images in an archive, or in the folder that it unpacks to."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from zlib import error as ZlibError

import numpy as np
from PIL import Image

from metautils.files import DataError


def images(
    source: Path, part: str, ending: str, mode: str, data: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Class and pixels of every image of `source/part.zip` or `source/part/`, ordered by name.

    Args:
        source: folder of the set.
        part: of the set; `part/CLASS/IMAGE` is the path of an image, CLASS may have levels.
        ending: of the images' names, such as ".png".
        mode: Pillow's, which the image is converted to.
        data: the set's name, for messages.

    Yields:
        `part/CLASS` and `(height, width)` or `(height, width, channels)` uint8.

    Raises:
        DataError: if neither exists, or the archive or an image is damaged.
    """
    archive, folder = source / f"{part}.zip", source / part
    if folder.is_dir():
        # By name as in the archive, on every system: Windows sorts paths as if in lower case.
        paths = sorted(folder.rglob(f"*{ending}"), key=lambda path: path.as_posix())
        for path in paths:
            name = f"{part}/{path.parent.relative_to(folder).as_posix()}"
            yield name, pixels(path, str(path), mode, data)
    elif archive.is_file():
        for name, content in unzipped(archive):
            if name.startswith(f"{part}/") and name.endswith(ending):
                yield name.rsplit("/", 1)[0], pixels(io.BytesIO(content), name, mode, data)
    else:
        raise DataError(
            f"Neither {archive} nor {folder}/ exists: put {data}'s {part} there, or unset "
            "METAUTILS_DATA to download it."
        )


def unzipped(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file, ordered by name; `DataError` if it is damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                yield name, file.read(name)
    # A damaged header may ask for anything: a password, another method, a place before the file.
    except (zipfile.BadZipFile, ZlibError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{archive} is damaged ({error}): fetch it again.") from error


def pixels(file: Path | io.BytesIO, name: str, mode: str, data: str) -> np.ndarray:
    """Of an image, see `images`; `DataError` by its `name` if it is damaged."""
    try:
        with Image.open(file) as image:
            return np.array(image.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no readable image ({error}): fetch {data} again.") from error
