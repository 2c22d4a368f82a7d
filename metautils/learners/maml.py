"""Model-agnostic meta-learning (Finn, Abbeel and Levine 2017): learn where to start from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from metautils.adapt import SGD, Adam, Adapted, adapt, inner_steps, over_tasks, vmap_obstacle
from metautils.episode import Episode
from metautils.learners.base import Learner, Method, Preset, Problem, task_loss
from metautils.nets import (
    BatchNorm,
    Conv4,
    StepBatchNorm,
    batch_norm_mode,
    classifier,
    features_of,
    set_step,
)
from metautils.precision import all_digits


class MAML(Learner):
    """`phi = theta - lr * grad L_support(theta)`, some steps of it; then predict with phi.

    The inner step is in section 2.2 of the paper; training through it is its algorithm 2. Of MAML++
    (Antoniou et al. 2019, section 4) there are `learned_rates`, `multi_step_loss` and, as a layer
    of the network, `metautils.nets.StepBatchNorm`.

    Args:
        net: theta lives here; for classification its outputs are the logits of all ways.
        lr: alpha, the rate of the inner steps on the *mean* support loss.
        steps: inner steps in training.
        test_steps: inner steps in evaluation mode; as in training if None.
        first_order: leave the second derivative out: FOMAML (section 5.2 of the paper).
        only: adapt only these submodules or parameters.
        transductive: normalise the queries of a task by their own batch, as in the paper, so
            that they help one another. Otherwise by the statistics of the support set. No matter
            for a network without `BatchNorm`, or with `StepBatchNorm`.
        learned_rates: learn a rate for each parameter tensor and inner step, from `lr` on; then
            there are no more steps in evaluation mode than in training.
        multi_step_loss: in so many of the first meta-steps the query loss after *every* inner step
            counts, at first alike, then more and more the last one's, which is alone at the end.
        vectorise: all tasks at once by vmap; if None, what was measured to be faster, and one by
            one where a layer is known not to be for vmap, such as `nn.LSTM` or `nn.Dropout`.

    Raises:
        ValueError: if the net has no parameter, keeps running statistics, or a number is out of
            range.

    Example:
        >>> from metautils.nets import mlp
        >>> learner = MAML(mlp(inputs=4, outputs=5), lr=0.1, steps=3)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    keeps_statistics = False

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.4,
        steps: int = 1,
        test_steps: int | None = None,
        *,
        first_order: bool = False,
        only: Collection[str] = (),
        transductive: bool = True,
        learned_rates: bool = False,
        multi_step_loss: int = 0,
        vectorise: bool | None = None,
    ) -> None:
        super().__init__()
        _check_norms(net, self.keeps_statistics)
        SGD(lr)  # told here, not at the first task
        if steps < 1 or (test_steps is not None and test_steps < 0):
            raise ValueError(f"steps={steps}, test_steps={test_steps}: at least 1 and 0 are needed")
        if learned_rates and (test_steps or 0) > steps:
            raise ValueError(
                f"test_steps={test_steps} is above steps={steps}: with learned_rates there are "
                "rates for the steps of training only."
            )
        if multi_step_loss < 0:
            raise ValueError(f"multi_step_loss is {multi_step_loss}; it must be at least 0.")
        self.net, self.lr, self.steps = net, lr, steps
        self.test_steps = steps if test_steps is None else test_steps
        self.options = {"first_order": first_order, "only": only}
        kept = [name for name, x in net.named_modules() if isinstance(x, StepBatchNorm)]
        self.statistics = [f"{name}.{which}" for name in kept for which in ("mean", "var")]
        norms = not kept and any(isinstance(layer, BatchNorm) for layer in net.modules())
        self.transductive, self.from_support = norms and transductive, norms and not transductive
        self.vectorise = vectorise
        self.rates, self.multi_step_loss = None, multi_step_loss
        if learned_rates:
            self.rates = nn.ModuleList(_scalars(net, lr) for _ in range(steps))
        if multi_step_loss:
            self.register_buffer("meta_steps", torch.tensor(0))
        self.ways: int | None = None  # outputs of the net, seen at the first task

    def optimizer(self) -> SGD | Adam:
        """What makes the inner steps."""
        return SGD(self.lr if self.rates is None else self.rates)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Predictions for the queries after the inner steps on the support set."""
        after = self.steps if self.training else self.test_steps
        # from (tasks, 1, Q, ...)
        return self.after_steps(support_x, support_y, query_x, [after])[:, 0]

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The scalar whose gradient trains theta, and the predictions for the queries."""
        x, y, queries = episode.support_x, episode.support_y, episode.query_x
        weights = self.step_weights() if self.training else [1.0]
        if len(weights) == 1 or not weights[0]:  # only what is predicted in the end counts
            predictions = self(x, y, queries)
            return self.loss(predictions, episode.query_y), predictions
        after = self.after_steps(x, y, queries, range(1, self.steps + 1))  # (tasks, steps, Q, ...)
        losses = [self.loss(after[:, k], episode.query_y) for k in range(self.steps)]
        return sum(w * each for w, each in zip(weights, losses, strict=True)), after[:, -1]

    def step_weights(self) -> list[float]:
        """How much the query loss after each of the inner steps counts; they add up to 1."""
        shared = 0.0
        if self.multi_step_loss:
            shared = max(0.0, 1 - int(self.meta_steps) / self.multi_step_loss)
        weights = [shared / self.steps] * self.steps
        weights[-1] += 1 - shared
        return weights

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`meta_loss`, task by task where tasks are run one by one: each frees its graph."""
        for part in episode.parts(None if self._vectorised else 1):
            loss, predictions = self.meta_loss(part)
            yield loss * (part.tasks / episode.tasks), predictions, part.query_y
        if self.multi_step_loss:
            self.meta_steps += 1

    def after_steps(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, after: Sequence[int]
    ) -> Tensor:
        """Predictions after each of these numbers of inner steps, `(tasks, len(after), Q, ...)`."""
        if not support_y.is_floating_point():
            self._check_labels(support_x, support_y)

        def task(x: Tensor, y: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
            found = []
            for f in islice(self.path(x, y), max(after) + 1):
                if f.k in after:
                    set_step(self.net, f.k, remembered=not self.training)
                    found.append(self._predict(f, x, queries))
            # of one task: (len(after), Q, ...), then each of the statistics
            return torch.stack(found), *(f.buffers[name] for name in self.statistics)

        predictions, *statistics = self._over_tasks(task, support_x, support_y, query_x)
        if self.training:
            self._remember(statistics)
        return predictions

    @torch.no_grad()
    def _remember(self, statistics: Sequence[Tensor]) -> None:
        """Running statistics, from what each task made of them, `(tasks, steps + 1, channels)`."""
        for name, each in zip(self.statistics, statistics, strict=True):
            kept = self.net.get_buffer(name)
            # All tasks at once weigh as much as they would one after another.
            moved = 1 - (1 - StepBatchNorm.momentum) ** len(each)
            kept += moved / StepBatchNorm.momentum * (each.mean(0) - kept)

    def path(self, support_x: Tensor, support_y: Tensor) -> Iterator[Adapted]:
        """The network after 0, 1, 2, ... inner steps on *one* task's support set, without end."""

        def loss(f: Adapted) -> Tensor:
            set_step(self.net, f.k)
            return task_loss(f(support_x), support_y)

        return inner_steps(self.net, loss, self.optimizer(), **self.options)

    @torch.no_grad()
    def _check_labels(self, support_x: Tensor, support_y: Tensor) -> None:
        if self.ways is None:
            unadapted = adapt(self.net, task_loss, SGD(1.0), steps=0)
            self.ways = unadapted(support_x[0]).shape[-1]
        low, high = int(support_y.min()), int(support_y.max())
        if low < 0 or high >= self.ways:
            raise ValueError(
                f"Support labels run from {low} to {high}, but the network has {self.ways} "
                f"outputs: they must lie in [0, {self.ways})."
            )

    def _over_tasks(self, task: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        batch_norm_mode(self.net, fused=not self._vectorised)
        try:
            with all_digits(batches[0].device):  # the second derivative needs them
                return over_tasks(task, self.net, *batches, vectorise=self._vectorised)
        finally:
            batch_norm_mode(self.net, fused=False)

    def _predict(self, f: Adapted, support_x: Tensor, queries: Tensor) -> Tensor:
        if not self.from_support:
            return f(queries)
        shots = len(support_x)
        batch_norm_mode(self.net, fused=False, reference=shots)
        predictions = f(torch.cat([support_x, queries]))[shots:]  # (S + Q, ways) to (Q, ways)
        batch_norm_mode(self.net, fused=not self._vectorised)
        return predictions

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        told = {"lr": self.lr, "steps": self.steps, "transductive": self.transductive}
        if self.rates is not None:
            told["learned_rates"] = True
        if self.multi_step_loss:
            told["multi_step_loss"] = self.multi_step_loss
        if self.statistics:
            told["statistics"] = "each step's"
        return ", ".join(f"{name}={value}" for name, value in (told | self.options).items())

    @property
    def _vectorised(self) -> bool:
        if self.vectorise is not None:
            return self.vectorise
        # Measured by benchmarks/inner_loop.py: on a CPU convolutions are quicker one task after
        # another, small dense networks all tasks at once; a GPU wants few and large operations.
        on_cpu = next(self.net.parameters()).device.type == "cpu"
        if on_cpu and any(isinstance(layer, _ConvNd) for layer in self.net.modules()):
            return False
        return vmap_obstacle(self.net) is None


class FOMAML(MAML):
    """MAML without second derivatives: the query gradient at phi moves theta (section 5.2).

    Example:
        >>> from metautils.nets import mlp
        >>> learner = FOMAML(mlp(inputs=4, outputs=5), lr=0.1)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, net: nn.Module, lr: float = 0.4, steps: int = 1, **options: object) -> None:
        super().__init__(net, lr, steps, first_order=True, **options)


def _scalars(net: nn.Module, value: float) -> nn.ParameterDict:
    """A scalar for every parameter of a network, under its name."""
    return nn.ParameterDict(
        {name.replace(".", "_"): p.new_tensor(value) for name, p in net.named_parameters()}
    )


def _check_norms(net: nn.Module, keeps_statistics: bool) -> None:
    if not any(True for _ in net.parameters()):
        raise ValueError("The network has no parameters, so there is nothing to adapt.")
    for name, layer in net.named_modules():
        if isinstance(layer, _BatchNorm) and not keeps_statistics:
            raise ValueError(
                f"{name} is {type(layer).__name__}, whose statistics would mix tasks: build the "
                "network with metautils.nets.BatchNorm, as in Conv4(norm=BatchNorm)."
            )


def on_strided_conv4(
    learner: Callable[..., MAML], norm: Callable[[int], nn.Module] = BatchNorm, **options: object
) -> Callable[[Problem], MAML]:
    """A learner that adapts the strided network of Finn et al. 2017."""

    def make(problem: Problem) -> MAML:
        body = Conv4(problem.image[0], strided=True, norm=norm)
        net = classifier(body, features_of(body, problem.image), problem.ways)
        return learner(net, **options, transductive=problem.transductive)

    return make


PRESETS = {
    "quick": Preset(300, 5, 1, 5, tasks=8, lr=3e-3),
    "full": Preset(20000, 5, 1, 5, tasks=8, episodes=1000, lr=3e-3),
}
METHODS = {
    "maml": Method("MAML", on_strided_conv4(MAML, test_steps=3), PRESETS),
    "fomaml": Method("FOMAML", on_strided_conv4(FOMAML, test_steps=3), PRESETS),
}
