"""Memory-augmented neural networks (Santoro et al. 2016), and the plain LSTM beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.learners.base import Method, Preset, Problem
from metautils.learners.reader import Reader
from metautils.nets import Conv4, features_of
from metautils.precision import all_digits, single


class LSTMState(NamedTuple):
    """What an LSTM remembers: h and c, each `(n, hidden)`.

    Example:
        >>> LSTMReader(nn.Identity(), features=8, ways=5, hidden=6).begin(2).h.shape
        torch.Size([2, 6])
    """

    h: Tensor
    c: Tensor


class LSTMReader(Reader):
    """An LSTM reads the images one by one, each with the label of the one before.

    So it answers at every place of a sequence, and learns from all of them: `pieces` puts support
    and queries into one row, in a random order, as Santoro et al. 2016 do.

    Args:
        embed: a network `(n, ...)` to `(n, features)`.
        features: of an image.
        ways: how many labels there are an input for.
        hidden: units of the LSTM.

    Example:
        >>> learner = LSTMReader(nn.Linear(4, 8), features=8, ways=5)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape, learner.in_a_row(x, y).shape
        (torch.Size([2, 10, 5]), torch.Size([2, 5, 5]))
    """

    def __init__(self, embed: nn.Module, features: int, ways: int, hidden: int = 200) -> None:
        super().__init__(embed, ways)
        self.cell, self.head = nn.LSTMCell(features + ways, hidden), nn.Linear(hidden, ways)

    def begin(self, n: int) -> NamedTuple:
        """The state before the first image of `n` sequences."""
        zeros = self.head.weight.new_zeros(n, self.cell.hidden_size)
        return LSTMState(zeros, zeros)

    def step(self, x: Tensor, state: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """One place of `n` sequences: features and label `(n, d + ways)` to logits `(n, ways)`."""
        state = LSTMState(*self.cell(x, state))
        return self.head(state.h), state

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits `(tasks, Q, ways)`."""
        support, labels, queries, _ = self.read(support_x, support_y, query_x)
        tasks, q = queries.shape[:2]
        with all_digits(queries.device):
            state = self.along(support, labels)[1][-1]
            # With a query the label of the last support image arrives, (tasks, Q, ways).
            last = self.one_hot(labels[:, -1:], support).expand(-1, q, -1)
            x = torch.cat([queries, last], -1).flatten(0, 1)  # (tasks * Q, d + ways)
            # Each query goes on by itself from a copy of the state: (tasks * Q, ...).
            state = type(state)(*(part.repeat_interleave(q, 0) for part in state))
            return self.step(x, state)[0].unflatten(0, (tasks, q))

    def in_a_row(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of every image, each before its own label is known: `(tasks, T, ways)`.

        Args:
            x: `(tasks, T, ...)`, in reading order.
            y: `(tasks, T)`.

        Raises:
            ValueError: if there is no image, or a label has no input.
        """
        self.check(y)
        features = single(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # (tasks, T, d)
        with all_digits(x.device):
            return self.along(features, y)[0]

    def along(self, features: Tensor, labels: Tensor) -> tuple[Tensor, list[NamedTuple]]:
        """Logits `(tasks, T, ways)` and the state after each place.

        Args:
            features: `(tasks, T, d)`, in reading order.
            labels: `(tasks, T)`; the last one is not looked at.
        """
        # The label of the image before, (tasks, T, ways); none at the first place.
        before = F.pad(self.one_hot(labels, features)[:, :-1], (0, 0, 1, 0))
        logits, states = [], [self.begin(len(features))]
        for x in torch.cat([features, before], -1).unbind(1):  # (tasks, d + ways)
            out, state = self.step(x, states[-1])
            logits.append(out)
            states.append(state)
        return torch.stack(logits, 1), states[1:]

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The loss of all places of the rows."""
        x, y = in_a_random_row(episode)
        logits = self.in_a_row(x, y)
        yield self.loss(logits, y), logits, y

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"ways={self.ways}, hidden={self.cell.hidden_size}"


def in_a_random_row(
    episode: Episode, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Support and queries of every task in one row, `(tasks, T, ...)` and `(tasks, T)`."""
    x = torch.cat([episode.support_x, episode.query_x], 1)
    y = torch.cat([episode.support_y, episode.query_y], 1)
    order = torch.rand(y.shape, generator=generator, device="cpu").argsort(1).to(x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], order], y.gather(1, order)


class MemoryState(NamedTuple):
    """What a MANN remembers.

    h and c are the controller's, `(n, hidden)`; M is the memory, `(n, slots, width)`; w_r the
    weights that were read with, `(n, heads, slots)`, and w_u the usage, `(n, slots)`.

    Example:
        >>> state = MANN(nn.Identity(), features=8, ways=5, slots=7, width=3).begin(2)
        >>> state.M.shape, state.w_r.shape
        (torch.Size([2, 7, 3]), torch.Size([2, 4, 7]))
    """

    h: Tensor
    c: Tensor
    M: Tensor
    w_r: Tensor
    w_u: Tensor


class MANN(LSTMReader):
    """An LSTM with an external memory, whose least used slots are written to.

    Equations 2 to 8 of the paper, where k and the weights have `heads` rows. How several heads
    share the least used slots is our choice: head r writes its key k_r to the r-th least used
    slot, or where it has just read, and all these slots are emptied first.

    Args:
        embed, features, ways, hidden: as in `LSTMReader`.
        slots, width: of the memory.
        heads: that read and write.
        scale: what cosines are multiplied with before the softmax. The paper has 1, with which a
            head reads a little of everything.
        gamma: the share of the usage that is left a step later.

    Example:
        >>> learner = MANN(nn.Linear(4, 8), features=8, ways=5)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape, learner.in_a_row(x, y).shape
        (torch.Size([2, 10, 5]), torch.Size([2, 5, 5]))
    """

    def __init__(
        self,
        embed: nn.Module,
        features: int,
        ways: int,
        hidden: int = 200,
        slots: int = 128,
        width: int = 40,
        heads: int = 4,
        scale: float = 1.0,
        gamma: float = 0.95,
    ) -> None:
        super().__init__(embed, features, ways, hidden)
        if not 1 <= heads <= slots:
            raise BadArgument(f"{heads} heads need as many slots, and 1 or more; slots is {slots}.")
        self.slots, self.width, self.heads = slots, width, heads
        self.scale, self.gamma = scale, gamma
        read = heads * width  # numbers
        self.cell = nn.LSTMCell(features + ways + read, hidden)
        self.key, self.gate = nn.Linear(hidden, read), nn.Linear(hidden, heads)
        self.head = nn.Linear(hidden + read, ways)

    def begin(self, n: int) -> MemoryState:
        """The state before the first image of `n` sequences: nothing is stored or used."""
        h, c = super().begin(n)
        M = h.new_full((n, self.slots, self.width), 1e-6)  # of 0 there is no cosine
        w_r = h.new_zeros(n, self.heads, self.slots)
        return MemoryState(h, c, M, w_r, w_r.sum(1))

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """One place of `n` sequences: features and label `(n, d + ways)` to logits `(n, ways)`."""
        r = (state.w_r @ state.M).flatten(1)  # (n, heads * width), what was read last
        h, c = self.cell(torch.cat([x, r], -1), (state.h, state.c))
        k = self.key(h).tanh().unflatten(-1, (self.heads, self.width))
        w_lu = self.least_used(state.w_u)
        w_w = torch.lerp(w_lu, state.w_r, self.gate(h).sigmoid()[..., None])
        M = self.emptied(state.M, w_lu) + w_w.mT @ k  # (n, slots, width)
        w_r = (self.scale * F.normalize(k, dim=-1) @ F.normalize(M, dim=-1).mT).softmax(-1)
        w_u = self.gamma * state.w_u + (w_r + w_w).sum(1)
        logits = self.head(torch.cat([h, (w_r @ M).flatten(1)], -1))
        return logits, MemoryState(h, c, M, w_r, w_u)

    def least_used(self, w_u: Tensor) -> Tensor:
        """One 1 in each row, at the slot that a head may write to: `(n, heads, slots)`."""
        slots = w_u.topk(self.heads, largest=False, sorted=True).indices  # (n, heads)
        return F.one_hot(slots, self.slots).to(w_u.dtype)

    def emptied(self, M: Tensor, w_lu: Tensor) -> Tensor:
        """The memory `(n, slots, width)` without what lay in the least used slots."""
        return M * (1 - w_lu.sum(1))[..., None]  # times (n, slots, 1)

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        names = ("slots", "width", "heads", "scale", "gamma")
        return ", ".join([super().extra_repr(), *(f"{x}={getattr(self, x)}" for x in names)])


def _lstm(problem: Problem) -> LSTMReader:
    body = Conv4(problem.image[0])
    return LSTMReader(body, features_of(body, problem.image), problem.ways)


def _mann(problem: Problem) -> MANN:
    """On a Conv-4, where the paper reads pixels, and with a factor before the softmax."""
    body = Conv4(problem.image[0])
    return MANN(body, features_of(body, problem.image), problem.ways, scale=10.0)


# Rows of ten images of each class, as in the paper.
_PRESETS = {
    "quick": Preset(300, 5, 1, 9, tasks=4),
    "full": Preset(4000, 5, 1, 9, tasks=16, episodes=1000),
}
METHODS = {
    "mann": Method("MANN", _mann, _PRESETS, rotations="classes"),
    "lstm": Method("LSTM", _lstm, _PRESETS, rotations="classes"),
}
