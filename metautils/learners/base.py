"""The one interface of the book: from a support set and queries to predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from metautils.episode import Episode
from metautils.errors import BadArgument


class Learner(nn.Module):
    """A mapping from a task to predictions: `learner(support_x, support_y, query_x)`.

    A method is a subclass with a `forward` of that signature. Every argument starts with a
    dimension of independent tasks:

    - `support_x`: `(tasks, S, ...)` and `support_y`: `(tasks, S)` int64 in `[0, ways)`,
    - `query_x`: `(tasks, Q, ...)`,
    - returns logits `(tasks, Q, ways)`.

    In regression `support_y` holds float targets `(tasks, S, outputs)`, and predictions have the
    shape `(tasks, Q, outputs)`.

    Attributes:
        transductive: whether a prediction depends on the other queries of its task.

    Example:
        >>> class Prior(Learner):
        ...     def forward(self, support_x, support_y, query_x):
        ...         ways = int(support_y.max()) + 1
        ...         return query_x.new_zeros(*query_x.shape[:2], ways)
        >>> import torch
        >>> x, y = torch.rand(2, 5, 3), torch.arange(5).expand(2, 5)
        >>> Prior()(x, y, torch.rand(2, 10, 3)).shape
        torch.Size([2, 10, 5])
    """

    transductive: bool = False

    def loss(self, predictions: Tensor, query_y: Tensor) -> Tensor:
        """`task_loss` over all queries of all tasks, a scalar."""
        # (tasks, Q, ...) to (tasks * Q, ...)
        return task_loss(predictions.flatten(0, 1), query_y.flatten(0, 1))

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What `meta_train` learns from: the meta-loss of an episode in pieces that add up.

        Yields:
            A scalar whose gradient trains the learner, predictions, and what they should be.
            `meta_train` runs backward after each, so that its graph is freed before the next.
        """
        predictions = self(episode.support_x, episode.support_y, episode.query_x)
        yield self.loss(predictions, episode.query_y), predictions, episode.query_y

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """What moves theta in `meta_train`: Adam, unless a method says how it has to be moved."""
        return torch.optim.Adam(self.parameters(), lr)


def takes_features(learner: Learner) -> bool:
    """Whether the learner's answers are those of its `on_features`.

    Not where a subclass has a `forward` of its own, which may look at the images.
    """
    kinds = type(learner).__mro__
    told = next((k for k, x in enumerate(kinds) if "on_features" in vars(x)), len(kinds))
    return told <= next(k for k, x in enumerate(kinds) if "forward" in vars(x))


def without_embedding(learner: Learner) -> Learner:
    """The same learner, of the same weights, that takes features where it took images."""
    light = copy.copy(learner)
    light._modules = {**learner._modules, "embed": nn.Identity()}
    return light


def task_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy for int64 labels `(n,)`, mean squared error for float targets.

    Raises:
        ValueError: if float targets are not of the predictions' shape.

    Example:
        >>> task_loss(torch.zeros(3, 1), torch.ones(3, 1))
        tensor(1.)
    """
    if targets.is_floating_point():
        check_targets(predictions, targets)
        return F.mse_loss(predictions, targets)
    return F.cross_entropy(predictions, targets)


def check_targets(predictions: Tensor, targets: Tensor) -> None:
    """Refuse targets of another shape, which a difference would blow up to all pairs."""
    if predictions.shape != targets.shape:
        one = predictions.shape[-1:] == (1,) and predictions.shape[:-1] == targets.shape
        raise BadArgument(
            f"Predictions have the shape {tuple(predictions.shape)} but targets "
            f"{tuple(targets.shape)}: both must be alike, "
            + ("so give targets.unsqueeze(-1)." if one else "with a number for every output.")
        )


def check_inputs(x: Tensor, inputs: int) -> None:
    """Refuse what is not of the shape `(tasks, n, inputs)`."""
    if x.dim() != 3 or x.shape[-1] != inputs:
        raise BadArgument(
            f"Inputs have the shape {tuple(x.shape)}, but the learner was made for "
            f"(tasks, n, {inputs})."
        )


def check_points(x: Tensor, y: Tensor, inputs: int, outputs: int) -> None:
    """Refuse points of a function that are not `(tasks, n, inputs)` and `(tasks, n, outputs)`.

    Nor may a target be NaN or infinite: from there it would reach every prediction of its task.
    """
    check_inputs(x, inputs)
    if y.shape != (*x.shape[:2], outputs):
        raise BadArgument(
            f"Targets have the shape {tuple(y.shape)}, but for these inputs and this learner they "
            f"must have {(*x.shape[:2], outputs)}."
        )
    if not y.isfinite().all():
        raise BadArgument("A target is NaN or infinite: leave that point out.")


def ways_of(support_y: Tensor) -> int:
    """How many classes the tasks have; each must be in the support set of every task.

    Of a class without an image a learner that compares has nothing: its mean would be 0/0, which
    is no number and yet wins every comparison.

    Args:
        support_y: `(tasks, S)` int64 labels from 0 on.

    Raises:
        ValueError: naming the class that a task lacks, or if a label is below 0 or no integer.

    Example:
        >>> ways_of(torch.tensor([[0, 1, 2, 2], [2, 2, 1, 0]]))
        3
    """
    labels = support_y.cpu()  # all at once: each number asked of a GPU would make it wait
    if labels.dtype != torch.int64 or labels.dim() != 2 or not labels.numel():
        raise BadArgument(
            f"support_y is {labels.dtype} of shape {tuple(labels.shape)}; give int64 labels of "
            "shape (tasks, images), one image or more."
        )
    if int(labels.min()) < 0:
        raise BadArgument(f"support_y holds the label {int(labels.min())}; count from 0.")
    (tasks, shots), ways = labels.shape, int(labels.max()) + 1
    # Whether there is an image, (tasks, ways); of more classes than images one is missing at once.
    there = torch.zeros(tasks, min(ways, shots + 1), dtype=torch.bool, device="cpu")
    if not there.scatter_(1, labels.clamp(max=shots), True).all():
        task, label = (~there).nonzero()[0].tolist()
        raise BadArgument(
            f"Class {label} has no support image in task {task}, though labels run to {ways - 1}, "
            f"which makes {ways} ways: give each of the classes 0 to {ways - 1} one image or more "
            "in every task, and tasks of other ways a call of their own."
        )
    return ways


@dataclass(frozen=True)
class Problem:
    """What a learner is made for.

    Attributes:
        image: shape of an image, `(channels, height, width)`.
        ways: classes in a task.
        classes: number of training classes.
        transductive: whether the queries of a task may be normalised by one another.
        shots: support images a class.

    Example:
        >>> problem = Problem(Size([1, 28, 28]), ways=5, classes=64)
        >>> problem.image.numel(), problem.transductive
        (784, True)
    """

    image: Size
    ways: int
    classes: int
    transductive: bool = True
    shots: int = 1


@dataclass(frozen=True)
class Preset:
    """Length and episodes of a training, and the number of test episodes for each setting.

    Attributes:
        steps: training episodes.
        ways, shots, queries: of the training episodes; queries are per class.
        tasks: in a training episode.
        episodes: of the test.
        lr: of the outer steps at the start.
        clip: of meta-gradients, see `meta_train`.

    Example:
        >>> preset = Preset(steps=200, ways=20, shots=1, queries=5)
        >>> preset.tasks, preset.episodes
        (1, 600)
    """

    steps: int
    ways: int
    shots: int
    queries: int
    tasks: int = 1
    episodes: int = 600
    lr: float = 1e-3
    clip: float | None = None


# Of methods on a body that has learned elsewhere: few steps at a small rate, which first rises.
WARM_UP = 30
_GENTLE = Preset(90, 10, 1, 5, lr=1e-4, clip=1.0)
ON_BODY = {"quick": _GENTLE, "full": replace(_GENTLE, steps=185)}


@dataclass(frozen=True)
class Method:
    """A method by name: how its learner is made and trained. A learner's file lists its METHODS.

    Attributes:
        title: its name in tables.
        make: the learner for a problem.
        presets: by name, "quick" and "full".
        rotations: of drawings in training: all four as `"classes"`, or one for a class and task,
            `"episode"`.
        any_ways: can be tested with other ways than it was trained with.
        any_shots: can be tested with other shots than it was trained with.
        on_body: the learner for a problem on an embedding `(n, ...)` to `(n, features)` that has
            learned elsewhere; None where the method needs a network of its own.
        body_presets: as `presets`, where there is such an embedding.

    Example:
        >>> presets = {"quick": Preset(steps=200, ways=20, shots=1, queries=5)}
        >>> method = Method("Mine", lambda problem: Learner(), presets, any_ways=True)
        >>> method.tests(ways=20, shots=1)
        ((5, 1), (20, 1))
    """

    title: str
    make: Callable[[Problem], Learner]
    presets: dict[str, Preset]
    rotations: str = "episode"
    any_ways: bool = False
    any_shots: bool = False
    on_body: Callable[[Problem, nn.Module], Learner] | None = None
    body_presets: dict[str, Preset] = field(default_factory=lambda: ON_BODY)

    def tests(self, ways: int, shots: int) -> tuple[tuple[int, int], ...]:
        """The (ways, shots) that a learner is tested in which was trained with these."""
        if not self.any_ways:
            return ((ways, shots),)
        return ((5, 1), (5, 5), (20, 1), (20, 5)) if self.any_shots else ((5, shots), (20, shots))
