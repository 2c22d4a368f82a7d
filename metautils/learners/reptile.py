"""Reptile (Nichol, Achiam and Schulman 2018): move theta towards where each task ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metautils.adapt import Adam, adapt
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.learners.base import Method, task_loss
from metautils.learners.maml import MAML, PRESETS, on_strided_conv4


class Reptile(MAML):
    """`theta <- theta + eps * (phi - theta)`, phi after some inner steps on all of a task.

    `theta - phi` takes the place of a gradient (section 3 of the paper), here as the derivative of
    half the squared distance, so that the training loop needs to know nothing of it. Inner steps
    are Adam's with beta1 = 0, as in the paper's experiments, but on a task's whole set, not on
    parts of it. A single step would be ordinary joint training: take several.

    Args:
        net, lr, steps, options: as in `MAML`.

    Example:
        >>> from metautils.nets import mlp
        >>> learner = Reptile(mlp(inputs=4, outputs=5), steps=3)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, net: nn.Module, lr: float = 1e-3, steps: int = 8, **options: object) -> None:
        super().__init__(
            net, lr, steps, first_order=True, learned_rates=False, multi_step_loss=0, **options
        )
        if self.statistics:
            raise BadArgument(
                "Reptile keeps no running statistics: build the network with BatchNorm."
            )

    def optimizer(self) -> Adam:
        """Adam without momentum."""
        return Adam(self.lr, betas=(0.0, 0.999))

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Half the squared distance of theta and phi, a mean over tasks, and what phi predicts.

        Each phi has seen the labels of its queries: there is no held-out set in training.
        """
        theta = torch.cat([p.flatten() for p in self.net.parameters()])  # (parameters,)

        def task(x: Tensor, y: Tensor) -> Tensor:
            f = adapt(
                self.net, lambda f: task_loss(f(x), y), self.optimizer(), self.steps, **self.options
            )
            phi = [p.flatten() for p in f.parameters.values()]
            answers = self._predict(f, x[:shots], x[shots:])
            return torch.cat([*phi, answers.flatten()])  # (parameters + Q * outputs,)

        shots = episode.support_x.shape[1]
        x = torch.cat([episode.support_x, episode.query_x], 1)  # (tasks, S + Q, ...)
        y = torch.cat([episode.support_y, episode.query_y], 1)  # (tasks, S + Q)
        with torch.no_grad():
            found = self._over_tasks(task, x, y)  # (tasks, parameters + Q * outputs)
        phi, predictions = found[:, : len(theta)], found[:, len(theta) :]
        # (tasks, Q, outputs)
        predictions = predictions.unflatten(1, (episode.query_x.shape[1], -1))
        return (theta - phi).square().sum(1).mean() / 2, predictions


METHODS = {"reptile": Method("Reptile", on_strided_conv4(Reptile, test_steps=50), PRESETS)}
