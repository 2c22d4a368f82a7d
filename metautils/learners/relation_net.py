"""Relation Networks (Sung et al. 2018): the comparison of query and class is learned as well."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.errors import BadArgument
from metautils.learners.base import Learner, Method, Preset, Problem, task_loss
from metautils.learners.protonet import class_sums
from metautils.nets import Conv4
from metautils.precision import single


class RelationModule(nn.Module):
    """g, from a pair of feature maps to one number: two convolutional blocks, two dense layers.

    As in the paper each block is a 3x3 convolution of as many filters as the maps have,
    batch normalisation, ReLU and 2x2 max-pooling.

    Args:
        channels: of the feature maps of one image.
        size: height and width of the maps, at least 4, for two poolings.
        hidden: units between the two dense layers.

    Raises:
        ValueError: if the maps are smaller than 4x4.

    Example:
        >>> relate = RelationModule(channels=4, size=7)
        >>> relate(torch.rand(2, 15, 4 * 7 * 7), torch.rand(2, 5, 4 * 7 * 7)).shape
        torch.Size([2, 15, 5])
    """

    def __init__(self, channels: int = 64, size: int = 7, hidden: int = 8) -> None:
        super().__init__()
        if size < 4:
            raise BadArgument(f"Maps of {size}x{size} cannot be halved twice: they must be 4x4.")
        self.shape = (channels, size, size)
        self.first = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.rest = nn.Sequential(
            nn.BatchNorm2d(channels), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(channels * (size // 4) ** 2, hidden), nn.ReLU(), nn.Linear(hidden, 1),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, query: Tensor, classes: Tensor) -> Tensor:
        """Of all pairs: `(tasks, Q, d)` and `(tasks, ways, d)` to `(tasks, Q, ways)`.

        The class comes first in the pair, then the query.
        """
        # A convolution of two maps side by side is the sum of a convolution of each. So images
        # are convolved, not pairs of images: Q + ways of them in place of Q * ways.
        of_class, of_query = self.first.weight.chunk(2, 1)  # each (channels, channels, 3, 3)
        # (tasks * ways, channels, size, size) and (tasks * Q, channels, size, size)
        b = F.conv2d(classes.reshape(-1, *self.shape), of_class, self.first.bias, padding=1)
        a = F.conv2d(query.reshape(-1, *self.shape), of_query, padding=1)
        # (tasks, Q, channels, size, size) and (tasks, ways, channels, size, size)
        a, b = a.unflatten(0, query.shape[:2]), b.unflatten(0, classes.shape[:2])
        pairs = a[:, :, None] + b[:, None]  # (tasks, Q, ways, channels, size, size)
        # (tasks * Q * ways, channels, size, size) to (tasks * Q * ways, 1) to (tasks, Q, ways)
        return single(self.rest(pairs.flatten(0, 2)).view(pairs.shape[:3]))


def squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean of `(sigmoid(score) - 1 if it is the class, else 0)^2`: equation 2 of the paper."""
    return F.mse_loss(scores.sigmoid(), F.one_hot(labels, scores.shape[-1]).to(scores.dtype))


class RelationNet(Learner):
    """Scores of query and class by a learned module; a class is the sum of its support features.

    Args:
        embed: f, a network `(n, ...)` to `(n, dimensions)`.
        relate: g, of all pairs, `(tasks, Q, d)` and `(tasks, ways, d)` to `(tasks, Q, ways)`.
        objective: from outputs `(n, ways)` and labels `(n,)` to a scalar: `squared_error` of
            sigmoids, as in the paper, or `task_loss`, cross-entropy without a sigmoid.

    Example:
        >>> learner = RelationNet(Conv4(width=4, pools=2), RelationModule(channels=4, size=7))
        >>> x, y = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 15, 1, 28, 28)).shape
        torch.Size([2, 15, 5])
    """

    def __init__(
        self,
        embed: nn.Module,
        relate: nn.Module,
        objective: Callable[[Tensor, Tensor], Tensor] = squared_error,
    ) -> None:
        super().__init__()
        self.embed, self.relate, self.objective = embed, relate, objective

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Outputs `(tasks, Q, ways)`, before any sigmoid; classes as in `ways_of`."""
        x = torch.cat([support_x, query_x], dim=1)  # (tasks, S + Q, ...)
        features = self.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (tasks, S + Q, d)
        shots = support_x.shape[1]
        return self.relate(features[:, shots:], class_sums(features[:, :shots], support_y))

    def loss(self, predictions: Tensor, query_y: Tensor) -> Tensor:
        """The objective over all queries of all tasks, a scalar."""
        # (tasks, Q, ways) to (tasks * Q, ways), and (tasks, Q) to (tasks * Q,)
        return self.objective(predictions.flatten(0, 1), query_y.flatten(0, 1))

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"objective={self.objective.__name__}"


def _made(problem: Problem) -> RelationNet:
    """On the maps of the paper, with cross-entropy, which learns faster than squares."""
    relate = RelationModule(size=problem.image[-1] // 4)
    return RelationNet(Conv4(problem.image[0], pools=2), relate, task_loss)


METHODS = {
    "relation": Method(
        "Relation Networks",
        _made,
        {"quick": Preset(200, 20, 1, 5), "full": Preset(20000, 20, 1, 5, episodes=1000)},
        rotations="classes",
        any_ways=True,
    )
}
