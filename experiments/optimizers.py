"""Optimisers taught at full scale: the records optimizer_quadratics and optimizer_digits.

What the learned one reaches on held-out problems beside SGD, momentum, RMSprop and Adam, whose
rates are tuned on training problems; its weights go to results/optimizer_NAME.pt. RMSprop is Adam
without its first average.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils import results
from metautils.adapt import SGD, Adam, Optimizer
from metautils.data import digits
from metautils.data.bank import ClassBank
from metautils.data.quadratics import QuadraticSampler
from metautils.evaluate import interval95
from metautils.files import save_atomically
from metautils.learners.learned_optimizer import FLOOR, FromScratch, LSTMOptimizer
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment

FIXED = {
    "SGD": SGD,
    "momentum 0.9": partial(SGD, momentum=0.9),
    "RMSprop": partial(Adam, betas=(0.0, 0.99)),
    "Adam": Adam,
}


@dataclass
class Variant:
    """What is optimised: steps, fresh networks, tasks from their number and a seed."""

    steps: int
    make: Callable[[], nn.Module]
    sample: Callable[[int, int], Any]


def point() -> nn.Module:
    """A place in ten dimensions."""
    net = nn.Linear(10, 1, bias=False)
    nn.init.normal_(net.weight)
    return net


def network(width: int = 20) -> nn.Module:
    """One hidden layer on 7x7 images."""
    layers = nn.Linear(49, width), nn.Sigmoid(), nn.Linear(width, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def quadratics(tasks: int, seed: int, spread: float = 1.0) -> QuadraticSampler:
    """Bowls whose axes differ in scale by `spread`."""
    return QuadraticSampler(10, tasks, spread, seed)


@cache
def small_digits() -> ClassBank:
    """All digits, averaged down to 7x7."""
    bank = digits.load().test
    return replace(bank, images=F.avg_pool2d(bank.images.float(), 4).round().to(torch.uint8))


def classify(tasks: int, seed: int) -> EpisodeSampler:
    """Classification of the digits."""
    return EpisodeSampler(small_digits(), 10, 140, 30, tasks, seed=seed)


def variants(problem: str, steps: int) -> dict[str, Variant]:
    """The training that is taught, and others that are only tested, by title."""
    first, twice = f"{steps} steps", f"{2 * steps} steps"
    if problem == "quadratics":
        equal = Variant(steps, point, partial(quadratics, spread=0.0))
        others = {f"{first}, all scales equal": equal}
        make, sample = point, quadratics
    else:
        others = {f"{first}, 40 units": Variant(steps, partial(network, 40), classify)}
        make, sample = network, classify
    return {first: Variant(steps, make, sample), twice: Variant(2 * steps, make, sample), **others}


def teach(
    out: Path,
    device: torch.device,
    *,
    problem: str,
    steps: int,
    truncation: int,
    unrolls: int,
    tasks: int,
    lr: float,
    held_out: int,
    batch: int | None,
    rates: list[float],
    seed: int,
) -> dict[str, Any]:
    """Teach an optimiser, and lay what it reaches beside fixed ones. On the CPU: all is small."""
    torch.manual_seed(seed)
    learned, each = LSTMOptimizer(), variants(problem, steps)
    taught = each[f"{steps} steps"]
    learner = FromScratch(taught.make, learned, steps, truncation, batch=batch)
    history = meta_train(
        learner, taught.sample(tasks, seed), unrolls, lr, every=50, out=out, clip=1.0,
        each_piece=True,
    )  # fmt: skip

    def ends(optimizer: Optimizer, variant: Variant, seed: int) -> Tensor:
        """Loss after the last step of each task; every optimiser meets the same starts."""
        episode = variant.sample(held_out, seed).sample()
        torch.manual_seed(seed)
        learner = FromScratch(variant.make, optimizer, variant.steps, batch=batch)
        return learner.losses(episode.support_x, episode.support_y)[:, -1]

    def tuned(make: Callable[[float], Optimizer], variant: Variant) -> float:
        """The rate whose mean final loss on training problems is lowest."""
        means = {lr: float(ends(make(lr), variant, seed + 2).mean()) for lr in rates}
        return min(means, key=lambda lr: means[lr] if math.isfinite(means[lr]) else math.inf)

    tables = []
    for title, variant in each.items():
        chosen = {name: tuned(make, variant) for name, make in FIXED.items()}
        optimizers = {"learned": learned} | {name: FIXED[name](r) for name, r in chosen.items()}
        found = {name: ends(each, variant, 99) for name, each in optimizers.items()}
        tables.append(table(title, chosen, found))
    save_atomically(learned.state_dict(), results.folder() / f"optimizer_{problem}.pt")
    return {
        "what": f"An optimiser learned on {problem}, {held_out} held-out problems",
        "tables": tables,
        "unrolls": unrolls,
        "tasks": tasks,
        "seed": seed,
        "minutes": round(history.seconds / 60, 2),
    }


def table(title: str, rates: dict[str, float], found: dict[str, Tensor]) -> dict[str, Any]:
    """Everybody on the held-out problems; fixed optimisers tuned for this variant."""
    rows = []
    for name, end in found.items():
        ratio = ((end + FLOOR) / (found["learned"] + FLOOR)).log().double()
        typical, half = ratio.mean(), interval95(ratio)
        low, middle, high = (f"{float((typical + s * half).exp()):.2g}" for s in (-1, 0, 1))
        more = end - found["learned"]
        told = [f"{more.mean():+.4f} ± {interval95(more):.4f}", f"{middle} ({low} to {high})"]
        rate = f"{rates[name]:.3g}" if name in rates else ""
        told = told if name in rates else ["", ""]
        rows.append([name, rate, f"{end.mean():.4f} ± {interval95(end):.4f}", *told])
    heads = [
        "Optimiser",
        "Rate",
        "Loss at the end",
        "More than the learned one, paired",
        "Times the learned one's, typically",
    ]
    return {"title": title, "heads": heads, "rows": rows}


SHARED = {
    "steps": 100,
    "truncation": 20,
    "rates": [10 ** (k / 6) for k in range(-15, 7)],  # 0.003 to 10, each a half above the last
    "seed": 0,
}
TINY = {"steps": 4, "truncation": 2, "unrolls": 2, "held_out": 2, "rates": [0.1]}
EXPERIMENTS = {
    "optimizer_quadratics": Experiment(
        teach,
        {"problem": "quadratics", "unrolls": 2500, "tasks": 16, "lr": 3e-3, "held_out": 200,
         "batch": None, **SHARED},
        minutes=20,
        tiny=TINY,
    ),
    "optimizer_digits": Experiment(
        teach,
        {"problem": "digits", "unrolls": 400, "tasks": 2, "lr": 3e-3, "held_out": 20,
         "batch": 128, **SHARED},
        minutes=15,
        tiny=TINY,
    ),
}  # fmt: skip
