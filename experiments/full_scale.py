"""The papers' tables at the papers' scale: the records full_scale_*.

On a GPU all trainings run side by side (side_by_side.py) and end in time; on a CPU one after
another takes days. Weights lie in runs/NAME as soon as all are trained, and are tested from there,
so a GPU may train and any machine test:

    python experiments/full_scale.py full_scale_omniglot --seconds 500    train only
    python experiments/records.py full_scale_omniglot                     what is missing, test
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuned import FineTuned
from metautils import data, methods, results
from metautils.data.bank import Parts
from metautils.evaluate import evaluate, interval95
from metautils.files import load_safely, save_atomically
from metautils.learners.anil import ANIL
from metautils.learners.base import Learner, Problem
from metautils.learners.maml import FOMAML, MAML, on_strided_conv4
from metautils.learners.meta_lstm import CLIP
from metautils.learners.meta_sgd import MetaSGD
from metautils.sampling import EpisodeSampler
from records import RUNS, Experiment
from side_by_side import Training, train

KINDS = {"MAML": MAML, "FOMAML": FOMAML, "ANIL": ANIL, "Meta-SGD": MetaSGD}
ALONE = "the start of the Meta-LSTM alone"
COMPARE = {"ProtoNet": "protonet", "Matching": "matching", "Relation": "relation"}


def learner_of(arm: dict[str, Any], problem: Problem, seed: int) -> Learner:
    """What an arm trains, freshly initialised."""
    torch.manual_seed(seed)
    kind, how = arm["learner"], arm.get("options", {})
    if kind in COMPARE:
        return methods.known()[COMPARE[kind]].make(problem)
    if kind == ALONE:
        net = methods.known()["meta_lstm"].make(problem).net
        return FineTuned(net, how["lr"], how["steps"], only=(), frozen=False)
    return on_strided_conv4(KINDS[kind], **how)(problem)


def trainings_of(
    out: Path, parts: Parts, arms: dict[str, Any], seeds: list[int]
) -> dict[Path, Training]:
    """Those that are not finished, by the file that their weights go into."""
    found = {}
    for name, arm in arms.items():
        ways, shots, queries, tasks = (arm[x] for x in ("ways", "shots", "queries", "tasks"))
        turned = arm.get("rotations") == "episode"
        bank = parts.train
        problem = Problem(bank.images.shape[1:], ways, len(bank))
        for seed in seeds:
            path = file_of(out, name, seed)
            if not path.exists():
                learner = learner_of(arm, problem, seed).to(bank.images.device)
                episodes = EpisodeSampler(
                    bank, ways, shots, queries, tasks, turned, seed, arm.get("vary", False)
                )
                found[path] = Training(learner, episodes, arm["steps"], arm["lr"], arm.get("clip"))
    return found


def learn(wanted: dict[Path, dict[str, Any]], device: torch.device, seconds: float) -> None:
    """Train what is missing in these folders, of settings of experiments, all side by side."""
    todo: dict[Path, Training] = {}
    for out, s in wanted.items():
        parts = Parts(*(bank.to(device) for bank in data.load(s["source"], 0)))
        todo |= trainings_of(out, parts, s["arms"], s["seeds"])
    if not todo:
        return
    made_by, paths = results.provenance(device), {each: path for path, each in todo.items()}

    def finished(each: Training) -> None:
        saved = {
            "weights": {name: x.cpu() for name, x in each.learner.state_dict().items()},
            "losses": each.losses[: each.count].cpu(),
            "minutes": each.minutes,
            "trained_by": made_by,
        }
        save_atomically(saved, paths[each])

    train(list(paths), seconds, finished)


def main() -> None:
    """Train only, for a machine that is lent for minutes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    wanted = {RUNS / name: EXPERIMENTS[name].settings for name in args.names}
    learn(wanted, torch.device(args.device), args.seconds)


def tested(
    out: Path,
    device: torch.device,
    *,
    source: str,
    arms: dict[str, Any],
    seeds: list[int],
    episodes: int,
) -> dict[str, Any]:
    """A table for each number of ways and shots, of the test classes."""
    learn({out: {"source": source, "arms": arms, "seeds": seeds}}, device, float("inf"))
    parts = Parts(*(bank.to(device) for bank in data.load(source, 0)))
    tables: dict[str, list[list[str]]] = {}
    first: dict[str, Tensor] = {}
    for name, arm in arms.items():
        title = f"{_ways(arm)}-way {arm['shots']}-shot"
        for helped in (True, False) if arm["learner"] in KINDS else (False,):
            kept = [load_safely(file_of(out, name, seed)) for seed in seeds]
            every = []
            for seed, saved in zip(seeds, kept, strict=True):
                path = file_of(out, f"{name} {episodes} {helped}", seed)
                if not path.exists():
                    right = _score(arm, parts, seed, saved["weights"], helped, episodes)
                    save_atomically(right, path)
                every.append(load_safely(path))
            tasks = torch.stack(every).double()  # (seeds, episodes)
            more = tasks - first.setdefault(title, tasks)
            steps = [len(saved["losses"]) for saved in kept]
            tables.setdefault(title, []).append([
                name,
                "transductive" if helped else "inductive",
                f"{min(steps):,} x {arm['tasks']}",
                f"{sum(saved['minutes'] for saved in kept) / len(kept):.1f}",
                f"{tasks.mean():.2f} ± {interval95(tasks.mean(0)):.2f}",
                ", ".join(f"{x:.2f}" for x in tasks.mean(1)),
                f"{more.mean():+.2f} ± {interval95(more.mean(0)):.2f}" if more.any() else "",
            ])  # fmt: skip
            print(title, *tables[title][-1], flush=True)
    heads = ["Learner", "Queries", "Steps x tasks", "Minutes", "Accuracy", "By seed",
             "Above the first row, paired"]  # fmt: skip
    what = f"Trained at full scale on {source}, {episodes} test episodes"
    return {
        "what": what,
        "tables": [{"title": t, "heads": heads, "rows": rows} for t, rows in tables.items()],
        "trained_by": kept[0]["trained_by"],
    }


def _score(
    arm: dict[str, Any], parts: Parts, seed: int, weights: dict[str, Tensor], helped: bool,
    episodes: int,
) -> Tensor:  # fmt: skip
    """Percent right in each test episode, `(episodes,)`."""
    ways, shots = _ways(arm), arm["shots"]
    problem = Problem(parts.test.images.shape[1:], ways, 1, helped)
    learner = learner_of(arm, problem, seed)
    learner.load_state_dict(weights)
    learner.to(parts.test.images.device)
    turned = arm.get("rotations") == "episode"
    return evaluate(learner, parts.test, [(ways, shots)], 15, episodes, turned, seed)[0].per_episode


def _ways(arm: dict[str, Any]) -> int:
    """Of the test: who compares learns from more classes than it is asked about."""
    return 5 if arm["learner"] in COMPARE else arm["ways"]


def file_of(out: Path, name: str, seed: int) -> Path:
    """Where the weights of an arm lie."""
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.pt"


def _maml(
    kind: str, ways: int, shots: int, alpha: float, inner: int, test: int, **changed: Any
) -> dict[str, Any]:
    """An arm of the family of MAML by its paper's protocol."""
    return {
        "learner": kind, "ways": ways, "shots": shots, "queries": 10 if ways == 5 else 5,
        "tasks": 16, "rotations": "episode", "lr": 2e-3,
        "options": {"lr": alpha, "steps": inner, "test_steps": test}, **changed,
    }  # fmt: skip


def _compares(kind: str, shots: int, **changed: Any) -> dict[str, Any]:
    """An arm that learns by comparing, on photos that are shifted and mirrored."""
    return {
        "learner": kind, "ways": 20, "shots": shots, "queries": 10, "tasks": 1, "vary": True,
        "steps": 20000, "lr": 1e-3, **changed,
    }  # fmt: skip


OMNIGLOT = {
    "MAML 5w1s": _maml("MAML", 5, 1, 0.4, 1, 3, steps=20000),
    "MAML 5w5s": _maml("MAML", 5, 5, 0.4, 1, 3, steps=10000),
    "FOMAML 5w1s": _maml("FOMAML", 5, 1, 0.4, 1, 3, steps=10000),
    "ANIL 5w1s": _maml("ANIL", 5, 1, 0.4, 1, 3, steps=10000),
    "Meta-SGD 5w1s": _maml("Meta-SGD", 5, 1, 0.4, 1, 1, steps=10000),
    # First-order MAML as the Meta-LSTM is trained: its network, a task an update, five inner steps.
    "FOMAML 5w1s, as the Meta-LSTM": _maml(
        ALONE, 5, 1, 0.1, 5, 5, steps=40000, queries=5, tasks=1, clip=CLIP
    ),
}
CIFAR_FS = {f"{kind} {shots}-shot": _compares(kind, shots) for kind in COMPARE for shots in (1, 5)}
TINY = {"ways": 3, "queries": 1, "tasks": 1, "steps": 2}


def _experiment(source: str, arms: dict[str, Any]) -> Experiment:
    """Its minutes are a guess: nobody has waited for a CPU."""
    tiny = {"source": "glyphs", "arms": {k: v | TINY for k, v in arms.items()}, "episodes": 2}
    settings = {"source": source, "arms": arms, "seeds": [0], "episodes": 600}
    return Experiment(tested, settings, 6000, tiny)


EXPERIMENTS = {
    "full_scale_omniglot": _experiment("omniglot", OMNIGLOT),
    "full_scale_cifar_fs": _experiment("cifar_fs", CIFAR_FS),
}

if __name__ == "__main__":
    main()
