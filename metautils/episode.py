"""An episode: the support and query sets of a batch of few-shot tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episode:
    """A batch of `tasks` tasks, each with a labelled support set and a query set to predict.

    Labels run from 0 to `ways - 1` inside each task; they say nothing about other tasks. In
    regression there are float targets instead, and no classes. Shapes are checked when the
    episode is made, so that what follows need not.

    Attributes:
        support_x: `(tasks, S, ...)`, inputs to learn from; images are float in [0, 1].
        support_y: `(tasks, S)`, int64 labels in `[0, ways)`; or targets `(tasks, S, outputs)`.
        query_x: `(tasks, Q, ...)`, inputs to predict.
        query_y: `(tasks, Q)` or `(tasks, Q, outputs)`, alike, seen only by the loss.
        classes: `(tasks, ways)`, int64, the class of the bank behind each label; None in
            regression.

    Raises:
        ValueError: if the shapes contradict each other or a label is out of range.

    Example:
        >>> support_x, support_y = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)
        >>> query_x, query_y = torch.rand(2, 10, 1, 28, 28), torch.arange(5).repeat(2, 2)
        >>> classes = torch.randint(100, (2, 5))
        >>> episode = Episode(support_x, support_y, query_x, query_y, classes)
        >>> episode.tasks, episode.ways
        (2, 5)
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        for part in ("support", "query"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            targets = y.is_floating_point() and y.dim() == 3 and self.classes is None
            if y.is_floating_point() and y.shape == x.shape[:2] and self.classes is None:
                raise ValueError(
                    f"{part}_y has shape {tuple(y.shape)} and holds float targets, whose shape is "
                    f"(tasks, inputs, outputs): for a single output give {part}_y.unsqueeze(-1)."
                )
            if y.shape[: 2 if targets else None] != x.shape[:2]:
                raise ValueError(
                    f"{part}_y has shape {tuple(y.shape)} but {part}_x starts with "
                    f"{tuple(x.shape[:2])}: give one label per input, as (tasks, images), or "
                    "float targets, as (tasks, inputs, outputs)."
                )
            if y.dtype != torch.int64 and not targets:
                raise ValueError(f"{part}_y is {y.dtype}; labels must be torch.int64.")
        if self.support_y.shape[2:] != self.query_y.shape[2:]:
            raise ValueError(
                f"support_y has shape {tuple(self.support_y.shape)} but query_y "
                f"{tuple(self.query_y.shape)}: both must hold labels, or as many outputs."
            )
        if self.support_x.shape[2:] != self.query_x.shape[2:]:
            raise ValueError(
                f"support images have shape {tuple(self.support_x.shape[2:])} but query images "
                f"{tuple(self.query_x.shape[2:])}: both must be alike."
            )
        counts = [len(x) for x in (self.support_x, self.query_x, self.classes) if x is not None]
        if len(set(counts)) > 1:
            raise ValueError(
                f"support, query and classes hold {', '.join(map(str, counts))} tasks: the first "
                "dimension must be the same."
            )
        if self.classes is not None:
            self._check_labels()

    def _check_labels(self) -> None:
        for part in ("support", "query"):
            y = getattr(self, f"{part}_y")
            outside = y[(y < 0) | (y >= self.ways)]
            if len(outside):
                raise ValueError(
                    f"{part}_y holds the label {int(outside[0])}; in a task of {self.ways} classes "
                    f"labels run from 0 to {self.ways - 1}."
                )

    @property
    def tasks(self) -> int:
        """Number of tasks in the batch."""
        return self.support_x.shape[0]

    @property
    def ways(self) -> int:
        """Number of classes in each task."""
        return self.classes.shape[1]

    def parts(self, tasks: int | None) -> Iterator[Episode]:
        """The same tasks in episodes of at most so many; all in one if None."""
        for k in range(0, self.tasks, tasks or self.tasks):
            rows = slice(k, k + (tasks or self.tasks))
            fields = (self.support_x, self.support_y, self.query_x, self.query_y, self.classes)
            yield Episode(*(None if x is None else x[rows] for x in fields))
