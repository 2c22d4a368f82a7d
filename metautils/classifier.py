"""An image classifier: a body, a head, the names of the classes; tested, saved, used."""

from __future__ import annotations

import csv
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from metautils import pretrained
from metautils.data.images import read_rgb
from metautils.data.labelled import Images
from metautils.evaluate import wilson95
from metautils.files import DataError, load_safely, save_atomically
from metautils.fit import predict
from metautils.precision import single

MODEL = "model.pt"
LONGEST = 8  # times its short side: what lies beyond in a strip is cut off before it is enlarged


class Classifier(nn.Sequential):
    """A body and a linear head, with the names of its classes and the size of its images.

    The head sees features of one length, whichever body they are of: see `OneLength`.

    Args:
        body: `(n, 3, h, w)` in [0, 1] to `(n, features)`.
        classes: their names, a label is a place in this list.
        size: height and width of the images, pixels; None for those that the body was made for.

    Example:
        >>> pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> net = Classifier(pretrained.Body(pool, features=3), ["ant", "bee"], size=32)
        >>> net(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 2])
        >>> sorted(net.classify(Image.new("RGB", (40, 30))))
        ['ant', 'bee']
    """

    def __init__(
        self, body: pretrained.Body, classes: Sequence[str], size: int | None = None
    ) -> None:
        head = nn.Linear(body.features, len(classes))
        super().__init__(OrderedDict(body=body, length=OneLength(), head=head))
        self.classes, self.size = tuple(classes), size or body.size

    def classify(self, image: str | Path | Image.Image) -> dict[str, float]:
        """Probabilities of the classes for one image or image file, highest first.

        Raises:
            DataError: if the file is no readable image.
        """
        ((_, found),) = classify_each(self, [image])
        if isinstance(found, DataError):
            raise found
        return ranked(self.classes, found)

    def save(self, path: str | Path) -> None:
        """Write weights, names of the classes, size and the body's name to one file."""
        save_atomically(self.told(), Path(path))

    def told(self) -> dict[str, Any]:
        """All that `load` needs to make the same classifier."""
        told = {"classes": list(self.classes), "size": self.size, "body": self.body.name}
        return {**told, **scaling(self.body), "weights": self.state_dict()}


def scaling(body: pretrained.Body) -> dict[str, Any]:
    """How images are scaled for a body, as files hold it."""
    return {"enlarged": body.enlarged, "interpolation": body.interpolation}


class OneLength(nn.Module):
    """Features `(n, d)` scaled to the length sqrt(d), so that their numbers are about 1.

    Example:
        >>> OneLength()(torch.tensor([[3.0, 4.0]])).square().mean()
        tensor(1.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(n, d)` to `(n, d)`, float32 or finer."""
        return nn.functional.normalize(single(x), dim=1) * x.shape[1] ** 0.5


def load(path: str | Path) -> Classifier:
    """A classifier, as `Classifier.save` wrote it.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    kinds = {"classes": list, "size": int, "body": str, "weights": dict}
    told = load_safely(Path(path))
    if not isinstance(told, dict) or not all(isinstance(told.get(x), kinds[x]) for x in kinds):
        raise DataError(f"{path} holds no classifier: name the model.pt of a fine-tuning.")
    net = Classifier(pretrained.body(None, told["body"]), told["classes"], told["size"])
    try:
        net.load_state_dict(told["weights"])
    except RuntimeError as error:
        raise DataError(
            f"{path} holds another network: name the model.pt of a fine-tuning."
        ) from error
    net.body.fixed = True
    # Files without it are of a time when all bodies saw images alike.
    net.body.enlarged = told.get("enlarged", 232 / 224)
    net.body.interpolation = told.get("interpolation", "bilinear")
    return net.eval()


@torch.no_grad()
def classify_each(
    net: Classifier, images: Sequence[str | Path | Image.Image], batch: int = 32
) -> Iterator[tuple[str | Path | Image.Image, Tensor | DataError]]:
    """Each image or file with its probabilities `(classes,)`, or with what is wrong with it.

    Args:
        net: on any device; it is put into evaluation mode.
        images: are read as they are asked for, `batch` at a time.
        batch: images that go through the network together.
    """
    look = to_test(net)
    for start in range(0, len(images), batch):
        part, seen, bad = images[start : start + batch], [], {}
        for k, image in enumerate(part):
            try:
                seen.append(look(read_rgb(image)))
            except DataError as error:
                bad[k] = error
        x = torch.stack(seen).to(net.head.weight.device) if seen else None  # (n, 3, size, size)
        chances = iter(net.eval()(x).softmax(1).cpu() if seen else ())
        for k, image in enumerate(part):
            yield image, bad[k] if k in bad else next(chances)


def ranked(classes: Sequence[str], chances: Tensor) -> dict[str, float]:
    """The probability `(classes,)` of each class by its name, highest first."""
    pairs = zip(classes, chances.tolist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def table(classes: Sequence[str], answers: dict[str | Path, Tensor]) -> str:
    """The answers as CSV: file, answer, its probability, and that of each class.

    Example:
        >>> print(table(["ant", "bee"], {"x.png": torch.tensor([0.25, 0.75])}), end="")
        file,answer,probability,p_ant,p_bee
        x.png,bee,0.750000,0.250000,0.750000
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "answer", "probability", *(f"p_{name}" for name in classes)])
    for file, chances in answers.items():
        numbers = [f"{chance:.6f}" for chance in chances.tolist()]
        best = int(chances.argmax())
        rows.writerow([file, classes[best], numbers[best], *numbers])
    return text.getvalue()


def to_train(net: Classifier, mirror: bool) -> v2.Compose:
    """A random crop, mirrored at random, as a float tensor `(3, size, size)` in [0, 1].

    Scaled as the images were from which the body learned.
    """
    flip = [v2.RandomHorizontalFlip()] if mirror else []
    way = v2.InterpolationMode(net.body.interpolation)
    crop = v2.RandomResizedCrop(net.size, (0.5, 1.0), interpolation=way, antialias=True)
    return v2.Compose([v2.ToImage(), crop, *flip, _as_float()])


def to_test(net: Classifier) -> v2.Compose:
    """The middle of an image, as a float tensor `(3, size, size)` in [0, 1].

    As much of it, and scaled in the same way, as the body was tested with by those who trained it.
    """
    way = v2.InterpolationMode(net.body.interpolation)
    resize = v2.Resize(enlarged(net), way, antialias=True)
    return v2.Compose([v2.ToImage(), _without_ends, resize, v2.CenterCrop(net.size), _as_float()])


def enlarged(net: Classifier) -> int:
    """Short side, in pixels, to which an image is scaled before its middle is cut out."""
    return round(net.size * net.body.enlarged)


def _without_ends(image: Tensor) -> Tensor:
    """The middle of a strip: enlarged until its short side fits, it would take gigabytes."""
    height, width = image.shape[-2:]
    most = LONGEST * min(height, width)
    if max(height, width) <= most:
        return image
    return v2.functional.center_crop(image, [min(height, most), min(width, most)])


def _as_float() -> v2.ToDtype:
    # Without scale=True the numbers would stay in 0 to 255, and nobody would say so.
    return v2.ToDtype(torch.float32, scale=True)


def batches(
    data: Dataset,
    batch: int,
    transform: v2.Compose | None = None,
    shuffle: bool = False,
    workers: int = 0,
) -> DataLoader:
    """Batches of inputs and labels; of `Images`, transformed. `workers` processes read them."""
    if transform is not None:
        data = data.only(range(len(data)))
        data.transform = transform
    # A batch of a single image has no variance, which batch normalisation divides by.
    single = shuffle and len(data) > batch and len(data) % batch == 1
    pinned = torch.cuda.is_available()
    return DataLoader(
        data, batch, shuffle, num_workers=workers, drop_last=single, pin_memory=pinned
    )


def features(
    net: Classifier, images: Images, batch: int = 32, workers: int = 0, progress: bool = False
) -> TensorDataset:
    """What the head sees of the middle of each image: `(n, features)` with labels `(n,)`.

    In evaluation mode: neither parameters nor batch statistics change.
    """
    head, net.head = net.head, nn.Identity()
    try:
        loader = batches(images, batch, to_test(net), workers=workers)
        rows, labels = predict(net, loader, progress)
    finally:
        net.head = head
    return TensorDataset(rows, labels)


@dataclass(frozen=True)
class Tested:
    """What a classifier made of a set of images.

    Attributes:
        chances: probability of each class for each image, `(n, classes)`.
        labels: the true classes, `(n,)` int64.
        files: of the images.
        classes: their names.

    Example:
        >>> chances = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> files = ("0.png", "1.png", "2.png")
        >>> tested = Tested(chances, torch.tensor([0, 1, 1]), files, ("ant", "bee"))
        >>> print(tested)
        66.7 % of 3 test images, 95 % interval 20.8 to 93.9
        >>> tested.surest_errors()
        [1]
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
        classes = len(self.classes)
        pairs = classes * self.labels + self.chances.argmax(1)  # (n,), a number for each pair
        return pairs.bincount(minlength=classes**2).view(classes, classes)

    @property
    def recalls(self) -> Tensor:
        """Percent of each class's images that were found, `(classes,)`; NaN for one without any."""
        counts = self.confusion
        return 100 * counts.diag() / counts.sum(1)

    @property
    def balanced(self) -> float:
        """The mean of `recalls` over the classes that have images, percent.

        Unlike the accuracy it falls when a rare class is never found.
        """
        return float(self.recalls.nanmean())

    @property
    def majority(self) -> float:
        """Percent that would be right if every answer were the most frequent class."""
        return 100 * int(self.confusion.sum(1).max()) / len(self.labels)

    def report(self, most: int = 20) -> str:
        """The accuracy, what it may hide, and how many of each class were found.

        Of more than `most` classes only those that were found least.
        """
        common = self.classes[int(self.confusion.sum(1).argmax())]
        lines = [
            str(self),
            f"{self.balanced:.1f} % as a mean over classes; {self.majority:.1f} % would be right "
            f"if every answer were {common}",
        ]
        # Those without an image come last, as NaN does.
        order = self.recalls.argsort(stable=True)[:most].tolist()
        wide = max(len(self.classes[k]) for k in order)
        for k in order:
            found, total = int(self.confusion[k, k]), int(self.confusion[k].sum())
            lines.append(f"  {self.classes[k]:{wide}}  {found} of {total} found")
        if len(self.classes) > most:
            lines.append(
                f"  and {len(self.classes) - most} more classes, found as often or oftener"
            )
        return "\n".join(lines)

    def surest_errors(self, count: int = 8) -> list[int]:
        """Wrong answers, by row, those first that were given with the highest probability."""
        said, answers = self.chances.max(1)  # (n,), (n,)
        wrong = (answers != self.labels).nonzero().flatten()  # (wrong answers,)
        return wrong[said[wrong].argsort(descending=True, stable=True)].tolist()[:count]

    def __str__(self) -> str:
        low, high = self.interval
        total = len(self.labels)
        return (
            f"{self.accuracy:.1f} % of {total} test images, 95 % interval {low:.1f} to {high:.1f}"
        )


def test(net: Classifier, images: Images, batch: int = 32, workers: int = 0) -> Tested:
    """Classify a set of images: the test set, once, when everything is decided."""
    logits, labels = predict(net, batches(images, batch, to_test(net), workers=workers))
    files = tuple(file for file, _ in images.samples)
    return Tested(logits.softmax(1), labels, files, net.classes)
