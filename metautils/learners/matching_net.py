"""Matching Networks (Vinyals et al. 2016): a query's label is an average of the support's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.data.bank import ClassBank
from metautils.learners.base import Learner, Method, Preset, ways_of, without_embedding
from metautils.nets import Conv4, LearnedScale
from metautils.precision import all_digits, single


class MatchingNet(Learner):
    """Attention over the support set: softmax of cosines, labels mixed (equations 1 and 2).

    Without the paper's full-context embeddings, which changed little on Omniglot there.

    Args:
        embed: f and g in one, a network `(n, ...)` to `(n, dimensions)`.
        scale: what cosines are multiplied with before the softmax. The paper has 1, and then no
            answer can be more certain than e^2 : 1.
        learned: learn it, from there.

    Raises:
        ValueError: if scale is not above 0.

    Example:
        >>> learner = MatchingNet(nn.Linear(4, 8), scale=10.0)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, embed: nn.Module, scale: float = 1.0, learned: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale is {scale}; it must be above 0.")
        self.embed, self.scale = embed, scale
        self.learned = LearnedScale(scale) if learned else None

    def attention(self, support: Tensor, query: Tensor) -> Tensor:
        """Logarithms of the weights, `(tasks, Q, S)`, from features `(tasks, _, d)`."""
        # In half precision many cosines would be equal to the last digit.
        with all_digits(query.device):
            # (tasks, Q, d) @ (tasks, d, S)
            cosines = F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).mT
            scaled = self.scale * cosines if self.learned is None else self.learned(cosines)
            return scaled.log_softmax(-1)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Log-probabilities `(tasks, Q, ways)`; classes as in `ways_of`."""
        x = torch.cat([support_x, query_x], dim=1)  # (tasks, S + Q, ...)
        # (tasks, S + Q, d)
        features = single(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        shots = support_x.shape[1]
        weights = self.attention(features[:, :shots], features[:, shots:])  # (tasks, Q, S)
        # Summed as logarithms, so that a weight too small for its digits is still a number.
        ways = torch.arange(ways_of(support_y), device=x.device)
        others = support_y[:, None, None] != ways[:, None]  # (tasks, 1, ways, S)
        # (tasks, Q, 1, S) to (tasks, Q, ways, S) to (tasks, Q, ways)
        return weights[:, :, None].masked_fill(others, -torch.inf).logsumexp(-1)

    def on_features(self, bank: ClassBank) -> tuple[MatchingNet, ClassBank]:
        """The same answers at less cost: a learner of features, and the features of all images.

        Puts this learner into evaluation mode.
        """
        self.eval()
        return without_embedding(self), bank.map(self.embed)

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"scale={self.scale}" + (", learned" if self.learned else "")


METHODS = {
    "matching": Method(
        "Matching Networks",
        # A factor before the softmax, which the paper does without.
        lambda problem: MatchingNet(Conv4(problem.image[0]), scale=10.0),
        {"quick": Preset(200, 20, 1, 5), "full": Preset(3000, 60, 1, 5, episodes=1000)},
        rotations="classes",
        any_ways=True,
        any_shots=True,
        on_body=lambda problem, embed: MatchingNet(embed, 10.0, learned=True),
    )
}
