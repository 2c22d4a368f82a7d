"""Four choices in teaching an optimiser, each undone by itself: the record optimizer_choices.

On the quadratics, from the same initial weights and on the same problems in the same order, with
several seeds. Each variant has the meta-rate that does best on problems of its own. A ratio
compares the losses at the end problem by problem.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metautils.data.quadratics import QuadraticSampler
from metautils.learners.learned_optimizer import FLOOR, FromScratch, LSTMOptimizer
from metautils.train import meta_train
from optimizers import point
from records import Experiment

TUNING_SEED = 1000


class Raw(LSTMOptimizer):
    """Reads the gradient itself, times a constant; the second input is 0."""

    factor = 1.0

    def seen(self, gradients: Tensor) -> Tensor:
        """(n,) to (2, n)."""
        return torch.stack([self.factor * gradients, torch.zeros_like(gradients)])


class RawTenth(Raw):
    """The same, a tenth as large."""

    factor = 0.1


class Summed(FromScratch):
    """Is judged by the losses themselves, as in the paper."""

    def scored(self, losses: Tensor) -> Tensor:
        """The losses as they are."""
        return losses


VARIANTS: dict[str, tuple[Callable, type, dict[str, bool]]] = {
    "as in the chapter": (LSTMOptimizer, FromScratch, {}),
    "input: the gradient": (Raw, FromScratch, {}),
    "input: a tenth of the gradient": (RawTenth, FromScratch, {}),
    "meta-loss: the sum of losses": (LSTMOptimizer, Summed, {}),
    "exact gradient within a piece": (LSTMOptimizer, FromScratch, {"first_order": False}),
}


def choices(
    out: Path,
    device: torch.device,
    *,
    steps: int,
    truncation: int,
    unrolls: int,
    tasks: int,
    rates: list[float],
    seeds: list[int],
    held_out: int,
) -> dict[str, Any]:
    """Teach each variant by each seed. On the CPU: all is small."""

    def ends(name: str, lr: float, seed: int, problems: int) -> Tensor:
        """Losses of a taught optimiser after the last step, (held_out,)."""
        make, learns, options = VARIANTS[name]
        torch.manual_seed(seed)
        learner = learns(point, make(), steps, truncation, **options)
        folder = out / f"{list(VARIANTS).index(name)}-{lr}-{seed}"
        meta_train(
            learner, QuadraticSampler(10, tasks, seed=seed), unrolls, lr, every=25, out=folder,
            progress=False, clip=1.0, each_piece=True,
        )  # fmt: skip
        e = QuadraticSampler(10, held_out, seed=problems).sample()
        torch.manual_seed(problems)
        return learner.losses(e.support_x, e.support_y)[:, -1]

    rows, first = [], None
    for name in VARIANTS:
        tried = {lr: logs(ends(name, lr, TUNING_SEED, 1001)).mean() for lr in rates}
        lr = min(tried, key=lambda lr: float(tried[lr].nan_to_num(torch.inf)))
        found = torch.stack([ends(name, lr, seed, 1002) for seed in seeds])  # (seeds, held_out)
        first = found if first is None else first
        ratios = (logs(found) - logs(first)).mean(1)  # (seeds,)
        each = ", ".join(f"{float(r.exp()):.2g}" for r in ratios)
        told = [f"{float(ratios.mean().exp()):.2g}", each] if found is not first else ["1", ""]
        means = f"{float(found.mean()):.3f} ({float(found.mean(1).min()):.3f} to "
        rows.append([name, lr, *told, means + f"{float(found.mean(1).max()):.3f})"])
    heads = ["Variant", "Meta-rate", "Times the first one's loss, typically", "By seed"]
    heads.append("Mean loss (by seed)")
    title = f"{unrolls} unrolls of {steps} steps in pieces of {truncation}, {len(seeds)} seeds"
    what = f"Optimisers taught on quadratics with one choice undone, {held_out} held-out problems"
    return {"what": what, "tables": [{"title": title, "heads": heads, "rows": rows}]}


def logs(losses: Tensor) -> Tensor:
    """Logarithms, of losses above the floor."""
    return (losses + FLOOR).log()


EXPERIMENTS = {
    "optimizer_choices": Experiment(
        choices,
        {"steps": 100, "truncation": 20, "unrolls": 100, "tasks": 16,
         "rates": [0.003, 0.01, 0.03], "seeds": [0, 1, 2], "held_out": 200},
        minutes=20,
        tiny={"steps": 4, "truncation": 2, "unrolls": 2, "tasks": 2, "rates": [0.01],
              "seeds": [0, 1], "held_out": 3},
    ),
}  # fmt: skip
