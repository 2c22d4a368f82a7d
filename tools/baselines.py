"""Pretraining beside meta-learning on CIFAR-FS: `python tools/baselines.py`.

The same network, number of training images (MAML: a third) and choice on validation classes for
all, and the same test episodes, so that differences are taken task by task. The same command goes
on after an interruption. Writes `results/compare_pretraining.json`.
"""

import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from metautils import data, results
from metautils.evaluate import evaluate, interval95
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

IMAGES = 480_000  # that a learner is trained on, 12.5 passes through the training classes
MAML_IMAGES = IMAGES // 3  # its second derivatives take about three times as long
FEATURES = 64 * 2 * 2
TESTS = [(5, 1), (5, 5)]


def protonet(shots):
    """A Prototypical Network and its episodes, tested with the shots that it was trained with."""
    return ProtoNet(Conv4(3)), (20, shots, 15, 1)


def maml(shots):
    """MAML of three inner steps in training, ten in testing."""
    net = classifier(Conv4(3, norm=BatchNorm), FEATURES, 5)
    return MAML(net, lr=0.1, steps=3, test_steps=10, transductive=False), (5, shots, 15, 4)


def body(cosine, _):
    """A network that learns to tell the training classes apart, by batches of 384."""
    head = CosineHead(FEATURES, 64) if cosine else nn.Linear(FEATURES, 64)
    return Baseline(Conv4(3), head, nearest_centroid), (64, 1, 5, 1)


def trained(name, make, shots, parts):
    """A learner with the weights that did best on the validation classes, and its minutes."""
    torch.manual_seed(0)
    learner, (ways, k, queries, tasks) = make(shots)
    steps = (MAML_IMAGES if name == "MAML" else IMAGES) // (tasks * ways * (k + queries))
    episodes = EpisodeSampler(parts.train, ways, k, queries, tasks)
    choose = EpisodeSampler(parts.validation, 5, shots, 15, 4)
    out = Path("runs") / "baselines" / f"{name}-{shots}"
    history = meta_train(
        learner, episodes, steps, 1e-3, choose, 200, every=-(-steps // 16), out=out
    )
    print(name, shots, f"{history.seconds / 60:.1f} minutes", flush=True)
    return learner, history.seconds / 60


def answered(learner, fit, tests, bank):
    """Evaluations of a trained body with one way to answer tasks; each image is embedded once."""
    features = bank.map(learner.embed.eval())
    each = Baseline(nn.Identity(), nn.Identity(), fit)
    return evaluate(each, features, tests, 15, 600)


def compared(parts):
    """Each learner's minutes and its evaluations, one for each of TESTS."""
    found = {}
    for name, make in {"Prototypical": protonet, "MAML": maml}.items():
        # Prototypical Networks want the shots of the test; MAML adapts to any from one start.
        trainings = [1, 5] if name == "Prototypical" else [1]
        runs = [trained(name, make, k, parts) for k in trainings] * (3 - len(trainings))
        minutes = ", ".join(f"{m:.0f}" for _, m in runs[: len(trainings)])
        scores = [
            evaluate(learner, parts.test, [test], 15, 600)[0]
            for (learner, _), test in zip(runs, TESTS, strict=True)
        ]
        found[name] = minutes, scores
    for kind in ("linear", "cosine"):
        # One body for both tests, chosen on 1-shot tasks of the validation classes.
        learner, m = trained(f"body-{kind}", partial(body, kind == "cosine"), 1, parts)
        fits = {"nearest centroid": nearest_centroid}
        if kind == "linear":
            fits["new linear head (Baseline)"] = linear_head
        else:
            fits["new cosine head (Baseline++)"] = cosine_head
        for fit, function in fits.items():
            scores = answered(learner, function, TESTS, parts.test)
            found[f"Classifier, {kind} head; {fit}"] = f"{m:.0f}", scores
    pixels = evaluate(ProtoNet(nn.Flatten()), parts.test, TESTS, 15, 600)
    return found | {"Class means in pixels": ("0", pixels)}


def table(found):
    """Accuracies, and how much each is above the Prototypical Network, paired by task."""
    _, first = found["Prototypical"]
    rows = []
    for name, (minutes, scores) in found.items():
        cells = [f"{e.accuracy:.2f} ± {e.ci95:.2f}" for e in scores]
        for e, other in zip(scores, first, strict=True):
            more = e.per_episode.double() - other.per_episode.double()
            told = f"{more.mean():+.2f} ± {interval95(more):.2f}"
            cells.append("" if name == "Prototypical" else told)
        rows.append([name, minutes, *cells])
    tests = [f"{n}-way {k}-shot" for n, k in TESTS]
    heads = ["Learner", "Minutes", *tests, *(f"Above the first row, {t}" for t in tests)]
    title = f"Conv-4 on CIFAR-FS, {IMAGES:,} training images each (MAML {MAML_IMAGES:,})"
    return {"title": title, "heads": heads, "rows": rows}


if __name__ == "__main__":
    made = results.provenance(torch.device("cpu"))
    record = {
        "what": "Pretraining beside meta-learning, 600 test episodes, seed 0",
        "tables": [table(compared(data.load("cifar_fs")))],
        **made,
    }
    path = results.folder() / "compare_pretraining.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(*(f"{title}\n{each}" for title, each in results.tables(path.stem).items()))
