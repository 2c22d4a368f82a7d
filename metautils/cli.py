"""`python -m metautils`: train, evaluate and inspect from the command line."""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from metautils.errors import BadArgument, ReaderError
from metautils.files import DataError, check_file, save_text
from metautils.progress import progress_bar

if TYPE_CHECKING:
    from metautils.pretrained import Body

# A command imports what it needs itself: all of it together takes seconds, which nobody should wait
# for who wants an answer on one photo.


def train(args: argparse.Namespace) -> None:
    """Train, test and write `record.json`; the same command goes on after an interruption."""
    from metautils import runs

    record = runs.train(
        args.method,
        args.data,
        args.out,
        preset=args.preset,
        split=args.split,
        seed=args.seed,
        transductive=args.transductive,
        device=args.device,
        body=args.body,
        ways=args.ways,
        shots=args.shots,
        queries=args.queries,
        lr=args.lr,
    )
    print(f"{record['minutes']} minutes of training; record in {args.out / runs.RECORD}")


def evaluate_again(args: argparse.Namespace) -> None:
    """Score a trained checkpoint anew, on its own test classes or on another set."""
    from metautils import runs

    out = runs.evaluate_again(
        args.run,
        source=args.data,
        split=args.split,
        rotations=args.rotations,
        transductive=args.transductive,
        device=args.device,
    )
    print(f"Record in {out}")


def finetune_folder(args: argparse.Namespace) -> None:
    """Fine-tune a pretrained body on a folder of images; the same command goes on if stopped."""
    from metautils import classifier, finetune, report

    names = ("size", "epochs", "batch", "lr", "pull", "seed")
    asked = {name: getattr(args, name) for name in names}
    own = {"mirror": args.mirror, "class_weights": args.class_weights}
    recipe = finetune.Recipe(**{k: v for k, v in asked.items() if v is not None}, **own)
    weights = None if args.weights == "none" else args.weights
    if weights is None and args.pull is not None:
        raise BadArgument("--l2-sp pulls to pretrained weights, so it needs other --weights.")
    if weights is None and args.epochs == 0:
        raise BadArgument("--probe-only trains a head on a trained body: give other --weights.")
    if args.pull is not None and args.pull < 0:
        raise BadArgument(f"--l2-sp is {args.pull}: a strength is 0 or more.")
    split = {"split_seed": args.split_seed, "groups": args.groups, "command": args.command}
    tested = finetune.run(args.data, args.out, recipe, weights, args.device, args.workers, **split)
    print(tested.report())
    print(f"Classifier in {args.out / classifier.MODEL}, report in {args.out / report.REPORT}")


def classify(args: argparse.Namespace) -> int:
    """Say what is on images, with the classifier of a fine-tuning; of bad ones, at the end, why."""
    from metautils import classifier
    from metautils.data import tree

    if args.csv:
        check_file(args.csv, 1 << 20)
    files = [file for name in args.images for file in tree.images_in(name)]
    net = classifier.load(args.run / classifier.MODEL).to(args.device)
    answers, bad = {}, []
    told = classifier.classify_each(net, files, args.batch)
    for file, found in progress_bar(told, show=bool(args.csv), desc="classify", total=len(files)):
        if isinstance(found, DataError):
            bad.append(found)
            continue
        answers[file] = found
        best = list(classifier.ranked(net.classes, found).items())[:3]
        if not args.csv:
            print(f"{file}:", ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in best))
    if args.csv:
        save_text(classifier.table(net.classes, answers), args.csv)
        print(f"{len(answers)} image(s) in {args.csv}")
    return max([_told(error) for error in bad], default=0)


def export_file(args: argparse.Namespace) -> None:
    """Write a fine-tuned classifier, or remembered things, for other programs: .onnx or .pt2."""
    from metautils import classifier, export
    from metautils.recognise import load

    if args.made.is_file():
        made, gives = load(args.made, _body_of(args.run)[0]), "scores"
    else:
        made, gives = classifier.load(args.made / classifier.MODEL), "probabilities"
    notes = export.told(made)
    export.export(made, args.out)
    print(f"{args.out} gives the {gives} of {', '.join(made.classes)}.")
    print(f"Its images: {notes['images']}.")


def _body_of(run: Path | None) -> tuple[Body | None, int | None]:
    """The body of a training and the size of its images, or None twice."""
    if run is None:
        return None, None
    from metautils import runs  # which brings all methods with it

    return runs.trained_body(run)


def recognise(args: argparse.Namespace) -> int:
    """Say which of the things of a folder is on images, or none of these; nothing is trained."""
    from metautils.data import tree
    from metautils.recognise import remembered

    if args.save:
        check_file(args.save, 1 << 20)
    files = [file for name in args.images for file in tree.images_in(name)]
    body, size = _body_of(args.run) if args.run else (args.body, None)
    things = remembered(args.support, args.strangers, body, size, args.head, args.device)
    if args.save:
        things.save(args.save)
    bad = []
    for file in files:
        try:
            print(f"{file}: {things.recognise(file)}", flush=True)
        except DataError as error:
            bad.append(error)
    return max([_told(error) for error in bad], default=0)


def describe(args: argparse.Namespace) -> None:
    """Fetch and check a set, and say what is in it."""
    from metautils import data
    from metautils.data.bank import Parts

    for part, bank in zip(Parts._fields, data.load(args.name, split=args.split), strict=True):
        counts = bank.counts.tolist() or [0]
        shape = " x ".join(map(str, bank.images.shape[1:]))
        print(
            f"{part:>10}: {len(bank):5d} classes, {len(bank.images):6d} images of {shape}, "
            f"{min(counts)} to {max(counts)} a class"
        )


def page(args: argparse.Namespace) -> None:
    """Print all records as Markdown."""
    from metautils import results

    try:
        print(results.page(), flush=True)
    except BrokenPipeError:  # who reads it has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with one sentence on stderr and status 2.

    A fault of the package is none of the reader's, so it keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows may lack the letters of a name
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    args = _parser(given).parse_args(given)
    args.command = shlex.join(["python", "-m", "metautils", *given])
    try:
        return args.run_command(args) or 0
    except ReaderError as error:
        return _told(error)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _told(f"There is not enough memory: {args.less_memory}.")
    except KeyboardInterrupt:
        print("\nStopped. Give the same command again to go on.", file=sys.stderr)
        return 130


def _told(error: ReaderError | str) -> int:
    """Print a sentence; the exit status of bad input."""
    print(f"metautils: {error}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    """Whether torch, Python or Pillow could not have the memory they wanted."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # On a CPU torch has no type of its own for it.
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """With the arguments of all commands, or of those alone that are among the words."""
    parser = argparse.ArgumentParser(prog="python -m metautils", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (run_command, add_arguments, less_memory) in COMMANDS.items():
        told = run_command.__doc__
        one = commands.add_parser(name, help=told, description=told)
        if words is None or name in words:
            add_arguments(one)
        one.set_defaults(run_command=run_command, less_memory=less_memory)
    return parser


def _train_arguments(one: argparse.ArgumentParser) -> None:
    from metautils import methods

    one.add_argument("method", help=f"{', '.join(methods.known())}, or a file of your own")
    one.add_argument(
        "--data", default="glyphs", help="glyphs, omniglot, cifar_fs or a folder of images"
    )
    one.add_argument("--split", default="random", choices=["random", "background"])
    one.add_argument("--preset", default="quick", choices=["quick", "full"])
    one.add_argument("--out", type=Path, required=True, help="folder for checkpoint and record")
    one.add_argument("--seed", type=_seed, default=0)
    one.add_argument(
        "--body", help="efficientnet_lite0, resnet50 or timm:NAME, to learn on; else from scratch"
    )
    one.add_argument("--ways", type=_positive, help="of the training episodes")
    one.add_argument("--shots", type=_positive, help="of the training episodes")
    one.add_argument("--queries", type=_positive, help="a class, of the training episodes")
    one.add_argument("--lr", type=_rate, help="of the outer steps at the start")
    _add_device(one)
    _add_inductive(one)


def _evaluate_arguments(two: argparse.ArgumentParser) -> None:
    two.add_argument("run", type=Path, help="the --out folder of a training")
    two.add_argument("--data", help="another set to test on")
    two.add_argument("--split", choices=["random", "background"])
    two.add_argument("--rotations", default="none", choices=["none", "classes", "episode"])
    _add_device(two)
    _add_inductive(two)


def _data_arguments(three: argparse.ArgumentParser) -> None:
    three.add_argument("name", help="glyphs, omniglot, digits, cifar_fs or a folder")
    three.add_argument("--split", default="random", choices=["random", "background"])


def _finetune_arguments(tune: argparse.ArgumentParser) -> None:
    from metautils.pretrained import LITE0

    tune.add_argument("--data", type=Path, required=True, help="folder, a subfolder for each class")
    tune.add_argument("--out", type=Path, required=True, help="folder for classifier and record")
    tune.add_argument(
        "--weights",
        default=LITE0,
        help="efficientnet_lite0 (default), resnet50, timm:NAME, none, or a file of weights",
    )
    tune.add_argument("--size", type=_positive, help="of the images in pixels, 224 by default")
    tune.add_argument("--batch", type=_positive, help="images in a step")
    length = tune.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=_positive,
        help="of all layers; by default 2 to 20, the fewer the more images, and none where the "
        "head alone has 95 %% right for sure",
    )
    length.add_argument(
        "--probe-only", dest="epochs", action="store_const", const=0, help="fit the head alone"
    )
    tune.add_argument("--lr", type=_rate, help="of the head, and of all layers at most")
    tune.add_argument("--l2-sp", dest="pull", type=float, help="strength of a pull to the start")
    tune.add_argument(
        "--no-mirror", dest="mirror", action="store_false", help="for letters, digits, signs"
    )
    tune.add_argument("--workers", type=_natural, default=0, help="processes that read images")
    tune.add_argument("--seed", type=_seed, default=0)
    tune.add_argument(
        "--split-seed", type=_seed, default=0, help="of the split, which --seed is not"
    )
    tune.add_argument(
        "--groups",
        metavar="PATTERN",
        help="regular expression for the names below --data; images for which its bracketed part "
        r"is the same, as (clip\d+) of cat/clip7-3.jpg, stay in one part",
    )
    tune.add_argument(
        "--class-weights", action="store_true", help="rare classes count as much as common ones"
    )
    _add_device(tune)


def _classify_arguments(tell: argparse.ArgumentParser) -> None:
    tell.add_argument("run", type=Path, help="the --out folder of a fine-tuning")
    tell.add_argument("images", type=Path, nargs="+", help="files, or folders of them")
    tell.add_argument("--csv", type=Path, help="file for the answers, a row for each image")
    tell.add_argument("--batch", type=_positive, default=32, help="images at a time")
    _add_device(tell)


def _recognise_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("images", type=Path, nargs="+", help="files, or folders of them")
    one.add_argument(
        "--support",
        type=Path,
        required=True,
        help="folder, a subfolder for each thing with a photo or more; or what --save wrote",
    )
    one.add_argument("--strangers", type=Path, help="folder of photos of none of these things")
    body = one.add_mutually_exclusive_group()
    body.add_argument("--body", help="efficientnet_lite0 (default), resnet50 or timm:NAME")
    body.add_argument(
        "--run", type=Path, help="the --out folder of a training on a body, or of a fine-tuning"
    )
    one.add_argument("--head", choices=["centroid", "ridge"], help="centroid by default")
    one.add_argument("--save", type=Path, help="file for what is remembered: features, no photos")
    _add_device(one)


def _export_arguments(away: argparse.ArgumentParser) -> None:
    away.add_argument(
        "made", type=Path, help="the --out folder of a fine-tuning, or the file of recognise --save"
    )
    away.add_argument("--run", type=Path, help="the training whose body the things were seen by")
    away.add_argument("--out", type=Path, required=True, help="a file that ends in .onnx or .pt2")


def _no_arguments(one: argparse.ArgumentParser) -> None:
    """Of a command that has none."""


def _add_device(one: argparse.ArgumentParser) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    one.add_argument("--device", type=_device, default=where)


def _add_inductive(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--inductive",
        dest="transductive",
        action="store_false",
        help="normalise queries by the support set, not by one another",
    )


# What runs each command, what adds its arguments, and what to do where memory does not suffice.
COMMANDS = {
    "train": (train, _train_arguments, "give fewer --ways or --queries"),
    "evaluate": (evaluate_again, _evaluate_arguments, "try --device cpu"),
    "data": (describe, _data_arguments, "name a smaller set"),
    "finetune": (finetune_folder, _finetune_arguments, "give a smaller --batch or --size"),
    "classify": (classify, _classify_arguments, "give a smaller --batch or smaller images"),
    "recognise": (recognise, _recognise_arguments, "give smaller images"),
    "export": (export_file, _export_arguments, "close other programs"),
    "results": (page, _no_arguments, "close other programs"),
}


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        message = f"{name!r} is no device of this machine: try cpu"
        raise argparse.ArgumentTypeError(message) from error


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return int(text)

    return number


_natural, _positive = _at_least(0), _at_least(1)


def _rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


def _seed(text: str) -> int:
    if not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is longer than the 64 bits of a seed")
    return int(text)
