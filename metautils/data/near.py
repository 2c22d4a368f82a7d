"""Pictures that look nearly alike: one saved again, made smaller, or cut by a few pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

# Two pictures are alike if their hashes differ in so few of 64 bits and their greys go together so
# well. Measured on 1,399 cats and dogs: of a million pairs these name one, a true copy, where the
# hash alone names 56; they find every one that was saved again as JPEG or halved, and 98 % of those
# cut by 5 pixels on every side. tests/test_near.py holds them to it.
BITS, CORRELATION = 8, 0.9
AT_ONCE = 512  # rows of the table of pairs


class Look(NamedTuple):
    """What is compared of a picture.

    `bits` is its difference hash, `(64,)` of -1 and 1: whether it gets brighter from left to right
    at 8 x 8 places. `grey` are 16 x 16 greys, `(256,)`, of mean 0 and length 1; of a flat picture
    zeros.

    Example:
        >>> seen = look(Image.linear_gradient("L").rotate(90))
        >>> seen.bits.shape, seen.grey.shape
        ((64,), (256,))
    """

    bits: np.ndarray
    grey: np.ndarray


def look(image: Image.Image) -> Look:
    """What is compared of a picture of any size."""
    small = image.convert("L")
    wide = np.asarray(small.resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)  # (8, 9)
    bits = np.where(wide[:, 1:] > wide[:, :-1], 1, -1).astype(np.float32).ravel()  # (64,)
    grey = np.asarray(small.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32).ravel()
    grey = grey - grey.mean()  # (256,)
    return Look(bits, grey / max(1e-6, float(np.linalg.norm(grey))))


def alike(one: Sequence[Look], other: Sequence[Look]) -> list[tuple[int, int]]:
    """Pairs of places, in `one` and in `other`, of pictures that look nearly alike, closest first.

    Example:
        >>> ramp, noise = Image.linear_gradient("L"), Image.effect_noise((64, 64), 99)
        >>> alike([look(ramp.rotate(90)), look(noise)], [look(noise.resize((40, 40)))])
        [(1, 0)]
    """
    if not one or not other:
        return []
    first, second = (Look(*map(np.stack, zip(*looks, strict=True))) for looks in (one, other))
    found = []
    for start in range(0, len(one), AT_ONCE):
        # Of two rows of signs, the product is 64 less twice the number of those that differ.
        alike = first.bits[start : start + AT_ONCE] @ second.bits.T >= 64 - 2 * BITS
        for k, row in enumerate(alike, start):
            near = row.nonzero()[0]  # (pictures,)
            fits = second.grey[near] @ first.grey[k]  # (pictures,)
            found += [(-x, k, j) for x, j in zip(fits.tolist(), near.tolist(), strict=True)
                      if x > CORRELATION]  # fmt: skip
    return [(i, j) for _, i, j in sorted(found)]
