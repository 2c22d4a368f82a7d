"""What a comparing learner knows of its own answers: strangers_omniglot and calibration.

A stranger is a query of a class that the support set does not have. A threshold on some score has
to keep it out; the area under the ROC curve says how well any threshold can: the probability that
a query of a known class scores higher than a stranger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from compare import SHARED, distances, slug, trained
from full_scale import CIFAR_FS, TINY, file_of, learn, learner_of
from metautils import data, methods
from metautils.certainty import calibration_error, fit_temperature
from metautils.checkpoint import CHECKPOINT, load_weights
from metautils.data.bank import ClassBank, Parts
from metautils.files import load_safely
from metautils.learners.base import Learner, Problem, without_embedding
from metautils.sampling import EpisodeSampler
from records import RUNS, Experiment

TASKS = 20  # at a time
QUERIES = 15
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "largest probability": lambda logits: logits.softmax(-1).amax(-1),
    "smallest distance": lambda logits: logits.amax(-1),
    "log of the sum of exp(- distance)": lambda logits: logits.logsumexp(-1),
    "smallest distance, less that of the second": lambda logits: (
        logits.topk(2).values.diff(dim=-1)[..., 0].neg()
    ),
}


@torch.no_grad()
def strangers(
    learner: Learner, bank: ClassBank, ways: int, shots: int, episodes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Logits `(episodes, Q, ways)`, and which queries are of a known class, `(episodes, Q)`.

    One class of `ways + 1` is asked about and not shown.
    """
    sampler = EpisodeSampler(bank, ways + 1, shots, QUERIES, min(TASKS, episodes), seed=seed)
    logits, known = [], []
    for _ in range(-(-episodes // sampler.tasks)):
        e = sampler.sample()
        shown = ways * shots  # the support set comes in the order of its labels
        logits.append(learner(e.support_x[:, :shown], e.support_y[:, :shown], e.query_x))
        known.append(e.query_y < ways)
    return torch.cat(logits)[:episodes].cpu(), torch.cat(known)[:episodes].cpu()


def told_apart(
    out: Path,
    device: torch.device,
    *,
    source: str,
    run: str,
    seeds: list[int],
    ways: int,
    shots: list[int],
    episodes: int,
) -> dict[str, Any]:
    """A table for each number of shots, of what each score knows."""
    tables: dict[int, dict[str, list[list[float]]]] = {k: {s: [] for s in SCORES} for k in shots}
    for seed in seeds:
        parts = data.load(source, seed)
        learner = methods.known()["protonet"].make(Problem(parts.test.images.shape[1:], 1, 1))
        load_weights(learner, RUNS / run / str(seed) / CHECKPOINT)
        each, features = learner.to(device).on_features(parts.test.with_rotations().to(device))
        for k in shots:
            logits, known = strangers(each, features, ways, k, episodes, seed)
            for name, score in SCORES.items():
                tables[k][name].append(_areas(score(logits), known))
    heads = ["Score", "Area under the curve", "By seed",
             "Strangers let in with 95 % of the known, %"]  # fmt: skip
    return {
        "what": f"Queries of a class that is not in the task, Prototypical Networks on {source}",
        "tables": [
            {
                "title": f"{ways}-way {k}-shot, one stranger class, {episodes} test episodes",
                "heads": heads,
                "rows": [_row(name, found) for name, found in rows.items()],
            }
            for k, rows in tables.items()
        ],
    }


def _areas(score: Tensor, known: Tensor) -> list[float]:
    """Area over all tasks together, and strangers let in at 95 % of the known, percent."""
    threshold = score[known].quantile(0.05)
    return [
        float(roc_auc_score(known.flatten().numpy(), score.flatten().numpy())),
        100 * float((score[~known] >= threshold).float().mean()),
    ]


def _row(name: str, found: list[list[float]]) -> list[str]:
    areas, let_in = torch.tensor(found).double().unbind(1)  # (seeds,) each
    by_seed = ", ".join(f"{x:.4f}" for x in areas)
    return [name, f"{areas.mean():.4f}", by_seed, f"{let_in.mean():.1f}"]


@torch.no_grad()
def answers(
    learner: Learner, bank: ClassBank, ways: int, shots: int, episodes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Logits `(n, ways)` and labels `(n,)` of all queries of the episodes."""
    sampler = EpisodeSampler(bank, ways, shots, QUERIES, min(TASKS, episodes), seed=seed)
    found = []
    for _ in range(-(-episodes // sampler.tasks)):
        e = sampler.sample()
        logits = learner(e.support_x, e.support_y, e.query_x)
        found.append((logits.flatten(0, 1).cpu(), e.query_y.flatten().cpu()))
    logits, labels = (torch.cat(x) for x in zip(*found, strict=True))
    return logits, labels


def calibrated(
    out: Path,
    device: torch.device,
    *,
    drawings: dict[str, Any],
    photos: dict[str, Any],
    bins: int,
    episodes: int,
) -> dict[str, Any]:
    """A table for each test: accuracy, the error before and after one temperature."""
    tables: dict[str, list[list[str]]] = {}
    arms = itertools.chain(_of_drawings(drawings, device), _of_photos(photos, device))
    for source, name, tests, parts, learners in arms:
        each = torch.tensor([_judged(x, parts, tests, episodes, bins) for x in learners]).double()
        for (ways, shots), found in zip(tests, each.mean(0).tolist(), strict=True):  # over seeds
            accuracy, before, t, after = found
            row = [name, f"{accuracy:.2f}", f"{before:.2f}", f"{t:.3g}", f"{after:.2f}"]
            title = f"{ways}-way {shots}-shot, {source}, {episodes} episodes"
            tables.setdefault(title, []).append(row)
            print(title, *row, flush=True)
    return {
        "what": "Expected calibration error before and after one temperature, which is fitted on "
        "validation classes",
        "tables": [{"title": t, "heads": HEADS, "rows": rows} for t, rows in tables.items()],
    }


Found = Iterator[tuple[str, str, list[tuple[int, int]], Parts, list[Learner]]]


def _of_drawings(how: dict[str, Any], device: torch.device) -> Found:
    """The learners of distances_omniglot, and their tests."""
    parts = Parts(*(b.to(device).with_rotations() for b in data.load(how["source"])))
    makers = distances(*parts.test.images.shape[1:3])
    numbers = (how[name] for name in ("steps", "ways", "shots", "queries", "choices"))
    steps, ways, shots, queries, choices = numbers
    for name, make in makers.items():
        learners = [
            trained(make, parts, device, seed, steps, ways, shots, queries, choices,
                    RUNS / how["run"] / slug(name, shots, seed))[0]
            for seed in how["seeds"]
        ]  # fmt: skip
        yield how["source"], name, [tuple(test) for test in how["tests"]], parts, learners


def _of_photos(how: dict[str, Any], device: torch.device) -> Found:
    """The learners of full_scale_cifar_fs that compare, each with its own test."""
    source, arms, out = how["source"], how["arms"], RUNS / how["run"]
    learn({out: {"source": source, "arms": arms, "seeds": [0]}}, device, float("inf"))
    parts = Parts(*(bank.to(device) for bank in data.load(source)))
    for name, arm in arms.items():
        problem = Problem(parts.test.images.shape[1:], arm["ways"], 1)
        learner = learner_of(arm, problem, 0)
        learner.load_state_dict(load_safely(file_of(out, name, 0))["weights"])
        yield source, name.partition(" ")[0], [(5, arm["shots"])], parts, [learner.to(device)]


def _judged(
    learner: Learner, parts: Parts, tests: list[tuple[int, int]], episodes: int, bins: int
) -> list[tuple[float, float, float, float]]:
    """For each test accuracy, error, temperature, and the error with it."""
    light, found = without_embedding(learner.eval()), []
    validation, test = (bank.map(learner.embed) for bank in parts[1:])
    for ways, shots in tests:
        few = min(ways, len(validation))
        t = fit_temperature(*answers(light, validation, few, shots, episodes, 1))
        logits, labels = answers(light, test, ways, shots, episodes, 0)
        errors = [calibration_error((logits / x).softmax(-1), labels, bins) for x in (1, t)]
        right = 100 * float((logits.argmax(-1) == labels).float().mean())
        found.append((right, errors[0], t, errors[1]))
    return found


HEADS = ["Learner", "Accuracy", "Calibration error, %", "Temperature", "Error after it, %"]
DRAWINGS = {
    "source": "omniglot",
    "run": "distances_omniglot",
    "seeds": [0, 1, 2],
    "tests": [[5, 1], [20, 1]],
    "shots": 1,
    "choices": 100,
    **{name: SHARED[name] for name in ("steps", "ways", "queries")},
}
PHOTOS = {"source": "cifar_fs", "run": "full_scale_cifar_fs", "arms": CIFAR_FS}
EXPERIMENTS = {
    "strangers_omniglot": Experiment(
        told_apart,
        {
            "source": "omniglot",
            "run": "protonet_seeds_omniglot",
            "seeds": [0, 1, 2],
            "ways": 5,
            "shots": [1, 5],
            "episodes": 600,
        },
        minutes=5,
        tiny={"source": "glyphs", "seeds": [0, 1], "ways": 2, "shots": [1], "episodes": 2},
        after=("protonet_seeds_omniglot",),
    ),
    "calibration": Experiment(
        calibrated,
        {"drawings": DRAWINGS, "photos": PHOTOS, "bins": 15, "episodes": 600},
        minutes=15,
        tiny={
            "drawings": DRAWINGS | {"source": "glyphs", "seeds": [0], "tests": [[2, 1]],
                                    "choices": 2, "steps": 2, "ways": 3, "queries": 1},
            "photos": PHOTOS | {"source": "glyphs", "arms": {
                name: arm | TINY for name, arm in CIFAR_FS.items() if arm["shots"] == 1}},
            "episodes": 2,
        },
    ),
}  # fmt: skip
