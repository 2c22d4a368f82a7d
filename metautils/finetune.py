"""Fine-tuning: from a pretrained body and a folder of images to a tested classifier."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from metautils import pretrained, results
from metautils.data import labelled
from metautils.data.labelled import PARTS, Images, Split, read_rgb
from metautils.evaluate import wilson95
from metautils.files import DataError, check_folder, load_safely, save_atomically
from metautils.fit import Epoch, fit, predict

MODEL = "model.pt"
ROOM = 600 << 20  # bytes that a run writes: weights three times, momentum, features
ENLARGED = 232 / 224  # images are made so much larger than their crop, as for the ImageNet weights


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


class Classifier(nn.Sequential):
    """A body and a linear head, with the names of its classes and the size of its images.

    Args:
        body: `(n, 3, h, w)` to `(n, features)`.
        features: numbers that the body gives for an image.
        classes: their names, a label is a place in this list.
        size: height and width of the images, pixels.
    """

    def __init__(
        self,
        body: nn.Module,
        classes: Sequence[str],
        size: int,
        features: int = pretrained.FEATURES,
    ) -> None:
        head = nn.Linear(features, len(classes))
        super().__init__(OrderedDict(body=body, head=head))
        self.classes, self.size = tuple(classes), size

    @torch.no_grad()
    def classify(self, image: str | Path | Image.Image) -> dict[str, float]:
        """Probabilities of the classes for one image or image file, highest first.

        Raises:
            DataError: if the file is no readable image.
        """
        picture = read_rgb(image)
        self.eval()
        x = to_test(self.size)(picture)[None].to(self.head.weight.device)
        chances = self(x)[0].softmax(0).tolist()
        ranked = sorted(zip(self.classes, chances, strict=True), key=lambda pair: -pair[1])
        return dict(ranked)

    def save(self, path: str | Path) -> None:
        """Write weights, names of the classes and size to one file."""
        told = {"classes": list(self.classes), "size": self.size, "weights": self.state_dict()}
        save_atomically(told, Path(path))


def load(path: str | Path) -> Classifier:
    """A classifier on a ResNet-50 body, as `Classifier.save` wrote it.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    told = load_safely(Path(path))
    if not isinstance(told, dict) or not {"classes", "size", "weights"} <= told.keys():
        raise DataError(f"{path} holds no classifier: name the model.pt of a fine-tuning.")
    net = Classifier(pretrained.body(None), told["classes"], told["size"])
    try:
        net.load_state_dict(told["weights"])
    except RuntimeError as error:
        raise DataError(
            f"{path} holds another network: name the model.pt of a fine-tuning."
        ) from error
    return net.eval()


def to_train(size: int, mirror: bool) -> v2.Compose:
    """A random crop, mirrored at random, as a normalised float tensor `(3, size, size)`."""
    flip = [v2.RandomHorizontalFlip()] if mirror else []
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    return v2.Compose([v2.ToImage(), crop, *flip, *_normalised()])


def to_test(size: int) -> v2.Compose:
    """The middle of an image, as a normalised float tensor `(3, size, size)`."""
    resize = v2.Resize(round(size * ENLARGED), antialias=True)
    return v2.Compose([v2.ToImage(), resize, v2.CenterCrop(size), *_normalised()])


def _normalised() -> list[v2.Transform]:
    told = pretrained.IMAGENET.transforms()
    # Without scale=True the numbers would stay in 0 to 255, and nobody would say so.
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(told.mean, told.std)]


def batches(
    images: Images, transform: v2.Compose, recipe: Recipe, shuffle: bool = False, workers: int = 0
) -> DataLoader:
    """Batches of transformed images and their labels; `workers` processes read them."""
    images = images.only(range(len(images)))
    images.transform = transform
    return _loader(images, recipe, shuffle, workers)


def _loader(data: Dataset, recipe: Recipe, shuffle: bool, workers: int = 0) -> DataLoader:
    # A batch of a single image has no variance, which batch normalisation divides by.
    single = shuffle and len(data) > recipe.batch and len(data) % recipe.batch == 1
    return DataLoader(
        data,
        recipe.batch,
        shuffle,
        num_workers=workers,
        drop_last=single,
        pin_memory=torch.cuda.is_available(),
    )


def features(
    net: Classifier, images: Images, recipe: Recipe, workers: int = 0, progress: bool = False
) -> TensorDataset:
    """What the frozen body makes of the middle of each image: `(n, features)` with labels `(n,)`.

    In evaluation mode: neither parameters nor batch statistics change.
    """
    head, net.head = net.head, nn.Identity()
    try:
        loader = batches(images, to_test(net.size), recipe, workers=workers)
        rows, labels = predict(net, loader, progress)
    finally:
        net.head = head
    return TensorDataset(rows, labels)


def _features(
    net: Classifier, split: Split, recipe: Recipe, kept: Path | None, workers: int, progress: bool
) -> tuple[TensorDataset, TensorDataset]:
    """Features of the training and validation images, from the file `kept` if it has them."""
    told = {"size": net.size, **_told(net, split)}
    if kept is not None and kept.exists():
        saved = load_safely(kept)
        if saved["of"] == told:
            return TensorDataset(*saved["train"]), TensorDataset(*saved["validation"])
    train, validation = (features(net, part, recipe, workers, progress) for part in split[:2])
    if kept is not None:
        saved = {"of": told, "train": train.tensors, "validation": validation.tensors}
        save_atomically(saved, kept)
    return train, validation


def _told(net: Classifier, split: Split) -> dict[str, Any]:
    """What tells this training from another: its files, its classes, where its body begins."""
    files = [file for part in split[:2] for file, _ in part.samples]
    stats = [Path(file).stat() for file in files]
    return {
        "files": [(f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)],
        "classes": net.classes,
        "body": float(sum(x.double().sum() for x in net.body.state_dict().values())),
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
        A row for each epoch.
    """
    kept = None if out is None else Path(out) / "features.pt"
    train, validation = _features(net, split, recipe, kept, workers, progress)
    torch.manual_seed(recipe.seed)
    net.head.reset_parameters()
    optimizer = Adam(net.head.parameters(), recipe.probe_lr, weight_decay=recipe.decay)
    return fit(
        net.head,
        _loader(train, recipe, shuffle=True),
        _loader(validation, recipe, shuffle=False),
        optimizer,
        StepLR(optimizer, recipe.probe_epochs),
        recipe.probe_epochs,
        progress=progress,
    )


def stage_two(
    net: Classifier,
    split: Split,
    recipe: Recipe,
    out: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> list[Epoch]:
    """Train all layers, the body at a tenth of the head's rate.

    Arguments and result as of `stage_one`; the checkpoint is `all_layers.pt`.
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

    path = None if out is None else Path(out) / "all_layers.pt"
    train = to_train(recipe.size, recipe.mirror)
    return fit(
        net,
        batches(split.train, train, recipe, True, workers),
        batches(split.validation, to_test(recipe.size), recipe, False, workers),
        optimizer,
        StepLR(optimizer, recipe.step),
        recipe.epochs,
        recipe.patience,
        None if recipe.pull is None else penalty,
        path,
        {**asdict(recipe), **_told(net, split)},
        progress,
    )


@dataclass(frozen=True)
class Tested:
    """What a classifier made of a set of images.

    Attributes:
        chances: probability of each class for each image, `(n, classes)`.
        labels: the true classes, `(n,)` int64.
        files: of the images.
        classes: their names.
    """

    chances: Tensor
    labels: Tensor
    files: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def right(self) -> int:
        """Images classified rightly."""
        return int((self.chances.argmax(1) == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Percent of the images classified rightly."""
        return 100 * self.right / len(self.labels)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy by Wilson, percent."""
        return wilson95(self.right, len(self.labels))

    @property
    def confusion(self) -> Tensor:
        """Images of each true class (row) that got each answer (column), `(classes, classes)`."""
        answers = self.chances.argmax(1).tolist()
        known = range(len(self.classes))
        return torch.from_numpy(confusion_matrix(self.labels.tolist(), answers, labels=known))

    def worst(self, count: int = 8) -> list[int]:
        """Wrong answers, by row, those first that gave the true class the least probability."""
        truth = self.chances.gather(1, self.labels[:, None])[:, 0]
        wrong = (self.chances.argmax(1) != self.labels).nonzero().flatten()
        return wrong[truth[wrong].argsort(stable=True)].tolist()[:count]

    def __str__(self) -> str:
        low, high = self.interval
        total = len(self.labels)
        return (
            f"{self.accuracy:.1f} % of {total} test images, 95 % interval {low:.1f} to {high:.1f}"
        )


def test(net: Classifier, images: Images, recipe: Recipe, workers: int = 0) -> Tested:
    """Classify a set of images: the test set, once, when everything is decided."""
    logits, labels = predict(net, batches(images, to_test(net.size), recipe, workers=workers))
    files = tuple(file for file, _ in images.samples)
    return Tested(logits.softmax(1), labels, files, net.classes)


def run(
    path: str | Path,
    out: Path,
    recipe: Recipe,
    weights: str | Path | None = "imagenet",
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> Tested:
    """The whole recipe for a folder of images; writes `model.pt` and `record.json` into `out`.

    Args:
        path: the images, see `metautils.data.labelled.load`.
        out: folder for the checkpoint, the classifier and the record.
        recipe: how to train.
        weights: of the body, see `metautils.pretrained.body`; with None stage one is left out.
        device: where to train.
        workers: processes that read images.

    Raises:
        DataError: if images, weights or folder are not as they should be, before any training.
    """
    made_by = results.provenance(torch.device(device))
    if Path(path).resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"{out} lies in {path} and would be taken for a class: choose another.")
    check_folder(out, ROOM)
    split = labelled.load(path, recipe.seed, progress=True)
    for note in split.notes[:5]:
        print(note)
    if len(split.notes) > 5:
        print(f"... and {len(split.notes) - 5} more that are read as RGB.")
    print("images:", *(f"{len(part)} {name}" for part, name in zip(split, PARTS, strict=False)))
    torch.manual_seed(recipe.seed)
    net = Classifier(pretrained.body(weights), split.train.classes, recipe.size).to(device)
    began = time.perf_counter()
    stages = [stage_two] if weights is None else [stage_one, stage_two]
    rows = {each.__name__: each(net, split, recipe, out, workers, True) for each in stages}
    tested = test(net, split.test, recipe, workers)
    net.save(out / MODEL)
    record = {
        "data": str(path),
        "classes": list(net.classes),
        "images": dict(zip(PARTS, map(len, split), strict=False)),
        "weights": None if weights is None else str(weights),
        "recipe": asdict(recipe),
        **{name: [asdict(row) for row in each] for name, each in rows.items()},
        "test": {"right": tested.right, "accuracy": tested.accuracy, "interval": tested.interval},
        "confusion": tested.confusion.tolist(),
        "worst": [tested.files[k] for k in tested.worst()],
        "minutes": round((time.perf_counter() - began) / 60, 2),
        **made_by,
    }
    results.write_json(record, out / "record.json")
    return tested


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
