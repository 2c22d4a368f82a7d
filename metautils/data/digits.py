"""scikit-learn's handwritten digits: a second domain that comes with a package."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from metautils.data.bank import ClassBank, Parts, split_classes


def load() -> Parts:
    """1,797 digits by 43 people as 28x28 images, ink 255 on 0; all ten classes are for testing.

    The originals are 8x8; they are enlarged to 20x20 in the middle of the image, about as much
    room as Omniglot's characters take. Classes have 174 to 183 images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (1797, 1, 8, 8)
    images = F.interpolate(images, (20, 20), mode="bilinear", align_corners=False)
    images = F.pad(images, (4, 4, 4, 4)).round().to(torch.uint8)  # (1797, 1, 28, 28)
    labels = torch.from_numpy(digits.target)
    bank = ClassBank.from_classes(
        [images[labels == k] for k in range(10)], [f"digit {k}" for k in range(10)]
    )
    return split_classes(bank, (0, 0, 10))
