"""Baseline and Baseline++ (Chen et al. 2019): learn to classify, then fit only a new last layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils import pretrained
from metautils.data.bank import ClassBank
from metautils.episode import Episode
from metautils.learners.base import (
    ON_BODY,
    Learner,
    Method,
    Preset,
    Problem,
    ways_of,
    without_embedding,
)
from metautils.learners.protonet import cosine, prototypes
from metautils.nets import Conv4, features_of
from metautils.precision import all_digits, single

Fit = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE = 10.0  # of cosines; without it no class could come near a probability of 1
STEPS, STEP, DECAY = 100, 0.1, 1e-3  # of fitting a head by gradient descent with momentum
RIDGE = 0.3  # how strongly the weights of a least-squares fit are held towards 0


class CosineHead(nn.Linear):
    """A last layer whose logits are `scale` times the cosine of features and a class's weights.

    Section 3.2 of Chen et al. 2019 (Baseline++).

    Args:
        features: numbers that the body gives for an image.
        classes: rows of weights, one for each class.
        scale: factor, above 0.

    Example:
        >>> CosineHead(features=8, classes=5)(torch.rand(3, 8)).shape
        torch.Size([3, 5])
    """

    def __init__(self, features: int, classes: int, scale: float = SCALE) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """`(n, features)` to logits `(n, classes)`."""
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def nearest_centroid(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Cosines with the class means of the support, times `SCALE`; nothing is fitted.

    Args:
        support: features `(tasks, S, d)`.
        labels: `(tasks, S)` int64; the classes are 0 to `labels.max()`, see `ways_of`.
        query: features `(tasks, Q, d)`.

    Returns:
        Logits `(tasks, Q, ways)`.
    """
    return SCALE * (1 - cosine(query, prototypes(support, labels)))


def linear_head(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Logits of a new linear layer for each task, fitted to its support set (Baseline).

    Arguments and result as of `nearest_centroid`. Features are scaled to length 1 first, as Tian
    et al. 2020 do.
    """
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    ways = ways_of(labels)
    start = support.new_zeros(len(support), ways, support.shape[-1])  # (tasks, ways, d)
    weight = _fitted(start, support, labels, lambda x, w: SCALE * x @ w.mT)
    return SCALE * query @ weight.mT  # (tasks, Q, d) @ (tasks, d, ways)


def cosine_head(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Logits of a new `CosineHead` for each task, fitted to its support set (Baseline++).

    Arguments and result as of `nearest_centroid`, whose class means are where fitting starts.
    """
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    # (tasks, ways, d)
    start = F.normalize(prototypes(support, labels), dim=-1)
    weight = _fitted(start, support, labels, lambda x, w: SCALE * x @ F.normalize(w, dim=-1).mT)
    return SCALE * query @ F.normalize(weight, dim=-1).mT  # (tasks, Q, d) @ (tasks, d, ways)


def ridge_head(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Logits of a least-squares fit of the labels, 1 or 0 for each class, held towards 0.

    Arguments and result as of `nearest_centroid`. On features of length 1, solved exactly, by one
    equation for each support image as in R2-D2 (Bertinetto et al. 2019).
    """
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    targets = F.one_hot(labels, ways_of(labels)).to(support)  # (tasks, S, ways)
    held = support @ support.mT + RIDGE * torch.eye(support.shape[1]).to(support)  # (tasks, S, S)
    # (tasks, Q, S) @ (tasks, S, ways)
    return SCALE * (query @ support.mT) @ torch.linalg.solve(held, targets)


def _fitted(
    start: Tensor, support: Tensor, labels: Tensor, logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Weights `(tasks, ways, d)` after gradient descent on each task's cross-entropy."""
    # Gradient descent never leaves the span of the support and the start, which lies in it. In a
    # basis of few directions it takes the same steps, many times as fast.
    basis = torch.linalg.qr(support.mT).Q  # (tasks, d, min(S, d))
    support, start = support @ basis, start @ basis  # (tasks, S, _) and (tasks, ways, _)
    # Evaluation runs without gradients, or in inference mode, whose tensors can have none; fitting
    # a head is part of the prediction.
    with torch.inference_mode(False), torch.enable_grad():
        support, labels = (x.clone() if x.is_inference() else x for x in (support, labels))
        weight = start.detach().clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=STEP, momentum=0.9, weight_decay=DECAY)
        for _ in range(STEPS):
            # A sum over tasks: each has its own weights, so none sees another's gradient.
            # Cross-entropy wants (tasks, ways, S).
            loss = (
                F.cross_entropy(logits(support, weight).mT, labels, reduction="none").mean(1).sum()
            )
            weight.grad = torch.autograd.grad(loss, weight)[0]
            optimizer.step()
    return weight.detach() @ basis.mT  # (tasks, ways, d)


class Baseline(Learner):
    """A body trained to tell all training classes apart; a task gets a new head on top of it.

    In training an episode is a batch of labelled images: what was support or query, and which
    classes stood beside one another, plays no part. For a task the body is frozen.

    Args:
        embed: the body, a network `(n, ...)` to `(n, features)`.
        head: for the classes of the whole training set, `(n, features)` to `(n, classes)`; not
            used in tasks.
        fit: how a task's queries are answered from its support set, on features:
            `nearest_centroid`, `linear_head` (Baseline) or `cosine_head` (Baseline++).

    Example:
        >>> learner = Baseline(nn.Linear(4, 8), head=nn.Linear(8, 64), fit=cosine_head)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, embed: nn.Module, head: nn.Module, fit: Fit = linear_head) -> None:
        super().__init__()
        self.embed, self.head, self.fit = embed, head, fit

    def pieces(self, episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Cross-entropy of all images, each of the class that it has in the whole bank."""
        # (tasks * (S + Q), ...)
        x = torch.cat([episode.support_x, episode.query_x], dim=1).flatten(0, 1)
        labels = torch.cat([episode.support_y, episode.query_y], dim=1)  # (tasks, S + Q)
        labels = episode.classes.to(x.device).gather(1, labels).flatten()  # (tasks * (S + Q),)
        logits = single(self.head(self.embed(x)))
        yield F.cross_entropy(logits, labels), logits, labels

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits `(tasks, Q, ways)`; the classes are 0 to `support_y.max()`, see `ways_of`."""
        x = torch.cat([support_x, query_x], dim=1)  # (tasks, S + Q, ...)
        # (tasks, S + Q, d)
        features = single(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        # (tasks, S, d) and (tasks, Q, d)
        support, query = features.split([support_x.shape[1], query_x.shape[1]], dim=1)
        with all_digits(x.device):  # fitting needs them
            return self.fit(support, support_y, query)

    def on_features(self, bank: ClassBank) -> tuple[Baseline, ClassBank]:
        """The same answers at less cost: a learner of features, and the features of all images.

        Puts this learner into evaluation mode.
        """
        self.eval()
        return without_embedding(self), bank.map(self.embed)

    def extra_repr(self) -> str:
        """The settings, so that a checkpoint knows its learner."""
        return f"fit={self.fit.__name__}"


def _on_conv4(
    fit: Fit, head: Callable[[int, int], nn.Module] = nn.Linear
) -> Callable[[Problem], Baseline]:
    """A Conv-4 that learns to tell the training classes apart, as Chen et al. 2019 pretrain."""

    def make(problem: Problem) -> Baseline:
        body = Conv4(problem.image[0])
        return Baseline(body, head(features_of(body, problem.image), problem.classes), fit)

    return make


def _on_resnet50(problem: Problem) -> Baseline:
    """The same with a ResNet-50 from scratch, on images of 64 pixels or more."""
    body, size = pretrained.body(None), max(64, problem.image[-1])
    larger = nn.Sequential(nn.Upsample((size, size), mode="bilinear"), body)
    return Baseline(larger, nn.Linear(body.features, problem.classes), nearest_centroid)


def _on_body(problem: Problem, embed: nn.Module) -> Baseline:
    """A body that has learned elsewhere, with a head for the training classes."""
    return Baseline(
        embed, CosineHead(features_of(embed, problem.image), problem.classes), cosine_head
    )


_PRESETS = {"quick": Preset(200, 64, 1, 1), "full": Preset(1250, 64, 1, 5, episodes=1000)}
_ANY = {"rotations": "classes", "any_ways": True, "any_shots": True}
METHODS = {
    "centroid": Method(
        "Classifier, nearest centroid", _on_conv4(nearest_centroid), _PRESETS, **_ANY
    ),
    "baseline": Method("Baseline", _on_conv4(linear_head), _PRESETS, **_ANY),
    "baseline_pp": Method(
        "Baseline++",
        _on_conv4(cosine_head, CosineHead),
        _PRESETS,
        **_ANY,
        on_body=_on_body,
        # As many images a step as the others, of more classes.
        body_presets={name: replace(x, ways=30, queries=1) for name, x in ON_BODY.items()},
    ),
    "resnet50": Method(
        "ResNet-50 classifier, nearest centroid",
        _on_resnet50,
        {"quick": Preset(200, 64, 1, 1), "full": Preset(1800, 64, 1, 1, episodes=1000)},
        **_ANY,
    ),
}
