"""Families of functions to learn from a few points: sinusoids, lines, planes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metautils.episode import Episode
from metautils.precision import in_float32, on_cpu


@dataclass(frozen=True)
class Family:
    """A distribution over functions; one function is one task.

    Attributes:
        name: of the family.
        inputs: numbers in one input.
        ranges: (lowest, highest) of each parameter of a function, drawn uniformly.
        function: inputs `(tasks, n, inputs)` and parameters `(tasks, 1)` each to `(tasks, n)`.
        domain: (lowest, highest) of each input, drawn uniformly.

    Example:
        >>> steep = Family("steep", 1, ((2.0, 4.0),), lambda x, a: a * x[..., 0])
        >>> steep.function(torch.ones(2, 5, 1), torch.tensor([[2.0], [3.0]])).shape
        torch.Size([2, 5])
    """

    name: str
    inputs: int
    ranges: tuple[tuple[float, float], ...]
    function: Callable[..., Tensor]
    domain: tuple[float, float] = (-5.0, 5.0)


# Amplitude and phase as in section 5.1 of Finn et al. 2017.
SINUSOIDS = Family(
    "sinusoids", 1, ((0.1, 5.0), (0.0, math.pi)), lambda x, a, b: a * torch.sin(x[..., 0] - b)
)
LINES = Family("lines", 1, ((-2.0, 2.0), (-1.0, 1.0)), lambda x, a, b: a * x[..., 0] + b)
PLANES = Family(
    "planes", 2, ((-2.0, 2.0),) * 2 + ((-1.0, 1.0),),
    lambda x, a, b, c: a * x[..., 0] + b * x[..., 1] + c,
    (-1.0, 1.0),
)  # fmt: skip


class RegressionSampler:
    """Draws episodes without end: in each task a function, then its support and query points.

    Args:
        family: of functions.
        shots: support points of a task.
        queries: query points of a task.
        tasks: tasks in one episode.
        seed: of a generator of its own on the CPU, as in `EpisodeSampler`.
        device: where the episodes are to lie.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> episode = RegressionSampler(SINUSOIDS, shots=5, queries=10, tasks=4).sample()
        >>> episode.support_x.shape, episode.query_y.shape
        (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
    """

    def __init__(
        self,
        family: Family,
        shots: int,
        queries: int = 10,
        tasks: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in {"shots": shots, "queries": queries, "tasks": tasks}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.family, self.shots, self.queries, self.tasks = family, shots, queries, tasks
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these episodes from others, but for the state of the generator."""
        told = ("shots", "queries", "tasks")
        own = {"seed": self.generator.initial_seed(), "family": self.family.name}
        return own | {name: getattr(self, name) for name in told}

    def sample(self) -> Episode:
        """Draw the next episode: inputs `(tasks, n, inputs)`, targets `(tasks, n, 1)`."""
        parameters = [self._uniform(low, high, 1) for low, high in self.family.ranges]
        # (tasks, n, inputs), where n = shots + queries
        x = self._uniform(*self.family.domain, self.shots + self.queries, self.family.inputs)
        y = self.family.function(x, *parameters)[..., None]  # (tasks, n, 1)
        x, y = x.to(self.device), y.to(self.device)
        k = self.shots
        return Episode(x[:, :k], y[:, :k], x[:, k:], y[:, k:])

    def __iter__(self) -> Iterator[Episode]:
        while True:
            yield self.sample()

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        with on_cpu(), in_float32():  # the same ones everywhere
            numbers = torch.rand(self.tasks, *shape, generator=self.generator)
        return low + (high - low) * numbers.to(torch.get_default_dtype())
