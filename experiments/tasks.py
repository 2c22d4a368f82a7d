"""Error against the number of training tasks: the record tasks_sinusoids.

The chapter on concepts builds two learners, one that compares and one that reads; its cells are
run here, so that text and record cannot differ. MAML is the third family, and a multi-task body
with a head that is solved for is the rival. A training has tasks, a start and batches of its own;
shifted waves have the phases that no training task has.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.files import read_json, write_json
from metautils.learners.base import Learner
from metautils.learners.maml import MAML
from metautils.nets import mlp
from records import Experiment

CHAPTER = Path(__file__).resolve().parents[1] / "book" / "01_concepts.md"
SHIFTED = replace(SINUSOIDS, ranges=((0.1, 5.0), (math.pi, 2 * math.pi)))
Error = Callable[[Episode], Tensor]  # squared error of each task


def of_chapter() -> dict[str, type[Learner]]:
    """The learners that the chapter builds."""
    text = CHAPTER.read_text(encoding="utf-8")
    cells = re.findall(r"^```\{code-cell\} ipython3\n(class .*?)^```", text, re.M | re.S)
    names: dict[str, Any] = {"Learner": Learner, "mlp": mlp, "nn": nn, "torch": torch}
    exec("\n".join(cells), names)
    return {"compare": names["Compare"], "read": names["Read"]}


def fit(loss: Callable[[Tensor], Tensor], parameters: Any, tasks: int, steps: int) -> None:
    """Adam, its rate decayed to 0, on 25 tasks at a time, as in the chapter."""
    optimizer = torch.optim.Adam(parameters, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(tasks, (25,))).backward()
        optimizer.step()
        schedule.step()


def meta_trained(learner: Learner, x: Tensor, y: Tensor, steps: int) -> Error:
    """A learner that is judged on ten points after it was given the other ten."""

    def loss(k: Tensor) -> Tensor:
        p = torch.randperm(x.shape[1])
        a, b = x[k][:, p], y[k][:, p]
        return mse_loss(learner(a[:, :10], b[:, :10], a[:, 10:]), b[:, 10:])

    fit(loss, learner.parameters(), len(x), steps)
    learner.eval()
    return lambda e: (
        (learner(e.support_x, e.support_y, e.query_x) - e.query_y).square().mean((1, 2))
    )


def with_one(z: Tensor) -> Tensor:
    """Features and a constant 1."""
    return torch.cat([z, torch.ones_like(z[..., :1])], -1)


def solved(x: Tensor, y: Tensor, steps: int, choose: Episode) -> Error:
    """A body shared by the tasks; of a new task the head is solved for, by ridge regression."""
    body, heads = mlp().embed, nn.Parameter(0.1 * torch.randn(len(x), 41, 1))

    def loss(k: Tensor) -> Tensor:
        return mse_loss(with_one(body(x[k])) @ heads[k], y[k])

    def error(e: Episode, lam: float) -> Tensor:
        z, asked = with_one(body(e.support_x)), with_one(body(e.query_x))
        head = z.mT @ torch.linalg.solve(z @ z.mT + lam * torch.eye(z.shape[1]), e.support_y)
        return (asked @ head - e.query_y).square().mean((1, 2))

    fit(loss, [*body.parameters(), heads], len(x), steps)
    with torch.no_grad():
        best = min((1e-3, 1e-2, 1e-1, 1.0), key=lambda lam: error(choose, lam).mean())
    return lambda e: error(e, best)


def kernel(choose: Episode) -> Error:
    """Nothing learned but a width: targets weighted by the distance of inputs."""

    def error(e: Episode, width: float) -> Tensor:
        near = torch.softmax(-((e.query_x - e.support_x.mT) ** 2) / width, -1)
        return (near @ e.support_y - e.query_y).square().mean((1, 2))

    widths = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
    best = min(widths, key=lambda width: error(choose, width).mean())
    return lambda e: error(e, best)


def against_tasks(
    out: Path,
    device: torch.device,
    *,
    counts: list[int],
    trainings: int,
    steps: int,
    tests: int,
) -> dict[str, Any]:
    """Mean error of every training, and a table of their means and intervals."""
    choose = RegressionSampler(SINUSOIDS, 10, 100, tests // 2, 555).sample()
    test = {"new": RegressionSampler(SINUSOIDS, 10, 100, tests, 999).sample()}
    test["shifted"] = RegressionSampler(SHIFTED, 10, 100, tests, 998).sample()

    def told(error: Error) -> dict[str, float | None]:
        with torch.no_grad():
            means = {kind: float(error(e).mean()) for kind, e in test.items()}
        return {kind: x if math.isfinite(x) else None for kind, x in means.items()}

    def training(count: int, seed: int) -> dict[str, dict[str, float | None]]:
        torch.manual_seed(seed)
        e = RegressionSampler(SINUSOIDS, 10, 10, count, seed).sample()
        x, y = torch.cat([e.support_x, e.query_x], 1), torch.cat([e.support_y, e.query_y], 1)
        found = {name: meta_trained(kind(), x, y, steps) for name, kind in of_chapter().items()}
        found["adapt"] = meta_trained(MAML(mlp(), 0.01, test_steps=10), x, y, steps)
        found["head solved for"] = solved(x, y, steps, choose)
        return {name: told(error) for name, error in found.items()}

    def kept(count: int, seed: int) -> dict[str, Any]:
        path = out / f"{count}_{seed}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(training(count, seed), path)
        return read_json(path)

    errors: dict[str, dict[str, list[list[float | None]]]] = {}
    for count in counts:
        found = [kept(count, seed) for seed in range(trainings)]
        for name, kinds in found[0].items():
            for kind in kinds:
                of_all = [each[name][kind] for each in found]
                errors.setdefault(name, {}).setdefault(kind, []).append(of_all)
    plain = told(kernel(choose))
    tables = [_table(kind, errors, counts, plain) for kind in test]
    what = (
        f"Mean squared error on {tests} waves after ten support points, by the number of training "
        f"tasks; median of {trainings} trainings, the best and the worst"
    )
    return {"what": what, "tables": tables, "errors": errors, "kernel": plain}


def spread(trainings: list[float | None]) -> tuple[float, float, float]:
    """The best, the median and the worst; what diverged counts as the worst.

    The best and the worst of seven enclose the median of all that could be with 98 %, whatever
    their distribution is.
    """
    ordered = sorted(math.inf if x is None else x for x in trainings)
    return ordered[0], statistics.median(ordered), ordered[-1]


def _table(
    kind: str, errors: dict[str, dict[str, Any]], counts: list[int], plain: dict[str, float]
) -> dict[str, Any]:
    rows = []
    for name, each in errors.items():
        ends = map(spread, each[kind])
        rows.append([name, *(f"{mid:.2f} ({low:.2f} to {high:.2f})" for low, mid, high in ends)])
    rows.append(["a kernel of the best width", *[f"{plain[kind]:.2f}"] * len(counts)])
    heads = ["", *(f"{n:,} tasks" for n in counts)]
    return {"title": f"Sinusoids: {kind} waves", "heads": heads, "rows": rows}


EXPERIMENTS = {
    "tasks_sinusoids": Experiment(
        against_tasks,
        {"counts": [10, 30, 100, 300, 1000], "trainings": 7, "steps": 1200, "tests": 600},
        minutes=10,
        tiny={"counts": [3, 4], "trainings": 2, "steps": 2, "tests": 6},
    )
}
