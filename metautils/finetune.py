"""Fine-tuning: from a pretrained body and a folder of images to a tested classifier."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from metautils import pretrained, report, results
from metautils.checkpoint import digest
from metautils.classifier import (
    MODEL,
    Classifier,
    Tested,
    batches,
    features,
    test,
    to_test,
    to_train,
)
from metautils.data import labelled
from metautils.data.labelled import PARTS, Split
from metautils.errors import BadArgument
from metautils.files import (
    check_apart,
    check_folder,
    load_safely,
    save_atomically,
    write_json,
    written_at,
)
from metautils.fit import Epoch, balanced, fit

CHECKPOINT = "all_layers.pt"
RECORD = "record.json"
ROOM = 600 << 20  # bytes that a run writes: weights three times, momentum, features


@dataclass(frozen=True)
class Recipe:
    """How a classifier is fine-tuned; see `stage_one` and `stage_two`.

    Attributes:
        size: height and width of the images, pixels.
        batch: images in a step.
        probe_epochs: of stage one, in which only the new head learns.
        probe_lr: of Adam in stage one.
        epochs: of stage two, in which all layers learn, at most.
        lr: of SGD for the body in stage two; the head's is ten times as high.
        step: epochs after which StepLR divides the rates of stage two by 10.
        patience: epochs of stage two without a better one, after which it ends.
        decay: of weights towards 0.
        pull: of the body's weights towards the pretrained ones instead, alpha of L2-SP; None for
            no such pull.
        mirror: turn half of the training images left to right; wrong for letters and digits.
        seed: of the head, the order of the images and their crops.
        class_weights: let every class count as much as any other, however few images it has, in
            losses and in the accuracies by which an epoch is chosen.

    Example:
        >>> recipe = Recipe(size=64, mirror=False)
        >>> recipe.size, recipe.epochs
        (64, 15)
    """

    size: int = 224
    batch: int = 32
    probe_epochs: int = 50
    probe_lr: float = 1e-3
    epochs: int = 15
    lr: float = 1e-3
    step: int = 7
    patience: int = 5
    decay: float = 1e-4
    pull: float | None = None
    mirror: bool = True
    seed: int = 0
    class_weights: bool = False


def _features(
    net: Classifier, split: Split, recipe: Recipe, kept: Path | None, workers: int, progress: bool
) -> tuple[TensorDataset, TensorDataset, float]:
    """Features of the training and validation images, and the seconds that they took.

    From the file `kept` if it has them.
    """
    told = {"size": net.size, **_told(net, split)}
    saved = load_safely(kept) if kept is not None and kept.exists() else None
    if not isinstance(saved, dict) or saved.get("of") != told or "seconds" not in saved:
        began = time.perf_counter()
        rows = [features(net, part, recipe.batch, workers, progress) for part in split[:2]]
        saved = dict(zip(PARTS, (each.tensors for each in rows), strict=False))
        saved |= {"of": told, "seconds": time.perf_counter() - began}
        if kept is not None:
            save_atomically(saved, kept)
    train, validation = (TensorDataset(*saved[part]) for part in ("train", "validation"))
    return train, validation, saved["seconds"]


def _told(net: Classifier, split: Split) -> dict[str, Any]:
    """What tells this training from another: its pictures, its classes, where its body begins."""
    body = net.body.state_dict()
    return {
        **{part: images.digests() for part, images in zip(PARTS, split[:2], strict=False)},
        "classes": net.classes,
        "body": digest(repr([(name, tuple(x.shape)) for name, x in body.items()]), *body.values()),
    }


def stage_one(
    net: Classifier,
    split: Split,
    recipe: Recipe,
    out: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> list[Epoch]:
    """Train the head alone: a linear probe of the frozen body.

    The body answers once for each image, and the head learns from these features, so an epoch
    takes no time; the price is that images are not cropped or mirrored at random here.

    Args:
        net: on the device where it is to be trained; afterwards with the head of its best epoch.
        split: the images.
        recipe: how to train.
        out: folder for the features, so that a resumed training finds them.
        workers: processes that read images.
        progress: show bars and a row for each epoch.

    Returns:
        A row for each epoch; the seconds of the first count those of the features too.
    """
    kept = None if out is None else Path(out) / "features.pt"
    train, validation, seconds = _features(net, split, recipe, kept, workers, progress)
    torch.manual_seed(recipe.seed)
    net.head.reset_parameters()
    optimizer = Adam(net.head.parameters(), recipe.probe_lr, weight_decay=recipe.decay)
    first, *rest = fit(
        net.head,
        batches(train, recipe.batch, shuffle=True),
        batches(validation, recipe.batch),
        optimizer,
        StepLR(optimizer, recipe.probe_epochs),
        recipe.probe_epochs,
        progress=progress,
        weights=_weights(split, recipe),
    )
    return [replace(first, seconds=first.seconds + seconds), *rest]


def _weights(split: Split, recipe: Recipe) -> Tensor | None:
    """How much an image of each class counts, `(classes,)`; None for all alike."""
    train = split.train
    return balanced(train.targets, len(train.classes)) if recipe.class_weights else None


def stage_two(
    net: Classifier,
    split: Split,
    recipe: Recipe,
    out: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> list[Epoch]:
    """Train all layers, the body at a tenth of the head's rate.

    Arguments as of `stage_one`; the checkpoint is `all_layers.pt`. Returns a row for each epoch.
    """
    torch.manual_seed(recipe.seed)
    start = {f"body.{k}": w.detach().clone() for k, w in net.body.named_parameters()}
    optimizer = SGD(
        [
            {"params": net.body.parameters(), "lr": recipe.lr},
            {"params": net.head.parameters(), "lr": 10 * recipe.lr},
        ],
        momentum=0.9,
        # L2-SP takes the place of weight decay, it does not come on top of it.
        weight_decay=recipe.decay if recipe.pull is None else 0.0,
    )

    def penalty(net: nn.Module) -> Tensor:
        return l2_sp(net, start, recipe.pull, recipe.decay)

    path = None if out is None else Path(out) / CHECKPOINT
    return fit(
        net,
        batches(split.train, recipe.batch, to_train(recipe.size, recipe.mirror), True, workers),
        batches(split.validation, recipe.batch, to_test(recipe.size), False, workers),
        optimizer,
        StepLR(optimizer, recipe.step),
        recipe.epochs,
        recipe.patience,
        None if recipe.pull is None else penalty,
        path,
        None if path is None else {**asdict(recipe), **_told(net, split)},
        progress,
        _weights(split, recipe),
    )


def run(
    path: str | Path,
    out: Path,
    recipe: Recipe,
    weights: str | Path | None = "imagenet",
    device: str | torch.device = "cpu",
    workers: int = 0,
    split_seed: int = 0,
    groups: str | None = None,
    command: str | None = None,
) -> Tested:
    """The whole recipe for a folder of images, from split to report.

    Writes the classifier `model.pt`, the numbers `record.json` and a page on them, `report.html`,
    into `out`.

    Args:
        path: the images, see `metautils.data.labelled.load`.
        out: folder for the checkpoint, the classifier and the record.
        recipe: how to train.
        weights: of the body, see `metautils.pretrained.body`; with None stage one is left out.
        device: where to train.
        workers: processes that read images.
        split_seed: of the split, which does not depend on the seed of the training.
        groups: which images stay in one part, see `metautils.data.labelled.load`.
        command: by which it was called, for the record.

    Raises:
        DataError: if images, weights or folder are not as they should be, before any training.
        BadArgument: if images are so small that a batch of one has no variance.
    """
    if recipe.batch == 1 and recipe.size <= 32:
        raise BadArgument(
            f"batch=1 with size={recipe.size}: batch normalisation needs two numbers or more, so "
            "give a larger batch or larger images."
        )
    made_by = results.provenance(torch.device(device))
    check_apart(out, Path(path))
    check_folder(out, ROOM)
    split = labelled.load(path, split_seed, True, groups)
    _print(split)
    torch.manual_seed(recipe.seed)
    net = Classifier(pretrained.body(weights), split.train.classes, recipe.size).to(device)
    before = written_at(out / CHECKPOINT)
    stages = [stage_two] if weights is None else [stage_one, stage_two]
    rows = {each.__name__: each(net, split, recipe, out, workers, True) for each in stages}
    finished_before = before == written_at(out / CHECKPOINT)
    began = time.perf_counter()
    tested = test(net, split.test, recipe.batch, workers)
    # Of all starts together, if it was interrupted: the rows are kept.
    seconds = sum(row.seconds for each in rows.values() for row in each)
    seconds += time.perf_counter() - began
    net.save(out / MODEL)
    record = {
        "data": str(path),
        "classes": list(net.classes),
        "images": dict(zip(PARTS, map(len, split), strict=False)),
        "split": {"seed": split_seed, "groups": groups, "notes": list(split.notes)},
        "files": {part: each.names() for part, each in zip(PARTS, split, strict=False)},
        "weights": None if weights is None else str(weights),
        "recipe": asdict(recipe),
        **{name: [asdict(row) for row in each] for name, each in rows.items()},
        "test": {
            "right": tested.right,
            "accuracy": tested.accuracy,
            "interval": tested.interval,
            "balanced": tested.balanced,
            "majority": tested.majority,
        },
        "confusion": tested.confusion.tolist(),
        "surest_errors": [tested.files[k] for k in tested.surest_errors()],
        "minutes": round(seconds / 60, 2),
        "command": command,
        "trained_by": results.kept(out / RECORD, made_by) if finished_before else made_by,
        **made_by,
    }
    write_json(record, out / RECORD)
    report.write(tested, record, out / report.REPORT)
    return tested


def _print(split: Split) -> None:
    for note in split.notes[:5]:
        print(note)
    if len(split.notes) > 5:
        print(f"... and {len(split.notes) - 5} more that are read as RGB.")
    print("images:", *(f"{len(part)} {name}" for part, name in zip(split, PARTS, strict=False)))


def l2_sp(net: nn.Module, start: dict[str, Tensor], pull: float, decay: float) -> Tensor:
    """alpha/2 |w - w0|^2 over the parameters in `start`, plus beta/2 |w|^2 over the others.

    The penalty of Li, Grandvalet and Davoine 2018, with alpha = `pull` and beta = `decay`.

    Args:
        net: the network in training.
        start: pretrained parameters w0 by name.
        pull: towards w0, 0 or more.
        decay: of the new parameters towards 0, 0 or more.

    Returns:
        A scalar, to be added to the loss.
    """
    total = torch.zeros((), device=next(net.parameters()).device)
    for name, w in net.named_parameters():
        strength, origin = (pull, start[name]) if name in start else (decay, 0.0)
        total = total + strength / 2 * (w - origin).square().sum()
    return total
