"""Which layers of a trained MAML do the work: the record inside_maml.

The test tasks are those of the run's own split; accuracies are in percent, with the half width of
the 95 % interval over tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metautils import data, methods
from metautils.checkpoint import CHECKPOINT, load_weights
from metautils.episode import Episode
from metautils.evaluate import interval95
from metautils.files import read_json
from metautils.learners.base import Problem
from metautils.learners.maml import MAML
from metautils.learners.protonet import ProtoNet, cosine, squared_euclidean
from metautils.runs import RECORD
from metautils.sampling import EpisodeSampler
from records import RUNS, Experiment


def inside(
    out: Path,
    device: torch.device,
    *,
    run: str,
    tasks: int,
    after: list[int],
    queries: list[int],
    at_once: int,
) -> dict[str, Any]:
    """What adapts, what the features are worth without, and how queries help one another."""
    record = read_json(RUNS / run / RECORD)
    ways, shots = record["train"]["ways"], record["train"]["shots"]
    test = data.load(record["data"], record["seed"], record["split"]).test.to(device)
    problem = Problem(test.images.shape[1:], ways, record["classes"]["train"])
    trained = methods.known()["maml"].make(problem).to(device)
    load_weights(trained, RUNS / run / CHECKPOINT)
    net = trained.net

    def accuracies(predict: Callable[[Episode], Tensor], queries: int = 15) -> list[str]:
        """Cells of logits (tasks, cells, Q, ways)."""
        sampler = EpisodeSampler(test, ways, shots, queries, at_once, rotate=True, seed=0)
        rows = []
        with torch.no_grad():
            for _ in range(tasks // at_once):
                e = sampler.sample()
                right = predict(e).argmax(-1) == e.query_y[:, None]  # (tasks, cells, Q)
                rows.append(100 * right.float().mean(-1).cpu())
        return [f"{v.mean():.1f} ± {interval95(v):.1f}" for v in torch.cat(rows).unbind(1)]

    def adapted(after: list[int], **options: Any) -> Callable[[Episode], Tensor]:
        learner = MAML(net, trained.lr, trained.steps, **options)
        return lambda e: learner.after_steps(e.support_x, e.support_y, e.query_x, after)

    def compared(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Episode], Tensor]:
        learner = ProtoNet(net.embed, distance)
        return lambda e: learner(e.support_x, e.support_y, e.query_x)[:, None]

    layers = {
        "all layers": {},
        "only the head": {"only": ("head",)},
        "only the body": {"only": ("embed",)},
        "all layers, statistics of the support set": {"transductive": False},
    }
    means = {"squared Euclidean": squared_euclidean, "cosine": cosine}
    head = F.normalize(net.head.weight.detach())
    cosines = (head @ head.T)[~torch.eye(ways, dtype=bool, device=device)]
    steps = [f"{k} step{'s' * (k != 1)}" for k in after]
    tables = [
        {"title": "What adapts", "heads": ["Adapts", *steps],
         "rows": [[name, *accuracies(adapted(after, **how))] for name, how in layers.items()]},
        {"title": "Class means of the features, nothing adapted",
         "heads": ["Distance", "Accuracy"],
         "rows": [[name, *accuracies(compared(distance))] for name, distance in means.items()]},
        {"title": "Queries that share a batch", "heads": ["Queries a class", "Accuracy"],
         "rows": [[n, *accuracies(adapted([1]), n)] for n in queries]},
        {"title": "Cosine between two rows of the learned head",
         "heads": ["lowest", "mean", "highest"],
         "rows": [[f"{v:.2f}" for v in (cosines.min(), cosines.mean(), cosines.max())]]},
    ]  # fmt: skip
    what = f"MAML as in `{run}`, {ways}-way {shots}-shot, {tasks} test tasks, 15 queries a class"
    return {"what": what, "tables": tables}


EXPERIMENTS = {
    "inside_maml": Experiment(
        inside,
        {
            "run": "maml_omniglot",
            "tasks": 600,
            "after": [0, 1, 3, 10],
            "queries": [1, 5, 15],
            "at_once": 12,
        },
        minutes=5,
        tiny={"tasks": 2, "after": [0, 1], "queries": [1], "at_once": 1},
        after=("maml_omniglot",),
    )
}
