"""MAML's relatives on sinusoids, and a strong simple rival: the record maml_family_sinusoids.

The same network and the same number of updates on 25 tasks for all. Each method is trained once for
every seed, and all are tested on the same new tasks. In rows that differ by one thing only, the
difference is of the same tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.evaluate import interval95
from metautils.learners.anil import ANIL
from metautils.learners.base import Learner
from metautils.learners.maml import FOMAML, MAML
from metautils.learners.meta_sgd import MetaSGD
from metautils.learners.reptile import Reptile
from metautils.nets import mlp
from metautils.train import meta_train
from records import Experiment

AFTER = [1, 5, 10]
RAN_AWAY = 100.0  # squared error; the highest curve reaches 25


class AdamOutside(Reptile):
    """Reptile whose outer step is Adam's, as every other method's."""

    outer_optimizer = Learner.outer_optimizer


# Each with the rate of its outer steps at the start.
METHODS: dict[str, tuple[Callable[[nn.Module], MAML], float]] = {
    "MAML": (lambda net: MAML(net, 0.01), 1e-2),
    "FOMAML": (lambda net: FOMAML(net, 0.01), 1e-2),
    "ANIL": (lambda net: ANIL(net, 0.01), 1e-2),
    "ANIL, trained for 5 steps at 0.03": (lambda net: ANIL(net, 0.03, 5), 1e-2),
    "Meta-SGD": (lambda net: MetaSGD(net, 0.01), 1e-2),
    "Reptile": (lambda net: Reptile(net, 0.02), 1.0),
}
DEPARTURES = {  # from Reptile as it stands in its paper
    "the whole task in each inner step": (lambda net: Reptile(net, 0.02, batch=20), 1.0),
    "Adam outside": (lambda net: AdamOutside(net, 0.02), 1e-2),
    "both": (lambda net: AdamOutside(net, 0.02, batch=20), 1e-2),
}
RIDGE = "multi-task features, ridge head"


def compare(
    out: Path, device: torch.device, *, steps: int, tasks: int, penalties: list[float],
    seeds: list[int],
) -> dict[str, Any]:  # fmt: skip
    """Errors after some inner steps, what Reptile's departures cost, and Meta-SGD's rates."""
    test = RegressionSampler(SINUSOIDS, 10, 100, tasks, 999, device).sample()
    found: dict[str, list[Tensor]] = {}
    rates = []
    for name, (make, lr) in (METHODS | DEPARTURES).items():
        for seed in seeds:
            torch.manual_seed(seed)
            learner = make(mlp()).to(device)
            learn = RegressionSampler(SINUSOIDS, 10, 10, 25, seed, device)
            slug = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
            meta_train(learner, learn, steps, lr, out=out / slug)
            found.setdefault(name, []).append(errors_after(learner, test))
            if isinstance(learner, MetaSGD):
                rates.append(torch.cat([x.detach().flatten() for x in learner.rates]))
    for seed in seeds:
        found.setdefault(RIDGE, []).append(ridge(steps, penalties, seed, test))
    what = (
        f"MAML's relatives on sinusoids, {steps} updates of 25 tasks, {len(seeds)} seeds, squared "
        f"error on {tasks} new tasks with ten support points"
    )
    return {"what": what, "tables": [family(found), reptiles(found), spread(rates)]}


def errors_after(learner: MAML, test: Episode) -> Tensor:
    """Squared error on the queries of each task, `(tasks, len(AFTER))`."""
    with torch.no_grad():
        predicted = learner.after_steps(test.support_x, test.support_y, test.query_x, AFTER)
    # (tasks, len(AFTER), Q, 1)
    return (predicted - test.query_y[:, None]).square().mean((2, 3)).cpu()


def ridge(steps: int, penalties: list[float], seed: int, test: Episode) -> Tensor:
    """Squared error `(tasks, 1)` of a body shared by 200 tasks, each new head solved for.

    The penalty is the best of some on other tasks.
    """
    torch.manual_seed(seed)
    device, count = test.query_x.device, 200
    learn = RegressionSampler(SINUSOIDS, 20, 1, count, seed, device).sample()
    body, heads = mlp().embed.to(device), nn.Parameter(0.1 * torch.randn(count, 41, 1).to(device))
    optimizer = torch.optim.Adam([*body.parameters(), heads], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        k = torch.randperm(count)[:25]
        optimizer.zero_grad()
        z = with_one(body(learn.support_x[k]))  # (25, 20, 41)
        F.mse_loss(z @ heads[k], learn.support_y[k]).backward()
        optimizer.step()
        schedule.step()
    choose = RegressionSampler(SINUSOIDS, 10, 100, len(test.query_x), 555, device).sample()
    best = min(penalties, key=lambda each: float(solved(body, choose, each).mean()))
    return solved(body, test, best)[:, None]


@torch.no_grad()
def solved(body: nn.Module, e: Episode, penalty: float) -> Tensor:
    """Squared error `(tasks,)` with the head that ridge regression finds on the support set."""
    z, queries = with_one(body(e.support_x)), with_one(body(e.query_x))
    held = z @ z.mT + penalty * torch.eye(z.shape[1]).to(z)  # (tasks, S, S)
    head = z.mT @ torch.linalg.solve(held, e.support_y)  # (tasks, 41, 1)
    return (queries @ head - e.query_y).square().mean((1, 2)).cpu()


def with_one(z: Tensor) -> Tensor:
    """Features and a constant 1, so that a head is one matrix."""
    return torch.cat([z, torch.ones_like(z[..., :1])], -1)


def family(found: dict[str, list[Tensor]]) -> dict[str, Any]:
    """A row for each method: means, or where a task ran away the median and the share of these."""
    steps = [f"{k} step{'s' * (k != 1)}" for k in AFTER]
    rows = [[name, *map(cell, torch.cat(found[name]).unbind(1)), ""] for name in METHODS]
    rows.append([RIDGE, *[""] * len(AFTER), cell(torch.cat(found[RIDGE]))])
    heads = ["Squared error after", *steps, "head solved for"]
    return {"title": "The family", "heads": heads, "rows": rows}


def cell(errors: Tensor) -> str:
    """The mean over tasks, or if some ran away the median and how many did."""
    away = ~(errors < RAN_AWAY)  # nan too
    if not away.any():
        return f"{errors.mean():.2f} ± {interval95(errors):.2f}"
    share = 100 * float(away.float().mean())
    return f"median {errors.nan_to_num(torch.inf).median():.2f}, {share:.1f} % ran away"


def reptiles(found: dict[str, list[Tensor]]) -> dict[str, Any]:
    """What each departure adds to the error after ten steps, by seed, on the same tasks."""
    rows = []
    for name in DEPARTURES:
        gaps = [a[:, -1] - b[:, -1] for a, b in zip(found[name], found["Reptile"], strict=True)]
        rows.append([name, *(f"{gap.mean():+.2f} ± {interval95(gap):.2f}" for gap in gaps)])
    heads = ["Added to the error after 10 steps", *(f"seed {k}" for k in range(len(gaps)))]
    return {"title": "Reptile otherwise than in its paper", "heads": heads, "rows": rows}


def spread(rates: list[Tensor]) -> dict[str, Any]:
    """Where the rates lie that Meta-SGD has learned, over all weights and seeds."""
    each = torch.cat(rates).cpu()
    marks = torch.quantile(each, torch.tensor([0.05, 0.5, 0.95, 1.0]))
    cells = [*(f"{x:.3f}" for x in marks), f"{100 * float((each < 0).float().mean()):.0f} %"]
    heads = ["5 % lie below", "half lie below", "95 % lie below", "highest", "below 0"]
    return {"title": "Rates of Meta-SGD", "heads": heads, "rows": [cells]}


EXPERIMENTS = {
    "maml_family_sinusoids": Experiment(
        compare,
        {"steps": 2300, "tasks": 600, "penalties": [0.001, 0.01, 0.1, 1.0], "seeds": [0, 1, 2]},
        minutes=12,
        tiny={"steps": 2, "tasks": 4, "seeds": [0, 1]},
    )
}
