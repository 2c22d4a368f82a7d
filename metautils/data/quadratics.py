"""Random quadratics, the smallest problems that an optimiser can be taught on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from metautils.episode import Episode


class QuadraticSampler:
    """Draws episodes without end: in each task a W and a y, whose loss is `|W phi - y|^2 / d`.

    A model of d numbers phi that gives W phi has this as its mean squared error. The query set is
    the support set: the task is to minimise, not to generalise. Entries of W and y are standard
    normal (section 3.1 of Andrychowicz et al. 2016).

    Args:
        dimensions: d.
        tasks: tasks in one episode.
        seed: of a generator of its own on the CPU, as in `EpisodeSampler`.
        device: where the episodes are to lie.

    Raises:
        ValueError: if dimensions or tasks is below 1.
    """

    def __init__(
        self,
        dimensions: int = 10,
        tasks: int = 16,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if min(dimensions, tasks) < 1:
            raise ValueError(f"dimensions={dimensions}, tasks={tasks}: both must be at least 1.")
        self.dimensions, self.tasks, self.device = dimensions, tasks, device
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these episodes from others, but for the state of the generator."""
        own = {"seed": self.generator.initial_seed(), "family": "quadratics"}
        return own | {"dimensions": self.dimensions, "tasks": self.tasks}

    def sample(self) -> Episode:
        """Draw the next episode: inputs `(tasks, d, d)`, targets `(tasks, d, 1)`."""
        d = self.dimensions
        w, y = torch.randn(self.tasks, d, d + 1, generator=self.generator).split([d, 1], -1)
        w, y = w.to(self.device), y.to(self.device)
        return Episode(w, y, w, y)

    def __iter__(self) -> Iterator[Episode]:
        while True:
            yield self.sample()
