"""Episodes by index gather: N-way K-shot tasks drawn from a ClassBank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metautils.data.bank import ClassBank, as_float
from metautils.episode import Episode
from metautils.errors import BadArgument


class EpisodeSampler:
    """Draws episodes without end: in each task, `ways` classes, then images, none of them twice.

    Random numbers come from a generator of its own on the CPU, wherever the images lie, so the
    same seed gives the same episodes on any machine. The images are gathered on their device.

    Args:
        bank: the classes to draw from.
        ways: classes in a task.
        shots: support images a class.
        queries: query images a class.
        tasks: tasks in one episode.
        rotate: turn every class of every task by its own random multiple of 90 degrees,
            support and query alike (the protocol of Finn et al. 2017 on Omniglot).
        seed: of the generator.
        vary: shift each image by up to an eighth of its sides, and mirror half of them: for photos
            to learn from, not for characters.

    Raises:
        ValueError: if the bank has fewer classes than `ways`, a class has fewer images than
            `shots + queries`, a number is not positive, or `rotate` meets images not square, or
            `vary` something else than images.

    Example:
        >>> bank = ClassBank(torch.rand(60, 1, 8, 8), torch.full((6,), 10), tuple("abcdef"))
        >>> episode = EpisodeSampler(bank, ways=5, shots=1, queries=3, tasks=2).sample()
        >>> episode.support_x.shape, episode.query_y.shape
        (torch.Size([2, 5, 1, 8, 8]), torch.Size([2, 15]))
    """

    def __init__(
        self,
        bank: ClassBank,
        ways: int,
        shots: int,
        queries: int,
        tasks: int = 1,
        rotate: bool = False,
        seed: int = 0,
        vary: bool = False,
    ) -> None:
        sizes = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks}
        for name, value in sizes.items():
            if value < 1:
                raise BadArgument(f"{name} is {value}; it must be at least 1.")
        if ways > len(bank):
            raise BadArgument(
                f"{ways} ways need {ways} classes but there are {len(bank)}: ask for fewer ways."
            )
        short = (bank.counts < shots + queries).nonzero().flatten()  # (classes that are too small,)
        if len(short):
            k = int(short[0])
            raise BadArgument(
                f"Class {bank.names[k]!r} has {int(bank.counts[k])} images but {shots} shots and "
                f"{queries} queries need {shots + queries}: ask for fewer or drop the class."
            )
        if vary and bank.images.dim() != 4:
            raise BadArgument(f"Only images can be varied, not {tuple(bank.images.shape[1:])}.")
        if rotate and (bank.images.dim() != 4 or bank.images.shape[-1] != bank.images.shape[-2]):
            raise BadArgument(f"Rotations need square images, not {tuple(bank.images.shape[1:])}.")
        self.bank, self.rotate, self.vary = bank, rotate, vary
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these episodes from others, but for the state of the generator."""
        told = ("ways", "shots", "queries", "tasks", "rotate")
        return {
            "seed": self.generator.initial_seed(),
            "bank": self.bank.digest,
            **{name: getattr(self, name) for name in told},
            **({"vary": True} if self.vary else {}),  # as checkpoints of other trainings have none
        }

    def indices(self) -> tuple[Tensor, Tensor]:
        """Draw classes `(tasks, ways)` and image rows `(tasks, ways, shots + queries)`."""
        # The first places of a random order are a draw without replacement.
        order = self._uniform(self.tasks, len(self.bank))  # (tasks, classes)
        classes = order.topk(self.ways).indices  # (tasks, ways)
        counts = self.bank.counts[classes]  # (tasks, ways)
        # (tasks, ways, images of the largest class)
        order = self._uniform(self.tasks, self.ways, int(self.bank.counts.max()))
        # Places beyond a class's own images sort last, so ragged classes need no loop.
        places = torch.arange(order.shape[-1], device=order.device)
        order.masked_fill_(places >= counts[..., None], -1.0)
        images = order.topk(self.shots + self.queries).indices  # (tasks, ways, shots + queries)
        return classes, self.bank.starts[classes][..., None] + images

    def sample(self) -> Episode:
        """Draw the next episode."""
        classes, rows = self.indices()
        turns = torch.zeros_like(classes)  # (tasks, ways), in multiples of 90 degrees
        if self.rotate:
            turns = torch.randint(4, turns.shape, generator=self.generator, device="cpu")
        parts = []
        # (tasks, ways, shots) and (tasks, ways, queries), both n below
        for part in rows.split([self.shots, self.queries], dim=2):
            # (tasks, ways * n, ...), in the order of the episode, so that no copy follows
            x = as_float(self._images(part.flatten(1)))
            each = x.unflatten(1, part.shape[1:])  # a view, (tasks, ways, n, ...)
            for k in range(1, 4 * self.rotate):
                each[turns == k] = each[turns == k].rot90(k, (-2, -1))  # (classes to turn, n, ...)
            # (ways, 1) to (tasks, ways, n) to (tasks, ways * n)
            labels = torch.arange(self.ways, device=x.device)[:, None].expand_as(part).flatten(1)
            parts += [x, labels]
        return Episode(*parts, classes)

    def _images(self, rows: Tensor) -> Tensor:
        """The images of these rows of the bank, `(tasks, n)`, varied where that is asked for."""
        images = self.bank.images
        rows = rows.to(images.device)
        if not self.vary:
            return images[rows]  # (tasks, n, ...)
        down, across = (self._shifted(rows.shape, size) for size in images.shape[-2:])
        mirrored = self._uniform(*rows.shape, 1) < 0.5  # (tasks, n, 1)
        across = torch.where(mirrored, across.flip(-1), across)  # (tasks, n, width)
        down, across = down.to(rows.device), across.to(rows.device)
        # Every pixel by its place: (tasks, n, height, width, channels), then channels in front.
        x = images[rows[..., None, None], :, down[..., None], across[..., None, :]]
        return x.movedim(-1, -3)

    def _shifted(self, shape: Sequence[int], size: int) -> Tensor:
        """Which of `size` pixels stand where an image has moved; its edge is repeated."""
        most = size // 8
        shift = torch.randint(-most, most + 1, (*shape, 1), generator=self.generator, device="cpu")
        return (torch.arange(size, device="cpu") + shift).clamp(0, size - 1)  # (tasks, n, size)

    def __iter__(self) -> Iterator[Episode]:
        while True:
            yield self.sample()

    def _uniform(self, *shape: int) -> Tensor:
        # float64: two equal numbers, whose order a machine could choose, do not occur in practice.
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator, device="cpu")
