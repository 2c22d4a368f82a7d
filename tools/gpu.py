"""Everything that wants a GPU, in one go of under 8 minutes that needs no network: `make gpu`.

    python tools/gpu.py                     on this machine's GPU; writes records into results/
    python tools/gpu.py --device pretend    the same, small, on the tests' pretend accelerator
    python tools/gpu.py --only record       one part again

A machine with a torch of its own needs no environment: any Python will do that has the package's
dependencies, pytest, hypothesis and IPython, and for two of the benchmarks their peer, higher. The
parts are processes of their own; each may fail without the others, and what was measured is written
as soon as it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

import ondevice
from metautils import results, runs
from metautils.files import write_json
from ondevice import ROOT

LIMIT = 480  # seconds for all
LOGS = Path("runs") / "gpu"  # what the parts print
CORES = os.cpu_count() or 1
WORKERS = min(8, CORES)  # parts at a time
TOGETHER = ["tests", *ondevice.CHAPTERS]  # of these no speed is measured
ALONE = ["record", *ondevice.BENCHMARKS]


@contextlib.contextmanager
def placed(device: str, out: Path) -> Iterator[None]:
    """The pretend device where it is asked for, and a folder for what is written."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(results, "folder", lambda: out))
        if device == "pretend":
            import pretend  # of the tests; it asks for a recent torch

            stack.enter_context(pretend.device())
        yield


def tests(device: str) -> int:
    """The tests that take a device; the chapters in them are parts of their own here."""
    import pytest

    file = str(ROOT / "tests" / "device_tests.py")
    return pytest.main(["-q", "-p", "no:cacheprovider", "-k", f"{device} and not chapter", file])


def record(device: str, out: Path) -> None:
    """A training and its test: on a GPU at the scale of its paper."""
    small = device == "pretend"
    sizes = {"steps": 2, "ways": 5, "episodes": 2} if small else {}
    with tempfile.TemporaryDirectory() as run:
        made = runs.train(
            "protonet",
            "glyphs",
            Path(run),
            preset="full",
            device=device,
            validation_episodes=2 if small else 100,
            **sizes,
        )
    write_json(made, out / "protonet_glyphs_gpu.json")


def one(part: str, device: str, out: Path) -> int:
    """One part, in this process; its exit status."""
    if part == "tests":
        return tests(device)
    small = device if device == "pretend" else None
    if part in ondevice.CHAPTERS:  # these read the book's own records
        with placed(device, results.folder()):
            ondevice.run(part, small)
    else:
        with placed(device, out):
            record(device, out) if part == "record" else ondevice.run(part, small)
    return 0


def search_path() -> str:
    """The package's folder before whatever Python was told already, as for carried wheels."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def apart(part: str, device: str, out: Path, logs: Path, until: float) -> list[str]:
    """One part in a process of its own; its name, what became of it, and its seconds."""
    # A benchmark measures memory in processes of its own, which have to find the package too.
    told = {"OMP_NUM_THREADS": str(max(1, CORES // WORKERS)), "PYTHONPATH": search_path()}
    began = time.monotonic()
    if began >= until:
        return [part, "no time left", "0"]
    command = [sys.executable, __file__, "--only", part, "--device", device, "--out", str(out)]
    with (logs / f"{Path(part).stem}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=log, timeout=until - began, env=os.environ | told
            )
            became = "passed" if done.returncode == 0 else f"failed, see {log.name}"
        except subprocess.TimeoutExpired:
            became = "no time left"
    row = [part, became, f"{time.monotonic() - began:.0f}"]
    print(*row, sep="\t", flush=True)
    return row


def everything(device: str, out: Path, logs: Path) -> int:
    """All parts; the table of what became of them goes to gpu.json. Exit status 1 if one failed."""
    made_by = results.provenance(torch.device("cpu" if device == "pretend" else device))
    until = time.monotonic() + LIMIT
    with ThreadPoolExecutor(WORKERS) as pool:
        rows = list(pool.map(lambda part: apart(part, device, out, logs, until), TOGETHER))
    rows += [apart(part, device, out, logs, until) for part in ALONE]
    table = {"title": "Parts", "heads": ["Part", "Outcome", "Seconds"], "rows": rows}
    what = "the tests of devices, every chapter at its quick size, a training, the benchmarks"
    write_json({"what": what, "tables": [table], **made_by}, out / "gpu.json")
    return int(any(row[1] != "passed" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "pretend"])
    parser.add_argument("--only", metavar="PART", choices=[*TOGETHER, *ALONE])
    parser.add_argument("--out", type=Path, help="folder for records and for what the parts print")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch can use: --device pretend tries the same without one.")
        return 2
    out = args.out or (results.folder() if args.device == "cuda" else LOGS)
    logs = args.out or LOGS
    for folder in (out, logs):
        folder.mkdir(parents=True, exist_ok=True)
    if args.only:
        return one(args.only, args.device, out)
    return everything(args.device, out, logs)


if __name__ == "__main__":
    raise SystemExit(main())
