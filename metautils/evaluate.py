"""Accuracy with its 95 % interval over episodes, the same for every method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal

from metautils.data.bank import NUMBERS_AT_ONCE, ClassBank
from metautils.data.regression import PointSampler
from metautils.errors import BadArgument
from metautils.learners.base import Learner, check_targets, takes_features
from metautils.learners.mann import LSTMReader, in_a_random_row
from metautils.learners.neural_process import ConditionalNeuralProcess
from metautils.precision import fast_autocast
from metautils.progress import progress_bar
from metautils.sampling import EpisodeSampler

IMAGES_AT_ONCE = 1000  # tasks are tested in batches of about so many, to keep processors busy


def interval95(values: Tensor) -> float:
    """Half width of the 95 % interval of a mean: 1.96 standard errors, in the values' unit.

    Raises:
        ValueError: for fewer than two values, which say nothing about their spread.
    """
    if len(values) < 2:
        raise BadArgument(f"An interval needs at least 2 episodes, not {len(values)}.")
    # On the CPU, as not every device has float64.
    return 1.96 * float(values.cpu().double().std()) / len(values) ** 0.5


def wilson95(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy over independent images, in percent (Wilson 1927).

    Unlike p +- 1.96 sqrt(p (1 - p) / n) it stays within 0 and 100 and is wide where all answers
    are right. For the images of one test set; queries of an episode share a support set, so
    episodes take `interval95`.

    Args:
        right: images classified rightly.
        total: images.

    Raises:
        ValueError: unless 0 <= right <= total and total is at least 1.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} right of {total}: give a count of 1 image or more.")
    z, p = 1.96, right / total
    middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one setting.

    Attributes:
        ways, shots, queries: of the episodes; queries are per class.
        per_episode: `(episodes,)`, percent of each episode's queries classified rightly.
        transductive: whether the queries of a task helped one another.

    Example:
        >>> print(Evaluation(5, 1, 15, torch.tensor([60.0, 80.0, 70.0])))
        5-way 1-shot: 70.00 ± 11.32 %
    """

    ways: int
    shots: int
    queries: int
    per_episode: Tensor
    transductive: bool = False

    @property
    def accuracy(self) -> float:
        """Mean over episodes, percent."""
        return float(self.per_episode.cpu().double().mean())

    @property
    def ci95(self) -> float:
        """Half width of the 95 % interval of `accuracy`, percentage points."""
        return interval95(self.per_episode)

    def __str__(self) -> str:
        how = ", transductive" if self.transductive else ""
        return f"{self.ways}-way {self.shots}-shot{how}: {self.accuracy:.2f} ± {self.ci95:.2f} %"


def episode_accuracy(learner: Learner, sampler: EpisodeSampler, episodes: int) -> Tensor:
    """Percent right in each of the next `episodes` episodes of `sampler`, `(episodes,)`.

    The learner is put into evaluation mode for the while. One that can answer from features embeds
    each image of the bank once, if the episodes would show it more images than there are.
    """
    was_training, shown = learner.training, sampler.ways * (sampler.shots + sampler.queries)
    few = len(sampler.bank.images) < episodes * shown and not (sampler.rotate or sampler.vary)
    judged = learner
    # A sampler with a `sample` of its own may do with images what cannot be done with features.
    if few and type(sampler) is EpisodeSampler and takes_features(learner):
        sampler = copy.copy(sampler)  # with the same generator, which moves on
        judged, sampler.bank = learner.on_features(sampler.bank)
    right = _per_task(
        judged, sampler, episodes, lambda logits, y: (logits.argmax(-1) == y).float().mean(1)
    )
    learner.train(was_training)
    return 100 * right


def squared_errors(learner: Learner, sampler: PointSampler, episodes: int) -> Tensor:
    """Mean squared error in each of the next `episodes` tasks of `sampler`, `(episodes,)`.

    The learner is put into evaluation mode for the while.

    Raises:
        ValueError: if predictions are not of the targets' shape.
    """

    def score(predictions: Tensor, targets: Tensor) -> Tensor:
        check_targets(predictions, targets)
        # (tasks, Q, outputs) to (tasks, Q * outputs) to (tasks,)
        return (predictions - targets).square().flatten(1).mean(1)

    return _per_task(learner, sampler, episodes, score)


def log_likelihood(
    learner: ConditionalNeuralProcess, sampler: PointSampler, episodes: int
) -> Tensor:
    """Mean log likelihood of a target, nats, in each of the next `episodes` tasks, `(episodes,)`.

    Natural logarithms of densities, so it may be above 0. It cannot be compared over two floors
    under sigma, nor with targets in another unit.

    Args:
        learner: one with a `predict_distribution`.
        sampler: of the tasks.
        episodes: how many.
    """
    # (tasks, Q, outputs) to (tasks, Q * outputs) to (tasks,)
    return _per_task(
        learner, sampler, episodes, lambda d, y: d.log_prob(y).flatten(1).mean(1), True
    )


def coverage95(learner: ConditionalNeuralProcess, sampler: PointSampler, episodes: int) -> Tensor:
    """Percent of targets within the band `mean +- 1.96 sigma` in each task, `(episodes,)`.

    95 is right, less is too sure and more not sure enough. Arguments as in `log_likelihood`.
    """

    def score(d: Normal, y: Tensor) -> Tensor:
        inside = (y - d.mean).abs() <= 1.96 * d.stddev  # (tasks, Q, outputs)
        return 100 * inside.flatten(1).float().mean(1)

    return _per_task(learner, sampler, episodes, score, True)


@torch.no_grad()
def by_presentation(learner: LSTMReader, sampler: EpisodeSampler, episodes: int) -> Tensor:
    """Accuracy at the first, second, ... time that a class is met (Santoro et al. 2016, table 1).

    The images of a task, support and queries, stand in one row in a random order, and each is to
    be named before its label is told. At the first presentation nothing can be known but which
    labels are still free.

    Args:
        learner: one that answers at every place of a row.
        sampler: of the episodes; of its generator the order comes too.
        episodes: how many.

    Returns:
        `(episodes, shots + queries)`, percent of an episode's classes that are named rightly. The
        learner is left in the mode that it had.
    """
    was_training, rows = learner.training, []
    learner.eval()
    for _ in range(-(-episodes // sampler.tasks)):
        x, y = in_a_random_row(sampler.sample(), sampler.generator)
        with fast_autocast(x.device):
            right = learner.in_a_row(x, y).argmax(-1) == y  # (tasks, T)
        # The stable order by labels brings each class's presentations together as they came.
        order = y.argsort(dim=1, stable=True)  # (tasks, T)
        each = right.gather(1, order).unflatten(1, (sampler.ways, -1))  # (tasks, ways, n)
        rows.append(100 * each.double().mean(1))  # (tasks, n)
    learner.train(was_training)
    return torch.cat(rows)[:episodes].cpu()


@torch.no_grad()
def _per_task(
    learner: Learner,
    sampler: EpisodeSampler | PointSampler,
    episodes: int,
    score: Callable[..., Tensor],
    distribution: bool = False,
) -> Tensor:
    answer = learner.predict_distribution if distribution else learner
    was_training = learner.training
    learner.eval()
    rows = []
    for _ in range(-(-episodes // sampler.tasks)):
        episode = sampler.sample()
        numbers = (episode.support_x.numel() + episode.query_x.numel()) // episode.tasks
        # Tasks of large images are drawn together all the same: a seed's episodes stay the same.
        for part in episode.parts(max(1, NUMBERS_AT_ONCE // max(1, numbers))):
            with fast_autocast(part.query_x.device):
                predictions = answer(part.support_x, part.support_y, part.query_x)
            rows.append(score(predictions, part.query_y))  # (tasks,)
    learner.train(was_training)
    return torch.cat(rows)[:episodes].cpu()


def evaluate(
    learner: Learner,
    bank: ClassBank,
    settings: Sequence[tuple[int, int]] = ((5, 1), (5, 5)),
    queries: int = 15,
    episodes: int = 600,
    rotate: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> list[Evaluation]:
    """Test a learner in several settings, each on its own fixed episodes.

    The same `seed`, bank and setting give the same episodes, so that two learners can be
    compared episode by episode.

    Args:
        learner: any learner of the book.
        bank: classes that it has not seen.
        settings: pairs (ways, shots).
        queries: query images a class.
        episodes: per setting; at least 600 for a number that is reported.
        rotate: give each class of each task a random rotation, see `EpisodeSampler`.
        seed: of the episodes.
        progress: show a bar.

    Returns:
        One `Evaluation` for each setting.

    Raises:
        ValueError: if the bank is too small for a setting.
    """
    results = []
    for ways, shots in progress_bar(settings, show=progress, desc="evaluate"):
        tasks = min(episodes, max(1, IMAGES_AT_ONCE // (ways * (shots + queries))))
        sampler = EpisodeSampler(bank, ways, shots, queries, tasks, rotate, seed)
        accuracy = episode_accuracy(learner, sampler, episodes)
        results.append(Evaluation(ways, shots, queries, accuracy, learner.transductive))
    return results
