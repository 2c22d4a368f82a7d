"""Records of full-scale runs: read, write, and lay beside the published numbers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from metautils import methods
from metautils.evaluate import Evaluation
from metautils.files import read_json, write_json

FIELDS = (
    "method", "data", "tested_on", "split", "classes", "rotations", "seed", "steps", "train",
    "evaluations", "baseline", "minutes", "device", "threads", "torch", "commit",
)  # fmt: skip
MADE_BY = FIELDS[-4:]  # of the test; those of the training stand in "trained_by"


def folder() -> Path:
    """Where the records lie: `results/` of a checkout, or the copy inside an installed package."""
    checkout = Path(__file__).parents[1] / "results"
    return checkout if checkout.is_dir() else Path(__file__).parent / "_records"


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record atomically as JSON.

    Raises:
        ValueError: if a field of `FIELDS` is missing.
    """
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(f"The record lacks {', '.join(missing)}; every field is needed.")
    write_json(record, path)


def read(name: str) -> dict[str, Any]:
    """The record `results/NAME.json`.

    Raises:
        FileNotFoundError: if there is none, naming those that there are.
    """
    path = folder() / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder().glob("*.json")))
        raise FileNotFoundError(f"There is no record {name!r} in results/; there are: {known}.")
    return _load(path)


def title(method: str) -> str:
    """A method's name in tables."""
    return methods.known()[method].title if method in methods.known() else method


def evaluation_rows(evaluations: list[Evaluation], rotations: str) -> list[dict[str, Any]]:
    """Evaluations as they stand in a record; accuracy and ci95 in percent."""
    return [
        {
            "ways": e.ways,
            "shots": e.shots,
            "queries": e.queries,
            "episodes": len(e.per_episode),
            "rotations": rotations,
            "transductive": e.transductive,
            "accuracy": round(e.accuracy, 4),
            "ci95": round(e.ci95, 4),
        }
        for e in evaluations
    ]


def provenance(device: torch.device) -> dict[str, Any]:
    """What a number depends on beside the method: processor, threads, torch, commit."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # of a class of its own, which no file may hold
        "commit": _commit(),
    }


def trained_by(record: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a record's training, which may be another than that of its test."""
    return record.get("trained_by") or {name: record[name] for name in MADE_BY}


def kept(path: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """What a training that was finished before was made by: what its record says, if it has one.

    Raises:
        DataError: if the record is damaged.
    """
    if not path.exists():
        return made_by
    saved = read_json(path)
    return trained_by(made_by | saved) if isinstance(saved, dict) else made_by


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else f"{device.type} of {_processor()}"


def _processor() -> str:
    try:
        names = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has that file
        names = []
    known = (x.split(":")[1].strip() for x in names if x.startswith("model name"))
    model = next(known, platform.processor() or platform.machine() or "CPU")
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of the package, unless it only lies in a repository that does not hold it."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, check=True)
    return done.stdout.decode(errors="replace").strip()


def published(data: str) -> list[dict[str, Any]]:
    """Rows of papers' tables on `data`: method, cite (key in references.bib), evaluations.

    `status` says whether the number was read in the paper or is second-hand.
    """
    rows = _load(folder() / "published.json")
    return [row for row in rows if row["data"] == data]


def records() -> dict[str, dict[str, Any]]:
    """All records by name, sorted."""
    paths = sorted(folder().glob("*.json"), key=lambda path: path.name)
    found = {path.stem: _load(path) for path in paths}
    return {k: r for k, r in found.items() if isinstance(r, dict) and "evaluations" in r}


def score(row: dict[str, Any], ways: int, shots: int, of: str = "evaluations") -> str:
    """`98.77 ± 0.10` of one setting, without `±` where none was published, a dash where missing."""
    for e in row[of]:
        if (e["ways"], e["shots"]) == (ways, shots):
            return f"{e['accuracy']:.1f}" if e["ci95"] is None else _with_interval(row, e)
    return "-"


def _with_interval(row: dict[str, Any], e: dict[str, Any]) -> str:
    digits = 2 if "commit" in row else 1  # ours is kept to more digits than papers print
    return f"{e['accuracy']:.{digits}f} ± {e['ci95']:.{digits}f}"


def table(ours: dict[str, dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Markdown: the named records first, then rows of papers, with where each comes from."""
    everything = [*ours.values(), *theirs]
    settings = sorted({(e["ways"], e["shots"]) for r in everything for e in r["evaluations"]})
    sources = [f"**this book**, `{name}`" for name in ours]
    for row in theirs:
        known = "" if row["status"] == "paper" else ", second-hand"
        sources.append(f"{row['source']}, {row['note']}{known}")
    rows = [
        [title(r["method"]), source, _queries(r),
         *(score(r, n, k) for n, k in settings)]
        for r, source in zip(everything, sources, strict=True)
    ]  # fmt: skip
    heads = ["Method", "Source", "Queries", *(f"{n}-way {k}-shot" for n, k in settings)]
    return _markdown(heads, rows)


def _queries(row: dict[str, Any]) -> str:
    """Whether queries were answered alone (inductive) or helped one another (transductive)."""
    transductive = row.get("transductive", row["evaluations"][0].get("transductive", False))
    return {True: "transductive", False: "inductive", None: "not said"}[transductive]


def page() -> str:
    """The results page: every record, beside the published numbers on the same set."""
    found = records()
    same = {k: r for k, r in found.items() if r["data"] == r["tested_on"] == "omniglot"}
    other = {k: r for k, r in found.items() if k not in same}
    parts = [
        "## Omniglot",
        table(same, published("omniglot")),
        "## The same networks in other tests",
        _markdown(
            ["Method", "Trained on", "Tested on", "Test rotations", "Queries", "5-way 1-shot",
             "20-way 1-shot", "Pixels, 5-way 1-shot", "Record"],
            [[title(r["method"]), r["data"], r["tested_on"],
              r["evaluations"][0]["rotations"], _queries(r), score(r, 5, 1), score(r, 20, 1),
              score(r, 5, 1, "baseline"), f"`{k}`"] for k, r in other.items()],
        ),
        "## Where each accuracy comes from",
        _markdown(
            ["Record", "Split", "Classes", "Training rotations", "Training episodes", "Seed",
             "Steps", "Minutes", "Hardware", "torch", "Commit"],
            [[f"`{k}`", r["split"], " / ".join(map(str, r["classes"].values())), r["rotations"],
              "{tasks} x {ways}-way {shots}-shot, {queries} queries".format(**r["train"]),
              r["seed"], r["steps"], r["minutes"], _both(r, "{device}, {threads} threads"),
              _both(r, "{torch}"), _both(r, "`{commit}`")] for k, r in found.items()],
        ),
        *_measurements(),
    ]  # fmt: skip
    return "\n\n".join(parts)


# By how the names of the records begin; what is under no other heading is under the last.
SECTIONS = {
    "At full scale": ("full_scale_",),
    "Learners that compare": (
        "compare_", "distances_", "protonet_seeds_", "relation_protocol_", "one_shot_",
        "strangers_", "calibration",
    ),
    "Learners that read": ("memory_", "snail_start_"),
    "Learned optimisers": ("optimizer_",),
    "Bodies that have learned elsewhere": ("finetune_", "transfer_", "pretrained_"),
    "Speed": ("speed_",),
    "Inside the methods": ("",),
}  # fmt: skip


def _measurements() -> list[str]:
    """Every record of tables, under its heading."""
    left = [p for p in sorted(folder().glob("*.json")) if "tables" in _load(p)]
    parts = []
    for heading, begins in SECTIONS.items():
        under = [path for path in left if path.name.startswith(begins)]
        left = [path for path in left if path not in under]
        parts += [f"## {heading}", *map(_measured, under)] if under else []
    return parts


def _both(record: dict[str, Any], told: str) -> str:
    """What a training was made by, and its test if that was made by something else."""
    trained, tested = (told.format(**x) for x in (trained_by(record), record))
    return trained if trained == tested else f"{trained}; test: {tested}"


def tables(name: str) -> dict[str, str]:
    """The tables of `results/NAME.json`, a measurement of another kind, as Markdown by title."""
    r = _load(folder() / f"{name}.json")
    return {t["title"]: _markdown(t["heads"], t["rows"]) for t in r["tables"]}


def _measured(path: Path) -> str:
    r = _load(path)
    where = _both(r, "{device}, torch {torch}, {threads} thread(s), commit `{commit}`")
    parts = [f"**{title}**\n\n{each}" for title, each in tables(path.stem).items()]
    return "\n\n".join([f"{r['what']}; {where}.", *parts])


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _markdown(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    # A narrow column must not part a number from its ± or from its unit.
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" x |", "\u00a0x |")
