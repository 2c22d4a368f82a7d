"""Teach an optimiser at full scale: `python tools/optimizers.py quadratics` or `digits`.

Writes its weights, `results/optimizer_NAME.pt`, and a record of what it reaches on held-out
problems beside SGD, momentum, RMSprop and Adam, whose rates are tuned on training problems. The
same command goes on after an interruption. RMSprop is Adam without its first average.
"""

import json
import math
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from metautils import results
from metautils.adapt import SGD, Adam
from metautils.data import digits
from metautils.data.quadratics import QuadraticSampler
from metautils.evaluate import interval95
from metautils.files import save_atomically
from metautils.learners.learned_optimizer import FLOOR, FromScratch, LSTMOptimizer
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

STEPS, TRUNCATION, SEED = 100, 20, 0
FIXED = {
    "SGD": SGD,
    "momentum 0.9": partial(SGD, momentum=0.9),
    "RMSprop": partial(Adam, betas=(0.0, 0.99)),
    "Adam": Adam,
}
RATES = [10 ** (k / 6) for k in range(-15, 7)]  # 0.003 to 10, each a half above the last


@dataclass
class Problems:
    """What is optimised: networks, tasks, and how long the optimiser is taught on them."""

    make: object  # gives a fresh network
    sample: object  # from a number of tasks and a seed to a sampler
    unrolls: int
    tasks: int
    lr: float
    held_out: int
    batch: int | None
    variants: dict  # other trainings, held out: title to steps, network, sampler


def point():
    net = nn.Linear(10, 1, bias=False)
    nn.init.normal_(net.weight)
    return net


def network(width=20):
    layers = nn.Linear(49, width), nn.Sigmoid(), nn.Linear(width, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def quadratics(tasks, seed, spread=1.0):
    return QuadraticSampler(10, tasks, spread, seed)


@cache
def small_digits():
    """All digits, averaged down to 7x7."""
    bank = digits.load().test
    return replace(bank, images=F.avg_pool2d(bank.images.float(), 4).round().to(torch.uint8))


def classify(tasks, seed):
    return EpisodeSampler(small_digits(), 10, 140, 30, tasks, seed=seed)


PROBLEMS = {
    "quadratics": Problems(
        point, quadratics, 2500, 16, 3e-3, 200, None,
        {"100 steps": (100, point, quadratics), "200 steps": (200, point, quadratics),
         "100 steps, all scales equal": (100, point, partial(quadratics, spread=0.0))},
    ),
    "digits": Problems(
        network, classify, 400, 2, 3e-3, 20, 128,
        {"100 steps": (100, network, classify), "200 steps": (200, network, classify),
         "100 steps, 40 units": (100, partial(network, 40), classify)},
    ),
}  # fmt: skip


def final_losses(optimizer, seed, steps, make, sample):
    """Loss after the last step of each task; every optimiser meets the same starts."""
    episode = sample(problems.held_out, seed).sample()
    torch.manual_seed(seed)
    learner = FromScratch(make, optimizer, steps, batch=problems.batch)
    return learner.losses(episode.support_x, episode.support_y)[:, -1]


def tuned(make, *variant):
    """The rate whose mean final loss on the training problems is lowest."""
    means = {lr: float(final_losses(make(lr), SEED + 2, *variant).mean()) for lr in RATES}
    return min(means, key=lambda lr: means[lr] if math.isfinite(means[lr]) else math.inf)


def table(title, variant):
    """Everybody on the held-out problems; fixed optimisers tuned for this variant."""
    optimizers = {"learned": learned}
    rates = {name: tuned(make, *variant) for name, make in FIXED.items()}
    optimizers |= {name: FIXED[name](lr) for name, lr in rates.items()}
    ends = {name: final_losses(each, 99, *variant) for name, each in optimizers.items()}
    rows = []
    for name, end in ends.items():
        ratio = ((end + FLOOR) / (ends["learned"] + FLOOR)).log().double()
        typical, half = ratio.mean(), interval95(ratio)
        low, middle, high = (f"{float((typical + s * half).exp()):.2g}" for s in (-1, 0, 1))
        more = end - ends["learned"]
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


name = sys.argv[1] if len(sys.argv) > 1 else ""
if name not in PROBLEMS:
    sys.exit(f"Name one of {', '.join(PROBLEMS)}.")
problems = PROBLEMS[name]
made = results.provenance(torch.device("cpu"))
torch.manual_seed(SEED)
learned = LSTMOptimizer()
learner = FromScratch(problems.make, learned, STEPS, TRUNCATION, batch=problems.batch)
history = meta_train(
    learner, problems.sample(problems.tasks, SEED), problems.unrolls, problems.lr, every=50,
    out=Path("runs") / f"optimizer_{name}",
)  # fmt: skip
save_atomically(learned.state_dict(), results.folder() / f"optimizer_{name}.pt")
record = {
    "what": f"An optimiser learned on {name}, {problems.held_out} held-out problems",
    "tables": [table(title, variant) for title, variant in problems.variants.items()],
    "unrolls": problems.unrolls, "tasks": problems.tasks, "seed": SEED,
    "minutes": round(history.seconds / 60, 2), **made,
}  # fmt: skip
path = results.folder() / f"optimizer_{name}.json"
path.write_text(json.dumps(record, indent=1) + "\n")
print(*(f"{title}\n{each}\n" for title, each in results.tables(f"optimizer_{name}").items()))
