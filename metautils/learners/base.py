"""The one interface of the book: from a support set and queries to predictions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Learner(nn.Module):
    """A mapping from a task to predictions: `learner(support_x, support_y, query_x)`.

    A method is a subclass with a `forward` of that signature. Every argument starts with a
    dimension of independent tasks:

    - `support_x`: `(tasks, S, ...)` and `support_y`: `(tasks, S)` int64 in `[0, ways)`,
    - `query_x`: `(tasks, Q, ...)`,
    - returns logits `(tasks, Q, ways)`.
    """

    def loss(self, predictions: Tensor, query_y: Tensor) -> Tensor:
        """Mean cross-entropy of logits `(tasks, Q, ways)` and labels `(tasks, Q)`, a scalar."""
        return F.cross_entropy(predictions.flatten(0, 1), query_y.flatten())
