"""Learners that compare, trained alike: `python tools/compare.py omniglot` or `cifar_fs`.

The same embedding, training episodes, steps and choice on validation classes for all; the same
test episodes too, so that differences are taken task by task. Writes `results/compare_NAME.json`.
The same command goes on after an interruption.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from metautils import data, results
from metautils.evaluate import evaluate, interval95
from metautils.learners.base import task_loss
from metautils.learners.matching_net import MatchingNet
from metautils.learners.protonet import ProtoNet
from metautils.learners.relation_net import RelationModule, RelationNet
from metautils.nets import Conv4
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train


@dataclass
class Protocol:
    """One table: how learners are trained, and the (ways, shots) that they are tested in."""

    shots: int
    tests: list[tuple[int, int]]
    seeds: tuple[int, ...]
    steps: int
    left_out: tuple[str, ...] = ()
    ways: int = 20
    queries: int = 5
    episodes: int = 600


SQUARES = "Relation, squared error"
PROTOCOLS = {
    "omniglot": [Protocol(1, [(5, 1), (20, 1)], (0, 1, 2), 1000)],
    "cifar_fs": [Protocol(k, [(5, k)], (0,), 1000, (SQUARES,)) for k in (1, 5)],
}


def methods(channels, size):
    """Makers of the learners; all but one embed into 64 maps of a quarter of the image's side."""

    def body():
        return Conv4(channels, pools=2)

    def relation(**objective):
        return lambda: RelationNet(body(), RelationModule(size=size // 4), **objective)

    return {
        "Prototypical": lambda: ProtoNet(body()),
        "Prototypical, four poolings": lambda: ProtoNet(Conv4(channels)),
        "Matching, cosine x 10": lambda: MatchingNet(body(), 10.0),
        SQUARES: relation(),
        "Relation, cross-entropy": relation(objective=task_loss),
    }


def trained(make, protocol, source, held_out, seed, out):
    """A learner, and the minutes that its training took."""
    torch.manual_seed(seed)
    learner = make()
    shape = protocol.shots, protocol.queries
    episodes = EpisodeSampler(source, protocol.ways, *shape, seed=seed)
    choose = EpisodeSampler(held_out, min(protocol.ways, len(held_out)), *shape, seed=seed)
    every = protocol.steps // 10
    history = meta_train(learner, episodes, protocol.steps, 1e-3, choose, every=every, out=out)
    return learner, history.seconds / 60


def tested(learner, protocol, bank):
    """Its evaluations; each image is embedded once."""
    features = bank.map(learner.embed.eval())
    learner.embed = nn.Identity()
    return evaluate(learner, features, protocol.tests, 15, protocol.episodes)


def compared(protocol, name, parts):
    """A table for each test; its first row is what the others are compared with."""
    found, minutes = {}, {}
    for method, make in methods(*parts.test.images.shape[1:3]).items():
        if method in protocol.left_out:
            continue
        runs = []
        for seed in protocol.seeds:
            slug = f"{name}-{protocol.shots}shot-{method}-{seed}".replace(", ", "-")
            out = Path("runs") / "compare" / slug.replace(" ", "-")
            runs.append(trained(make, protocol, *parts[:2], seed, out))
        minutes[method] = sum(m for _, m in runs) / len(runs)
        found[method] = [tested(learner, protocol, parts.test) for learner, _ in runs]
        print(method, *(str(e) for scores in found[method] for e in scores), flush=True)
    return [
        table(k, ways, shots, found, minutes, protocol)
        for k, (ways, shots) in enumerate(protocol.tests)
    ]


def table(k, ways, shots, found, minutes, protocol):
    """Everybody in test `k`, and the paired difference to the first row."""
    rows = []
    for method, runs in found.items():
        every = torch.stack([scores[k].per_episode for scores in runs]).double()
        first = torch.stack([s[k].per_episode for s in found["Prototypical"]]).double()
        more = every - first
        seeds = [", ".join(f"{a:.2f}" for a in every.mean(1))] if len(runs) > 1 else []
        accuracy = f"{every.mean():.2f} ± {interval95(every.mean(0)):.2f}"
        above = f"{more.mean():+.2f} ± {interval95(more.mean(0)):.2f}" if rows else ""
        rows.append([method, f"{minutes[method]:.1f}", accuracy, *seeds, above])
    by_seed = ["By seed"] if len(protocol.seeds) > 1 else []
    heads = ["Learner", "Minutes", "Accuracy", *by_seed, "Above the first row, paired"]
    learned = f"{protocol.steps} episodes of {protocol.ways}-way {protocol.shots}-shot"
    title = f"{ways}-way {shots}-shot, trained on {learned}"
    return {"title": title, "heads": heads, "rows": rows}


name = sys.argv[1] if len(sys.argv) > 1 else ""
if name not in PROTOCOLS:
    sys.exit(f"Name one of {', '.join(PROTOCOLS)}.")
made = results.provenance(torch.device("cpu"))
parts = data.load(name)
if name == "omniglot":
    parts = type(parts)(*(bank.with_rotations() for bank in parts))
record = {
    "what": f"Learners that compare, trained alike on {name}, 600 test episodes",
    "tables": [t for protocol in PROTOCOLS[name] for t in compared(protocol, name, parts)],
    **made,
}
path = results.folder() / f"compare_{name}.json"
path.write_text(json.dumps(record, indent=1) + "\n")
print(*(f"{title}\n{each}\n" for title, each in results.tables(f"compare_{name}").items()))
