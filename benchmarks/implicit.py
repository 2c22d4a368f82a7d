"""What a meta-step of MAML, FOMAML and iMAML keeps in memory, by the number of inner steps.

One 5-way 1-shot task with 15 queries a class, 28x28, through Conv-4 of width 32. Each row is of a
process of its own: what one meta-step adds to its peak.
"""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from metautils import results
from metautils.episode import Episode
from metautils.learners.imaml import IMAML
from metautils.learners.maml import FOMAML, MAML
from metautils.nets import BatchNorm, Conv4, classifier

TASKS, COUNTS = 1, (1, 10, 50, 100)
KINDS = {"MAML": MAML, "FOMAML": FOMAML, "iMAML, 5 products": IMAML}


def episode(tasks=TASKS):
    torch.manual_seed(0)
    y = torch.arange(5)
    x = torch.rand(tasks, 80, 1, 28, 28)
    labels = (y.expand(tasks, -1), y.repeat_interleave(15).expand(tasks, -1))
    return Episode(x[:, :5], labels[0], x[:, 5:], labels[1])


def meta_step(kind, steps, e):
    learner = kind(classifier(Conv4(width=32, norm=BatchNorm), 32, 5), 0.01, steps)
    for loss, *_ in learner.pieces(e):
        loss.backward()


def resident(which):
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(which)).split()[1]) / 1024


def measured(name):
    """MiB of the peak above the level before all, and seconds, for each number of steps."""
    e, found = episode(), []
    for _ in range(5):  # what libraries set up and allocators keep at first use is no graph
        meta_step(KINDS[name], 1, e)
    gc.collect()
    before = resident("VmRSS")
    for steps in COUNTS:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
        start = time.perf_counter()
        meta_step(KINDS[name], steps, e)
        found.append((resident("VmHWM") - before, time.perf_counter() - start))
    return found


def apart(name):
    """The same in a process of its own."""
    # Small blocks too go back to the system as soon as they are free.
    told = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = [sys.executable, __file__, name]
    return json.loads(
        subprocess.run(run, capture_output=True, text=True, check=True, env=told).stdout
    )


if len(sys.argv) > 1:
    print(json.dumps(measured(sys.argv[1])))
    sys.exit()

found = {name: apart(name) for name in KINDS}
heads = [f"{k} inner step{'s' * (k != 1)}" for k in COUNTS]
tables = [
    {"title": "Peak memory", "heads": ["MiB", *heads],
     "rows": [[name, *(f"{mib:.0f}" for mib, _ in row)] for name, row in found.items()]},
    {"title": "Time", "heads": ["Seconds", *heads],
     "rows": [[name, *(f"{s:.2f}" for _, s in row)] for name, row in found.items()]},
]  # fmt: skip
what = "one meta-step on one 5-way 1-shot task with 15 queries a class, Conv-4 of width 32"
record = {"what": what, "tables": tables, **results.provenance(torch.device("cpu"))}
(results.folder() / "speed_implicit.json").write_text(json.dumps(record, indent=1) + "\n")
print(*(f"{title}\n{each}\n" for title, each in results.tables("speed_implicit").items()), sep="\n")
