"""What each part of MAML++ (Antoniou et al. 2019) gives: the record maml_plus_plus_omniglot.

The same network, training tasks, meta-steps, inner steps and test tasks for all; the weights are
the last ones. With running statistics, and in the second row, queries do not see one another.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from compare import table
from metautils import data
from metautils.evaluate import evaluate
from metautils.learners.base import Problem
from metautils.learners.maml import MAML, on_strided_conv4
from metautils.nets import StepBatchNorm
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment


def arms(steps: int, multi: int) -> dict[str, dict[str, Any]]:
    """Options of the learner for each row."""
    own = {"norm": partial(StepBatchNorm, steps=steps)}
    rates, every = {"learned_rates": True}, {"multi_step_loss": multi}
    return {
        "MAML": {},
        "MAML, normalised by the support set": {"transductive": False},
        "a rate for each tensor and step": rates,
        "the loss after every step": every,
        "running statistics of each step": own,
        "rates and loss together": rates | every,
    }


def compare(
    out: Path,
    device: torch.device,
    *,
    source: str,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    inner_steps: int,
    multi_step_loss: int,
    steps: int,
    lr: float,
    seeds: list[int],
    episodes: int,
) -> dict[str, Any]:
    """A table of all rows, trained at every seed."""
    parts = data.load(source)
    train, test = parts.train.to(device), parts.test.to(device)
    found: dict[str, list[Any]] = {}
    minutes = {}
    for name, options in arms(inner_steps, multi_step_loss).items():
        took = []
        for seed in seeds:
            torch.manual_seed(seed)
            given = dict(options)
            problem = Problem(train.images.shape[1:], ways, ways, given.pop("transductive", True))
            learner = on_strided_conv4(MAML, steps=inner_steps, **given)(problem).to(device)
            learn = EpisodeSampler(train, ways, shots, queries, tasks, rotate=True, seed=seed)
            slug = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
            history = meta_train(learner, learn, steps, lr, out=out / slug)
            took.append(history.seconds / 60)
            found.setdefault(name, []).append(
                evaluate(learner, test, [(ways, shots)], 15, episodes)
            )
        minutes[name] = sum(took) / len(took)
    learned = f"{steps} meta-steps of {tasks} tasks, {inner_steps} inner steps"
    title = f"{ways}-way {shots}-shot after {learned}"
    what = f"The parts of MAML++ beside MAML on {source}, {episodes} test episodes"
    return {"what": what, "tables": [table(title, 0, found, minutes)]}


EXPERIMENTS = {
    "maml_plus_plus_omniglot": Experiment(
        compare,
        {
            "source": "omniglot",
            "ways": 5,
            "shots": 1,
            "queries": 5,
            "tasks": 8,
            "inner_steps": 3,
            "multi_step_loss": 100,
            "steps": 300,
            "lr": 3e-3,
            "seeds": [0, 1],
            "episodes": 600,
        },
        minutes=40,
        tiny={
            "source": "glyphs",
            "ways": 3,
            "tasks": 2,
            "steps": 2,
            "seeds": [0, 1],
            "episodes": 2,
        },
        gpu={"steps": 5000, "multi_step_loss": 500},
    )
}
