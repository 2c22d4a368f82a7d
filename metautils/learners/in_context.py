"""Learning in context (Garg et al. 2022): a transformer that reads examples of a function."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.learners.base import Learner, check_inputs, check_points
from metautils.precision import all_digits


class Block(nn.Module):
    """A layer of a transformer: attention, then a dense network, each added to its input.

    Both are normalised at their entrance, as in GPT-2.

    Args:
        width: channels.
        heads: of attention.

    Example:
        >>> block = Block(width=8, heads=2)
        >>> block(torch.rand(3, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """`(tasks, n, width)` to the same; `sees`, `(n, n)` bool: who reads whom."""
        # (tasks, n, 3 * width) to three of (tasks, heads, n, width / heads)
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for z in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        read = F.scaled_dot_product_attention(q, k, v, sees).transpose(1, 2)
        x = x + self.out(read.flatten(2))  # from (tasks, n, heads, width / heads)
        return x + self.mlp(self.norms[1](x))


class InContext(Learner):
    """A causal transformer over x_1, y_1, x_2, y_2, ..., which predicts y_i where it reads x_i.

    It learns to learn from all places of a row: `pieces` puts support and queries one behind
    another. In use the support set is read once, in the order in which it is given; every query
    stands right behind it and sees nothing but it and itself, so the method is inductive. Without
    a support set the prediction is that of what training has taught about functions as such.

    Args:
        inputs: numbers in one x.
        outputs: numbers in one y.
        length: the most examples in a row, the query among them: each place has a vector of its
            own, which is learned.
        width: of the tokens.
        layers: of the transformer.
        heads: of each layer.

    Raises:
        ValueError: if heads do not divide the width, or a number is below 1.

    Example:
        >>> learner = InContext(inputs=3, length=12)
        >>> x, y = torch.rand(2, 11, 3), torch.rand(2, 11, 1)
        >>> learner(x, y, torch.rand(2, 10, 3)).shape, learner.along(x, y).shape
        (torch.Size([2, 10, 1]), torch.Size([2, 11, 1]))
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 1,
        length: int = 12,
        width: int = 64,
        layers: int = 3,
        heads: int = 2,
    ) -> None:
        super().__init__()
        if min(inputs, outputs, length, width, layers, heads) < 1 or width % heads:
            raise BadArgument(
                f"inputs={inputs}, outputs={outputs}, length={length}, width={width}, "
                f"layers={layers}, heads={heads}: all 1 or more, and width a multiple of heads."
            )
        self.length = length
        self.read_x, self.read_y = nn.Linear(inputs, width), nn.Linear(outputs, width)
        self.places = nn.Parameter(
            0.02 * torch.randn(2 * length - 1, width)
        )  # the last y is unread
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Predictions `(tasks, Q, outputs)`.

        Raises:
            ValueError: if the support set is as long as a row or longer, its sizes are not those
                that the learner was made for, or a target is not finite.
        """
        self.check(support_x, support_y, room=self.length - 1)
        check_inputs(query_x, self.read_x.in_features)
        s, q = support_x.shape[1], query_x.shape[1]
        with all_digits(query_x.device):  # half precision keeps too little of a target
            queries = self.read_x(query_x) + self.places[2 * s]  # all at the same place
            tokens = torch.cat([self.tokens(support_x, support_y), queries], 1)
            return self.through(tokens, _sees(2 * s, q, tokens.device))[:, 2 * s :]

    def along(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions at every place of a row, each before its own y is seen.

        Args:
            x: `(tasks, T, inputs)`.
            y: `(tasks, T, outputs)`; the last one is not looked at.

        Returns:
            `(tasks, T, outputs)`.

        Raises:
            ValueError: as of `forward`; and if there is no example, or more than `length`.
        """
        self.check(x, y, room=self.length)
        if not x.shape[1]:
            raise BadArgument("The row is empty: give one example or more.")
        with all_digits(x.device):
            tokens = self.tokens(x, y)[:, :-1]  # (tasks, 2 T - 1, width)
            return self.through(tokens, _sees(tokens.shape[1], 0, tokens.device))[:, ::2]

    def tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """x_1, y_1, x_2, y_2, ...: `(tasks, 2 T, width)`; the last y of a full row has no place."""
        pairs = torch.stack([self.read_x(x), self.read_y(y)], 2)  # (tasks, T, 2, width)
        places = F.pad(self.places, (0, 0, 0, 1))  # (2 * length, width)
        return pairs.flatten(1, 2) + places[: 2 * x.shape[1]]

    def through(self, tokens: Tensor, sees: Tensor) -> Tensor:
        """Tokens `(tasks, n, width)` to a prediction at each, `(tasks, n, outputs)`."""
        for block in self.blocks:
            tokens = block(tokens, sees)
        return self.head(tokens)

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The loss of all places of the rows."""
        x = torch.cat([episode.support_x, episode.query_x], 1)
        y = torch.cat([episode.support_y, episode.query_y], 1)
        predictions = self.along(x, y)
        yield self.loss(predictions, y), predictions, y

    def check(self, x: Tensor, y: Tensor, room: int) -> None:
        """Refuse examples that cannot be read, or more of them than there is room for."""
        check_points(x, y, self.read_x.in_features, self.read_y.in_features)
        if x.shape[1] > room:
            raise BadArgument(
                f"There are {x.shape[1]} examples, but the learner has places for {room} here: "
                "give fewer, or make and train it with a greater length."
            )

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"length={self.length}, heads={self.blocks[0].heads}"


def _sees(s: int, q: int, device: torch.device) -> Tensor:
    """Who reads whom, `(s + q, s + q)`: tokens what is before them, queries no other query."""
    sees = torch.ones(s + q, s + q, dtype=torch.bool, device=device).tril()
    sees[s:, s:] = torch.eye(q, dtype=torch.bool, device=device)
    return sees


def linear_attention(
    tokens: Tensor, queries: Tensor, key: Tensor, looked_for: Tensor, value: Tensor
) -> Tensor:
    """Attention without a softmax, added to the queries: equation 3 of von Oswald et al. 2023.

    With weights that can be written down it is one step of gradient descent on the squared error
    of a linear model, whose examples `(x, y)` are the tokens.

    Args:
        tokens: `(tasks, S, c)`.
        queries: `(tasks, Q, c)`.
        key, looked_for, value: `(c, c)` each, what tokens and queries are multiplied with.

    Returns:
        `(tasks, Q, c)`.

    Example:
        >>> same = torch.eye(2)
        >>> linear_attention(torch.ones(1, 5, 2), torch.ones(1, 1, 2), same, same, same)
        tensor([[[11., 11.]]])
    """
    weights = (queries @ looked_for.mT) @ (tokens @ key.mT).mT  # (tasks, Q, S)
    return queries + weights @ (tokens @ value.mT)
