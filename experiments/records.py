"""The records in results/: which are missing, and to run them, as `make records` does.

    python experiments/records.py                 list what is missing or was made otherwise
    python experiments/records.py --minutes 90    run as many of these as fit, first things first
    python experiments/records.py NAME ...        run these

Every file of this folder lists its EXPERIMENTS. A record holds the settings that it was made with;
where the experiment has others today, the record is out of date. An interrupted experiment goes on
when it is run again: what it has finished lies in runs/NAME.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metautils import results
from metautils.evaluate import Evaluation
from metautils.files import read_json, write_json
from metautils.runs import RECORD

HERE = Path(__file__).resolve().parent
RUNS = Path("runs")  # below the folder where it is run
Settings = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """How a record is made.

    Attributes:
        make: from a folder of its own, the device and the settings to the record.
        settings: all that the numbers depend on, as JSON holds it.
        minutes: on two CPU cores, measured once, with the trainings.
        tiny: settings that are others in a test of a moment.
        gpu: settings that are others on a GPU.
        after: experiments whose run folders it reads.
    """

    make: Callable[..., dict[str, Any]]
    settings: Settings
    minutes: float
    tiny: Settings
    gpu: Settings = field(default_factory=dict)
    after: tuple[str, ...] = ()


def known() -> dict[str, Experiment]:
    """Every experiment by the name of its record, those first that others read."""
    found: dict[str, Experiment] = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem != "records":
            found |= getattr(importlib.import_module(path.stem), "EXPERIMENTS", {})
    return dict(sorted(found.items(), key=lambda item: len(item[1].after)))


def state(name: str, experiment: Experiment) -> str | None:
    """What is wrong with a record, in a few words; None if nothing is."""
    path = results.folder() / f"{name}.json"
    if not path.exists():
        return "missing"
    saved = read_json(path).get("settings")
    wanted = [experiment.settings, experiment.settings | experiment.gpu]
    if saved in wanted:
        return None
    if saved is None:
        return "made with unknown settings"
    odd = next(key for key in {**wanted[0], **saved} if saved.get(key) != wanted[0].get(key))
    return f"made with {odd}={saved.get(odd)!r}, not {wanted[0].get(odd)!r}"


def with_what_it_reads(name: str, experiments: dict[str, Experiment]) -> list[str]:
    """The experiment, after those whose run folders it reads and which are not there."""
    missing = [other for other in experiments[name].after if not (RUNS / other / RECORD).exists()]
    return [*missing, name]


def run(name: str, experiment: Experiment, device: torch.device, changed: Settings) -> None:
    """Make a record and write it to results/."""
    settings = experiment.settings | changed
    made_by = results.provenance(device)  # of now: a training may outlive an edit
    record = experiment.make(RUNS / name, device, **settings)
    write_json(record | {"settings": settings} | made_by, results.folder() / f"{name}.json")


def told(evaluation: Evaluation, digits: int = 2) -> str:
    """Accuracy and interval as they stand in a table."""
    return f"{evaluation.accuracy:.{digits}f} ± {evaluation.ci95:.{digits}f}"


def main(arguments: list[str] | None = None) -> int:
    """List or run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="records to make, whatever their state")
    parser.add_argument("--minutes", type=float, help="run what fits into so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    experiments, device = known(), torch.device(args.device)
    odd = [name for name in args.names if name not in experiments]
    if odd:
        print(f"There is no experiment {odd[0]!r}; there are: {', '.join(experiments)}.")
        return 2
    todo = {name: state(name, each) for name, each in experiments.items()}
    todo = {name: why for name, why in todo.items() if why}
    if not args.names and args.minutes is None:
        for name, why in todo.items():
            print(f"{experiments[name].minutes:6.0f} minutes  {name}: {why}")
        print(
            f"{len(todo)} of {len(experiments)} records to make. On two CPU cores; a GPU is faster."
        )
        return 0
    left, done = args.minutes, set()
    for name in args.names or todo:
        wanted = [x for x in with_what_it_reads(name, experiments) if x not in done]
        minutes = sum(experiments[x].minutes for x in wanted)
        if left is not None and minutes > left:
            continue  # a shorter one may still fit
        left = None if left is None else left - minutes
        for x in wanted:
            each = experiments[x]
            print(f"{x}: about {each.minutes:.0f} minutes on two CPU cores", flush=True)
            run(x, each, device, each.gpu if device.type != "cpu" else {})
            done.add(x)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.modules["records"] = sys.modules["__main__"]  # one Experiment, whoever imports it
    raise SystemExit(main())
