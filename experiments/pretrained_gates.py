"""The Meta-LSTM begun as its own rival: the record pretrained_gates_omniglot.

Its start c_0 is a body that tells all training characters apart, with a head of zeros, and its
untrained gates make small steps of gradient descent: nearly the tuned fine-tuning of
finetune_omniglot. From there it is meta-trained; beside it the start alone is, by first-order MAML
with the rate of fine-tuning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetuned import FineTuned, pretrained, with_head
from metautils import data
from metautils.data.bank import Parts
from metautils.evaluate import evaluate, interval95
from metautils.learners.base import Learner
from metautils.learners.meta_lstm import CLIP, MetaLSTM
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment


def begin(
    out: Path, device: torch.device, *,
    source: str, seed: int, ways: int, shots: int, queries: int, body: dict[str, int],
    arms: dict[str, dict[str, Any]], validation: int, episodes: int,
) -> dict[str, Any]:  # fmt: skip
    """A row for each arm, paired with the first."""
    parts = Parts(*(bank.to(device) for bank in data.load(source, seed)))
    turned = parts.train.with_rotations()
    rows, first = [], None
    for name, arm in arms.items():
        net = with_head(pretrained(turned, seed, **body, path=out / "body.pt"), ways)
        torch.manual_seed(seed)
        learner = _learner(net, arm).to(device)
        minutes = 0.0
        if arm["tasks"]:
            samplers = [
                EpisodeSampler(bank, ways, shots, queries, rotate=True, seed=seed)
                for bank in parts[:2]
            ]
            history = meta_train(
                learner, samplers[0], arm["tasks"], arm["meta_rate"], samplers[1], validation,
                every=max(1, arm["tasks"] // 5), out=out / name.replace(" ", "-"), clip=CLIP,
            )  # fmt: skip
            minutes = history.seconds / 60
        test = evaluate(learner, parts.test, [(ways, shots)], 15, episodes, True, seed)[0]
        right = test.per_episode.double()
        first = right if first is None else first
        rows.append([name, f"{arm['tasks']:,}", f"{minutes:.1f}", *_told(right, first)])
        print(*rows[-1], flush=True)
    heads = ["Learner", "Training tasks", "Minutes", "Accuracy", "Above the first row, paired"]
    title = f"{ways}-way {shots}-shot, queries one by one"
    what = f"The Meta-LSTM begun as fine-tuning, on {source}, {episodes} test tasks, seed {seed}"
    return {"what": what, "tables": [{"title": title, "heads": heads, "rows": rows}]}


def _learner(net: nn.Module, arm: dict[str, Any]) -> Learner:
    """Gradient descent where the arm has a rate, else the Meta-LSTM."""
    if "rate" in arm:
        return FineTuned(net, arm["rate"], arm["steps"], only=(), frozen=False)
    return MetaLSTM(net, arm["steps"])


def _told(right: Tensor, first: Tensor) -> list[str]:
    more = right - first
    above = f"{more.mean():+.2f} ± {interval95(more):.2f}" if more.any() else ""
    return [f"{right.mean():.2f} ± {interval95(right):.2f}", above]


ARMS = {
    "fine-tuned": {"tasks": 0, "steps": 20, "rate": 0.01},
    "Meta-LSTM begun there": {"tasks": 0, "steps": 20},
    "Meta-LSTM trained from there": {
        "tasks": 500, "steps": 20, "meta_rate": 1e-4,
    },
    "start alone from there": {
        "tasks": 500, "steps": 20, "rate": 0.01, "meta_rate": 1e-4,
    },
}  # fmt: skip
_TINY = {name: arm | {"tasks": min(arm["tasks"], 2), "steps": 1} for name, arm in ARMS.items()}
EXPERIMENTS = {
    "pretrained_gates_omniglot": Experiment(
        begin,
        {
            "source": "omniglot",
            "seed": 0,
            "ways": 5,
            "shots": 1,
            "queries": 5,
            "body": {"steps": 6000, "batch": 128},
            "arms": ARMS,
            "validation": 60,
            "episodes": 600,
        },
        minutes=120,
        tiny={
            "source": "glyphs",
            "ways": 2,
            "queries": 1,
            "body": {"steps": 2, "batch": 8},
            "arms": _TINY,
            "validation": 2,
            "episodes": 2,
        },
    )
}
