"""Things remembered from a few photos each, and recognised again: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from metautils import pretrained
from metautils.checkpoint import device_of, digest
from metautils.classifier import Classifier, to_test
from metautils.data import tree
from metautils.data.images import read_each, read_rgb
from metautils.errors import BadArgument
from metautils.files import DataError, load_safely, save_atomically
from metautils.learners.baseline import SCALE, nearest_centroid, ridge_head
from metautils.precision import single

Photo = str | Path | Image.Image
HEADS = {"centroid": nearest_centroid, "ridge": ridge_head}
BATCH = 32  # photos that go through the body together
# Measured on photos and on characters, 5 to 10 classes of one photo: where as many known things are
# refused as strangers let in, that is 23 to 32 % of both.
PASSED = 0.25
PLAIN = {"names": list, "digests": list, "photos": Tensor, "strangers": Tensor}
KINDS = {"body": str, "weights": str, "size": int, "head": str, **PLAIN}  # in a file


@dataclass(frozen=True)
class Answer:
    """What a photo was taken for.

    Attributes:
        name: of the class; None for none of these, where `score` is not above `threshold`.
        score: of the class that is most like the photo.
        threshold: above which a photo is of a class.
        scores: of each class by its name, highest first.

    Example:
        >>> print(Answer("cup", 0.8, 0.6, {"cup": 0.8, "jug": 0.5}))
        cup (cup 0.80, jug 0.50; none of these up to 0.60)
    """

    name: str | None
    score: float
    threshold: float
    scores: dict[str, float]

    def __str__(self) -> str:
        """The name, or none of these, and the scores of the nearest."""
        best = ", ".join(f"{name} {score:.2f}" for name, score in list(self.scores.items())[:3])
        none = "none of these"
        return f"{self.name or none} ({best}; {none} up to {self.threshold:.2f})"


class Recogniser:
    """Recognises things from one photo or a few of each, by the features of a body.

    A class is the photos that are remembered under its name. A photo is taken for the class whose
    score is highest, or for none of these where that is not above the `threshold`. Classes and
    photos may come and go at any time.

    Args:
        body: a body, or its name as `metautils.pretrained.body` knows it.
        head: what scores are: "centroid", cosines with the mean of a class's features, or "ridge",
            a least-squares fit of the classes.
        size: height and width at which the body sees photos, pixels; None: those it was made for.

    Attributes:
        names: the class of each photo.
        photos: their features, of length 1, `(photos, features)`.
        strangers: features of photos of none of the classes, `(strangers, features)`.

    Raises:
        BadArgument: if there is no such head.
        DataError: if the body cannot be had.

    Example:
        >>> pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> things = Recogniser(pretrained.Body(pool, 3, size=8, mean=[0] * 3, std=[1] * 3))
        >>> red, blue, dark = (Image.new("RGB", (20, 30), x) for x in ("red", "blue", "darkred"))
        >>> things.remember([red, blue], ["tomato", "sky"])
        >>> things.recognise(dark).name
        'tomato'
        >>> things.recognise(Image.new("RGB", (9, 9), "green")).name is None
        True
    """

    def __init__(
        self,
        body: pretrained.Body | str | Path = pretrained.LITE0,
        head: str = "centroid",
        size: int | None = None,
    ) -> None:
        if head not in HEADS:
            raise BadArgument(f"{head!r} is no head: name one of {', '.join(HEADS)}.")
        self.body = body if isinstance(body, pretrained.Body) else pretrained.body(body)
        self.body.eval()
        self.head, self.size = head, size or self.body.size
        self.names: list[str] = []
        self.photos = self.strangers = torch.zeros(0, self.body.features)
        self._digests: list[str] = []  # of what the body saw of each photo
        self._found: float | None = None  # the threshold, until something changes

    @property
    def classes(self) -> list[str]:
        """The names, in the order in which they came."""
        return list(dict.fromkeys(self.names))

    def remember(self, photos: Sequence[Photo], names: Sequence[str]) -> None:
        """Add each photo under its name, a known one or a new one; all of them or none.

        A picture that is there already under its name is passed over.

        Raises:
            DataError: if a photo cannot be read, or is one of another class too.
            BadArgument: if there are not as many names as photos.
        """
        if len(photos) != len(names):
            raise BadArgument(f"{len(photos)} photos and {len(names)} names: give each a name.")
        features, digests = self._look(photos)
        known, new = dict(zip(self._digests, self.names, strict=True)), []
        for k, (name, found) in enumerate(zip(names, digests, strict=True)):
            if found not in known:
                new.append(k)
            if known.setdefault(found, name) != name:
                raise DataError(
                    f"{photos[k]} of {name!r} is the same picture as one of {known[found]!r}: "
                    "remove one of them."
                )
        self.photos = torch.cat([self.photos, features[new]])  # (photos, features)
        self.names += [names[k] for k in new]
        self._digests += [digests[k] for k in new]
        self._found = None

    def forget(self, name: str) -> None:
        """Drop a class with all its photos.

        Raises:
            BadArgument: if there is none of this name.
        """
        kept = [k for k, other in enumerate(self.names) if other != name]
        if len(kept) == len(self.names):
            known = ", ".join(self.classes) or "none yet"
            raise BadArgument(f"There is no class {name!r} to forget; there are: {known}.")
        self.photos = self.photos[kept]
        self.names, self._digests = ([x[k] for k in kept] for x in (self.names, self._digests))
        self._found = None

    def meet(self, strangers: Sequence[Photo]) -> None:
        """Add photos of none of the classes, by which to find the threshold.

        Raises:
            DataError: if one cannot be read, or is one of a class.
        """
        features, digests = self._look(strangers)
        for photo, found in zip(strangers, digests, strict=True):
            if found in self._digests:
                name = self.names[self._digests.index(found)]
                raise DataError(f"{photo} is no stranger but a photo of {name!r}: remove one.")
        self.strangers = torch.cat([self.strangers, features])  # (strangers, features)
        self._found = None

    def recognise(self, photo: Photo) -> Answer:
        """What a photo shows.

        Raises:
            DataError: if it cannot be read.
            BadArgument: if a single class is known and no stranger, or none at all.
        """
        threshold, scores = self.threshold, self.scores(self.features([photo]))[0].tolist()
        ranked = sorted(zip(self.classes, scores, strict=True), key=lambda pair: -pair[1])
        name, score = ranked[0]
        return Answer(name if score > threshold else None, score, threshold, dict(ranked))

    def features(self, photos: Sequence[Photo]) -> Tensor:
        """What the body makes of photos, of length 1, `(photos, features)`.

        Raises:
            DataError: if some cannot be read.
        """
        return self._look(photos)[0]

    def scores(self, features: Tensor) -> Tensor:
        """Of each class, `(n, classes)`, for features `(n, d)`."""
        return self._scores(range(len(self.names)), features)

    def seen_by(self) -> Classifier:
        """The body and size, as a classifier of the classes has them; its head is not used."""
        return Classifier(self.body, self.classes or ["any"], self.size)

    @property
    def threshold(self) -> float:
        """Above which score a photo is of a class, by what is remembered alone."""
        if self._found is None:
            self._found = _between(self.known(), self.unknown())
        return self._found

    def known(self) -> Tensor:
        """Highest score of each photo when it is left out, `(n,)`; of classes of two or more."""
        every = range(len(self.names))
        several = [k for k in every if self.names.count(self.names[k]) > 1]
        left_out = [self._scores([j for j in every if j != k], self.photos[[k]]) for k in several]
        return torch.cat([self.photos.new_zeros(0), *(row.amax(1) for row in left_out)])

    def unknown(self) -> Tensor:
        """Highest score of each stranger, `(n,)`: of those met, or else of each class left out.

        Raises:
            BadArgument: as `recognise`.
        """
        if len(self.classes) < (1 if len(self.strangers) else 2):
            raise BadArgument(
                f"{len(self.classes)} class(es) of photos are remembered: give two or more, or one "
                "and --strangers, else nothing tells what is none of these."
            )
        if len(self.strangers):
            return self.scores(self.strangers).amax(1)
        rows = []
        for name in self.classes:
            own = [k for k, other in enumerate(self.names) if other == name]
            rest = [k for k, other in enumerate(self.names) if other != name]
            rows.append(self._scores(rest, self.photos[own]).amax(1))  # (photos of the class,)
        return torch.cat(rows)

    def _scores(self, support: Sequence[int], features: Tensor) -> Tensor:
        """Scores `(n, classes)` of features `(n, d)`, with only these photos remembered."""
        names = [self.names[k] for k in support]
        places = {name: k for k, name in enumerate(dict.fromkeys(names))}
        labels = torch.tensor([places[name] for name in names])  # (S,)
        # A single task: (1, S, d), (1, S) and (1, n, d) to (1, n, classes).
        task = self.photos[list(support)][None], labels[None], features[None]
        return HEADS[self.head](*task)[0] / SCALE

    @torch.no_grad()
    def _look(self, photos: Sequence[Photo]) -> tuple[Tensor, list[str]]:
        """Features of photos, and a digest of what the body saw of each."""
        see = to_test(self.seen_by())
        seen = read_each(lambda photo: see(read_rgb(photo)), photos)  # (3, size, size) each
        rows = [torch.zeros(0, self.body.features)]
        for start in range(0, len(seen), BATCH):
            x = torch.stack(seen[start : start + BATCH]).to(device_of(self.body))
            rows.append(F.normalize(single(self.body(x)), dim=1).cpu())  # (n, features)
        return torch.cat(rows), [digest("", x) for x in seen]

    def save(self, path: str | Path) -> None:
        """Write what is remembered to one file: features and names, no photos and no body.

        Raises:
            DataError: if it cannot be written.
        """
        told = {"body": self.body.name, "weights": _weights(self.body), "size": self.size}
        told |= {"head": self.head, "names": self.names, "digests": self._digests}
        save_atomically(told | {"photos": self.photos, "strangers": self.strangers}, Path(path))


def load(path: str | Path, body: pretrained.Body | str | Path | None = None) -> Recogniser:
    """What `Recogniser.save` wrote.

    Args:
        path: of the file.
        body: the one that it was made with; None: the one of the name that the file tells.

    Raises:
        DataError: if the file is missing, damaged or something else, or of another body.
    """
    told = load_safely(Path(path))
    if not isinstance(told, dict) or not all(isinstance(told.get(x), KINDS[x]) for x in KINDS):
        raise DataError(f"{path} holds no remembered things: name a file of `recognise --save`.")
    made = Recogniser(told["body"] if body is None else body, told["head"], told["size"])
    if _weights(made.body) != told["weights"]:
        raise DataError(
            f"{path} was made with other weights than those of this {made.body.name}: give --run "
            "or --body as it was then, or remember the photos anew."
        )
    made.names, made._digests = told["names"], told["digests"]
    made.photos, made.strangers = told["photos"], told["strangers"]
    return made


def remembered(
    support: Path,
    strangers: Path | None = None,
    body: pretrained.Body | str | None = None,
    size: int | None = None,
    head: str | None = None,
    device: str | torch.device = "cpu",
) -> Recogniser:
    """What a folder with a subfolder of photos for each thing, or a file, lets one recognise.

    Args:
        support: the folder, or what `Recogniser.save` wrote.
        strangers: a folder of photos of none of the things.
        body, size, head: as of `Recogniser`; None: its own, or those that the file tells.
        device: where the body computes.

    Raises:
        DataError: if there are fewer than two classes or an empty one, or a photo that is none or
            of two classes, or the body is not that of the file.
    """
    classes = {} if support.is_file() else _classes(support, strangers is not None)
    if not classes:
        made = load(support, body)
        made.head = head or made.head
    else:
        made = Recogniser(body or pretrained.LITE0, head or "centroid", size)
    made.body.to(device)
    files = [(file, name) for name, photos in classes.items() for file in photos]
    made.remember([file for file, _ in files], [name for _, name in files])
    if strangers is not None:
        made.meet(tree.images_in(strangers))
    return made


def _classes(support: Path, strangers: bool) -> dict[str, list[Path]]:
    """The photos of each thing in a folder; with strangers, one thing will do."""
    found = tree.find(support)
    if found.split:
        raise DataError(f"{support} has {' and '.join(found.parts)} in it: name the folder of one.")
    classes = found.parts["train"].classes
    if len(classes) < 2 - strangers:
        raise DataError(
            f"{support} has {len(classes)} subfolder(s) of photos: give two or more, one for each "
            "thing, or one and --strangers, a folder of photos of anything else."
        )
    return classes


def _weights(body: pretrained.Body) -> str:
    """A digest of the weights: features of another body mean something else."""
    return digest("", *body.state_dict().values())


def _between(known: Tensor, unknown: Tensor) -> float:
    """The threshold between scores of known things `(n,)` and of strangers `(m,)`.

    The larger of two shares is as small as can be: of known things that are refused, and of
    strangers that are let in. Of one photo a class nothing tells how much photos of one thing
    differ; then `PASSED` of the strangers are let in.
    """
    if not len(known):
        return float(unknown.quantile(1 - PASSED))
    scores = torch.cat([known, unknown]).unique()  # (k,), rising
    if len(scores) > 1:
        scores = (scores[1:] + scores[:-1]) / 2  # (k - 1,), between each two
    cuts = scores[:, None]
    refused, accepted = (known <= cuts).float().mean(1), (unknown > cuts).float().mean(1)
    worse = torch.maximum(refused, accepted)  # (k - 1,)
    best = scores[worse == worse.min()]
    return float(best[len(best) // 2])
