"""Teach an optimiser at full scale: `python tools/optimizers.py quadratics` or `digits`.

Writes its weights, `results/optimizer_NAME.pt`, and a record of what it reaches on held-out
problems beside SGD, momentum, RMSprop and Adam, whose rates are tuned on training problems. The
same command goes on after an interruption. RMSprop is Adam without its first average.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from metautils import results
from metautils.adapt import SGD, Adam
from metautils.data import digits
from metautils.data.quadratics import QuadraticSampler
from metautils.evaluate import interval95
from metautils.files import save_atomically
from metautils.learners.learned_optimizer import FromScratch, LSTMOptimizer
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

STEPS, TRUNCATION, SEED = 100, 20, 0
FIXED = {
    "SGD": SGD,
    "momentum 0.9": partial(SGD, momentum=0.9),
    "RMSprop": partial(Adam, betas=(0.0, 0.99)),
    "Adam": Adam,
}
RATES = [10 ** (k / 8) for k in range(-24, 9)]  # 0.001 to 10, each a third above the last


@dataclass
class Problems:
    """What is optimised: networks, tasks, and how long the optimiser is taught on them."""

    make: object  # from a width to a fresh network
    sample: object  # from a number of tasks and a seed to a sampler
    unrolls: int
    tasks: int
    lr: float
    held_out: int
    batch: int | None = None
    widths: tuple[int, ...] = (20,)


def point(width):
    net = nn.Linear(10, 1, bias=False)
    nn.init.normal_(net.weight)
    return net


def network(width, activation=nn.Sigmoid):
    layers = nn.Linear(49, width), activation(), nn.Linear(width, 10)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), *layers)


PROBLEMS = {
    "quadratics": Problems(
        point, lambda tasks, seed: QuadraticSampler(10, tasks, seed), 4000, 16, 1e-2, 200
    ),
    "digits": Problems(
        network,
        lambda tasks, seed: EpisodeSampler(digits.load().test, 10, 140, 30, tasks, seed=seed),
        600, 2, 1e-2, 40, batch=128, widths=(20, 40),
    ),
}  # fmt: skip


def final_losses(optimizer, episode, steps=STEPS, width=20):
    """Loss after the last step of each task; every optimiser meets the same starts."""
    torch.manual_seed(SEED + 1)
    learner = FromScratch(partial(problems.make, width), optimizer, steps, batch=problems.batch)
    try:
        return learner.losses(episode.support_x, episode.support_y)[:, -1]
    except FloatingPointError:
        return torch.full((len(episode.support_y),), math.inf)


def tuned(make, episode):
    """The rate whose mean final loss on the training problems is lowest."""
    means = {lr: float(final_losses(make(lr), episode).mean()) for lr in RATES}
    return min(means, key=lambda lr: means[lr] if math.isfinite(means[lr]) else math.inf)


def row(name, optimizer, learned, told):
    cells = [name, told]
    for steps, width in settings:
        mine = final_losses(optimizer, held_out, steps, width)
        ratio = (mine.log() - final_losses(learned, held_out, steps, width).log()).double()
        typical, half = float(ratio.mean().exp()), math.exp(interval95(ratio))
        cells += [
            f"{mine.mean():.4f} ± {interval95(mine):.4f}",
            f"{typical:.1f} ({typical / half:.1f} to {typical * half:.1f})",
        ]
    return cells


name = sys.argv[1]
problems = PROBLEMS[name]
settings = [(steps, width) for width in problems.widths for steps in (STEPS, 2 * STEPS)]
made = results.provenance(torch.device("cpu"))
torch.manual_seed(SEED)
learned = LSTMOptimizer()
learner = FromScratch(partial(problems.make, 20), learned, STEPS, TRUNCATION, batch=problems.batch)
history = meta_train(
    learner, problems.sample(problems.tasks, SEED), problems.unrolls, problems.lr, every=50,
    out=Path("runs") / f"optimizer_{name}",
)  # fmt: skip
save_atomically(learned.state_dict(), results.folder() / f"optimizer_{name}.pt")
training, held_out = (problems.sample(problems.held_out, seed).sample() for seed in (SEED + 2, 99))
rates = {each: tuned(make, training) for each, make in FIXED.items()}
rows = [row("learned", learned, learned, "")]
rows += [row(each, FIXED[each](lr), learned, f"{lr:.3g}") for each, lr in rates.items()]
heads = ["Optimiser", "Rate"]
for steps, width in settings:
    what = f"{steps} steps" + (f", {width} units" if len(problems.widths) > 1 else "")
    heads += [f"Loss after {what}", "as a multiple"]
record = {
    "what": f"An optimiser learned on {name}, {problems.held_out} held-out problems",
    "tables": [{"title": "Loss at the end", "heads": heads, "rows": rows}],
    "unrolls": problems.unrolls, "tasks": problems.tasks, "seed": SEED,
    "minutes": round(history.seconds / 60, 2), **made,
}  # fmt: skip
path = results.folder() / f"optimizer_{name}.json"
path.write_text(json.dumps(record, indent=1) + "\n")
print(results.tables(f"optimizer_{name}")["Loss at the end"])
