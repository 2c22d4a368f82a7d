"""What holds SNAIL back: is it the embedding, or the reading? (Mishra et al. 2018)"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metautils import data
from metautils.evaluate import evaluate
from metautils.learners.protonet import ProtoNet
from metautils.learners.snail import SNAIL
from metautils.nets import Conv4, classifier, features_of
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment, told

FEATURES = 64


def started(
    out: Path,
    device: torch.device,
    *,
    source: str,
    seed: int,
    compare: dict[str, int],
    lesson: dict[str, int],
    steps: int,
    episodes: int,
) -> dict[str, Any]:
    """SNAIL on an embedding of random weights, on one that has learned by comparing, on it frozen.

    The last weights are tested; there is no validation.
    """
    parts = data.load(source, seed)
    train, test = (x.with_rotations().to(device) for x in (parts.train, parts.test))
    ways = lesson["ways"]

    def embedding() -> nn.Module:
        torch.manual_seed(seed)
        body = Conv4(train.images.shape[1])
        return classifier(body, features_of(body, train.images.shape[1:]), FEATURES)

    def taught(title: str, embed: nn.Module, known: bool = False) -> list[str]:
        torch.manual_seed(seed)
        net = SNAIL(embed, FEATURES, ways, ways + 1).to(device)
        lessons, exam = (x.map(compared.embed) if known else x for x in (train, test))
        history = meta_train(
            net, EpisodeSampler(lessons, **lesson, seed=seed), steps, every=250, out=out / title
        )
        (score,) = evaluate(net, exam, [(ways, 1)], episodes=episodes, seed=seed)
        return [title, told(score), f"{history.seconds / 60:.0f}"]

    compared = ProtoNet(embedding()).to(device)
    first = EpisodeSampler(train, compare["ways"], 1, 5, seed=seed)
    history = meta_train(compared, first, compare["steps"], every=250, out=out / "embedding")
    (alone,) = evaluate(compared.eval(), test, [(ways, 1)], episodes=episodes, seed=seed)
    rows = [
        ["Prototypical Network", told(alone), f"{history.seconds / 60:.0f}"],
        taught("SNAIL on its embedding, frozen", nn.Identity(), known=True),
        taught("SNAIL from its embedding", copy.deepcopy(compared.embed)),
        taught("SNAIL from random weights", embedding()),
    ]
    heads = ["Learner", f"{ways}-way 1-shot", "Minutes"]
    return {
        "what": "SNAIL, from an embedding that has learned by comparing",
        "tables": [{"title": "Percent right, new characters", "heads": heads, "rows": rows}],
    }


EXPERIMENTS = {
    "snail_start_omniglot": Experiment(
        started,
        {
            "source": "omniglot",
            "seed": 0,
            "compare": {"steps": 1000, "ways": 20},
            "lesson": {"ways": 20, "shots": 1, "queries": 2, "tasks": 4},
            "steps": 4000,
            "episodes": 1000,
        },
        45,
        {
            "source": "glyphs",
            "compare": {"steps": 2, "ways": 5},
            "lesson": {"ways": 3, "shots": 1, "queries": 2, "tasks": 2},
            "steps": 2,
            "episodes": 2,
        },
    )
}
