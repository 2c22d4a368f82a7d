"""Try the package with the newest dependencies on every Python, and with the oldest of all.

    python tools/versions.py [NAME ...]    all, or those that start so: newest, newest-3.12

Each gets an environment of its own, runs the tests of the package and executes a chapter. uv finds
the interpreter on the PATH or fetches one. Nothing asks for a shell or for Linux.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"
UV = (sys.executable, "-m", "uv")
# What the tests of the package and a chapter need beside it.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "nbval", "ipykernel")
# These test the book: its site, its style, its notebooks in other programs. What they need is
# pinned in requirements.txt, and `make test` runs them with that.
BOOK = ("colab", "glossary", "notebooks", "portable", "site", "style", "viewers", "workflow")
PYTEST = "-m pytest -q -n auto --maxprocesses 4 --dist loadfile --nbval-lax --nbval-current-env"
TELL = "import sys, importlib.metadata as m; print(sys.version.split()[0], m.version('torch'))"


@dataclass
class Trial:
    """Dependencies on a Python, and what came of it."""

    name: str
    python: str
    torch: str = ""
    counts: tuple[int, int, int] = (0, 0, 0)  # passed, failed, skipped
    seconds: float = 0
    missing: str = ""  # why it could not be tried


def plan() -> list[Trial]:
    """The oldest dependencies on the oldest Python, and the newest on each that is promised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"]]
    newest = [Trial(f"newest-{each}", each) for each in pythons]
    return [Trial(f"oldest-{pythons[0]}", pythons[0]), *newest]


def install(trial: Trial) -> Path | None:
    """A fresh environment's Python; None if the interpreter or the packages are not to be had."""
    folder = FOLDER / trial.name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (*UV, "pip", "install", "--quiet", "--python", python)
    bounds = "lowest-direct" if trial.name.startswith("oldest") else "highest"
    for command in (
        (*UV, "venv", "--quiet", "--clear", "--python", trial.python, folder),
        # Not by the package itself: what that asks for is not `direct` to uv.
        (*pip, "--resolution", bounds, "-r", "pyproject.toml"),
        (*pip, *TOOLS),
    ):
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8")
        if done.returncode:
            sys.stderr.write(done.stderr)
            reason = done.stderr.partition("error: ")[2].splitlines()[:2]
            trial.missing = " ".join(map(str.strip, reason)) or "no reason was told"
            return None
    subprocess.run((*pip, "--no-deps", "-e", "."), cwd=ROOT, check=True)
    told = subprocess.run(
        (python, "-c", TELL), stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    trial.python, trial.torch = told.stdout.split()
    return python


def run(trial: Trial, python: Path, all_chapters: bool) -> None:
    """Run the tests of the package, and the chapters, each cell of which is a test too."""
    began, report = time.monotonic(), FOLDER / trial.name / "report.xml"
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb" if all_chapters else "01_*.ipynb"))
    ignored = [f"--ignore=tests/test_{name}.py" for name in BOOK]
    command = (python, *PYTEST.split(), f"--junitxml={report}", *ignored, *notebooks, "tests")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as processes run side by side
    stopped = subprocess.run(command, cwd=ROOT, env=one_thread).returncode
    suite = ElementTree.parse(report).getroot()[0] if report.exists() else {}
    count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed, skipped = count["failures"] + count["errors"], count["skipped"]
    trial.counts = count["tests"] - failed - skipped, failed or int(stopped != 0), skipped
    trial.seconds = time.monotonic() - began


def table(trials: list[Trial]) -> str:
    """What came of each, in a line."""
    line = "{:13}{:9}{:9}{:>7}{:>8}{:>9}{:>9}"
    lines = [line.format("", "Python", "torch", "passed", "failed", "skipped", "seconds")]
    for t in trials:
        numbers = [""] * 4 if t.missing else [*t.counts, round(t.seconds)]
        told = line.format(t.name, t.python, t.torch, *numbers)
        lines.append(f"{told.rstrip()}  not here: {t.missing}" if t.missing else told)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Try what was asked for and tell what came of it; 1 if anything failed, or all is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="newest, oldest, newest-3.12, ...")
    parser.add_argument("--all-chapters", action="store_true", help="not the first alone")
    options = parser.parse_args(arguments)
    trials = [t for t in plan() if not options.names or t.name.startswith(tuple(options.names))]
    for trial in trials:
        print(f"== {trial.name}", flush=True)
        if python := install(trial):
            run(trial, python, options.all_chapters)
    print(table(trials))
    return int(any(t.counts[1] for t in trials) or all(t.missing for t in trials))


if __name__ == "__main__":
    sys.exit(main())
