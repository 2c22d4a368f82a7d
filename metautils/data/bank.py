"""ClassBank: images grouped by class in one tensor, so that an episode is one index gather."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metautils.checkpoint import digest
from metautils.files import DataError, cache_folder, load_safely, save_atomically
from metautils.precision import fast_autocast, single

NUMBERS_AT_ONCE = 4_000_000  # of images or features: more are worked on in parts, to bound memory


def as_float(images: Tensor) -> Tensor:
    """uint8 images in [0, 1], of torch's default dtype; anything else as it is."""
    if images.dtype != torch.uint8:
        return images
    return images.to(torch.get_default_dtype()).div_(255)


@dataclass(frozen=True)
class ClassBank:
    """Images of many classes, stored class after class in one tensor.

    Attributes:
        images: `(images, channels, height, width)` uint8 with ink or light high, or any float
            features `(images, ...)`; rows of one class lie next to each other.
        counts: images in each class, `(classes,)` int64; classes may differ in size.
        names: one readable name per class, unique.
        attributes: where known, a description of each class, `(classes, attributes)` float.

    Raises:
        ValueError: if counts, names and images contradict each other, or a class is empty.

    Example:
        >>> images = [torch.zeros(3, 1, 28, 28), torch.ones(2, 1, 28, 28)]
        >>> bank = ClassBank.from_classes(images, names=["blank", "full"])
        >>> len(bank), bank.images.shape, bank[1].shape
        (2, torch.Size([5, 1, 28, 28]), torch.Size([2, 1, 28, 28]))
    """

    images: Tensor
    counts: Tensor
    names: tuple[str, ...]
    attributes: Tensor | None = None

    def __post_init__(self) -> None:
        if int(self.counts.sum()) != len(self.images) or len(self.counts) != len(self.names):
            raise ValueError(
                f"{len(self.images)} images, counts that add up to {int(self.counts.sum())} and "
                f"{len(self.names)} names for {len(self.counts)} classes: they must agree."
            )
        if len(self.counts) and int(self.counts.min()) == 0:
            empty = self.names[int(self.counts.argmin())]
            raise ValueError(f"Class {empty!r} has no image: drop it or add some.")

    @classmethod
    def from_classes(cls, images: Sequence[Tensor], names: Sequence[str]) -> ClassBank:
        """Make a bank from one tensor `(n_k, ...)` per class."""
        counts = torch.tensor([len(x) for x in images], device="cpu")
        return cls(torch.cat(list(images)), counts, tuple(names))

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.counts)

    def __getitem__(self, index: int) -> Tensor:
        """All images of class `index`."""
        start = int(self.starts[index])
        return self.images[start : start + int(self.counts[index])]

    @property
    def starts(self) -> Tensor:
        """Row of each class's first image, `(classes,)` int64."""
        return self.counts.cumsum(0) - self.counts

    @property
    def digest(self) -> str:
        """Sixteen digits that differ where an image, a name or the class of an image differs."""
        return digest(repr((tuple(self.images.shape), self.names)), self.counts, self.images)

    def select(self, classes: Sequence[int] | Tensor) -> ClassBank:
        """The bank of the given classes only, in the given order."""
        index = torch.as_tensor(classes, dtype=torch.int64, device="cpu")
        # (images,), the class of each
        owner = torch.arange(len(self), device="cpu").repeat_interleave(self.counts)
        rows = [(owner == k).nonzero().flatten() for k in index]  # (n_k,) each
        images = self.images[torch.cat([owner[:0], *rows])]  # (images left, ...)
        names = tuple(self.names[k] for k in index)
        attributes = None if self.attributes is None else self.attributes[index]
        return ClassBank(images, self.counts[index], names, attributes)

    def some(self, most: int) -> ClassBank:
        """So many images of each class at most, evenly spaced among its own: they may be ordered.

        Example:
            >>> bank = ClassBank(torch.arange(7), torch.tensor([5, 2]), ("many", "few"))
            >>> bank.some(3).images.tolist()
            [0, 1, 3, 5, 6]
        """
        places = [torch.arange(min(most, n), device="cpu") * n // min(most, n) for n in self.counts]
        rows = torch.cat([a + b for a, b in zip(self.starts, places, strict=True)])
        counts = self.counts.clamp(max=most)
        return replace(self, images=self.images[rows.to(self.images.device)], counts=counts)

    def with_rotations(self) -> ClassBank:
        """Four classes for each one: turned by 0, 90, 180 and 270 degrees (Santoro et al. 2016).

        Raises:
            ValueError: if the images are not square.
        """
        if self.images.dim() != 4 or self.images.shape[-1] != self.images.shape[-2]:
            raise ValueError(
                f"Rotations need images (n, channels, size, size), not {tuple(self.images.shape)}."
            )
        # Each is written where it is to lie: four copies beside them would double the memory.
        turned = self.images.new_empty(4, *self.images.shape)  # (4, images, ...)
        for k in range(4):
            turned[k] = self.images.rot90(k, (-2, -1))
        names = tuple(f"{name}/rot{90 * k:03d}" for k in range(4) for name in self.names)
        return ClassBank(turned.flatten(0, 1), self.counts.repeat(4), names)

    def to(self, device: torch.device | str) -> ClassBank:
        """The same bank with its images on `device`; episodes are then gathered there."""
        return replace(self, images=self.images.to(device))

    @torch.no_grad()
    def map(self, embed: Callable[[Tensor], Tensor], batch: int = 500) -> ClassBank:
        """The bank of `embed(images)`: compute features once, then draw episodes of features.

        Right only where an image's embedding does not depend on the task around it. `batch` images
        are embedded at a time, and fewer where they are large.
        """
        batch = min(batch, max(1, NUMBERS_AT_ONCE // max(1, self.images.shape[1:].numel())))
        with fast_autocast(self.images.device):
            # (batch, ...) each
            rows = [single(embed(as_float(x))) for x in self.images.split(batch)]
        return replace(self, images=torch.cat(rows))


class Parts(NamedTuple):
    """Disjoint classes to learn from, to choose a model on, and to report on.

    Example:
        >>> bank = ClassBank.from_classes([torch.rand(3, 1, 28, 28)] * 5, names="abcde")
        >>> parts = split_classes(bank, (3, 1, 1))
        >>> len(parts.train), len(parts.validation), len(parts.test)
        (3, 1, 1)
    """

    train: ClassBank
    validation: ClassBank
    test: ClassBank


def split_classes(bank: ClassBank, sizes: tuple[int, int, int], seed: int = 0) -> Parts:
    """Shuffle the classes with `seed` and cut them into train, validation and test classes.

    Raises:
        ValueError: if the sizes do not add up to the number of classes.
    """
    if sum(sizes) != len(bank) or min(sizes) < 0:
        raise ValueError(f"Parts of {sizes} classes do not add up to the {len(bank)} there are.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(bank), generator=generator, device="cpu")
    return Parts(*(bank.select(part) for part in order.split(list(sizes))))


def cached(name: str, make: Callable[[], ClassBank], version: str = "") -> ClassBank:
    """The bank that was kept under this name in the cache, or a new one, which is then kept.

    One of another version, or a damaged one, is made again. Where nothing can be written, a warning
    says so.
    """
    with suppress(DataError):  # made anew below
        return _kept(cache_folder() / f"{name}.pt", version)
    bank = make()
    try:
        saved = vars(bank) | {"names": list(bank.names), "version": version}
        save_atomically(saved, cache_folder() / f"{name}.pt")
    except DataError as error:
        warnings.warn(
            f"The data are there, but will be made again next time: {error}", stacklevel=2
        )
    return bank


def _kept(path: Path, version: str) -> ClassBank:
    saved = load_safely(path)
    fields = {"images", "counts", "names", "attributes", "version"}
    if not isinstance(saved, dict) or saved.keys() != fields or saved.pop("version") != version:
        raise DataError(f"{path} is of another version.")
    return ClassBank(**saved | {"names": tuple(saved["names"])})
