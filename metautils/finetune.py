"""Fine-tuning: from a pretrained body and a folder of images to a tested classifier."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from metautils import pretrained, report, results
from metautils.checkpoint import check_same_settings, digest
from metautils.classifier import (
    MODEL,
    Classifier,
    Tested,
    batches,
    features,
    scaling,
    test,
    to_test,
    to_train,
)
from metautils.data import labelled
from metautils.data.labelled import PARTS, Split
from metautils.errors import BadArgument, Diverged
from metautils.evaluate import wilson95
from metautils.files import (
    check_apart,
    check_folder,
    load_safely,
    save_atomically,
    write_json,
    written_at,
)
from metautils.fit import Epoch, balanced, fit, measure

CHECKPOINT = "all_layers.pt"
FEATURES, PROBE = "features.pt", "probe.pt"
RECORD = "record.json"
ROOM = 1000 << 20  # bytes that a run with a ResNet-50 writes: weights, AdamW's moments, the best
STRENGTHS = [10.0**k for k in range(-1, 4)]  # C of the probe's logistic regression
FOLDS = 5  # of its cross-validation
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the fine-tuned weights in those that are chosen from
SEEN = 1600  # images in stage two: a minute or two on two CPU cores
WARM_UP = 0.1  # of the steps of stage two
CLIP = 1.0  # the largest norm of a gradient in stage two
# Percent that a probe has right for sure, from which on stage two is left out: it takes most of the
# minutes, and with 100 and 500 images a class of cats and dogs it added nothing when it was run
# (-0.3 ± 0.9 points both).
ENOUGH = 95.0


@dataclass(frozen=True)
class Recipe:
    """How a classifier is fine-tuned; see `stage_one` and `stage_two`.

    Attributes:
        size: height and width of the images, pixels; None for those that the body was made for.
        batch: images in a step.
        epochs: of stage two, in which all layers learn; 0 leaves it out; None for as many as 1,600
            images take, but 2 at least and 20 at most, and for none if the probe is good enough:
            see `both_stages`.
        lr: of AdamW for the head and the body's last stage, halved a stage towards the images;
            None for 1e-4, or 1e-3 for all layers of an untrained body.
        decay: of weights towards 0, but for those of norms and biases.
        pull: of the body's weights towards the pretrained ones instead, alpha of L2-SP; None for
            no such pull.
        mirror: turn half of the training images left to right; wrong for letters and digits.
        seed: of an untrained head, the order of the images and their crops.
        class_weights: let every class count as much as any other, however few images it has, in
            losses and in the accuracies by which weights are chosen.

    Example:
        >>> recipe = Recipe(size=64, mirror=False)
        >>> recipe.size, recipe.batch
        (64, 32)
    """

    size: int | None = None
    batch: int = 32
    epochs: int | None = None
    lr: float | None = None
    decay: float = 0.01
    pull: float | None = None
    mirror: bool = True
    seed: int = 0
    class_weights: bool = False


@dataclass(frozen=True)
class Probe:
    """What stage one found: two heads on the features of a body that does not change.

    Attributes:
        strength: inverse of the penalty on the head's weights, C of scikit-learn.
        accuracy: percent of the training and validation images that were right when they were
            left out, in cross-validation; it chose nothing, but for `strength`.
        wrong: validation images that the head of the training images alone has wrong.
        head: of the training and validation images, weight and bias.
        rehearsed: of the training images alone, where stage two starts.
        seconds: that all this took.

    Example:
        >>> head = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        >>> print(Probe(10.0, 97.5, 1, head, head, 2.0))
        97.5 % right in cross-validation, with C = 10
    """

    strength: float
    accuracy: float
    wrong: int
    head: dict[str, Tensor]
    rehearsed: dict[str, Tensor]
    seconds: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1f} % right in cross-validation, with C = {self.strength:g}"


def _features(
    net: Classifier, split: Split, recipe: Recipe, kept: Path | None, workers: int, progress: bool
) -> tuple[TensorDataset, TensorDataset, float]:
    """Features of the training and validation images, and the seconds that they took.

    From the file `kept` if it has them.
    """
    told = {"size": net.size, **_told(net, split)}
    saved = load_safely(kept) if kept is not None and kept.exists() else None
    if isinstance(saved, dict) and {"of", "seconds", "train", "validation"} <= saved.keys():
        check_same_settings(saved["of"], told, kept)
    else:
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
        **scaling(net.body),
        "body": digest(repr([(name, tuple(x.shape)) for name, x in body.items()]), *body.values()),
    }


def stage_one(
    net: Classifier,
    split: Split,
    recipe: Recipe,
    out: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Probe:
    """Fit the head alone, by logistic regression: a linear probe of the frozen body.

    The body answers once for each image. The problem is convex, so there are no steps or rates to
    choose; how strongly weights are held towards 0 is chosen by cross-validation over the training
    and validation images. The price is that images are not cropped or mirrored at random here.

    Args:
        net: on the device where it is to be trained; afterwards with the probe's head.
        split: the images.
        recipe: how to train.
        out: folder for the features, so that a resumed training finds them.
        workers: processes that read images.
        progress: show a bar while the body answers.

    Raises:
        CheckpointMismatch: if the features in `out` are of other images or of another body.
    """
    kept = None if out is None else Path(out) / FEATURES
    train, validation, seconds = _features(net, split, recipe, kept, workers, progress)
    began = time.perf_counter()
    x = torch.cat([train.tensors[0], validation.tensors[0]])  # (images, features)
    y = torch.cat([train.tensors[1], validation.tensors[1]])  # (images,)
    # Steps of L-BFGS are small: for 1,000 images, beside other jobs on two cores, OpenBLAS took 34
    # to 49 s with two threads and 1 s with one.
    with threadpool_limits(1):
        strength, accuracy = _strength(x, y, recipe.class_weights)
        head = _fitted(x, y, strength, recipe.class_weights)
        rehearsed = _fitted(*train.tensors, strength, recipe.class_weights)
    logits = nn.functional.linear(validation.tensors[0], *rehearsed.values())
    wrong = int((logits.argmax(1) != validation.tensors[1]).sum())
    net.head.load_state_dict(head)
    seconds += time.perf_counter() - began
    return Probe(strength, accuracy, wrong, head, rehearsed, seconds)


def _strength(x: Tensor, y: Tensor, balanced: bool = False) -> tuple[float, float]:
    """C with the least loss on images left out, and the accuracy on those in percent."""
    folds = StratifiedKFold(min(FOLDS, int(y.bincount().min())), shuffle=True, random_state=0)
    accuracy = "balanced_accuracy" if balanced else "accuracy"
    scores = {"loss": "neg_log_loss", "accuracy": accuracy}
    grid = {"C": [c / x.shape[1] for c in STRENGTHS]}
    search = GridSearchCV(_regression(balanced), grid, scoring=scores, refit=False, cv=folds)
    found = search.fit((x @ _axes(x)).numpy(), y.numpy()).cv_results_
    best = int(found["mean_test_loss"].argmax())
    return STRENGTHS[best], 100 * float(found["mean_test_accuracy"][best])


def _axes(x: Tensor) -> Tensor:
    """Orthonormal axes `(d, min(n, d))` of the space in which the features `(n, d)` lie.

    The head that is looked for lies there too, since what is across it would cost and do nothing;
    of few images there are far fewer axes than features, and the fit is as much faster.
    """
    return torch.linalg.qr(x.T)[0] if len(x) < x.shape[1] else torch.eye(x.shape[1]).to(x)


def _regression(balanced: bool = False, **settings: float) -> LogisticRegression:
    weights = "balanced" if balanced else None
    return LogisticRegression(max_iter=1000, class_weight=weights, **settings)


def _fitted(x: Tensor, y: Tensor, strength: float, balanced: bool = False) -> dict[str, Tensor]:
    """Weight and bias of the logistic regression of labels `(n,)` on features `(n, d)`."""
    # Features have length sqrt(d), so that C / d on them is C on features of length 1.
    axes, c = _axes(x), strength / x.shape[1]
    fitted = _regression(balanced, C=c).fit((x @ axes).numpy(), y.numpy())
    w, b = (torch.from_numpy(z).float() for z in (fitted.coef_, fitted.intercept_))
    w = w @ axes.T  # (classes, d)
    if len(w) == 1:  # of two classes scikit-learn keeps the difference
        w, b = torch.cat([-w / 2, w / 2]), torch.cat([-b / 2, b / 2])
    return {"weight": w, "bias": b}


def _surely(probe: Probe, split: Split, recipe: Recipe) -> float:
    """Lower end of the 95 % interval of the probe's accuracy in cross-validation, percent."""
    labels = torch.tensor([*split.train.targets, *split.validation.targets], device="cpu")
    # Where classes count alike, a rare one's few images decide how much can be known.
    counts = balanced(labels.tolist(), len(split.train.classes))[labels]  # (images,)
    alike = counts.sum() ** 2 / counts.square().sum()  # as many images of one weight
    images = int(alike) if recipe.class_weights else len(labels)
    return wilson95(round(probe.accuracy / 100 * images), images)[0]


def _weights(split: Split, recipe: Recipe) -> Tensor | None:
    """How much an image of each class counts, `(classes,)`; None for all alike."""
    train = split.train
    return balanced(train.targets, len(train.classes)) if recipe.class_weights else None


def stage_two(
    net: Classifier,
    split: Split,
    recipe: Recipe,
    probe: Probe | None = None,
    out: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> list[Epoch]:
    """Train all layers, started from the probe of the training images.

    AdamW with warm-up and a cosine by steps; gradients keep a norm of 1 at most.

    Args:
        net: on the device where it is to be trained; afterwards with the weights of its last epoch,
            or of its best one where it began untrained.
        split: the images.
        recipe: how to train.
        probe: of `stage_one`; None for an untrained network.
        out: folder for the checkpoint `all_layers.pt`.
        workers: processes that read images.
        progress: show bars and a row for each epoch.

    Returns:
        A row for each epoch.

    Raises:
        Diverged: if the loss is no longer finite; the last checkpoint stays.
    """
    torch.manual_seed(recipe.seed)
    if probe is not None:
        net.head.load_state_dict(probe.rehearsed)
    start = {f"body.{k}": w.detach().clone() for k, w in net.body.named_parameters()}
    optimizer = AdamW(_groups(net, recipe))
    images = batches(split.train, recipe.batch, to_train(net, recipe.mirror), True, workers)

    def penalty(net: nn.Module) -> Tensor:
        return l2_sp(net, start, recipe.pull, recipe.decay)

    path = None if out is None else Path(out) / CHECKPOINT
    epochs = recipe.epochs
    if epochs is None:
        epochs = min(20, max(2, SEEN // len(split.train)))
    return fit(
        net,
        images,
        batches(split.validation, recipe.batch, to_test(net), False, workers),
        optimizer,
        LambdaLR(optimizer, _share_of_rate(epochs * len(images))),
        epochs,
        clip=CLIP,
        choose=probe is None,
        penalty=None if recipe.pull is None else penalty,
        path=path,
        settings=None if path is None else {**asdict(recipe), **_told(net, split)},
        progress=progress,
        weights=_weights(split, recipe),
    )


def _groups(net: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters with their rates: the head's, then the body's from its last stage to its first."""
    known = net.body.fixed
    rate = recipe.lr or (1e-4 if known else 1e-3)
    groups = [(list(net.head.parameters()), rate)]
    for k, stage in enumerate(reversed(net.body.by_stage())):
        groups.append((stage, rate * 0.5**k if known else rate))
    decay = recipe.decay if recipe.pull is None else 0.0
    return [
        {"params": own, "lr": lr, "weight_decay": decay if wide else 0.0}
        for params, lr in groups
        for wide in (True, False)  # norms and biases have a single dimension
        if (own := [w for w in params if (w.dim() > 1) == wide])
    ]


def _share_of_rate(steps: int) -> Callable[[int], float]:
    """Of step 0 and so on: up in the first tenth of the steps, then down along a cosine."""
    rise = max(1, round(WARM_UP * steps))

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise)))

    return share


@torch.no_grad()
def between(
    net: Classifier,
    start: dict[str, Tensor],
    split: Split,
    recipe: Recipe,
    workers: int = 0,
) -> list[dict[str, float]]:
    """Choose weights on the way from `start` to the network's own by the validation images.

    WiSE-FT (Wortsman et al. 2022): the mean of two networks, weight by weight, may be better than
    both. Among equally many right answers the least loss is taken.

    Args:
        net: after `stage_two`; afterwards with the weights that were chosen.
        start: the state before, with the head of the training images alone.
        split: of whose images those of the validation choose.
        recipe: how they were trained.
        workers: processes that read images.

    Returns:
        A row for each share of the fine-tuned weights, with its accuracy in percent and its loss;
        the chosen one's `chosen` is True.
    """
    end, rows = copy.deepcopy(net.state_dict()), []
    images = batches(split.validation, recipe.batch, to_test(net), workers=workers)
    for share in SHARES:
        net.load_state_dict(_mixed(start, end, share))
        loss, accuracy = measure(net, images, _weights(split, recipe))
        rows.append({"share": share, "accuracy": accuracy, "loss": loss})
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    net.load_state_dict(_mixed(start, end, best["share"]))
    return [{**row, "chosen": row is best} for row in rows]


def _mixed(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights so far on the way from the start to the end; counts of batches as at the end."""
    return {
        name: torch.lerp(start[name], x, share) if x.is_floating_point() else x
        for name, x in end.items()
    }


def run(
    path: str | Path,
    out: Path,
    recipe: Recipe,
    weights: str | Path | None = pretrained.LITE0,
    device: str | torch.device = "cpu",
    workers: int = 0,
    split_seed: int = 0,
    groups: str | None = None,
    command: str | None = None,
) -> Tested:
    """The whole recipe for a folder of images, from split to report.

    Writes the classifier `model.pt`, the numbers `record.json` and a page on them, `report.html`,
    into `out`.

    The probe is in `model.pt` before stage two begins, and stays there if that comes to nothing.

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
        BadArgument: if images are so small that a batch of one has no variance, or of a size that
            the body refuses.
        CheckpointMismatch: if `out` holds a run with other images or settings.
        Diverged: if the loss of an untrained network is no longer finite.
    """
    if recipe.batch == 1 and (recipe.size or 64) <= 32:
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
    _check_size(net)
    before = written_at(out / CHECKPOINT)
    if weights is None:
        stages = {"stage_two": _rows(stage_two(net, split, recipe, None, out, workers, True))}
    else:
        stages = both_stages(net, split, recipe, out, workers)
    finished_before = before == written_at(out / CHECKPOINT)
    began = time.perf_counter()
    tested = test(net, split.test, recipe.batch, workers)
    # Of all starts together, if it was interrupted: the rows are kept.
    seconds = sum(row["seconds"] for row in _timed(stages)) + time.perf_counter() - began
    net.save(out / MODEL)
    record = {
        "data": str(path),
        "classes": list(net.classes),
        "images": dict(zip(PARTS, map(len, split), strict=False)),
        "split": {"seed": split_seed, "groups": groups, "notes": list(split.notes)},
        "files": {part: each.names() for part, each in zip(PARTS, split, strict=False)},
        "weights": None if weights is None else str(weights),
        "recipe": asdict(recipe),
        **stages,
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


@torch.no_grad()
def _check_size(net: Classifier) -> None:
    """One blank image goes through; many transformers take no size but the one they learned."""
    device = net.head.weight.device
    try:
        net.eval()(torch.zeros(1, 3, net.size, net.size, device=device))
    except (AssertionError, RuntimeError) as error:
        if net.size == net.body.size or "memory" in str(error):
            raise
        raise BadArgument(
            f"--size {net.size}: {net.body.name} was made for images of {net.body.size} pixels and "
            "refuses others: leave --size out."
        ) from error
    net.train()


def both_stages(
    net: Classifier, split: Split, recipe: Recipe, out: Path, workers: int = 0
) -> dict[str, Any]:
    """Stage one, stage two if the recipe has epochs for it, and the choice between them.

    The probe is in `out/model.pt` before stage two begins. Where the recipe leaves the epochs open,
    stage two is left out if the probe is good enough, that is if the 95 % interval of its accuracy
    in cross-validation begins at 95 % or above; but what was begun in `out` is gone on with.

    Args:
        net: on the device where it is to be trained; afterwards with the weights that were chosen.
        split: the images.
        recipe: how to train.
        out: folder for features, checkpoint and classifier.
        workers: processes that read images.

    Returns:
        What the record says of each stage.
    """
    probe = stage_one(net, split, recipe, out, workers, True)
    print(f"probe: {probe}")
    if not (out / MODEL).exists():
        net.save(out / MODEL)  # so that it can be used from now on, whatever comes
    told: dict[str, Any] = {
        "stage_one": {
            "strength": probe.strength,
            "accuracy": probe.accuracy,
            "validation_wrong": probe.wrong,
            "seconds": probe.seconds,
        }
    }
    if recipe.epochs == 0:
        return told
    sure = _surely(probe, split, recipe)
    if recipe.epochs is None and sure >= ENOUGH and not (out / CHECKPOINT).exists():
        told |= {"stage_two": [], "left_out": f"the probe has {sure:.1f} % or more right"}
        print(
            f"Stage two is left out, as {told['left_out']} (95 % interval in cross-validation): "
            "give --epochs 2 or more to train all layers all the same."
        )
        return told
    start = copy.deepcopy(net.state_dict())
    rehearsed = {f"head.{name}": x.to(net.head.weight) for name, x in probe.rehearsed.items()}
    try:
        told["stage_two"] = _rows(stage_two(net, split, recipe, probe, out, workers, True))
        clock = time.perf_counter()
        rows = between(net, start | rehearsed, split, recipe, workers)
        told["choice"] = {"rows": rows, "seconds": time.perf_counter() - clock}
    except Diverged as error:
        told["diverged"] = str(error)
        print(f"Warning: {error} The probe is kept.")
    if not any(row["chosen"] and row["share"] for row in told.get("choice", {}).get("rows", [])):
        net.load_state_dict(start)  # with the head that has seen the validation images too
    return told


def _rows(epochs: list[Epoch]) -> list[dict[str, float]]:
    return [asdict(epoch) for epoch in epochs]


def _timed(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """What took its time in a record's stages."""
    once = [stages[name] for name in ("stage_one", "choice") if name in stages]
    return [*once, *stages.get("stage_two", [])]


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
