"""What a trained Meta-LSTM has learned: the records inside_meta_lstm_5w1s and _5w5s.

The gates, a mean over the coordinates of each layer, by inner step; and what start and rule are
worth each without the other, on test tasks with one rotation for each class and task; accuracies
are in percent, with the half width of the 95 % interval over tasks.
"""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metautils import data, methods
from metautils.adapt import SGD, inner_steps
from metautils.checkpoint import CHECKPOINT, load_weights
from metautils.data.bank import ClassBank, Parts
from metautils.evaluate import Evaluation, evaluate
from metautils.files import read_json
from metautils.learners.base import Problem
from metautils.learners.meta_lstm import MetaLSTM
from metautils.runs import RECORD
from metautils.sampling import EpisodeSampler
from records import RUNS, Experiment, told

Gates = dict[str, dict[str, Tensor]]  # "f" or "i", tensor: (tasks, steps)


class WithSGD(MetaLSTM):
    """The same learner with plain gradient descent for its rule."""

    lr = 0.1

    def optimizer(self) -> SGD:
        return SGD(self.lr)


def inside(
    out: Path,
    device: torch.device,
    *,
    run: str,
    tasks: int,
    tuned_on: int,
    rates: list[float],
    gate_tasks: int,
) -> dict[str, Any]:
    """Start or rule, and the gates."""
    record = read_json(RUNS / run / RECORD)
    ways, shots, seed = record["train"]["ways"], record["train"]["shots"], record["seed"]
    loaded = data.load(record["data"], seed, record["split"])
    parts = Parts(*(bank.to(device) for bank in loaded))
    problem = Problem(parts.test.images.shape[1:], ways, len(parts.train), transductive=False)
    make = methods.known()["meta_lstm"].make
    trained = make(problem).to(device)
    load_weights(trained, RUNS / run / CHECKPOINT)

    def accuracy(learner: MetaLSTM, bank: ClassBank, seed: int, tasks: int) -> Evaluation:
        return evaluate(learner, bank, [(ways, shots)], 15, tasks, True, seed)[0]

    torch.manual_seed(seed)
    with_sgd, fresh = copy.deepcopy(trained), make(problem).to(device)
    with_sgd.__class__ = WithSGD
    found = {}
    for lr in rates:
        with_sgd.lr = lr
        found[lr] = accuracy(with_sgd, parts.validation, seed + 1, tuned_on).accuracy
    with_sgd.lr = max(found, key=found.get)
    fresh.cell = trained.cell
    cases = {
        "learned start, learned rule": trained,
        f"learned start, gradient descent at {with_sgd.lr}": with_sgd,
        "fresh start, learned rule": fresh,
    }
    worth = [
        [name, told(accuracy(each, parts.test, seed, tasks), 1)] for name, each in cases.items()
    ]
    sampler = EpisodeSampler(parts.test, ways, shots, 1, rotate=True, seed=seed)
    heads = ["Tensor", *(f"Step {k + 1}" for k in range(trained.steps))]
    tables = [{"title": "Start or rule?", "heads": ["Learner", "Accuracy"], "rows": worth}]
    for which, names in gates(trained, sampler, gate_tasks).items():
        title = {"f": "Forget gates", "i": "Input gates"}[which]
        rows = [[name, *(f"{v:.4f}" for v in values.mean(0))] for name, values in names.items()]
        tables.append({"title": title, "heads": heads, "rows": rows})
    what = f"Meta-LSTM as in `{run}`, {ways}-way {shots}-shot, {tasks} test tasks"
    return {"what": what, "tables": tables}


def gates(learner: MetaLSTM, sampler: EpisodeSampler, tasks: int) -> Gates:
    """Mean forget and input gate of every tensor at every step."""
    rows = {which: {name: [] for name, _ in learner.net.named_parameters()} for which in "fi"}
    for _ in range(tasks):
        e = sampler.sample()
        x, y = e.support_x[0], e.support_y[0]
        path = inner_steps(
            learner.net, lambda f, x=x, y=y: F.cross_entropy(f(x), y), learner.cell,
            **learner.options,
        )  # fmt: skip
        with torch.no_grad():
            states = [f.state for f in islice(path, 1, learner.steps + 1)]
        sizes = [p.numel() for p in learner.net.parameters()]
        for which, names in rows.items():
            # (steps, coordinates) to one (steps, size) for each tensor
            each = torch.stack([s[which] for s in states]).split(sizes, 1)
            for name, values in zip(names, each, strict=True):
                names[name].append(values.mean(1))
    return {which: {n: torch.stack(v) for n, v in names.items()} for which, names in rows.items()}


def _of(run: str) -> Experiment:
    settings = {
        "run": run,
        "tasks": 600,
        "tuned_on": 100,
        "rates": [0.01, 0.03, 0.1, 0.3, 1.0],
        "gate_tasks": 100,
    }
    tiny = {"tasks": 2, "tuned_on": 2, "rates": [0.1], "gate_tasks": 1}
    return Experiment(inside, settings, 5, tiny, after=(run,))


EXPERIMENTS = {
    "inside_meta_lstm_5w1s": _of("meta_lstm_omniglot_5w1s"),
    "inside_meta_lstm_5w5s": _of("meta_lstm_omniglot_5w5s"),
}
