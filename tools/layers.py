"""Which layers of a trained MAML do the work: `python tools/layers.py runs/maml` -> results/.

The test tasks, their number and the seed are those of the run's record; accuracies are in percent,
with the half width of the 95 % interval over tasks.
"""

import json
import sys
from pathlib import Path

import torch

from metautils import cli, data, results
from metautils.evaluate import interval95
from metautils.learners.maml import MAML
from metautils.learners.protonet import ProtoNet, cosine, squared_euclidean
from metautils.sampling import EpisodeSampler
from metautils.train import CHECKPOINT, load_weights

TASKS, AFTER = 600, [0, 1, 3, 10]
STEPS = [f"{k} step{'s' * (k != 1)}" for k in AFTER]


def accuracies(predict, queries):
    """Cells `accuracy ± interval`; predict gives logits (tasks, rows, Q, ways) of an episode."""
    sampler = EpisodeSampler(test, ways, shots, queries, 12, rotate=True, seed=0)
    rows = []
    with torch.no_grad():
        for _ in range(TASKS // 12):
            e = sampler.sample()
            right = predict(e).argmax(-1) == e.query_y[:, None]
            rows.append(100 * right.float().mean(-1))
    values = torch.cat(rows).unbind(1)
    return [f"{v.mean():.1f} ± {interval95(v):.1f}" for v in values]


def adapted(after, **options):
    learner = MAML(net, trained.lr, trained.steps, **options)
    return lambda e: learner.after_steps(e.support_x, e.support_y, e.query_x, after)


def compared(distance):
    learner = ProtoNet(net.embed, distance)
    return lambda e: learner(e.support_x, e.support_y, e.query_x)[:, None]


run = Path(sys.argv[1])
record = json.loads((run / "record.json").read_text())
ways, shots = record["train"]["ways"], record["train"]["shots"]
test = data.load(record["data"], record["seed"], record["split"]).test
trained = cli.METHODS["maml"].make(torch.Size([1, 28, 28]), ways, True)
load_weights(trained, run / CHECKPOINT)
net = trained.net
layers = {
    "all layers": {},
    "only the head": {"only": ("head",)},
    "only the body": {"only": ("embed",)},
    "all layers, statistics of the support set": {"transductive": False},
}
rows = [[name, *accuracies(adapted(AFTER, **options), 15)] for name, options in layers.items()]
means = [
    [name, *accuracies(compared(distance), 15)]
    for name, distance in {"squared Euclidean": squared_euclidean, "cosine": cosine}.items()
]
queries = [[n, *accuracies(adapted([1]), n)] for n in (1, 5, 15)]
head = torch.nn.functional.normalize(net.head.weight.detach())
cosines = (head @ head.T)[~torch.eye(ways, dtype=bool)]
tables = [
    {"title": "What adapts", "heads": ["Adapts", *STEPS], "rows": rows},
    {"title": "Class means of the features, nothing adapted", "heads": ["Distance", "Accuracy"],
     "rows": means},
    {"title": "Queries that share a batch", "heads": ["Queries a class", "Accuracy"],
     "rows": queries},
    {"title": "Cosine between two rows of the learned head", "heads": ["lowest", "mean", "highest"],
     "rows": [[f"{v:.2f}" for v in (cosines.min(), cosines.mean(), cosines.max())]]},
]  # fmt: skip
what = (
    f"MAML as in `maml_omniglot`, {ways}-way {shots}-shot, {TASKS} test tasks, 15 queries a class"
)
made = {"what": what, "tables": tables, **results.provenance(torch.device("cpu"))}
(results.folder() / "inside_maml.json").write_text(json.dumps(made, indent=1) + "\n")
print(*(f"{title}\n{each}\n" for title, each in results.tables("inside_maml").items()), sep="\n")
