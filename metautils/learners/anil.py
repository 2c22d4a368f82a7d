"""ANIL, almost no inner loop (Raghu et al. 2020): MAML that adapts the last layer only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.data.bank import ClassBank
from metautils.learners.base import ON_BODY, Learner, Method, Problem, without_embedding
from metautils.learners.maml import MAML, PRESETS, on_strided_conv4
from metautils.nets import features_of
from metautils.precision import single

LENGTH = 10.0  # of a task's features, so that the head's logits can differ by as much
# Of the inner steps there, best at five shots and as good as any at one, on CIFAR-FS's validation
# classes with the body frozen: rates of 0.01 to 1, of 1 and 5 steps, tried.
RATE, STEPS = 0.1, 5


class ANIL(MAML):
    """The body stays as meta-trained; the inner steps move the head (section 5 of the paper).

    Args:
        net: with a submodule named `head`, as `metautils.nets.classifier` makes it.
        lr, steps, options: as in `MAML`.

    Example:
        >>> import torch
        >>> from metautils.nets import mlp
        >>> learner = ANIL(mlp(inputs=4, outputs=5), steps=3)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, net: nn.Module, lr: float = 0.4, steps: int = 1, **options: object) -> None:
        super().__init__(net, lr, steps, only=("head",), **options)


class FeatureANIL(Learner):
    """ANIL with a body that knows no task: features once, then MAML of the head alone on them.

    The same predictions and meta-gradients as by `ANIL`, whose inner steps leave the body as it is,
    for one pass through the body where that makes one for each inner step. No layer of the body may
    look at more than one image.

    Args:
        embed: the body, a network `(n, ...)` to `(n, features)`.
        head: what the inner steps move, on features of length `LENGTH`.

    Example:
        >>> learner = FeatureANIL(nn.Linear(4, 8), MAML(nn.Linear(8, 5), lr=0.1, steps=3))
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, embed: nn.Module, head: MAML) -> None:
        super().__init__()
        self.embed, self.head = embed, head

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits `(tasks, Q, ways)` of the head after its inner steps."""
        x = torch.cat([support_x, query_x], dim=1)  # (tasks, S + Q, ...)
        # (tasks, S + Q, d)
        features = single(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        features = LENGTH * F.normalize(features, dim=-1)
        shots = support_x.shape[1]
        return self.head(features[:, :shots], support_y, features[:, shots:])

    def on_features(self, bank: ClassBank) -> tuple[FeatureANIL, ClassBank]:
        """The same answers at less cost: a learner of features, and the features of all images.

        Puts this learner into evaluation mode.
        """
        self.eval()
        return without_embedding(self), bank.map(self.embed)

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        return self.head.extra_repr()


def _on_body(problem: Problem, embed: nn.Module) -> FeatureANIL:
    """A body that has learned elsewhere, with a head of zeros.

    From there one step on one image a class is the nearest centroid; a random head has to be
    unlearned first.
    """
    head = nn.Linear(features_of(embed, problem.image), problem.ways)
    for x in head.parameters():
        nn.init.zeros_(x)
    return FeatureANIL(embed, MAML(head, lr=RATE, steps=STEPS))


METHODS = {
    "anil": Method(
        "ANIL",
        on_strided_conv4(ANIL, test_steps=3),
        PRESETS,
        on_body=_on_body,
        # As many images a step as the others.
        body_presets={name: replace(x, ways=5, tasks=2) for name, x in ON_BODY.items()},
    )
}
