"""Optimization as a model for few-shot learning (Ravi and Larochelle 2017): the Meta-LSTM."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from metautils.adapt import Adapted, Named
from metautils.errors import Diverged
from metautils.learners.base import Method, Preset, Problem
from metautils.learners.learned_optimizer import (
    LSTMCell,
    check_memory,
    coordinates,
    log_sign,
    named,
)
from metautils.learners.maml import MAML
from metautils.nets import Conv4, classifier, features_of

CLIP = 0.25  # of meta-gradients, as in the paper


class MetaLSTMCell(nn.Module):
    """`c_t = f_t * c_(t-1) + i_t * c~_t`, whose cell state c is phi and c~ minus the gradient.

    The gates are learned, and shared by all coordinates. With f = 1 and i = alpha this is
    gradient descent.

    Args:
        hidden: units of the ordinary LSTM below, which sees gradients and loss.

    Example:
        >>> phi, gradients = {"w": torch.rand(3, 2)}, {"w": torch.rand(3, 2)}
        >>> new, state = MetaLSTMCell(hidden=8).step(phi, gradients, {}, 0, torch.tensor(1.0))
        >>> new["w"].shape, state["f"].shape
        (torch.Size([3, 2]), torch.Size([6]))
    """

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least 1.")
        self.first = LSTMCell(4, hidden)
        self.W_F, self.W_I = (nn.Parameter(torch.empty(hidden + 2)) for _ in range(2))
        for p in self.parameters():
            nn.init.uniform_(p, -0.01, 0.01)
        # f near 1 and i near 0: it starts as gradient descent with small steps. (The authors' own
        # program draws the forget gate's bias from 4 to 5.)
        self.b_F = nn.Parameter(torch.empty(1).uniform_(4, 6))
        self.b_I = nn.Parameter(torch.empty(1).uniform_(-5, -4))

    def step(
        self, phi: Named, gradients: Named, state: dict, k: int, loss: Tensor
    ) -> tuple[Named, dict]:
        """Inner step number `k`, counted from 0: new parameters and state."""
        g, c = coordinates({name: gradients[name] for name in phi}, k), coordinates(phi)
        check_loss(loss, k)
        check_memory(state, len(g), k)
        # (2, n), twice: (4, n)
        seen = torch.cat([log_sign(g), log_sign(loss[None]).expand(2, len(g))])
        h1, c1 = self.first(seen, state.get("h1"), state.get("c1"))
        zeros = torch.zeros_like(g)
        f = _gate(self.W_F, self.b_F, h1, c, state.get("f", zeros))
        i = _gate(self.W_I, self.b_I, h1, c, state.get("i", zeros))
        new = f * c - i * g  # (n,)
        return named(new, phi), {"h1": h1, "c1": c1, "f": f, "i": i}


def check_loss(loss: Tensor, k: int) -> None:
    """Stop where the inner loss is no number."""
    if not bool(loss.detach().isfinite()):
        raise Diverged(
            f"The inner loss is not finite at inner step {k + 1}: look for bad values in the "
            "inputs or targets, or make fewer or smaller steps."
        )


class MetaLSTM(MAML):
    """Learn the start, as MAML does, and with it the rule that makes every step.

    `net` holds c_0, the cell's initial state. As in the paper, gradients and losses enter the cell
    as constants, and with `nn.BatchNorm2d` in
    the network queries are normalised by their own batch in training and, when tested, by the
    running averages of their task's inner steps. A `momentum` near 1 lets these forget the start.

    The paper scales meta-gradients down to a norm of 0.25: `meta_train(..., clip=CLIP)`.

    Args:
        net: its outputs are the logits of all ways; see `MAML`.
        steps: T, in training and testing.
        hidden: as in `MetaLSTMCell`.
        clip: inner gradients are scaled down to this norm, so that a bad step cannot run away.
        first_order: as the paper. If False the meta-gradient goes through gradients and losses
            too, which torch's batch normalisation allows at several times the cost.

    Raises:
        ValueError: as `MAML`.
        FloatingPointError: if an inner gradient is not finite; tells the step.

    Example:
        >>> from metautils.nets import mlp
        >>> learner = MetaLSTM(mlp(inputs=4, outputs=5), steps=2)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    keeps_statistics = True

    def __init__(
        self,
        net: nn.Module,
        steps: int = 5,
        hidden: int = 20,
        clip: float = 10.0,
        first_order: bool = True,
    ) -> None:
        super().__init__(net, steps=steps, first_order=first_order, vectorise=False)
        if clip <= 0:
            raise ValueError(f"clip is {clip}; a norm must be above 0.")
        self.options["clip"], self.cell = clip, MetaLSTMCell(hidden)
        self.net.train()

    def optimizer(self) -> MetaLSTMCell:
        """The learned one."""
        return self.cell

    def train(self, mode: bool = True) -> MetaLSTM:
        """Set the mode of the learner; inner steps always normalise by their own batch."""
        super().train(mode)
        self.net.train()
        return self

    def _predict(self, f: Adapted, support_x: Tensor, queries: Tensor) -> Tensor:
        self.net.train(self.training)  # a test's queries must not see one another
        try:
            return f(queries)
        finally:
            self.net.train()

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        told = {"steps": self.steps, "hidden": len(self.cell.W_F) - 2} | self.options
        return ", ".join(f"{name}={value}" for name, value in told.items())


def _gate(W: Tensor, b: Tensor, h: Tensor, c: Tensor, before: Tensor) -> Tensor:
    return (W[:-2] @ h + W[-2] * c + W[-1] * before + b).sigmoid()  # (hidden,) @ (hidden, n): (n,)


def _made(problem: Problem) -> MetaLSTM:
    """On the paper's network of 32 filters; never transductive."""
    norm = partial(nn.BatchNorm2d, momentum=0.95)
    body = Conv4(problem.image[0], width=32, norm=norm)
    return MetaLSTM(classifier(body, features_of(body, problem.image), problem.ways))


METHODS = {
    "meta_lstm": Method(
        "Meta-LSTM",
        _made,
        {
            "quick": Preset(300, 5, 1, 5, clip=CLIP),
            "full": Preset(12000, 5, 1, 5, episodes=1000, lr=2e-3, clip=CLIP),
        },
    )
}
