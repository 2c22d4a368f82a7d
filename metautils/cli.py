"""`python -m metautils`: train, evaluate and inspect from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metautils import data, results
from metautils.data.bank import ClassBank, Parts
from metautils.evaluate import evaluate
from metautils.files import DataError
from metautils.learners.base import Learner
from metautils.learners.protonet import ProtoNet
from metautils.nets import Conv4
from metautils.sampling import EpisodeSampler
from metautils.train import CHECKPOINT, CheckpointMismatch, load_weights, meta_train

METHODS = {"protonet": ProtoNet}
SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
QUERIES = 15
DRAWN = ("glyphs", "omniglot")  # a drawing turned by 90 degrees is a new character; a photo is not


@dataclass(frozen=True)
class Preset:
    """Length and episodes of training, number of test episodes a setting."""

    steps: int
    ways: int
    shots: int
    queries: int
    episodes: int


# 60-way 1-shot with 5 queries a class is how Snell et al. 2017 train on Omniglot.
PRESETS = {"quick": Preset(200, 20, 1, 5, 600), "full": Preset(3000, 60, 1, 5, 1000)}


def train(args: argparse.Namespace) -> None:
    """Train, test and write `record.json`; the same command goes on after an interruption."""
    preset, made_by = PRESETS[args.preset], results.provenance(args.device)
    parts = data.load(args.data, args.seed, args.split)
    for name, part in zip(Parts._fields, parts, strict=True):
        if not len(part):
            raise ValueError(f"{args.data} leaves no class for {name}: choose a set with more.")
    rotations = "classes" if args.data in DRAWN else "none"
    _settings(_rotated(parts.test, rotations))  # told before the training, not after it
    learner = _learner(args.method, parts.train, args.seed).to(args.device)
    source = _rotated(parts.train, rotations).to(args.device)
    ways = min(preset.ways, len(source))
    episodes = EpisodeSampler(source, ways, preset.shots, preset.queries, seed=args.seed)
    validation = _rotated(parts.validation, rotations).to(args.device)
    choose = EpisodeSampler(validation, min(20, len(validation)), 1, preset.queries, seed=args.seed)
    history = meta_train(
        learner, episodes, preset.steps, validation=choose, every=250, out=args.out
    )
    record = {
        "method": args.method,
        "data": args.data,
        "tested_on": args.data,
        "split": args.split if args.data == "omniglot" else "classes",
        "classes": dict(zip(Parts._fields, map(len, parts), strict=True)),
        "rotations": rotations,
        "seed": args.seed,
        "steps": preset.steps,
        "train": {"ways": ways, "shots": preset.shots, "queries": preset.queries, "tasks": 1},
        **_test(learner, parts.test, rotations, preset.episodes, args.device),
        "minutes": round(history.seconds / 60, 2),
        "preset": args.preset,
        **made_by,
    }
    results.write(record, args.out / "record.json")
    print(f"{record['minutes']} minutes of training; record in {args.out / 'record.json'}")


def evaluate_again(args: argparse.Namespace) -> None:
    """Score a trained checkpoint anew, on its own test classes or on another set."""
    path = args.run / "record.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: train with --out {args.run} first.")
    record = json.loads(path.read_text())
    name, split = args.data or record["data"], args.split or record["split"]
    parts = data.load(name, record["seed"], split if name == "omniglot" else "random")
    learner = _learner(record["method"], parts.test, record["seed"]).to(args.device)
    load_weights(learner, args.run / CHECKPOINT)
    episodes = PRESETS[record["preset"]].episodes
    record |= {
        "tested_on": f"{name}, {split} split" if name == "omniglot" else name,
        "classes": record["classes"] | {"test": len(parts.test)},
        **_test(learner, parts.test, args.rotations, episodes, args.device),
    }
    out = args.run / f"record-{Path(name).name}-{args.rotations}.json"
    results.write(record, out)
    print(f"Record in {out}")


def describe(args: argparse.Namespace) -> None:
    """Fetch and check a set, and say what is in it."""
    for part, bank in zip(Parts._fields, data.load(args.name, split=args.split), strict=True):
        counts = bank.counts.tolist() or [0]
        shape = " x ".join(map(str, bank.images.shape[1:]))
        print(
            f"{part:>10}: {len(bank):5d} classes, {len(bank.images):6d} images of {shape}, "
            f"{min(counts)} to {max(counts)} a class"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with one sentence on stderr and status 2."""
    args = _parser().parse_args(arguments)
    try:
        args.run_command(args)
    except (DataError, CheckpointMismatch, ValueError, FloatingPointError, OSError) as error:
        print(f"metautils: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Give the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def _learner(method: str, bank: ClassBank, seed: int) -> Learner:
    torch.manual_seed(seed)
    return METHODS[method](Conv4(channels=bank.images.shape[1]))


def _rotated(bank: ClassBank, rotations: str) -> ClassBank:
    return bank.with_rotations() if rotations == "classes" else bank


def _settings(bank: ClassBank) -> list[tuple[int, int]]:
    """Every setting for which the bank has the images; all classes at once where they are few."""
    fewest = int(bank.counts.min())
    known = [(n, k) for n, k in SETTINGS if n <= len(bank)] or [(len(bank), k) for k in (1, 5)]
    settings = [(n, k) for n, k in known if k < fewest]
    if len(bank) < 2 or not settings:
        raise ValueError(
            f"Testing needs 2 classes of 2 images or more; there are {len(bank)}, the smallest of "
            f"{fewest}: give more classes or images."
        )
    return settings


def _test(
    learner: Learner, bank: ClassBank, rotations: str, episodes: int, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of the learner, and of class means in raw pixels on the same episodes."""
    bank = _rotated(bank, rotations).to(device)
    settings = _settings(bank)
    queries = min(QUERIES, int(bank.counts.min()) - max(k for _, k in settings))
    rows = {}
    for name, each in {"evaluations": learner, "baseline": ProtoNet(nn.Flatten())}.items():
        print("trained" if each is learner else "class means in pixels, for comparison")
        scores = evaluate(
            each, bank, settings, queries, episodes, rotations == "episode", progress=True
        )
        print(*(f"  {score}" for score in scores), sep="\n")
        rows[name] = results.evaluation_rows(scores, rotations)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metautils", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("train", help=train.__doc__, description=train.__doc__)
    one.add_argument("method", choices=METHODS)
    one.add_argument("--data", default="glyphs", help="glyphs, omniglot or a folder of images")
    one.add_argument("--split", default="random", choices=["random", "background"])
    one.add_argument("--preset", default="quick", choices=PRESETS)
    one.add_argument("--out", type=Path, required=True, help="folder for checkpoint and record")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run_command=train)

    two = commands.add_parser(
        "evaluate", help=evaluate_again.__doc__, description=evaluate_again.__doc__
    )
    two.add_argument("run", type=Path, help="the --out folder of a training")
    two.add_argument("--data", help="another set to test on")
    two.add_argument("--split", choices=["random", "background"])
    two.add_argument("--rotations", default="none", choices=["none", "classes", "episode"])
    two.set_defaults(run_command=evaluate_again)

    three = commands.add_parser("data", help=describe.__doc__, description=describe.__doc__)
    three.add_argument("name", help="glyphs, omniglot, digits or a folder of images")
    three.add_argument("--split", default="random", choices=["random", "background"])
    three.set_defaults(run_command=describe)

    four = commands.add_parser("results", help="print all records as Markdown")
    four.set_defaults(run_command=lambda args: print(results.page()))

    where = "cuda" if torch.cuda.is_available() else "cpu"
    for command in (one, two):
        command.add_argument("--device", type=_device, default=where)
    return parser


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        message = f"{name!r} is no device of this machine: try cpu"
        raise argparse.ArgumentTypeError(message) from error
