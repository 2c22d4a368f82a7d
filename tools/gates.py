"""What a trained Meta-LSTM has learned: `python tools/gates.py runs/meta_lstm` -> results/.

The gates, a mean over the coordinates of each layer, by inner step; and what start and rule are
worth each without the other, on 600 test tasks with one rotation for each class and task;
accuracies are in percent, with the half width of the 95 % interval over tasks.
"""

import copy
import json
import sys
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F

from metautils import cli, data, results
from metautils.adapt import SGD, inner_steps
from metautils.evaluate import evaluate
from metautils.sampling import EpisodeSampler
from metautils.train import CHECKPOINT, load_weights

TASKS, RATES = 600, (0.01, 0.03, 0.1, 0.3, 1.0)


def gates(learner, sampler, tasks):
    """Mean forget and input gate of every tensor at every step: name to (tasks, steps)."""
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
            each = torch.stack([s[which] for s in states]).split(sizes, 1)
            for name, values in zip(names, each, strict=True):
                names[name].append(values.mean(1))
    return {which: {n: torch.stack(v) for n, v in names.items()} for which, names in rows.items()}


IMAGE = torch.Size([1, 28, 28])


class WithSGD(type(cli.METHODS["meta_lstm"].make(IMAGE, 5, False))):
    """The same learner with plain gradient descent for its rule."""

    lr = 0.1

    def optimizer(self):
        return SGD(self.lr)


def accuracy(learner, bank, seed, tasks=TASKS):
    return evaluate(learner, bank, [(ways, shots)], 15, tasks, True, seed)[0]


run = Path(sys.argv[1])
record = json.loads((run / "record.json").read_text())
ways, shots, seed = record["train"]["ways"], record["train"]["shots"], record["seed"]
parts = data.load(record["data"], seed, record["split"])
trained = cli.METHODS["meta_lstm"].make(IMAGE, ways, False)
load_weights(trained, run / CHECKPOINT)

torch.manual_seed(seed)
with_sgd, fresh = copy.deepcopy(trained), cli.METHODS["meta_lstm"].make(IMAGE, ways, False)
with_sgd.__class__ = WithSGD
found = {}
for lr in RATES:
    with_sgd.lr = lr
    found[lr] = accuracy(with_sgd, parts.validation, seed + 1, 100).accuracy
with_sgd.lr = max(found, key=found.get)
fresh.cell = trained.cell
cases = {
    "learned start, learned rule": trained,
    f"learned start, gradient descent at {with_sgd.lr}": with_sgd,
    "fresh start, learned rule": fresh,
}
worth = []
for name, learner in cases.items():
    each = accuracy(learner, parts.test, seed)
    worth.append([name, f"{each.accuracy:.1f} ± {each.ci95:.1f}"])
sampler = EpisodeSampler(parts.test, ways, shots, 1, rotate=True, seed=seed)
heads = ["Tensor", *(f"Step {k + 1}" for k in range(trained.steps))]
tables = [{"title": "Start or rule?", "heads": ["Learner", "Accuracy"], "rows": worth}]
for which, names in gates(trained, sampler, 100).items():
    title = {"f": "Forget gates", "i": "Input gates"}[which]
    rows = [[name, *(f"{v:.4f}" for v in values.mean(0))] for name, values in names.items()]
    tables.append({"title": title, "heads": heads, "rows": rows})
name = f"inside_{run.name}"
made = {
    "what": f"Meta-LSTM as in `{run.name}`, {ways}-way {shots}-shot, {TASKS} test tasks",
    "tables": tables, **results.provenance(torch.device("cpu")),
}  # fmt: skip
(results.folder() / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
print(*(f"{title}\n{each}\n" for title, each in results.tables(name).items()), sep="\n")
