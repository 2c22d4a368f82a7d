"""Functions to learn from a few points: families of them, linear ones, Gaussian processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metautils.checkpoint import digest
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.exact import rbf
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


class PointSampler(ABC):
    """Draws episodes without end: in each task a function, then points; a base of others.

    A subclass says in `points` how they are drawn.

    Args:
        shots: support points of a task.
        queries: query points of a task.
        tasks: tasks in one episode.
        seed: of a generator of its own on the CPU, as in `EpisodeSampler`.
        device: where the episodes are to lie.

    Attributes:
        name: of the family of functions.
        told: the attributes that `settings` holds.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> class Zero(PointSampler):
        ...     name = "zero"
        ...     def points(self, n):
        ...         return torch.zeros(self.tasks, n, 2), torch.zeros(self.tasks, n, 1)
        >>> Zero(shots=5).sample().query_x.shape
        torch.Size([1, 10, 2])
    """

    name: str
    told: tuple[str, ...] = ("shots", "queries", "tasks")

    def __init__(
        self,
        shots: int,
        queries: int = 10,
        tasks: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in {"shots": shots, "queries": queries, "tasks": tasks}.items():
            if value < 1:
                raise BadArgument(f"{name} is {value}; it must be at least 1.")
        self.shots, self.queries, self.tasks = shots, queries, tasks
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these episodes from others, but for the state of the generator."""
        own = {"seed": self.generator.initial_seed(), "family": self.name}
        return own | {name: getattr(self, name) for name in self.told}

    @abstractmethod
    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Inputs `(tasks, n, inputs)` and targets `(tasks, n, 1)` of one function a task."""

    def sample(self) -> Episode:
        """Draw the next episode: inputs `(tasks, n, inputs)`, targets `(tasks, n, 1)`."""
        x, y = (z.to(self.device) for z in self.points(self.shots + self.queries))
        k = self.shots
        return Episode(x[:, :k], y[:, :k], x[:, k:], y[:, k:])

    def __iter__(self) -> Iterator[Episode]:
        while True:
            yield self.sample()

    def _drawn(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        with on_cpu(), in_float32():  # the same ones everywhere
            numbers = draw(self.tasks, *shape, generator=self.generator)
        return numbers.to(torch.get_default_dtype())

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self._drawn(torch.rand, *shape)


class RegressionSampler(PointSampler):
    """Draws episodes without end: in each task a function of a family, then its points.

    Args:
        family: of functions.
        shots, queries, tasks, seed, device: as in `PointSampler`.

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
        super().__init__(shots, queries, tasks, seed, device)
        self.family, self.name = family, family.name

    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Inputs `(tasks, n, inputs)` and targets `(tasks, n, 1)` of one function a task."""
        parameters = [self._uniform(low, high, 1) for low, high in self.family.ranges]
        x = self._uniform(*self.family.domain, n, self.family.inputs)
        return x, self.family.function(x, *parameters)[..., None]


class LinearSampler(PointSampler):
    """Draws episodes without end: `y = w x + noise`, where w and every x are from N(0, I).

    The tasks of Garg et al. 2022. With `weights` there are only so many tasks, as in the
    pretraining of Raventos et al. 2023. Targets of queries have noise too.

    Args:
        dimensions: d, of x and of w.
        shots, queries, tasks, seed, device: as in `PointSampler`.
        noise: standard deviation of the targets about w x.
        weights: `(M, d)`; w is one of its rows, all as likely. None: w is from N(0, I).

    Raises:
        ValueError: if a number is not positive, noise is below 0, or weights are not `(M, d)`.

    Example:
        >>> episode = LinearSampler(dimensions=3, shots=5, tasks=4, noise=0.1).sample()
        >>> episode.support_x.shape, episode.query_y.shape
        (torch.Size([4, 5, 3]), torch.Size([4, 10, 1]))
    """

    name = "linear"
    told = (*PointSampler.told, "dimensions", "noise")

    def __init__(
        self,
        dimensions: int,
        shots: int,
        queries: int = 10,
        tasks: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
        noise: float = 0.0,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(shots, queries, tasks, seed, device)
        if dimensions < 1 or noise < 0:
            raise BadArgument(
                f"dimensions={dimensions}, noise={noise}: at least 1 and 0 are needed."
            )
        if weights is not None and (weights.shape[1:] != (dimensions,) or not len(weights)):
            raise BadArgument(
                f"weights have the shape {tuple(weights.shape)}; give (M, {dimensions}), one row "
                "or more."
            )
        self.dimensions, self.noise = dimensions, noise
        self.weights = None if weights is None else weights.cpu()

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these episodes from others, but for the state of the generator."""
        known = None if self.weights is None else digest("weights", self.weights)
        return super().settings | {"weights": known}

    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Inputs `(tasks, n, d)` and targets `(tasks, n, 1)` of one w a task."""
        if self.weights is None:
            w = self._drawn(torch.randn, self.dimensions, 1)  # (tasks, d, 1)
        else:
            rows = (len(self.weights) * self._drawn(torch.rand)).long()  # (tasks,)
            w = self.weights[rows, :, None].to(torch.get_default_dtype())
        x = self._drawn(torch.randn, n, self.dimensions)
        return x, x @ w + self.noise * self._drawn(torch.randn, n, 1)


class GaussianProcessSampler(PointSampler):
    """Draws episodes without end: functions of a Gaussian process with the kernel `rbf`.

    Inputs are uniform between -2 and 2. Targets of queries have noise too.

    Args:
        shots, queries, tasks, seed, device: as in `PointSampler`.
        length: scale of the kernel; or (lowest, highest), and each task draws its own, uniformly.
        noise: standard deviation of the targets about the function.

    Raises:
        ValueError: if a number is not positive, or noise is below 0.

    Example:
        >>> episode = GaussianProcessSampler(shots=5, tasks=4, length=(0.2, 1.0)).sample()
        >>> episode.support_x.shape, episode.query_y.shape
        (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
    """

    name = "gaussian process"
    told = (*PointSampler.told, "length", "noise")

    def __init__(
        self,
        shots: int,
        queries: int = 10,
        tasks: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
        length: float | tuple[float, float] = 0.4,
        noise: float = 0.1,
    ) -> None:
        super().__init__(shots, queries, tasks, seed, device)
        self.length = (length, length) if isinstance(length, int | float) else tuple(length)
        if not 0 < self.length[0] <= self.length[1] or noise < 0:
            raise BadArgument(
                f"length={length}, noise={noise}: give a length above 0, or a range of such, and "
                "noise of 0 or more."
            )
        self.noise = noise

    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Inputs `(tasks, n, 1)` and targets `(tasks, n, 1)` of one function a task."""
        length = self._uniform(*self.length, 1, 1)
        x = self._uniform(-2.0, 2.0, n, 1)
        # Points that are close have nearly the same rows: float64, and a little on the diagonal.
        cov = rbf(x.double(), x.double(), length.double())  # (tasks, n, n)
        cov.diagonal(dim1=1, dim2=2).add_(1e-6)
        f = torch.linalg.cholesky(cov) @ self._drawn(torch.randn, n, 1).double()
        return x, f.to(x.dtype) + self.noise * self._drawn(torch.randn, n, 1)
