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
SHOTS = [10, 5]
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
    "the whole task in each step": (lambda net: Reptile(net, 0.02, batch=20), 1.0),
    "Adam outside": (lambda net: AdamOutside(net, 0.02), 1e-2),
}
RIDGE = "multi-task features, ridge head"


def compare(
    out: Path, device: torch.device, *, steps: int, tasks: int, penalties: list[float],
    seeds: list[int],
) -> dict[str, Any]:  # fmt: skip
    """Errors after some inner steps, differences on the same tasks, and Meta-SGD's rates."""
    tests = [RegressionSampler(SINUSOIDS, n, 100, tasks, 999, device).sample() for n in SHOTS]
    found: dict[str, list[list[Tensor]]] = {}  # by method, seed and shots
    rates = []
    for name, (make, lr) in (METHODS | DEPARTURES).items():
        for seed in seeds:
            torch.manual_seed(seed)
            learner = make(mlp()).to(device)
            learn = RegressionSampler(SINUSOIDS, 10, 10, 25, seed, device)
            slug = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
            meta_train(learner, learn, steps, lr, out=out / slug)
            found.setdefault(name, []).append([errors_after(learner, e) for e in tests])
            if isinstance(learner, MetaSGD):
                rates.append(torch.cat([x.detach().flatten() for x in learner.rates]))
    for seed in seeds:
        body = shared_body(steps, seed, device)
        found.setdefault(RIDGE, []).append([ridge(body, penalties, e) for e in tests])
    what = (
        f"MAML's relatives on sinusoids, {steps} updates of 25 tasks, {len(seeds)} seeds, squared "
        f"error on {tasks} new tasks with ten support points"
    )
    return {"what": what, "tables": [family(found), differences(found), spread(rates)]}


def errors_after(learner: MAML, test: Episode) -> Tensor:
    """Squared error on the queries of each task, `(tasks, len(AFTER))`."""
    with torch.no_grad():
        predicted = learner.after_steps(test.support_x, test.support_y, test.query_x, AFTER)
    # (tasks, len(AFTER), Q, 1)
    return (predicted - test.query_y[:, None]).square().mean((2, 3)).cpu()


def shared_body(steps: int, seed: int, device: torch.device) -> nn.Module:
    """A body trained on 200 tasks, each with a head of its own."""
    torch.manual_seed(seed)
    count = 200
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
    return body


def ridge(body: nn.Module, penalties: list[float], test: Episode) -> Tensor:
    """Squared error `(tasks, 1)` with each head solved for, the penalty best on other tasks."""
    tasks, shots, *_ = test.support_x.shape
    choose = RegressionSampler(SINUSOIDS, shots, 100, tasks, 555, test.query_x.device).sample()
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


def family(found: dict[str, list[list[Tensor]]]) -> dict[str, Any]:
    """A row for each method, with ten support points, and its last cell by seed."""
    rows = []
    for name in [*METHODS, RIDGE]:
        errors = torch.stack([by_shots[0] for by_shots in found[name]])  # (seeds, tasks, cells)
        cells = [cell(each) for each in errors.unbind(-1)]
        last, away = errors[..., -1], ran_away(errors[..., -1]).any()
        middle = median if away else Tensor.mean
        seeds = ("medians " if away else "") + ", ".join(f"{float(middle(e)):.2f}" for e in last)
        if name == RIDGE:
            cells = [*[""] * len(AFTER), f"{cells[0]}, median {median(last):.2f}"]
        rows.append([name, *cells, *[""] * (len(AFTER) + 1 - len(cells)), seeds])
    steps = [f"{k} step{'s' * (k != 1)}" for k in AFTER]
    heads = ["Squared error after", *steps, "head solved for", "the last by seed"]
    return {"title": "The family", "heads": heads, "rows": rows}


def ran_away(errors: Tensor) -> Tensor:
    """Which did, nan too."""
    return ~(errors < RAN_AWAY)


def median(errors: Tensor) -> Tensor:
    """Of all, where nan is the worst."""
    return errors.nan_to_num(torch.inf).median()


def cell(errors: Tensor) -> str:
    """From `(seeds, tasks)`: mean and its interval, or where some ran away median and share.

    The trainings are tested on the same tasks: the interval is of each task's mean over seeds.
    """
    away = ran_away(errors)
    if not away.any():
        return f"{errors.mean():.2f} ± {interval95(errors.mean(0)):.2f}"
    return f"median {median(errors):.2f}, {100 * float(away.float().mean()):.1f} % ran away"


def differences(found: dict[str, list[list[Tensor]]]) -> dict[str, Any]:
    """The rival less MAML and each departure less Reptile, by seed, on the same tasks."""
    pairs = [(RIDGE, "MAML", k, f", {shots} points") for k, shots in enumerate(SHOTS)]
    pairs += [(name, "Reptile", 0, "") for name in DEPARTURES]
    rows = []
    for name, other, k, on in pairs:
        both = zip(found[name], found[other], strict=True)
        gaps = [a[k][:, -1] - b[k][:, -1] for a, b in both]
        cells = [f"{gap.mean():+.2f} ± {interval95(gap):.2f}" for gap in gaps]
        rows.append([f"{name}, less {other}{on}", *cells])
    heads = ["Squared error, after 10 steps", *(f"seed {k}" for k in range(len(gaps)))]
    return {"title": "Differences on the same tasks", "heads": heads, "rows": rows}


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
        {
            "steps": 2300,
            "tasks": 600,
            "penalties": [1e-5, 1e-4, 1e-3, 0.01, 0.1],
            "seeds": [0, 1, 2],
        },
        minutes=12,
        tiny={"steps": 2, "tasks": 4, "seeds": [0, 1]},
    )
}
