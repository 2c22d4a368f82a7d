"""Neural processes (Garnelo et al. 2018, Kim et al. 2019): functions with how sure one may be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.learners.base import Learner, check_inputs, check_points
from metautils.precision import all_digits


class ConditionalNeuralProcess(Learner):
    """Each support point becomes a vector; their mean and a query's x give mean and deviation.

    `r_i = h(x_i, y_i)`, `r` the mean of all r_i, `(mu, sigma) = g(r, x)`, of Garnelo et al. 2018. A
    mean knows no order, and each query is answered alone. It learns by the likelihood of targets
    (`pieces`). Without a support set r is 0: the answer of training to no point at all.

    Args:
        inputs: numbers in one x.
        outputs: numbers in one y.
        width: of all layers and of r.
        floor: what sigma is always above. A likelihood has no bound where sigma may go to 0, so
            only those over the same floor can be compared.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> learner = ConditionalNeuralProcess(inputs=1)
        >>> x, y = torch.rand(2, 5, 1), torch.rand(2, 5, 1)
        >>> learner(x, y, torch.rand(2, 10, 1)).shape
        torch.Size([2, 10, 1])
        >>> sigma = learner.predict_distribution(x, y, torch.rand(2, 10, 1)).stddev
        >>> bool((sigma > 0.1).all())
        True
    """

    def __init__(
        self, inputs: int = 1, outputs: int = 1, width: int = 128, floor: float = 0.1
    ) -> None:
        super().__init__()
        if min(inputs, outputs, width) < 1 or floor <= 0:
            raise BadArgument(
                f"inputs={inputs}, outputs={outputs}, width={width}, floor={floor}: all must be "
                "above 0."
            )
        self.inputs, self.outputs, self.width, self.floor = inputs, outputs, width, floor
        self.encoder = _layers(inputs + outputs, width, width)  # h
        self.decoder = _layers(width + inputs, width, 2 * outputs)  # g

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """The mean of each query's target, `(tasks, Q, outputs)`; errors as of the next."""
        return self.predict_distribution(support_x, support_y, query_x).mean

    def predict_distribution(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Normal:
        """A normal distribution for each number of each query's target, `(tasks, Q, outputs)`.

        Raises:
            ValueError: if sizes are not those that the learner was made for, or a target is not
                finite.
        """
        check_points(support_x, support_y, self.inputs, self.outputs)
        check_inputs(query_x, self.inputs)
        with all_digits(query_x.device):  # of a likelihood half precision leaves too little
            r = self.read(support_x, support_y, query_x)  # (tasks, Q, width)
            mu, raw = self.decoder(torch.cat([r, query_x], -1)).chunk(2, -1)
            return Normal(mu, self.floor + F.softplus(raw), validate_args=False)

    def read(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """What each query is told of the support set, `(tasks, Q, width)`: the same for all."""
        points = self.encoder(torch.cat([support_x, support_y], -1))  # (tasks, S, width)
        r = points.sum(1, keepdim=True) / max(1, points.shape[1])
        return r.expand(-1, query_x.shape[1], -1)

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The negative log likelihood of all points, given a random number of them.

        Equation 4 of Garnelo et al. 2018: support and queries stand in one row, the first n points
        are the support set, n from 0 to all but one, and all are to be predicted.
        """
        x = torch.cat([episode.support_x, episode.query_x], 1)
        y = torch.cat([episode.support_y, episode.query_y], 1)
        n = int(torch.randint(x.shape[1], (), device="cpu"))
        found = self.predict_distribution(x[:, :n], y[:, :n], x)
        yield -found.log_prob(y).mean(), found.mean, y

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"width={self.width}, floor={self.floor:g}"


class AttentiveNeuralProcess(ConditionalNeuralProcess):
    """Each query reads from the support points by attention, in place of their mean.

    The deterministic path of Kim et al. 2019: keys are made of the support's x, what is looked for
    of the query's x, and values are the r_i. There is no latent variable, so a task has no samples
    of functions, and support points do not attend to one another.

    Args:
        inputs, outputs, width, floor: as in `ConditionalNeuralProcess`.
        heads: of the attention.

    Raises:
        ValueError: if a number is not positive, or width is no multiple of heads.

    Example:
        >>> learner = AttentiveNeuralProcess(inputs=1, width=32)
        >>> x, y = torch.rand(2, 5, 1), torch.rand(2, 5, 1)
        >>> learner(x, y, torch.rand(2, 10, 1)).shape
        torch.Size([2, 10, 1])
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        width: int = 128,
        floor: float = 0.1,
        heads: int = 8,
    ) -> None:
        super().__init__(inputs, outputs, width, floor)
        if heads < 1 or width % heads:
            raise BadArgument(f"width={width}, heads={heads}: width must be a multiple of heads.")
        self.places = _layers(inputs, width, width)  # keys, and what is looked for
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def read(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """What each query is told of the support set, `(tasks, Q, width)`."""
        if not support_x.shape[1]:
            return super().read(support_x, support_y, query_x)
        points = self.encoder(torch.cat([support_x, support_y], -1))  # (tasks, S, width)
        keys, looked_for = self.places(support_x), self.places(query_x)
        return self.attention(looked_for, keys, points, need_weights=False)[0]

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"{super().extra_repr()}, heads={self.attention.num_heads}"


def _layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, outputs),
    )  # fmt: skip
