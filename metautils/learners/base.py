"""The one interface of the book: from a support set and queries to predictions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from metautils.episode import Episode


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
        tasks_at_once: how many tasks of an episode `meta_train` takes before it runs backward
            (None: all). The sum of the gradients is the same; memory and speed are not.
        update_each_piece: whether `meta_train` takes a step after each of the `pieces`, not after
            the last only.
        meta_clip: `meta_train` scales meta-gradients down to this norm (None: it does not).
    """

    transductive: bool = False
    tasks_at_once: int | None = None
    update_each_piece: bool = False
    meta_clip: float | None = None

    def loss(self, predictions: Tensor, query_y: Tensor) -> Tensor:
        """`task_loss` over all queries of all tasks, a scalar."""
        return task_loss(predictions.flatten(0, 1), query_y.flatten(0, 1))

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The scalar whose gradient trains the learner, and the predictions for the queries."""
        predictions = self(episode.support_x, episode.support_y, episode.query_x)
        return self.loss(predictions, episode.query_y), predictions

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The meta-loss in pieces that add up, each with predictions and what they should be.

        `meta_train` runs backward after each, so that its graph is freed before the next.
        """
        for part in episode.parts(self.tasks_at_once):
            loss, predictions = self.meta_loss(part)
            yield loss * (part.tasks / episode.tasks), predictions, part.query_y


def task_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy for int64 labels `(n,)`, mean squared error for float targets."""
    if targets.is_floating_point():
        return F.mse_loss(predictions, targets)
    return F.cross_entropy(predictions, targets)
