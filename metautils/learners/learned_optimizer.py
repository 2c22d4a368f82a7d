"""Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from metautils.adapt import Adapted, Named, Optimizer, for_vmap, inner_steps, vmap_obstacle
from metautils.episode import Episode
from metautils.errors import Diverged
from metautils.learners.base import Learner, task_loss
from metautils.precision import all_digits

FLOOR = 1e-8  # a loss this small is small enough: below it, the logarithm rewards nothing more


class LSTMCell(nn.Module):
    """`nn.LSTMCell` with the coordinates last, at less than half its time on a CPU.

    Shapes:
        x `(inputs, n)`, h and c `(hidden, n)`, None at the first step; returns the new h and c.

    Example:
        >>> h, c = LSTMCell(inputs=2, hidden=20)(torch.rand(2, 7), None, None)
        >>> h.shape, c.shape
        (torch.Size([20, 7]), torch.Size([20, 7]))
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4 * hidden, inputs + hidden))
        self.bias = nn.Parameter(torch.empty(4 * hidden, 1))
        for p in self.parameters():
            nn.init.uniform_(p, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of the LSTM (Hochreiter and Schmidhuber 1997) with forget gates."""
        if h is None:
            h = c = x.new_zeros(len(self.bias) // 4, x.shape[1])
        # [x, h] is (inputs + hidden, n); their product (4 * hidden, n); each gate (hidden, n)
        i, f, candidate, o = torch.addmm(self.bias, self.weight, torch.cat([x, h])).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
        return o.sigmoid() * c.tanh(), c


class LSTMOptimizer(nn.Module):
    """`phi <- phi + g`, where one small LSTM makes g of every coordinate's own gradient.

    All coordinates share the LSTM's weights theta; each keeps a hidden state of its own. So the
    optimiser has as many parameters for a network of ten weights as for one of a million.

    Args:
        hidden: units in each of the two layers.
        scale: of the output, so that an untrained optimiser makes small steps.

    Raises:
        ValueError: if hidden or scale is not above 0.

    Example:
        >>> phi, gradients = {"w": torch.rand(3, 2)}, {"w": torch.rand(3, 2)}
        >>> new, state = LSTMOptimizer(hidden=8).step(phi, gradients, {}, 0, torch.tensor(1.0))
        >>> new["w"].shape, state["h1"].shape
        (torch.Size([3, 2]), torch.Size([8, 6]))
    """

    def __init__(self, hidden: int = 20, scale: float = 0.1) -> None:
        super().__init__()
        if hidden < 1 or scale <= 0:
            raise ValueError(f"hidden={hidden}, scale={scale}: both must be above 0.")
        self.first, self.second = LSTMCell(2, hidden), LSTMCell(hidden, hidden)
        self.output, self.scale = nn.Linear(hidden, 1), scale

    def step(
        self, phi: Named, gradients: Named, state: dict, k: int, loss: Tensor
    ) -> tuple[Named, dict]:
        """Inner step number `k`, counted from 0: new parameters and state."""
        inputs = self.seen(coordinates({name: gradients[name] for name in phi}, k))
        check_memory(state, inputs.shape[1], k)
        h1, c1 = self.first(inputs, state.get("h1"), state.get("c1"))
        h2, c2 = self.second(h1, state.get("h2"), state.get("c2"))
        update = named(self.scale * self.output(h2.T), phi)  # (hidden, n) to (n, 1), then cut up
        new = {name: p + update[name] for name, p in phi.items()}
        return new, {"h1": h1, "c1": c1, "h2": h2, "c2": c2}

    def seen(self, gradients: Tensor) -> Tensor:
        """What the LSTM reads of the gradients: `(n,)` to `(2, n)`."""
        return log_sign(gradients)


class FromScratch(Learner):
    """Ordinary training as a mapping: a fresh network, some steps of an optimiser, predictions.

    With an optimiser that is a module, meta-training teaches it to train. The meta-loss is the mean
    over all steps of the *logarithm* of the loss: equation 3 of the paper, which has the loss
    itself there, is about the first steps only where losses fall by powers of ten. As in the paper
    the optimiser is updated after every `truncation` steps: `meta_train(..., each_piece=True)`.

    Args:
        make: gives a freshly initialised network.
        optimizer: `LSTMOptimizer`, or a fixed one to compare with.
        steps: T, the length of a training.
        truncation: steps through which the meta-gradient runs back; None: through all.
        batch: support examples in each step, drawn anew; None: all of them.
        first_order: take the gradients that the optimiser sees as constants, as the paper does.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> learner = FromScratch(lambda: nn.Linear(2, 1), LSTMOptimizer(), steps=3)
        >>> x, y = torch.rand(4, 10, 2), torch.rand(4, 10, 1)
        >>> learner(x, y, torch.rand(4, 7, 2)).shape, learner.losses(x, y).shape
        (torch.Size([4, 7, 1]), torch.Size([4, 4]))
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        optimizer: Optimizer,
        steps: int = 100,
        truncation: int | None = None,
        batch: int | None = None,
        *,
        first_order: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"steps": steps, "truncation": truncation, "batch": batch}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.make, self.optimizer, self.steps, self.batch = make, optimizer, steps, batch
        self.truncation, self.first_order = truncation or steps, first_order

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Predictions for the queries after `steps` steps on the support set."""
        with all_digits(query_x.device):  # as in training, see `pieces`
            path, _ = self.train_networks(support_x, support_y)
            return next(islice(path, self.steps, None))(query_x)

    def train_networks(
        self, x: Tensor, y: Tensor
    ) -> tuple[Iterator[Adapted], Callable[[Adapted], Tensor]]:
        """The networks of all tasks after 0, 1, 2, ... steps, and their losses there `(tasks,)`."""
        tasks, points = y.shape[:2]
        nets = Copies([self.make() for _ in range(tasks)]).to(x.device)
        rows = None
        if self.batch is not None:
            # (steps + 1, batch)
            rows = torch.randint(points, (self.steps + 1, self.batch), device="cpu").to(x.device)

        def loss(f: Adapted) -> Tensor:
            these = slice(None) if rows is None else rows[f.k]
            return _each_loss(f(x[:, these]), y[:, these])  # of (tasks, batch, ...)

        options = {"first_order": self.first_order}
        return inner_steps(nets, lambda f: loss(f).sum(), self.optimizer, **options), loss

    @torch.no_grad()
    def losses(self, support_x: Tensor, support_y: Tensor) -> Tensor:
        """Losses of a training after 0, 1, ... `steps` steps, `(tasks, steps + 1)`.

        On the whole support set, also where the steps see only a part of it.
        """
        with all_digits(support_x.device):
            path, _ = self.train_networks(support_x, support_y)
            return torch.stack(
                [_each_loss(f(support_x), support_y) for f in islice(path, self.steps + 1)], 1
            )

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The meta-loss of every `truncation` steps, cut off from the steps before."""
        # Half precision would cost small losses their digits. The context must not stay open over
        # a yield, where the caller enters its own.
        device = episode.query_x.device
        with all_digits(device):
            path, loss = self.train_networks(episode.support_x, episode.support_y)
            next(path)
        for done in range(0, self.steps, self.truncation):
            total = 0.0
            with all_digits(device):
                for f in islice(path, min(self.truncation, self.steps - done)):
                    total = total + self.scored(loss(f)).sum()
                with torch.no_grad():
                    predictions = f(episode.query_x)
            yield total / (self.steps * episode.tasks), predictions, episode.query_y
            f.detach_()

    def scored(self, losses: Tensor) -> Tensor:
        """What losses of a step count in the meta-loss, of the same shape."""
        return (losses + FLOOR).log()

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        told = ("steps", "truncation", "batch", "first_order")
        own = [f"{name}={getattr(self, name)}" for name in told]
        return ", ".join([*own, f"scale={getattr(self.optimizer, 'scale', None)}"])


def _each_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    return torch.vmap(task_loss)(predictions, targets)


class Copies(nn.Module):
    """Networks of one shape as one module: parameters `(copies, ...)`, inputs `(copies, n, ...)`.

    Args:
        nets: without buffers.

    Example:
        >>> Copies([nn.Linear(2, 1) for _ in range(3)])(torch.rand(3, 10, 2)).shape
        torch.Size([3, 10, 1])
    """

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = copy.deepcopy(nets[0])
        stacked, _ = stack_module_state(nets)
        for name, p in self.nets.named_parameters():
            p.data = stacked[name].detach()
        self._one = [nets[0]]  # in a list, so that its parameters are not this module's

    def forward(self, x: Tensor) -> Tensor:
        """Each network's output for its own inputs."""
        one = self._one[0]
        parameters = dict(self.nets.named_parameters())

        def output(p: Named, x: Tensor) -> Tensor:
            return functional_call(one, p, (x,))

        if vmap_obstacle(one):
            rows = ({name: p[k] for name, p in parameters.items()} for k in range(len(x)))
            return torch.stack([*map(output, rows, x)])  # (copies, n, ...)
        with for_vmap(one, "all networks run side by side, so build them without it.", len(x)):
            return torch.vmap(output)(parameters, x)


def log_sign(x: Tensor, p: float = 10.0) -> Tensor:
    """`(log|x| / p, sign x)` where `|x| >= exp(-p)`, else `(-1, exp(p) x)`: appendix A, p = 10.

    Gradients of all magnitudes become numbers of about 1.

    Shapes:
        `(n,)` to `(2, n)`.
    """
    large = x.abs() >= x.new_full((), -p).exp()
    safe = torch.where(large, x, 1.0)
    size = torch.where(large, safe.abs().log() / p, -1.0)
    return torch.stack([size, torch.where(large, x.sign(), torch.e**p * x)])


def coordinates(tensors: Named, k: int | None = None) -> Tensor:
    """All entries of all tensors in one row, `(n,)`.

    Raises:
        FloatingPointError: given the number of the step, if an entry is not finite.
    """
    row = torch.cat([x.flatten() for x in tensors.values()])
    if k is not None and not bool(row.detach().isfinite().all()):
        names = ", ".join(n for n, x in tensors.items() if not bool(x.detach().isfinite().all()))
        raise Diverged(
            f"The inner gradient of {names} is not finite at inner step {k + 1} of the unroll: "
            "the steps before it were too large. Make fewer of them, clip the gradient "
            "(clip=...), or look for bad values in the inputs."
        )
    return row


def named(row: Tensor, like: Named) -> Named:
    """The inverse of `coordinates`: a row cut up into tensors of these names and shapes."""
    parts = row.flatten().split([x.numel() for x in like.values()])  # (n_k,) each
    return {n: part.view(x.shape) for (n, x), part in zip(like.items(), parts, strict=True)}


def check_memory(state: dict, count: int, k: int) -> None:
    """Tell when the optimiser remembers another number of coordinates than it is given."""
    if state and state["h1"].shape[1] != count:
        raise ValueError(
            f"The optimiser remembers {state['h1'].shape[1]} coordinates but is given {count} at "
            f"inner step {k + 1}: parameters must not be added or removed between steps."
        )
