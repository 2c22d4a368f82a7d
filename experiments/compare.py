"""Learners that compare, trained alike: compare_omniglot, compare_cifar_fs, distances_omniglot.

The same embedding, training episodes, steps and choice on validation classes for all; the same
test episodes too, so that differences are taken task by task.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metautils import data
from metautils.data.bank import ClassBank, Parts
from metautils.evaluate import Evaluation, evaluate, interval95
from metautils.learners.base import Learner, task_loss
from metautils.learners.matching_net import MatchingNet
from metautils.learners.protonet import (
    ProtoNet,
    ScaledCosine,
    cosine,
    euclidean,
    squared_euclidean,
)
from metautils.learners.relation_net import RelationModule, RelationNet
from metautils.nets import Conv4, LearnedScale
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment

SQUARES = "Relation, squared error"


def methods(channels: int, size: int) -> dict[str, Callable[[], Learner]]:
    """Makers of the learners; all but one embed into 64 maps of a quarter of the image's side."""

    def body() -> Conv4:
        return Conv4(channels, pools=2)

    def relation(**objective: Any) -> Callable[[], RelationNet]:
        return lambda: RelationNet(body(), RelationModule(size=size // 4), **objective)

    return {
        "Prototypical": lambda: ProtoNet(body()),
        "Prototypical, four poolings": lambda: ProtoNet(Conv4(channels)),
        "Matching, cosine x 10": lambda: MatchingNet(body(), 10.0),
        SQUARES: relation(),
        "Relation, cross-entropy": relation(objective=task_loss),
    }


class Scaled(nn.Module):
    """Squared distance times a factor that is learned."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.scale = LearnedScale(start)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Of all pairs, as `squared_euclidean`."""
        return self.scale(squared_euclidean(a, b))

    def __repr__(self) -> str:
        return f"Scaled(start={self.scale.start:g})"


def cosine_x_10(a: Tensor, b: Tensor) -> Tensor:
    """Ten times `cosine`."""
    return 10 * cosine(a, b)


def distances(channels: int, size: int) -> dict[str, Callable[[], Learner]]:
    """Makers of Prototypical Networks that differ in how they compare, with four poolings."""
    makers: dict[str, Callable[[], Any]] = {
        "squared distance": lambda: squared_euclidean,
        "squared distance, factor learned from 0.1": lambda: Scaled(0.1),
        "plain distance": lambda: euclidean,
        "1 - cosine": lambda: cosine,
        "10 (1 - cosine)": lambda: cosine_x_10,
        "1 - cosine, factor learned from 10": ScaledCosine,
    }
    return {
        name: lambda make=make: ProtoNet(Conv4(channels), make()) for name, make in makers.items()
    }


def compare(
    out: Path,
    device: torch.device,
    *,
    learners: Callable[[int, int], dict[str, Callable[[], Learner]]] = methods,
    who: str = "Learners that compare",
    source: str,
    rotations: bool,
    trainings: list[dict[str, Any]],
    seeds: list[int],
    steps: int,
    ways: int,
    queries: int,
    episodes: int,
    left_out: list[str],
) -> dict[str, Any]:
    """For each training, of so many shots, a table for each (ways, shots) of its tests."""
    parts = Parts(*(bank.to(device) for bank in data.load(source)))
    if rotations:
        parts = Parts(*(bank.with_rotations() for bank in parts))
    makers = learners(*parts.test.images.shape[1:3])
    tables = []
    for training in trainings:
        shots, tests = training["shots"], [tuple(test) for test in training["tests"]]

        found, minutes = {}, {}
        for name in makers:
            if name not in left_out:
                runs = [
                    trained(makers[name], parts, device, seed, steps, ways, shots, queries,
                            min(100, episodes), out / slug(name, shots, seed))
                    for seed in seeds
                ]  # fmt: skip
                minutes[name] = sum(m for _, m in runs) / len(runs)
                found[name] = [tested(each, parts.test, tests, episodes) for each, _ in runs]
        learned = f"{steps} episodes of {ways}-way {shots}-shot"
        for k, (n, few) in enumerate(tests):
            title = f"{n}-way {few}-shot, trained on {learned}"
            tables.append(table(title, k, found, minutes))
    what = f"{who}, trained alike on {source}, {episodes} test episodes"
    return {"what": what, "tables": tables}


def trained(
    make: Callable[[], Learner],
    parts: Parts,
    device: torch.device,
    seed: int,
    steps: int,
    ways: int,
    shots: int,
    queries: int,
    choices: int,
    out: Path,
) -> tuple[Learner, float]:
    """A learner with the weights that did best on validation classes, and minutes of training."""
    torch.manual_seed(seed)
    learner = make().to(device)
    learn = EpisodeSampler(parts.train, ways, shots, queries, seed=seed)
    few = min(ways, len(parts.validation))
    choose = EpisodeSampler(parts.validation, few, shots, queries, seed=seed)
    history = meta_train(
        learner, learn, steps, 1e-3, choose, choices, every=max(1, steps // 10), out=out
    )
    return learner, history.seconds / 60


def slug(name: str, shots: int, seed: int) -> str:
    """A name for the folder of a training."""
    return f"{shots}shot-{name}-{seed}".replace(", ", "-").replace(" ", "-")


def tested(
    learner: Learner, bank: ClassBank, tests: list[tuple[int, int]], episodes: int
) -> list[Evaluation]:
    """Its evaluations; each image is embedded once."""
    features = bank.map(learner.embed.eval())
    learner.embed = nn.Identity()
    return evaluate(learner, features, tests, 15, episodes)


def table(
    title: str, k: int, found: dict[str, list[list[Evaluation]]], minutes: dict[str, float]
) -> dict[str, Any]:
    """Everybody in test `k`, and the paired difference to the first row."""
    rows, base = [], next(iter(found.values()))
    several = len(base) > 1
    for method, runs in found.items():
        every = torch.stack([scores[k].per_episode for scores in runs]).double()
        first = torch.stack([scores[k].per_episode for scores in base]).double()
        more = every - first
        seeds = [", ".join(f"{a:.2f}" for a in every.mean(1))] if several else []
        accuracy = f"{every.mean():.2f} ± {interval95(every.mean(0)):.2f}"
        above = f"{more.mean():+.2f} ± {interval95(more.mean(0)):.2f}" if rows else ""
        rows.append([method, f"{minutes[method]:.1f}", accuracy, *seeds, above])
    by_seed = ["By seed"] if several else []
    heads = ["Learner", "Minutes", "Accuracy", *by_seed, "Above the first row, paired"]
    return {"title": title, "heads": heads, "rows": rows}


SHARED = {"steps": 1000, "ways": 20, "queries": 5, "episodes": 600}
TINY = {"source": "glyphs", "steps": 2, "ways": 3, "queries": 1, "episodes": 2}
EXPERIMENTS = {
    "compare_omniglot": Experiment(
        compare,
        {
            "source": "omniglot",
            "rotations": True,
            "trainings": [{"shots": 1, "tests": [[5, 1], [20, 1]]}],
            "seeds": [0, 1, 2],
            "left_out": [],
            **SHARED,
        },
        minutes=75,
        tiny={**TINY, "seeds": [0, 1]},
    ),
    "distances_omniglot": Experiment(
        partial(compare, learners=distances, who="Distances of Prototypical Networks"),
        {
            "source": "omniglot",
            "rotations": True,
            "trainings": [{"shots": 1, "tests": [[5, 1], [20, 1]]}],
            "seeds": [0, 1, 2],
            "left_out": [],
            **SHARED,
        },
        minutes=30,
        tiny={**TINY, "seeds": [0, 1]},
    ),
    "compare_cifar_fs": Experiment(
        compare,
        {
            "source": "cifar_fs",
            "rotations": False,
            "trainings": [{"shots": k, "tests": [[5, k]]} for k in (1, 5)],
            "seeds": [0],
            "left_out": [SQUARES],
            **SHARED,
        },
        minutes=60,
        tiny=TINY,
        gpu={"seeds": [0, 1, 2]},
    ),
}
