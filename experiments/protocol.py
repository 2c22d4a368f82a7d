"""One trained Relation Network, tested step by step more as its authors' program tests theirs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from metautils import data, methods
from metautils.checkpoint import CHECKPOINT, load_weights
from metautils.data.bank import ClassBank
from metautils.evaluate import Evaluation
from metautils.files import read_json
from metautils.learners.base import Learner, Problem
from metautils.precision import fast_autocast
from metautils.progress import progress_bar
from metautils.runs import RECORD
from metautils.sampling import EpisodeSampler
from records import RUNS, Experiment, told


def protocol(
    out: Path,
    device: torch.device,
    *,
    run: str,
    ways: list[int],
    shots: int,
    queries: int,
    episodes: int,
    seed: int,
) -> dict[str, Any]:
    """Each row adds one difference to the row before; the last has them all."""
    record = read_json(RUNS / run / RECORD)
    parts = data.load(record["data"], record["seed"])
    problem = Problem(parts.test.images.shape[1:], record["train"]["ways"], 1)
    learner = methods.known()[record["method"]].make(problem).to(device)
    load_weights(learner, RUNS / run / CHECKPOINT)
    test = parts.test.to(device)
    steps = {
        "As in this book: every rotation a class of its own, 15 queries a class": {},
        "One rotation a task": {"bank": test, "turn": True},
        "As many queries as shots": {"bank": test, "turn": True, "queries": shots},
        "In training mode": {"bank": test, "turn": True, "queries": shots, "training": True},
    }
    rows = []
    for title, step in steps.items():
        how = {"bank": test.with_rotations(), "queries": queries, "turn": False} | step
        scores = [_tested(learner, n, shots, episodes, seed, **how) for n in ways]
        rows.append([title, *map(told, scores)])
    heads = ["The test", *(f"{n}-way {shots}-shot" for n in ways)]
    title = f"One network, four tests of {episodes} tasks, each with one more difference"
    return {
        "what": "Relation Network on Omniglot, under its authors' test step by step",
        "tables": [{"title": title, "heads": heads, "rows": rows}],
    }


@torch.no_grad()
def _tested(
    learner: Learner,
    ways: int,
    shots: int,
    episodes: int,
    seed: int,
    *,
    bank: ClassBank,
    queries: int,
    turn: bool,
    training: bool = False,
) -> Evaluation:
    """Tasks one by one, as in training mode the images of a call are normalised together."""
    learner = copy.deepcopy(learner).train(training)  # whose running averages would move
    sampler = EpisodeSampler(bank, ways, shots, queries, seed=seed)
    turns = torch.randint(4, (episodes,), generator=torch.Generator().manual_seed(seed))
    found = []
    for k in progress_bar(turns.tolist(), desc=f"{ways} ways"):
        e = sampler.sample()
        support, query = (x.rot90(k, (-2, -1)) if turn else x for x in (e.support_x, e.query_x))
        with fast_autocast(query.device):
            right = learner(support, e.support_y, query).argmax(-1) == e.query_y  # (1, Q)
        found.append(100 * right.double().mean().cpu())
    return Evaluation(ways, shots, queries, torch.stack(found), training)


EXPERIMENTS = {
    "relation_protocol_omniglot": Experiment(
        protocol,
        {
            "run": "relation_omniglot",
            "ways": [5, 20],
            "shots": 1,
            "queries": 15,
            "episodes": 1000,
            "seed": 0,
        },
        6,
        {"ways": [2, 3], "queries": 2, "episodes": 2},
        after=("relation_omniglot",),
    )
}
