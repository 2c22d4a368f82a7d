"""Random quadratics, the smallest problems that an optimiser can be taught on."""

from __future__ import annotations

import torch
from torch import Tensor

from metautils.data.regression import PointSampler
from metautils.episode import Episode


class QuadraticSampler(PointSampler):
    """Draws episodes without end: in each task a W and a y, whose loss is `|W phi - y|^2 / d`.

    A model of d numbers phi that gives W phi has this as its mean squared error. The query set is
    the support set: the task is to minimise, not to generalise. Entries of W and y are standard
    normal, as is reported of Andrychowicz et al. 2016. Then every column of W, and W as a whole, is
    multiplied by a factor of its own, for in a network coordinates and losses differ in scale.

    Args:
        dimensions: d.
        tasks: tasks in one episode.
        spread: the factors' range in powers of ten: with 1 they run from `10**-0.5` to `10**0.5`,
            uniform in the logarithm; with 0 all are 1.
        seed: of a generator of its own on the CPU, as in `EpisodeSampler`.
        device: where the episodes are to lie.

    Raises:
        ValueError: if dimensions or tasks is below 1, or spread below 0.

    Example:
        >>> episode = QuadraticSampler(dimensions=10, tasks=4).sample()
        >>> episode.support_x.shape, episode.support_y.shape
        (torch.Size([4, 10, 10]), torch.Size([4, 10, 1]))
    """

    name = "quadratics"
    told = ("dimensions", "tasks", "spread")

    def __init__(
        self,
        dimensions: int = 10,
        tasks: int = 16,
        spread: float = 1.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if min(dimensions, tasks) < 1 or spread < 0:
            raise ValueError(
                f"dimensions={dimensions}, tasks={tasks}, spread={spread}: at least 1, 1 and 0 are "
                "needed."
            )
        super().__init__(dimensions, dimensions, tasks, seed, device)
        self.dimensions, self.spread = dimensions, spread

    def sample(self) -> Episode:
        """Draw the next episode: inputs `(tasks, d, d)`, targets `(tasks, d, 1)`."""
        w, y = (z.to(self.device) for z in self.points(self.dimensions))
        return Episode(w, y, w, y)

    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Rows of W, `(tasks, n, d)`, and of y, `(tasks, n, 1)`."""
        d = self.dimensions
        # (tasks, n, d) and (tasks, n, 1)
        w, y = self._drawn(torch.randn, n, d + 1).split([d, 1], -1)
        # times (tasks, 1, d) and (tasks, 1, 1)
        return w * self._factors(d) * self._factors(1), y

    def _factors(self, count: int) -> Tensor:
        return 10 ** (self.spread * (self._drawn(torch.rand, 1, count) - 0.5))
