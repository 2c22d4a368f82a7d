"""Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metautils.data.archive import images, pixels, unzipped
from metautils.data.bank import ClassBank, Parts, cached, split_classes
from metautils.errors import BadArgument
from metautils.files import DataError, cache_folder, data_folder

DRAWINGS = {"images_background": 964 * 20, "images_evaluation": 659 * 20}
RANDOM_SPLIT = (1028, 172, 423)  # the 1,200 to learn from of Vinyals et al. 2016, cut once more
VALIDATION_ALPHABETS = 5


def load(split: str = "random", seed: int = 0) -> Parts:
    """Omniglot at 28x28, ink 255 on 0, upright.

    Args:
        split: `"random"` shuffles all characters with `seed` into 1,028 for training, 172 for
            validation and 423 for testing; `"background"` keeps Lake's 659 evaluation characters
            for testing and takes 5 of the 30 background alphabets, drawn with `seed`, for
            validation, so that no alphabet is in two parts.
        seed: of the shuffle.

    Raises:
        ValueError: for another split.
        DataError: if the images cannot be found or downloaded, or are damaged.
    """
    if split not in ("random", "background"):
        raise BadArgument(f"split is {split!r}; it must be 'random' or 'background'.")
    bank = everything()
    if split == "random":
        return split_classes(bank, RANDOM_SPLIT, seed)
    background = [name for name in bank.names if name.startswith("images_background")]
    alphabets = sorted({name.split("/")[1] for name in background})
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(alphabets), generator=generator, device="cpu")
    held_out = {alphabets[k] for k in order[:VALIDATION_ALPHABETS]}
    part = [
        2 if name.startswith("images_evaluation") else int(name.split("/")[1] in held_out)
        for name in bank.names
    ]
    return Parts(*(bank.select([k for k, p in enumerate(part) if p == want]) for want in range(3)))


def everything() -> ClassBank:
    """All 1,623 characters, background set first, from the decoded cache or the images."""
    folder = data_folder()  # a wrong METAUTILS_DATA is told even where the cache would do
    return cached("omniglot-28", lambda: _decode(_source(folder)))


class OneShotRun(NamedTuple):
    """One run of Lake et al.'s one-shot task.

    `support_x` is one drawing of each class, `(classes, 1, 28, 28)` uint8, `query_x` are drawings
    to be told, `(queries, 1, 28, 28)` uint8, and `query_y` says the class of each, `(queries,)`
    int64.

    Example:
        >>> run = OneShotRun(*(torch.zeros(n, 1, 28, 28) for n in (20, 20)), torch.arange(20))
        >>> len(run.support_x), len(run.query_y)
        (20, 20)
    """

    support_x: Tensor
    query_x: Tensor
    query_y: Tensor


def one_shot_runs() -> list[OneShotRun]:
    """The 20 runs on which Lake et al. (2015) compared people and machines.

    In each, twenty characters of one alphabet of the evaluation set, each drawn once by one person
    to learn from and once by another to be told: 400 questions in all.

    Raises:
        DataError: if the archive cannot be found or is damaged.
    """
    archive = (data_folder() or Path()) / "omniglot-one-shot" / "all_runs.zip"
    if not archive.is_file():
        raise DataError(
            f"{archive} does not exist: set METAUTILS_DATA to a folder that holds omniglot-one-shot"
            "/all_runs.zip, which is in python/one-shot-classification of "
            "https://github.com/brendenlake/omniglot."
        )
    files, found = dict(unzipped(archive)), []
    for labels in (name for name in files if name.endswith("class_labels.txt")):
        try:  # each line: the file of a query, the file of the drawing of its class
            pairs = [line.split() for line in files[labels].decode().splitlines() if line.strip()]
            queries, answers = zip(*pairs, strict=True)
            classes = sorted(set(answers))
            drawings = [
                _shrink(torch.stack([_inked(files[name], name) for name in names]))
                for names in (classes, queries)
            ]
        except (KeyError, ValueError) as error:
            raise DataError(f"{archive} is damaged ({labels}: {error}): fetch it again.") from error
        found.append(OneShotRun(*drawings, torch.tensor([classes.index(x) for x in answers])))
    return found


def _inked(content: bytes, name: str) -> Tensor:
    """`(105, 105)` uint8, ink 255 on 0."""
    return torch.from_numpy(255 - pixels(io.BytesIO(content), name, "L", "Omniglot"))


def _source(folder: Path | None) -> Path:
    if folder is not None:
        return folder / "omniglot-py"
    from torchvision.datasets import Omniglot

    root = cache_folder() / "torchvision"
    try:
        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Omniglot is not in {root} and could not be downloaded ({error}): connect to the "
            "network, or set METAUTILS_DATA to a folder that holds omniglot-py/"
            "images_background.zip and images_evaluation.zip, or use data='glyphs'."
        ) from error
    return root / "omniglot-py"


def _decode(source: Path) -> ClassBank:
    classes: dict[str, list[Tensor]] = defaultdict(list)
    for part, expected in DRAWINGS.items():
        found = 0
        for name, image in images(source, part, ".png", "L", "Omniglot"):
            classes[name].append(torch.from_numpy(255 - image))
            found += 1
        if found != expected:
            raise DataError(
                f"{source / part} holds {found} drawings, not {expected}: fetch Omniglot again."
            )
    # (20, 1, 28, 28) each
    small = [_shrink(torch.stack(drawings)) for drawings in classes.values()]
    return ClassBank.from_classes(small, list(classes))


def _shrink(drawings: Tensor) -> Tensor:
    """`(n, 105, 105)` to `(n, 1, 28, 28)` uint8, each pixel the mean of what it covers."""
    # (n, 1, 105, 105) to (n, 1, 28, 28)
    small = F.interpolate(drawings[:, None].float(), (28, 28), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)
