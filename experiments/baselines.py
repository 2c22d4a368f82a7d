"""Pretraining beside meta-learning: the record compare_pretraining.

The same network, number of training images (MAML: a third) and choice on validation classes for
all, and the same test episodes, so that differences are taken task by task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metautils import data
from metautils.data.bank import Parts
from metautils.evaluate import Evaluation, evaluate, interval95
from metautils.learners.base import Learner
from metautils.learners.baseline import (
    Baseline,
    CosineHead,
    cosine_head,
    linear_head,
    nearest_centroid,
)
from metautils.learners.maml import MAML
from metautils.learners.protonet import ProtoNet
from metautils.nets import BatchNorm, Conv4, classifier
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment, told

WAYS, QUERIES = 5, 15  # of the test
Made = tuple[Learner, tuple[int, int, int, int]]  # and ways, shots, queries, tasks of its training


def protonet(shots: int, parts: Parts, ways: int) -> Made:
    """A Prototypical Network, tested with the shots that it was trained with."""
    return ProtoNet(Conv4(_channels(parts))), (ways, shots, 15, 1)


def maml(shots: int, parts: Parts, ways: int) -> Made:
    """MAML of three inner steps in training, ten in testing."""
    net = classifier(Conv4(_channels(parts), norm=BatchNorm), _features(parts), WAYS)
    return MAML(net, lr=0.1, steps=3, test_steps=10, transductive=False), (WAYS, shots, 15, 4)


def linear_body(shots: int, parts: Parts, ways: int) -> Made:
    """A network that learns to tell the training classes apart, six images of each at a time."""
    return _body(nn.Linear, parts)


def cosine_body(shots: int, parts: Parts, ways: int) -> Made:
    """The same with a cosine head."""
    return _body(CosineHead, parts)


def _body(head: Callable[[int, int], nn.Module], parts: Parts) -> Made:
    classes = len(parts.train)
    learner = Baseline(Conv4(_channels(parts)), head(_features(parts), classes), nearest_centroid)
    return learner, (classes, 1, 5, 1)


def _channels(parts: Parts) -> int:
    return parts.train.images.shape[1]


def _features(parts: Parts) -> int:
    return 64 * (parts.train.images.shape[-1] // 16) ** 2


def pretraining(
    out: Path,
    device: torch.device,
    *,
    source: str,
    images: int,
    maml_images: int,
    ways: int,
    shots: list[int],
    episodes: int,
    seed: int,
) -> dict[str, Any]:
    """Each learner's minutes and accuracies, and how much it is above the Prototypical Network."""
    parts = Parts(*(bank.to(device) for bank in data.load(source, seed)))
    tests = [(WAYS, k) for k in shots]

    def learned(make: Callable[..., Made], k: int, images: int) -> tuple[Learner, float]:
        """A learner with the weights that did best on the validation classes, and its minutes."""
        torch.manual_seed(seed)
        learner, (n, k, queries, tasks) = make(k, parts, ways)
        steps = max(1, images // (tasks * n * (k + queries)))
        learn = EpisodeSampler(parts.train, n, k, queries, tasks, seed=seed)
        choose = EpisodeSampler(parts.validation, WAYS, k, QUERIES, 4, seed=seed)
        history = meta_train(
            learner.to(device), learn, steps, 1e-3, choose, min(200, episodes),
            every=-(-steps // 16), out=out / f"{make.__name__}-{k}",
        )  # fmt: skip
        return learner, history.seconds / 60

    def tested(learner: Learner, which: list[tuple[int, int]]) -> list[Evaluation]:
        return evaluate(learner, parts.test, which, QUERIES, episodes, seed=seed)

    # Prototypical Networks want the shots of the test; MAML adapts to any from one start.
    runs = [learned(protonet, k, images) for k in shots]
    scores = [tested(run, [test])[0] for (run, _), test in zip(runs, tests, strict=True)]
    found = {"Prototypical": (", ".join(f"{m:.0f}" for _, m in runs), scores)}
    learner, minutes = learned(maml, shots[0], maml_images)
    found["MAML"] = f"{minutes:.0f}", tested(learner, tests)
    for body, kind, fits in (
        (linear_body, "linear", {"new linear head (Baseline)": linear_head}),
        (cosine_body, "cosine", {"new cosine head (Baseline++)": cosine_head}),
    ):
        # One body for all tests, chosen on 1-shot tasks of the validation classes.
        learner, minutes = learned(body, shots[0], images)
        for fit, function in {"nearest centroid": nearest_centroid, **fits}.items():
            learner.fit = function
            each, features = learner.on_features(parts.test)
            accuracies = evaluate(each, features, tests, QUERIES, episodes, seed=seed)
            found[f"Classifier, {kind} head; {fit}"] = f"{minutes:.0f}", accuracies
    found["Class means in pixels"] = "0", tested(ProtoNet(nn.Flatten()), tests)
    title = f"Conv-4 on CIFAR-FS, {images:,} training images each (MAML {maml_images:,})"
    return {
        "what": f"Pretraining beside meta-learning, {episodes} test episodes, seed {seed}",
        "tables": [table(title, found)],
    }


def table(title: str, found: dict[str, tuple[str, list[Evaluation]]]) -> dict[str, Any]:
    """Accuracies, and how much each is above the Prototypical Network, paired by task."""
    _, first = found["Prototypical"]
    rows = []
    for name, (minutes, scores) in found.items():
        cells = [told(e) for e in scores]
        for e, other in zip(scores, first, strict=True):
            more = e.per_episode.double() - other.per_episode.double()
            above = f"{more.mean():+.2f} ± {interval95(more):.2f}"
            cells.append("" if name == "Prototypical" else above)
        rows.append([name, minutes, *cells])
    tests = [f"{e.ways}-way {e.shots}-shot" for e in first]
    heads = ["Learner", "Minutes", *tests, *(f"Above the first row, {t}" for t in tests)]
    return {"title": title, "heads": heads, "rows": rows}


EXPERIMENTS = {
    "compare_pretraining": Experiment(
        pretraining,
        {
            "source": "cifar_fs",
            "images": 480_000,  # 12.5 passes through the training classes
            "maml_images": 160_000,  # its second derivatives take about three times as long
            "ways": 20,
            "shots": [1, 5],
            "episodes": 600,
            "seed": 0,
        },
        minutes=120,
        tiny={"source": "glyphs", "images": 40, "maml_images": 40, "ways": 3, "episodes": 2},
        gpu={"maml_images": 480_000},
    )
}
