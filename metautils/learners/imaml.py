"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019): a start that phi is pulled back to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from metautils.adapt import Adapted, Named, inner_steps, twice_differentiable
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.hypergradients import conjugate_gradients, implicit_gradient
from metautils.learners.base import Method, task_loss
from metautils.learners.maml import MAML, PRESETS, on_strided_conv4


class IMAML(MAML):
    """`phi = argmin L_support(phi) + lam/2 |phi - theta|^2`, and the gradient of that minimum.

    The inner problem is equation 3 of the paper, here descended by some gradient steps from theta.
    The meta-gradient `(I + H/lam)^-1 g` (its equation 6) looks at where they ended only: no step is
    kept, so memory does not grow with their number. It is right where the steps have nearly solved
    the inner problem, which `lam` makes easy and `steps` have to see to.

    Args:
        net, lr, steps, options: as in `MAML`; every weight that is not frozen is adapted.
        lam: lambda, the strength of the pull, above 0. The rate must stay below 2 over lambda and
            the greatest curvature of the support loss together.
        products: Hessian-vector products of the conjugate gradients, for each task.

    Raises:
        ValueError: if lam is not above 0, products is below 1, an option is one that only steps
            with a graph can have, or as `MAML` does.

    Example:
        >>> from metautils.nets import mlp
        >>> learner = IMAML(mlp(inputs=4, outputs=5), lr=0.1, steps=16)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.1,
        steps: int = 16,
        lam: float = 2.0,
        products: int = 5,
        **options: object,
    ) -> None:
        for name in options.keys() & {"first_order", "learned_rates", "multi_step_loss"}:
            raise BadArgument(f"IMAML does not go back through its steps: leave out {name}.")
        super().__init__(
            net, lr, steps, first_order=True, learned_rates=False, multi_step_loss=0, **options
        )
        if not lam > 0 or products < 1:
            raise BadArgument(f"lam={lam}, products={products}: above 0 and at least 1 are needed.")
        if self.statistics or self.options["only"]:
            raise BadArgument(
                "IMAML adapts every weight and keeps no running statistics: leave out only=..., "
                "and build the network with BatchNorm."
            )
        self.lam, self.products = lam, products

    def inner_loss(self, f: Adapted, x: Tensor, y: Tensor, theta: Named) -> Tensor:
        """The support loss and the pull towards theta."""
        pulls = [(f.parameters[name] - p).square().sum() for name, p in theta.items()]
        return task_loss(f(x), y) + self.lam / 2 * sum(pulls)

    def path(self, support_x: Tensor, support_y: Tensor) -> Iterator[Adapted]:
        """The network after 0, 1, 2, ... inner steps on *one* task's support set, without end."""
        theta = self._theta()
        return inner_steps(
            self.net,
            lambda f: self.inner_loss(f, support_x, support_y, theta),
            self.optimizer(),
            first_order=True,
        )

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """A scalar of the query loss's value and the implicit gradient, and the predictions."""
        if not episode.support_y.is_floating_point():
            self._check_labels(episode.support_x, episode.support_y)
        steps = self.steps if self.training else self.test_steps
        theta = self._theta()
        start = _flat(theta)  # (parameters,)

        def task(x: Tensor, y: Tensor, queries: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
            f = next(islice(self.path(x, y), steps, None))

            def at(phi: Tensor) -> Adapted:
                return Adapted(self.net, {**f.parameters, **_named(phi, theta)}, f.buffers)

            with torch.enable_grad(), twice_differentiable(self.net):
                towards = implicit_gradient(
                    lambda phi, centre: self.inner_loss(at(phi), x, y, _named(centre, theta)),
                    lambda phi: task_loss(self._predict(at(phi), x, queries), answers),
                    _flat({name: f.parameters[name] for name in theta}),
                    start,
                    partial(conjugate_gradients, steps=self.products),
                )
            return towards, self._predict(f, x, queries)

        with torch.no_grad():  # nothing of the inner steps is kept
            parts = (episode.support_x, episode.support_y, episode.query_x, episode.query_y)
            # (tasks, parameters) and (tasks, Q, outputs)
            towards, predictions = self._over_tasks(task, *parts)
            loss = self.loss(predictions, episode.query_y)
        slope = towards.mean(0) @ start
        return loss + (slope - slope.detach()), predictions

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        return f"{super().extra_repr()}, lam={self.lam}, products={self.products}"

    def _theta(self) -> Named:
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}


def _flat(named: Named) -> Tensor:
    return torch.cat([p.flatten() for p in named.values()])


def _named(flat: Tensor, like: Named) -> Named:
    """The parts of a vector under the names of parameters, in their shapes."""
    parts = flat.split([p.numel() for p in like.values()])
    return {name: x.view_as(p) for x, (name, p) in zip(parts, like.items(), strict=True)}


METHODS = {"imaml": Method("iMAML", on_strided_conv4(IMAML), PRESETS)}
