"""iMAML beside MAML and FOMAML, on sinusoids and on drawn characters: the record compare_imaml.

All start from the same weights and see the same training tasks as often. Inner rates were chosen by
hand, from a few short runs on other tasks. Work is not equal: 5 second-order steps stand beside 16
first-order ones and 5 products, and these 16 do not solve iMAML's inner problem. Differences to
MAML are paired by test task, and all seeds' tasks lie in one interval.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metautils import data
from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.evaluate import evaluate, interval95, squared_errors
from metautils.learners.imaml import IMAML
from metautils.learners.maml import FOMAML, MAML
from metautils.nets import BatchNorm, Conv4, classifier, mlp
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment

KINDS = {"MAML": MAML, "FOMAML": FOMAML, "iMAML": IMAML}
Scores = Callable[[str, dict[str, Any], int], Tensor]


def compared(
    out: Path, device: torch.device, *, waves: dict[str, Any], glyphs: dict[str, Any]
) -> dict[str, Any]:
    """Two tables: mean squared error, and accuracy in percent."""
    drawn, _, unseen = (part.to(device) for part in data.load("glyphs", 0))

    def on_waves(kind: str, how: dict[str, Any], seed: int) -> Tensor:
        torch.manual_seed(seed)
        learner = KINDS[kind](mlp(), **how).to(device)
        train = RegressionSampler(SINUSOIDS, 10, 10, waves["tasks"], seed, device)
        meta_train(learner, train, waves["steps"], waves["lr"], progress=False, clip=10.0)
        test = RegressionSampler(SINUSOIDS, 10, 100, 50, 5000 + seed, device)
        return squared_errors(learner, test, waves["test"])

    def on_glyphs(kind: str, how: dict[str, Any], seed: int) -> Tensor:
        torch.manual_seed(seed)
        net = classifier(Conv4(width=32, strided=True, norm=BatchNorm), 32, 5)
        learner = KINDS[kind](net, **how).to(device)
        train = EpisodeSampler(drawn, 5, 1, 5, glyphs["tasks"], seed=seed)
        meta_train(learner, train, glyphs["steps"], glyphs["lr"], progress=False, clip=10.0)
        (e,) = evaluate(learner, unseen, [(5, 1)], 5, glyphs["test"], seed=5000 + seed)
        return e.per_episode.double()

    tables = [
        table("Sinusoids, mean squared error", on_waves, waves, 3),
        table("Drawn characters, 5-way 1-shot, accuracy", on_glyphs, glyphs, 1),
    ]
    what = "equal numbers of meta-steps and tasks; difference to the first row, paired by test task"
    return {"what": what, "tables": tables}


def table(title: str, scores: Scores, size: dict[str, Any], digits: int) -> dict[str, Any]:
    """A row for each learner, all seeds together."""
    found = {
        name: torch.cat([scores(name.split(",")[0], how, seed) for seed in range(size["seeds"])])
        for name, how in size["rows"].items()
    }
    first = next(iter(found.values()))

    def told(values: Tensor, sign: str = "") -> str:
        return f"{float(values.mean()):{sign}.{digits}f} ± {float(interval95(values)):.{digits}f}"

    rows = [[name, told(x), told(x - first, "+")] for name, x in found.items()]
    return {"title": title, "heads": ["Learner", "Score", "Difference"], "rows": rows}


EXPERIMENTS = {
    "compare_imaml": Experiment(
        compared,
        {
            "waves": {
                "steps": 200, "tasks": 20, "lr": 1e-2, "test": 300, "seeds": 2,
                "rows": {
                    "MAML, 5 steps": {"lr": 0.01, "steps": 5},
                    "FOMAML, 5 steps": {"lr": 0.01, "steps": 5},
                    "iMAML, 16 steps": {"lr": 0.005, "steps": 16, "lam": 5.0},
                },
            },
            "glyphs": {
                "steps": 100, "tasks": 2, "lr": 3e-3, "test": 200, "seeds": 1,
                "rows": {
                    "MAML, 5 steps": {"lr": 0.1, "steps": 5},
                    "FOMAML, 5 steps": {"lr": 0.1, "steps": 5},
                    "iMAML, 16 steps": {"lr": 0.1, "steps": 16, "lam": 0.5},
                },
            },
        },
        minutes=6,
        tiny={
            "waves": {"steps": 1, "tasks": 2, "lr": 1e-2, "test": 50, "seeds": 1,
                      "rows": {"MAML": {"lr": 0.01}, "iMAML": {"lr": 0.01, "steps": 2}}},
            "glyphs": {"steps": 1, "tasks": 1, "lr": 1e-3, "test": 2, "seeds": 1,
                       "rows": {"MAML": {"lr": 0.1}, "iMAML": {"lr": 0.1, "steps": 2}}},
        },
    )
}  # fmt: skip
