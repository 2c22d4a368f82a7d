"""One meta-step of MAML: metautils beside `higher`, and its own ways beside one another.

5-way 1-shot tasks with 15 queries a class, 28x28, through Conv-4 with batch normalisation. `higher`
runs as its users write it, one `innerloop_ctx` and one backward pass for each task, once on the
network as it is usually written (normalisation, ReLU, pooling), once on this package's network, so
that what the network saves is told from what the inner loop saves. Memory is measured in a process
of its own for each case, as what a meta-step adds to the peak. learn2learn, the other peer, does
not install on Python 3.11.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from metautils import results
from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.learners.anil import ANIL
from metautils.learners.base import task_loss
from metautils.learners.maml import FOMAML, MAML
from metautils.nets import BatchNorm, Conv4, classifier, mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a SyntaxWarning of its own
    import higher

ROUNDS = 7
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASKS, STEPS = (32, 5) if DEVICE.type == "cuda" else (8, 1)
native = partial(nn.BatchNorm2d, track_running_stats=False)


class Usual(nn.Sequential):
    """Conv-4 as most repositories write it."""

    def __init__(self):
        blocks = []
        for channels in (1, 64, 64, 64):
            convolution = nn.Conv2d(channels, 64, 3, padding=1)
            blocks += [convolution, native(64), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*blocks, nn.Flatten())


def episode(tasks=TASKS):
    torch.manual_seed(0)
    y = torch.arange(5)
    x = torch.rand(tasks, 80, 1, 28, 28)
    labels = (y.expand(tasks, -1), y.repeat_interleave(15).expand(tasks, -1))
    return Episode(*(v.to(DEVICE) for v in (x[:, :5], labels[0], x[:, 5:], labels[1])))


def conv4(strided=False, norm=BatchNorm):
    return classifier(Conv4(strided=strided, norm=norm), 64, 5)


def ours(kind, net, steps=STEPS, **options):
    learner = kind(net.to(DEVICE), 0.01, steps, **options)

    def meta_step(e):
        learner.zero_grad()
        for loss, *_ in learner.pieces(e):
            loss.backward()

    return meta_step


def theirs(net, steps=STEPS):
    optimizer = torch.optim.SGD(net.to(DEVICE).parameters(), 0.01)

    def meta_step(e):
        net.zero_grad()
        for x, y, qx, qy in zip(e.support_x, e.support_y, e.query_x, e.query_y, strict=True):
            context = higher.innerloop_ctx(net, optimizer, copy_initial_weights=False)
            with context as (f, inner):
                for _ in range(steps):
                    inner.step(task_loss(f(x), y))
                (task_loss(f(qx), qy) / e.tasks).backward()

    return meta_step


def timed(meta_step, e):
    start = time.perf_counter()
    meta_step(e)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(title, cases, e):
    """Medians of interleaved rounds, and of each round's ratio to the first case."""
    first = next(iter(cases))
    for step in cases.values():
        step(e)
    rounds = [{name: timed(step, e) for name, step in cases.items()} for _ in range(ROUNDS)]
    rows = [
        [name, f"{1000 * median(r[name] for r in rounds):.0f}",
         f"{median(r[name] / r[first] for r in rounds):.2f} x"]
        for name in cases
    ]  # fmt: skip
    return {"title": title, "heads": ["Meta-step", "Milliseconds", "Time"], "rows": rows}


MEMORY = {
    "MAML, task by task": lambda steps: ours(MAML, conv4(), steps, vectorise=False),
    "MAML, vmap": lambda steps: ours(MAML, conv4(), steps, vectorise=True),
    "FOMAML, task by task": lambda steps: ours(FOMAML, conv4(), steps, vectorise=False),
    "higher": lambda steps: theirs(conv4(norm=native), steps),
}


def peak(name, steps):
    """MiB that one meta-step adds to the peak of this process."""
    e, step = episode(), MEMORY[name](steps)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        step(e)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ours(FOMAML, conv4())(episode(1))  # what the libraries set up at first use is no graph
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
    before = resident("VmRSS")
    step(e)
    return resident("VmHWM") - before


def resident(which):
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(which)).split()[1]) / 1024


if len(sys.argv) > 1:
    print(peak(sys.argv[1], int(sys.argv[2])))
    sys.exit()

ONE = f"{STEPS} inner step{'s' * (STEPS != 1)}"
HOW = f"{TASKS} tasks, {ONE}"
pooled = {
    "higher, Conv-4 as usually written": theirs(classifier(Usual(), 64, 5)),
    "higher, this package's Conv-4": theirs(conv4(norm=native)),
    "MAML, task by task": ours(MAML, conv4(), vectorise=False),
    "MAML, vmap": ours(MAML, conv4(), vectorise=True),
    "FOMAML": ours(FOMAML, conv4()),
    "ANIL": ours(ANIL, conv4()),
}
strided = {
    "higher, strided Conv-4": theirs(conv4(True, native)),
    "MAML, task by task": ours(MAML, conv4(True), vectorise=False),
    "MAML, vmap": ours(MAML, conv4(True), vectorise=True),
    "FOMAML": ours(FOMAML, conv4(True)),
    "ANIL": ours(ANIL, conv4(True)),
}
dense = {
    "higher": theirs(mlp()),
    "MAML, task by task": ours(MAML, mlp(), vectorise=False),
    "MAML, vmap": ours(MAML, mlp(), vectorise=True),
    "FOMAML": ours(FOMAML, mlp()),
    "ANIL": ours(ANIL, mlp()),
}
curves = RegressionSampler(SINUSOIDS, 10, 10, 25, device=DEVICE).sample()
tables = [
    table(f"Conv-4 with pooling, {HOW}", pooled, episode()),
    table(f"Strided Conv-4, {HOW}", strided, episode()),
    table(f"Two hidden layers of 40 on sinusoids, 25 tasks, {ONE}", dense, curves),
]
memory = []
for name in MEMORY:
    runs = [[sys.executable, __file__, name, str(steps)] for steps in (1, 3, 5, 10)]
    # Small blocks too go back to the system as soon as they are free.
    told = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = [
        subprocess.run(run, capture_output=True, text=True, check=True, env=told) for run in runs
    ]
    memory.append([name, *(f"{float(run.stdout):.0f}" for run in found)])
heads = ["Peak memory in MiB", *(f"{k} inner step{'s' * (k != 1)}" for k in (1, 3, 5, 10))]
tables.append(
    {"title": f"Memory, Conv-4 with pooling, {TASKS} tasks", "heads": heads, "rows": memory}
)
what = "one meta-step; images are 5-way 1-shot tasks of 28x28 with 15 queries a class; "
what += f"medians of {ROUNDS} interleaved rounds"
record = {"what": what, "tables": tables, **results.provenance(DEVICE)}
name = "inner_loop" if DEVICE.type == "cpu" else "inner_loop_gpu"
(results.folder() / f"speed_{name}.json").write_text(json.dumps(record, indent=1) + "\n")
print(*(f"{title}\n{each}\n" for title, each in results.tables(f"speed_{name}").items()), sep="\n")
