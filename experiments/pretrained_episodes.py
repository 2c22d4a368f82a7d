"""A pretrained body, frozen and with episodes on top: pretrained_episodes_cifar_fs, _omniglot.

P>M>F (Hu et al. 2022) without its last part: pretrain, then meta-train. Of the body's own classes
ImageNet has many of CIFAR's by name, and no character. The same test episodes for all rows, so that
differences are taken task by task.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from compare import table
from metautils import data, methods, pretrained
from metautils.data.bank import Parts
from metautils.evaluate import Evaluation, evaluate
from metautils.learners.base import ON_BODY, WARM_UP, Learner, Problem
from metautils.learners.baseline import Baseline, nearest_centroid, ridge_head
from metautils.nets import Conv4
from metautils.runs import DRAWN, VALIDATED, enlarging
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment

STRENGTH = 1.0  # C of the logistic regression, on features of length 1


def logistic_head(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Probabilities of a logistic regression for each task, by scikit-learn; see `Baseline`."""
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    found = [
        LogisticRegression(C=STRENGTH, max_iter=1000)
        .fit(s.cpu().numpy(), y.cpu().numpy())
        .predict_proba(q.cpu().numpy())
        for s, y, q in zip(support, labels, query, strict=True)
    ]
    return torch.from_numpy(np.stack(found)).to(support)  # (tasks, Q, ways)


FROZEN = {
    "Frozen, nearest centroid": nearest_centroid,
    "Frozen, ridge": ridge_head,
    "Frozen, logistic regression": logistic_head,
}


def on_body(
    out: Path,
    device: torch.device,
    *,
    source: str,
    body: str,
    size: int,
    trained: list[str],
    seeds: list[int],
    steps: int,
    ways: dict[str, int],
    tests: list[list[int]],
    images: int,
    episodes: int,
) -> dict[str, Any]:
    """Tables of all rows, one for each (ways, shots); `images` of a test class at most."""
    whole = Parts(*(bank.to(device) for bank in data.load(source)))
    test, settings = whole.test.some(images), [tuple(each) for each in tests]

    def embed() -> nn.Module:
        return enlarging(pretrained.body(body), size).to(device)

    def learned(name: str, seed: int, scratch: bool = False) -> tuple[Learner, float]:
        """A learner after its training, and the minutes that this took."""
        method = methods.known()[name]
        preset = method.body_presets["full"]
        banks = [bank.with_rotations() if source in DRAWN else bank for bank in whole[:2]]
        torch.manual_seed(seed)
        n = min(ways.get(name, preset.ways), len(banks[0]))
        problem = Problem(banks[0].images.shape[1:], n, len(banks[0]))
        net = Conv4(problem.image[0]) if scratch else embed()
        learner = method.on_body(problem, net).to(device)
        varied = source not in DRAWN
        learn = EpisodeSampler(
            banks[0], n, preset.shots, preset.queries, preset.tasks, seed=seed, vary=varied
        )
        few = banks[1].some(VALIDATED)
        choose = EpisodeSampler(few, min(5, n, len(few)), preset.shots, preset.queries, seed=seed)
        history = meta_train(
            learner, learn, steps, 1e-3 if scratch else preset.lr, choose, min(100, episodes),
            every=max(1, steps // 5), out=out / f"{name}-{seed}{'-scratch' * scratch}",
            clip=preset.clip, warm_up=None if scratch else WARM_UP,
        )  # fmt: skip
        return learner, history.seconds / 60

    def score(learner: Learner) -> dict[str, list[Evaluation]]:
        """Its answers, and those of class means on its body where it gives others."""
        each, features = learner.on_features(test)
        scores = {"": evaluate(each, features, settings, 15, episodes)}
        if isinstance(each, Baseline):
            each.fit = nearest_centroid
            scores["; nearest centroid"] = evaluate(each, features, settings, 15, episodes)
        return scores

    found, minutes = {}, {}
    for name, scratch in [*((name, False) for name in trained), (trained[0], True)]:
        runs = [learned(name, seed, scratch) for seed in seeds]
        scores = [score(learner) for learner, _ in runs]
        for how in scores[0]:
            title = methods.known()[name].title + how + "; Conv-4 from scratch" * scratch
            minutes[title] = sum(m for _, m in runs) / len(runs)
            found[title] = [each[how] for each in scores]
    began = time.perf_counter()
    features = test.map(embed().eval())
    seconds = time.perf_counter() - began
    for title, fit in FROZEN.items():
        learner = Baseline(nn.Identity(), nn.Identity(), fit).eval()
        minutes[title] = 0.0
        found[title] = [evaluate(learner, features, settings, 15, episodes)]
    return {
        "what": f"{body} at {size} pixels on {source}, {episodes} test episodes of {images} images "
        f"a class at most, whose features take {seconds:.0f} s",
        "tables": [
            table(f"{n}-way {few}-shot, {steps} steps", k, found, minutes)
            for k, (n, few) in enumerate(settings)
        ],
    }


SHARED = {
    "body": pretrained.LITE0,
    "size": 128,
    "trained": ["protonet", "matching", "baseline_pp", "anil"],
    "seeds": [0, 1, 2],
    "steps": ON_BODY["full"].steps,
    "ways": {},
    "tests": [[5, 1], [5, 5]],
    "episodes": 600,
}
TINY = {
    "source": "glyphs", "size": 32, "seeds": [0], "steps": 2, "episodes": 2, "images": 21,
    "ways": dict.fromkeys(("protonet", "matching", "baseline_pp"), 3),
}  # fmt: skip
EXPERIMENTS = {
    "pretrained_episodes_cifar_fs": Experiment(
        on_body, {"source": "cifar_fs", "images": 600, **SHARED}, minutes=90, tiny=TINY
    ),
    "pretrained_episodes_omniglot": Experiment(
        on_body,
        {"source": "omniglot", "images": 20, **SHARED, "trained": ["protonet"]},
        minutes=30,
        tiny=TINY,
    ),
}
