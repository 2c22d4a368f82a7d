"""One reader of images, whoever asks: upright, 8 bits, whatever the mode; and what is no image."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from metautils.files import DataError
from metautils.progress import progress_bar

# Those of Pillow's that hold pictures; others are pages (PDF, EPS), films, or icons of a system.
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM"}
FORMATS |= {"QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP"}

# What cameras write and Pillow alone does not read: photographs that are missed, if they are all.
UNREAD = {".heic", ".heif", ".hif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}

# What systems leave beside the files of a person; whatever begins with a dot is hidden anyway.
LEFTOVERS = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle"}
LEFTOVERS |= {"$recycle.bin", "system volume information", "lost+found"}

READERS = 4  # images that are open at the same time, at most: each may take a hundred megabytes

BITS, PHOTOMETRIC, ORIENTATION, SAMPLES = 258, 262, 274, 339  # tags of TIFF, and of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def visible(name: str) -> bool:
    """Whether a file or folder is meant to be seen: `.DS_Store` and `__MACOSX` are not."""
    return not name.startswith(".") and name.casefold() not in LEFTOVERS


@cache
def suffixes() -> frozenset[str]:
    """How the names of images end, in lower case: of all that this Pillow reads."""
    known = Image.registered_extensions().items()
    return frozenset(end for end, name in known if name in FORMATS and name in Image.OPEN)


def read_rgb(file: str | Path | Image.Image) -> Image.Image:
    """An image of any mode in colour, see `read_image`."""
    return read_image(file).convert("RGB")


def read_image(file: str | Path | Image.Image) -> Image.Image:
    """An image, from a file or open, as 8 bits, grey or RGB, upright; transparency becomes white.

    Grey of 16 bits is scaled by the depth that the file declares, floats as if white were 1.

    Raises:
        DataError: if the file is no image, or is cut off, or its range cannot be known.
    """
    whole = isinstance(file, Image.Image)
    with damage_told(file), nullcontext(file) if whole else Image.open(file) as opened:
        opened.load()
        turn, tags, kind = _orientation(opened), _tags(opened), opened.format
        image = _simple(opened.transpose(UPRIGHT[turn]) if turn in UPRIGHT else opened)
    if 0 in image.size:
        raise DataError(f"{file} has no pixels: mend or remove it.")
    image.info = {}  # else whoever reads it again would turn it again
    return _eight_bits(_Loaded(image, file, kind, tags))


@contextmanager
def damage_told(file: str | Path | Image.Image) -> Iterator[None]:
    """Say which file it is that Pillow cannot read; of damaged ones it raises errors of any kind.

    Only Pillow's own work belongs in here: a fault of ours would be taken for a bad file.

    Raises:
        DataError: in place of whatever was raised.
    """
    try:
        yield
    except Exception as error:
        why = textwrap.shorten(str(error), 200) or type(error).__name__
        raise DataError(f"{file} is no readable image: mend or remove it ({why}).") from error


def read_each(
    read: Callable[[Any], Any], files: Sequence[Any], progress: bool = False
) -> list[Any]:
    """What `read` makes of each file, in their order; a few are read at the same time.

    Raises:
        DataError: after the last file, if some cannot be read; it names the first five.
    """
    Image.init()  # else a thread could miss formats while another loads them
    # Threads will do, as decoders and hashes let others work beside them.
    with ThreadPool(min(READERS, os.cpu_count() or 1)) as pool:
        answers = pool.imap(partial(_tried, read), files)
        found = [*progress_bar(answers, show=progress, desc="read images", total=len(files))]
    told = zip(files, found, strict=True)
    bad = {file: error for file, error in told if isinstance(error, DataError)}
    if len(bad) > 1:
        names, more = ", ".join(map(str, [*bad][:5])), len(bad) - 5
        raise DataError(
            f"{len(bad)} images cannot be read, mend or remove them: {names}"
            f"{f' and {more} more' if more > 0 else ''}; the first: {next(iter(bad.values()))}"
        )
    for error in bad.values():
        raise error
    return found


def _tried(read: Callable[[Any], Any], file: Any) -> Any:
    """What is read, or the sentence on why it cannot be."""
    try:
        return read(file)
    except DataError as error:
        return error


def _tags(opened: Image.Image) -> dict[int, Any]:
    """How the numbers of a TIFF are meant; nothing of other formats."""
    held = getattr(opened, "tag_v2", {})
    return {tag: held.get(tag) for tag in (BITS, PHOTOMETRIC, SAMPLES)}


def _orientation(opened: Image.Image) -> object:
    """How the camera was held, if that can be read."""
    block = opened.info.get("exif")
    turn = _turn(block) if isinstance(block, bytes) else None
    if turn is None:
        with suppress(Exception):  # a photograph is worth more than what is said about it
            turn = opened.getexif().get(ORIENTATION)  # of a TIFF, or in XMP
    return turn if isinstance(turn, int) else None


def _turn(block: bytes) -> int | None:
    """The orientation in a block of EXIF; Pillow stops at the first field that is broken."""
    block = block.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if block.startswith(b"II") else "big"

    def number(place: int, length: int) -> int:
        return int.from_bytes(block[place : place + length], order)

    first = number(4, 4) + 2
    for place in range(first, min(first + 12 * number(first - 2, 2), len(block)), 12):
        length = {1: 1, 3: 2, 4: 4}.get(number(place + 2, 2))  # bytes of a number of this kind
        if number(place, 2) == ORIENTATION and length and number(place + 4, 4) == 1:
            return number(place + 8, length)
    return None


def _simple(opened: Image.Image) -> Image.Image:
    """The image in one of few modes: 1, L, RGB, RGBA, or those of more than 8 bits as they are."""
    if opened.mode.startswith(("I", "F")):
        return opened.copy()  # whose transparent level would be lost in any other mode
    if opened.has_transparency_data:
        return opened.convert("RGBA")
    return opened.copy() if opened.mode in ("1", "L", "RGB") else opened.convert("RGB")


class _Loaded(NamedTuple):
    """An image, the file it is of, the file's format, and how it says its numbers are meant."""

    image: Image.Image
    file: str | Path | Image.Image
    kind: str | None
    tags: dict[int, Any]


def _eight_bits(loaded: _Loaded) -> Image.Image:
    """The image in 8 bits on white."""
    image = loaded.image
    if image.mode.startswith(("I", "F")):
        return _scaled(loaded)
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L") if image.mode == "1" else image


def _scaled(loaded: _Loaded) -> Image.Image:
    """Grey of more than 8 bits scaled to 8; Pillow's own conversion cuts off what is above 255.

    By what the file declares and never by its own pixels, so that images of a set stay comparable.
    """
    file, top = loaded.file, _white(loaded)
    values = np.asarray(loaded.image, dtype=np.float64)
    if top is None:
        raise DataError(
            f"{file} has integers of mode {loaded.image.mode} of which no range is known: save it "
            "with 8 or 16 bits, or as floats in [0, 1]."
        )
    if not ((values >= 0) & (values <= top)).all():  # nor is NaN
        raise DataError(
            f"{file} has numbers outside [0, {top}], and so no range that is known: save it with "
            "8 bits, or as floats in [0, 1]."
        )
    if loaded.tags[PHOTOMETRIC] == 0:  # white is zero, which Pillow minds in 8 bits only
        values = top - values
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def _white(loaded: _Loaded) -> int | None:
    """The number that means white; None where the file does not say."""
    mode = loaded.image.mode
    if mode == "F":
        return 1
    if loaded.kind == "TIFF":
        bits, kind_of_number = (
            x[0] if isinstance(x, tuple) else x for x in map(loaded.tags.get, (BITS, SAMPLES))
        )
        return 2**bits - 1 if bits in (12, 16) and kind_of_number in (None, 1) else None
    # An older Pillow opens PNG of 16 bits as 32; any scales PGM of more than 8 bits to 16.
    return 65535 if mode.startswith("I;16") or loaded.kind in ("PNG", "PPM") else None
