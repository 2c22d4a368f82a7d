"""One reader of images, whoever asks: upright, 8 bits, whatever the mode; and what is no image."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from metautils.files import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def visible(name: str) -> bool:
    """Whether a file or folder is meant to be seen: `.DS_Store` and `__MACOSX` are not."""
    return not name.startswith((".", "__MACOSX"))


def read_rgb(file: str | Path | Image.Image) -> Image.Image:
    """An image of any mode in colour, see `read_image`."""
    return read_image(file).convert("RGB")


def read_image(file: str | Path | Image.Image) -> Image.Image:
    """An image, from a file or open, as 8 bits, grey or RGB, upright; transparency becomes white.

    Raises:
        DataError: if the file is no image, or is cut off.
    """
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is no readable image: mend or remove it ({error}).") from error
    image = _eight_bits(upright)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion cuts everything above 255 off."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    top = 65535 if values.max() > 255 else 255
    return Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
