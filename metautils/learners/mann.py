"""Memory-augmented neural networks (Santoro et al. 2016), and the plain LSTM beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.episode import Episode
from metautils.learners.base import Method, Preset, Problem, task_loss
from metautils.learners.reader import Reader, in_order
from metautils.nets import Conv4, features_of
from metautils.precision import all_digits

State = NamedTuple  # of tensors (n, ...), one row for each sequence


class Recurrent(Reader):
    """Reads images one by one, each with the label of the one before; a base of others.

    A network of this kind answers at every place of a sequence, so it learns from all of them:
    `pieces` puts support and queries into one row, in a random order, as the paper does.
    """

    def begin(self, n: int, like: Tensor) -> State:
        """The state before the first image of `n` sequences."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One place: an image and a label, `(n, d + ways)`, to logits `(n, ways)`."""
        raise NotImplementedError

    def answers(self, features: Tensor, labels: Tensor) -> tuple[Tensor, State]:
        """Logits of every place, `(tasks, T, ways)`, each before its label is known; the state.

        Args:
            features: `(tasks, T, d)`, in reading order.
            labels: `(tasks, T)`; the last one is not looked at.
        """
        state, logits = self.begin(len(features), features), []
        # The label of the image before, (tasks, T, ways); none at the first place.
        before = F.pad(self.one_hot(labels, features)[:, :-1], (0, 0, 1, 0))
        for x in torch.cat([features, before], -1).unbind(1):
            out, state = self.step(x, state)
            logits.append(out)
        return torch.stack(logits, 1), state

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits `(tasks, Q, ways)`."""
        support, labels, queries, _ = self.read(support_x, support_y, query_x)
        tasks, q = queries.shape[:2]
        with all_digits(queries.device):
            state = self.answers(support, labels)[1]
            # With a query the last support image's label arrives: (tasks, Q, ways).
            last = self.one_hot(labels[:, -1:], support).expand(-1, q, -1)
            x = torch.cat([queries, last], -1).flatten(0, 1)  # (tasks * Q, d + ways)
            state = type(state)(*(each.repeat_interleave(q, 0) for each in state))
            return self.step(x, state)[0].unflatten(0, (tasks, q))

    def in_a_row(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of every image `(tasks, T, ways)`, from the images and labels before it.

        Args:
            x: `(tasks, T, ...)`.
            y: `(tasks, T)`.
        """
        self._check(y)
        features = self.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (tasks, T, d)
        with all_digits(x.device):
            return self.answers(features.float(), y)[0]

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The loss of all places of the sequences."""
        x, y = row(episode, self.order(episode.tasks, episode.support_y.shape[1] + episode.query_y.shape[1]))
        logits = self.in_a_row(x, y)
        yield task_loss(logits.flatten(0, 1), y.flatten()), logits, y

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"ways={self.ways}"


def row(episode: Episode, order: Tensor) -> tuple[Tensor, Tensor]:
    """Support and queries in one row: `(tasks, T, ...)` and `(tasks, T)`, in the order given."""
    x = torch.cat([episode.support_x, episode.query_x], 1)
    y = torch.cat([episode.support_y, episode.query_y], 1)
    order = order.to(x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], order], y.gather(1, order)


class LSTMState(NamedTuple):
    h: Tensor
    c: Tensor


class LSTMReader(Recurrent):
    """An LSTM that has its own state only."""

    def __init__(self, embed: nn.Module, features: int, ways: int, hidden: int = 200) -> None:
        super().__init__(embed, ways)
        self.cell, self.head = nn.LSTMCell(features + ways, hidden), nn.Linear(hidden, ways)

    def begin(self, n: int, like: Tensor) -> LSTMState:
        zeros = like.new_zeros(n, self.cell.hidden_size)
        return LSTMState(zeros, zeros)

    def step(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        state = LSTMState(*self.cell(x, state))
        return self.head(state.h), state


class MemoryState(NamedTuple):
    h: Tensor  # (n, hidden)
    c: Tensor
    M: Tensor  # (n, slots, width)
    w_r: Tensor  # (n, heads, slots)
    w_u: Tensor  # (n, slots)


class MANN(Recurrent):
    def __init__(self, embed, features, ways, hidden=200, slots=128, width=40, heads=4, gamma=0.95, erase=True):
        super().__init__(embed, ways)
        self.slots, self.width, self.heads, self.gamma, self.erase = slots, width, heads, gamma, erase
        self.cell = nn.LSTMCell(features + ways + heads * width, hidden)
        self.key = nn.Linear(hidden, heads * width)
        self.alpha = nn.Linear(hidden, heads)
        self.head = nn.Linear(hidden + heads * width, ways)

    def begin(self, n, like):
        zeros = like.new_zeros(n, self.cell.hidden_size)
        M = like.new_full((n, self.slots, self.width), 1e-6)
        w_r = like.new_zeros(n, self.heads, self.slots)
        return MemoryState(zeros, zeros, M, w_r, w_r[:, 0])

    def step(self, x, state):
        r = (state.w_r @ state.M).flatten(1)
        h, c = self.cell(torch.cat([x, r], -1), (state.h, state.c))
        k = self.key(h).tanh().unflatten(-1, (self.heads, self.width))  # (n, heads, width)
        sigma = self.alpha(h).sigmoid()[..., None]  # (n, heads, 1)
        least = state.w_u.topk(self.heads, largest=False).indices  # (n, heads)
        w_lu = F.one_hot(least, self.slots).to(x.dtype)  # (n, heads, slots)
        w_w = sigma * state.w_r + (1 - sigma) * w_lu
        M = state.M
        if self.erase:
            M = M * (1 - w_lu.sum(1))[..., None]
        M = M + w_w.mT @ k
        w_r = (F.normalize(k, dim=-1) @ F.normalize(M, dim=-1).mT)
        w_r = (self.sharp * w_r).softmax(-1)
        w_u = self.gamma * state.w_u + w_r.sum(1) + w_w.sum(1)
        r = (w_r @ M).flatten(1)
        return self.head(torch.cat([h, r], -1)), MemoryState(h, c, M, w_r, w_u)
    sharp = 1.0


def _made(problem: Problem) -> MANN:
    body = Conv4(problem.image[0])
    return MANN(body, features_of(body, problem.image), problem.ways)

def _lstm(problem: Problem) -> LSTMReader:
    body = Conv4(problem.image[0])
    return LSTMReader(body, features_of(body, problem.image), problem.ways)


METHODS = {
    "mann": Method("MANN", _made, {"quick": Preset(300, 5, 1, 9, tasks=4), "full": Preset(5000, 5, 1, 9, tasks=16, episodes=1000)}, rotations="classes"),
    "lstm": Method("LSTM", _lstm, {"quick": Preset(300, 5, 1, 9, tasks=4), "full": Preset(5000, 5, 1, 9, tasks=16, episodes=1000)}, rotations="classes"),
}
