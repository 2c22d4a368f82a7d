"""Prototypical Networks (Snell, Swersky and Zemel 2017): compare a query with class means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.data.bank import NUMBERS_AT_ONCE, ClassBank
from metautils.errors import BadArgument
from metautils.learners.base import Learner, Method, Preset, ways_of, without_embedding
from metautils.nets import Conv4, LearnedScale
from metautils.precision import single


def prototypes(features: Tensor, labels: Tensor, ways: int | None = None) -> Tensor:
    """Mean of each class's support features, equation 1 of the paper.

    Args:
        features: `(tasks, S, dimensions)`.
        labels: `(tasks, S)` int64 in `[0, ways)`; classes may differ in their number of shots, but
            each must have one, see `ways_of`.
        ways: number of classes; None: as many as there are labels.

    Returns:
        `(tasks, ways, dimensions)`.

    Raises:
        ValueError: as `ways_of`, or if there are other labels than 0 to `ways - 1`.

    Example:
        >>> prototypes(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, 1]]))
        tensor([[[2.],
                 [5.]]])
    """
    sums = class_sums(features, labels, ways)  # (tasks, ways, d)
    return sums / F.one_hot(labels, sums.shape[1]).sum(1)[..., None]  # by (tasks, ways, 1)


def class_sums(features: Tensor, labels: Tensor, ways: int | None = None) -> Tensor:
    """Sum of each class's support features; arguments, result and errors as of `prototypes`."""
    found = ways_of(labels)
    if ways not in (None, found):
        raise BadArgument(
            f"The labels run to {found - 1}, which makes {found} ways, but ways is {ways}: give "
            f"ways={found}, or labels of each class from 0 to {ways - 1} and of no other."
        )
    rows = labels[..., None].expand_as(features)  # (tasks, S) to (tasks, S, d)
    sums = features.new_zeros(len(features), found, features.shape[-1])  # (tasks, ways, d)
    return sums.scatter_add(1, rows, features)


def squared_euclidean(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of all pairs: `(tasks, A, d)` and `(tasks, B, d)` to `(tasks, A, B)`."""
    # Written out, not expanded to |a|^2 - 2ab + |b|^2, which loses digits when a is near b.
    return _of_pairs(lambda a, b: (a - b).square(), a, b)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| of all pairs, as in many copies of the method; the paper squares it."""
    # The root has no gradient at 0, which a query equal to its prototype would meet.
    return (squared_euclidean(a, b) + 1e-12).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b) of all pairs, in [0, 2]."""
    return 1 - _of_pairs(torch.mul, F.normalize(a, dim=-1), F.normalize(b, dim=-1))


class ScaledCosine(nn.Module):
    """`cosine` times a factor that is learned.

    Cosines alone differ by 2 at most, and no softmax of them is certain of anything (Oreshkin et
    al. 2018, TADAM).

    Args:
        start: the factor before training.

    Example:
        >>> ScaledCosine()(torch.ones(1, 1, 4), torch.eye(4)[None, :2])  # 10 (1 - 1/2)
        tensor([[[5., 5.]]], grad_fn=<MulBackward0>)
    """

    def __init__(self, start: float = 10.0) -> None:
        super().__init__()
        self.scale = LearnedScale(start)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Of all pairs: `(tasks, A, d)` and `(tasks, B, d)` to `(tasks, A, B)`."""
        return self.scale(cosine(a, b))

    def __repr__(self) -> str:
        return f"ScaledCosine(start={self.scale.start:g})"


def _of_pairs(term: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The sum over d of `term(a, b)` for all pairs, `(tasks, A, B)`."""
    rows = max(1, NUMBERS_AT_ONCE // max(1, b.numel()))
    if rows >= a.shape[1]:
        return term(a[:, :, None], b[:, None]).sum(-1)  # from (tasks, A, B, d)
    # Of raw pixels (tasks, A, B, d) is gigabytes, so some rows at a time; and into one tensor, as
    # small results that stay between large ones would leave the memory full of holes.
    sums = torch.empty_like(term(a[:, :, None, 0], b[:, None, :, 0]))  # (tasks, A, B)
    for k in range(0, a.shape[1], rows):
        sums[:, k : k + rows] = term(a[:, k : k + rows, None], b[:, None]).sum(-1)
    return sums


class ProtoNet(Learner):
    """Softmax over negative distances to prototypes, equation 2 of the paper.

    Args:
        embed: f, a network `(n, ...)` to `(n, dimensions)`.
        distance: of all pairs, `(tasks, Q, d)` and `(tasks, ways, d)` to `(tasks, Q, ways)`.

    Example:
        >>> learner = ProtoNet(nn.Linear(4, 8))
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(
        self, embed: nn.Module, distance: Callable[[Tensor, Tensor], Tensor] = squared_euclidean
    ) -> None:
        super().__init__()
        self.embed = embed
        self.distance = distance

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits `(tasks, Q, ways)`; the classes are 0 to `support_y.max()`, see `ways_of`."""
        shots = support_x.shape[1]
        # One pass for both sets, in single precision at least from here on: distances need the
        # digits.
        x = torch.cat([support_x, query_x], dim=1)  # (tasks, S + Q, ...)
        # (tasks, S + Q, d)
        features = single(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        support, query = features[:, :shots], features[:, shots:]  # (tasks, S, d) and (tasks, Q, d)
        return -self.distance(query, prototypes(support, support_y))

    def on_features(self, bank: ClassBank) -> tuple[ProtoNet, ClassBank]:
        """The same answers at less cost: a learner of features, and the features of all images.

        Puts this learner into evaluation mode.
        """
        self.eval()
        return without_embedding(self), bank.map(self.embed)

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"distance={getattr(self.distance, '__name__', self.distance)}"


METHODS = {
    "protonet": Method(
        "Prototypical Networks",
        lambda problem: ProtoNet(Conv4(problem.image[0])),
        # 60-way 1-shot with 5 queries a class is how the paper trains on Omniglot.
        {"quick": Preset(200, 20, 1, 5), "full": Preset(3000, 60, 1, 5, episodes=1000)},
        rotations="classes",
        any_ways=True,
        any_shots=True,
        on_body=lambda problem, embed: ProtoNet(embed, ScaledCosine()),
    )
}
