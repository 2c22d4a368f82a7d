"""CIFAR-FS (Bertinetto et al. 2019): CIFAR-100's classes, 64 to learn from, 16 and 20 held out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from metautils.data.archive import images
from metautils.data.bank import ClassBank, Parts, cached
from metautils.files import DataError, cache_folder, data_folder

IMAGES = 600  # a class
VALIDATION = {
    "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp",
    "maple_tree", "motorcycle", "otter", "sea", "shark", "television", "tractor",
}  # fmt: skip
TEST = {
    "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain",
    "poppy", "rocket", "rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale",
    "woman", "worm",
}  # fmt: skip


def load() -> Parts:
    """CIFAR-100 in colour at 32x32, split by class into 64, 16 and 20, with 600 images each.

    The images of a class are ordered by their pixels, so that every source gives the same bank.

    Raises:
        DataError: if the images cannot be found or downloaded, or are damaged.
    """
    folder = data_folder()  # a wrong METAUTILS_DATA is told even where the cache would do
    bank = cached("cifar-fs-32", lambda: _decode(folder))
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for k, name in enumerate(bank.names):
        part = "validation" if name in VALIDATION else "test" if name in TEST else "train"
        parts[part].append(k)
    return Parts(**{name: bank.select(classes) for name, classes in parts.items()})


def _decode(folder: Path | None) -> ClassBank:
    classes: dict[str, list[np.ndarray]] = defaultdict(list)
    for name, image in _downloaded() if folder is None else _stored(folder / "cifar-fs"):
        if image.shape != (32, 32, 3):
            raise DataError(f"An image of {name} is not 32x32 in colour: fetch CIFAR-100 again.")
        classes[name].append(image)
    found = {name: len(each) for name, each in sorted(classes.items())}
    odd = [f"{count} of {name}" for name, count in found.items() if count != IMAGES]
    missing = (VALIDATION | TEST) - set(found)
    if len(found) != 100 or odd or missing:
        told = ", ".join(odd[:3] or sorted(missing)[:3]) or "other classes"
        raise DataError(
            f"CIFAR-100 has {IMAGES} images of each of 100 classes, here are {len(found)} classes "
            f"({told}): fetch it again."
        )
    rows = [
        torch.from_numpy(np.stack(sorted(classes[name], key=np.ndarray.tobytes))) for name in found
    ]
    # (600, 32, 32, 3) to (600, 3, 32, 32)
    return ClassBank.from_classes([x.permute(0, 3, 1, 2).contiguous() for x in rows], list(found))


def _stored(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    for part in ("train", "val", "test"):
        for name, image in images(source, part, ".webp", "RGB", "CIFAR-FS"):
            yield name.rsplit("/", 1)[1], image


def _downloaded() -> Iterator[tuple[str, np.ndarray]]:
    from torchvision.datasets import CIFAR100

    root = cache_folder() / "torchvision"
    try:
        sets = [CIFAR100(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-100 is not in {root} and could not be downloaded ({error}): connect to the "
            "network, or set METAUTILS_DATA to a folder that holds cifar-fs/train.zip, val.zip "
            "and test.zip, or use data='glyphs'."
        ) from error
    for each in sets:
        for image, label in zip(each.data, each.targets, strict=True):
            yield each.classes[label], image
