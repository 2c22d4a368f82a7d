"""Reading (image after image): what learners share whose forward pass is the learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.errors import BadArgument
from metautils.learners.base import Learner
from metautils.precision import single


class Reader(Learner):
    """A learner whose forward pass over a sequence is the learning; a base of others.

    The support set comes in a random order, another one each time in training and always the same
    in evaluation, so that an answer can be had again. Then comes a query, each one alone: it sees
    no other, so the method is inductive.

    Args:
        embed: a network `(n, ...)` to `(n, dimensions)`.
        ways: how many labels there are an input for, as many as classes in a task at most.

    Attributes:
        length: the most images that a sequence may have, the query among them; None: any number.

    Example:
        >>> reader = Reader(nn.Identity(), ways=5).eval()
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> support, labels, queries, order = reader.read(x, y, torch.rand(2, 10, 4))
        >>> support.shape, bool((labels == order).all())
        (torch.Size([2, 5, 4]), True)
    """

    length: int | None = None

    def __init__(self, embed: nn.Module, ways: int) -> None:
        super().__init__()
        if ways < 2:
            raise BadArgument(f"ways is {ways}; to tell classes apart there must be 2 or more.")
        self.embed, self.ways = embed, ways

    def read(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is to be read, embedded in one pass, and the order in which.

        Returns:
            Features `(tasks, S, d)` and labels `(tasks, S)` of the support set in that order, and
            of the queries `(tasks, Q, d)`; the order, `(tasks, S)`.

        Raises:
            ValueError: if there is no support image, a label has no input, or the sequence is
                longer than `length`.
        """
        self.check(support_y)
        x = torch.cat([support_x, query_x], dim=1)  # (tasks, S + Q, ...)
        features = single(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        support, queries = features.split([support_x.shape[1], query_x.shape[1]], dim=1)
        order = self.order(*support_y.shape).to(x.device)
        return in_order(support, order), support_y.gather(1, order), queries, order

    def order(self, tasks: int, images: int) -> Tensor:
        """In which the images of each task are read, `(tasks, images)`."""
        if self.training:
            return torch.rand(tasks, images, device="cpu").argsort(1)
        g = torch.Generator().manual_seed(images)
        return torch.rand(images, generator=g, device="cpu").argsort().expand(tasks, -1)

    def one_hot(self, labels: Tensor, like: Tensor) -> Tensor:
        """Labels `(tasks, n)` as inputs `(tasks, n, ways)`."""
        return F.one_hot(labels, self.ways).to(like.dtype)

    def check(self, support_y: Tensor) -> None:
        """Refuse labels `(tasks, S)` that cannot be read; errors as of `read`."""
        if not support_y.numel():
            raise BadArgument("The support set is empty: give one image or more to learn from.")
        low, high = int(support_y.min()), int(support_y.max())
        if low < 0 or high >= self.ways:
            raise BadArgument(
                f"support_y holds the label {low if low < 0 else high}, but the learner has inputs "
                f"for the labels 0 to {self.ways - 1}: give such labels, or train with more --ways."
            )
        longest = support_y.shape[1] + 1
        if self.length is not None and longest > self.length:
            raise BadArgument(
                f"{longest - 1} support images and a query make a sequence of {longest}, but the "
                f"learner was made for {self.length} at most: give fewer, or train with more "
                "--shots."
            )


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """`(tasks, S, d)` in the order `(tasks, S)`."""
    return x.gather(1, order[..., None].expand_as(x))
