"""Reptile (Nichol, Achiam and Schulman 2018): move theta towards where each task ends."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from metautils.adapt import Adam, adapt
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.learners.base import Method, task_loss
from metautils.learners.maml import MAML, PRESETS, on_strided_conv4
from metautils.precision import on_cpu


class Reptile(MAML):
    """`theta <- theta + epsilon * (phi - theta)`, phi after some inner steps on a training task.

    Algorithm 2 of the paper: a mean over tasks, epsilon the learning rate of `meta_train`. Inner
    steps are Adam's with beta1 = 0, as in the paper's experiments, each on the next `batch` of all
    images of the task, which are shuffled anew when they have all been used. (Adam begins anew in
    each task; in the authors' program its average of squares runs on.) For a new task they are
    taken on the whole support set. A single step would be joint training: take several.

    Args:
        net, lr, steps, options: as in `MAML`.
        batch: examples of an inner step in training; all of them if they are no more.

    Raises:
        ValueError: as `MAML`, or if batch is below 1 or the network keeps running statistics.

    Example:
        >>> from metautils.nets import mlp
        >>> learner = Reptile(mlp(inputs=4, outputs=5), steps=3)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 1e-3,
        steps: int = 8,
        *,
        batch: int = 10,
        **options: object,
    ) -> None:
        super().__init__(
            net, lr, steps, first_order=True, learned_rates=False, multi_step_loss=0, **options
        )
        if batch < 1:
            raise BadArgument(f"batch is {batch}; an inner step needs at least 1 example.")
        if self.statistics:
            raise BadArgument(
                "Reptile keeps no running statistics: build the network with BatchNorm."
            )
        self.batch = batch

    def optimizer(self) -> Adam:
        """Adam without momentum."""
        return Adam(self.lr, betas=(0.0, 0.999))

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Plain descent: with the gradient `theta - phi`, epsilon is its rate."""
        return torch.optim.SGD(self.parameters(), lr)

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Half the squared distance of theta and phi, a mean over tasks, and what phi predicts.

        Its gradient is theta - phi. Each phi has seen the labels of its queries: there is no
        held-out set in training.
        """
        theta = torch.cat([p.flatten() for p in self.net.parameters()])  # (parameters,)

        def task(x: Tensor, y: Tensor, order: Tensor) -> Tensor:
            f = adapt(
                self.net,
                lambda f: task_loss(f(x[order[f.k]]), y[order[f.k]]),
                self.optimizer(),
                self.steps,
                **self.options,
            )
            phi = [p.flatten() for p in f.parameters.values()]
            answers = self._predict(f, x[:shots], x[shots:])
            return torch.cat([*phi, answers.flatten()])  # (parameters + Q * outputs,)

        shots = episode.support_x.shape[1]
        x = torch.cat([episode.support_x, episode.query_x], 1)  # (tasks, S + Q, ...)
        y = torch.cat([episode.support_y, episode.query_y], 1)  # (tasks, S + Q)
        with torch.no_grad():
            order = self.minibatches(*x.shape[:2]).to(x.device)
            found = self._over_tasks(task, x, y, order)  # (tasks, parameters + Q * outputs)
        phi, predictions = found[:, : len(theta)], found[:, len(theta) :]
        # (tasks, Q, outputs)
        predictions = predictions.unflatten(1, (episode.query_x.shape[1], -1))
        return (theta - phi).square().sum(1).mean() / 2, predictions

    def minibatches(self, tasks: int, examples: int) -> Tensor:
        """Which examples of each task every inner step is taken on, `(tasks, steps, batch)`."""
        batch = min(self.batch, examples)
        rounds = -(-self.steps * batch // examples)  # rounded up
        with on_cpu():  # the same ones everywhere
            shuffled = torch.rand(tasks, rounds, examples).argsort(-1)
        # (tasks, rounds * examples) to (tasks, steps, batch)
        return shuffled.flatten(1)[:, : self.steps * batch].unflatten(1, (self.steps, batch))

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        return f"{super().extra_repr()}, batch={self.batch}"


# Twelve images of a class, as in the paper's 5-way 1-shot; theta goes all the way to phi at first.
_PRESETS = {name: replace(each, queries=11, lr=1.0) for name, each in PRESETS.items()}
METHODS = {"reptile": Method("Reptile", on_strided_conv4(Reptile, test_steps=50), _PRESETS)}
