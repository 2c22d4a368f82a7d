"""scikit-learn's digits as a bank."""

import pytest
import torch
from sklearn.datasets import load_digits

from metautils.data import digits


@pytest.fixture(scope="module")
def test_part():
    train, validation, test = digits.load()
    assert len(train) == len(validation) == 0
    return test


def test_ten_ragged_classes(test_part):
    assert sorted(test_part.names) == [f"digit {k}" for k in range(10)]
    counts = dict(zip(test_part.names, test_part.counts.tolist(), strict=True))
    assert counts == {
        f"digit {k}": n for k, n in enumerate([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    }


def test_ink_is_high_and_inside(test_part):
    images = test_part.images
    assert images.shape == (1797, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert images.flatten(1).amax(1).min() > 150
    frame = images.clone()
    frame[..., 4:-4, 4:-4] = 0
    assert int(frame.sum()) == 0


def test_images_are_those_of_their_class(test_part):
    """The mean of an image's pixels survives the enlargement, so it tells the original."""
    originals = load_digits()
    for k, name in enumerate(test_part.names):
        digit = int(name.removeprefix("digit "))
        images = originals.images[originals.target == digit]
        ours = test_part[k][..., 4:-4, 4:-4].float().mean((1, 2, 3)) * 16 / 255
        # Enlarging weighs the rim a little less, where the originals have next to no ink.
        correlation = torch.corrcoef(
            torch.stack([ours, torch.from_numpy(images).float().mean((1, 2))])
        )[0, 1]
        assert correlation > 0.97
