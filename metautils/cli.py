"""`python -m metautils`: train, evaluate and inspect from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metautils import data, finetune, pretrained, results
from metautils.data.bank import ClassBank, Parts
from metautils.evaluate import evaluate
from metautils.files import DataError
from metautils.finetune import Recipe
from metautils.learners.anil import ANIL
from metautils.learners.base import Learner, task_loss
from metautils.learners.baseline import (
    Baseline,
    CosineHead,
    Fit,
    cosine_head,
    linear_head,
    nearest_centroid,
)
from metautils.learners.maml import FOMAML, MAML
from metautils.learners.matching_net import MatchingNet
from metautils.learners.meta_lstm import MetaLSTM
from metautils.learners.meta_sgd import MetaSGD
from metautils.learners.protonet import ProtoNet
from metautils.learners.relation_net import RelationModule, RelationNet
from metautils.learners.reptile import Reptile
from metautils.nets import BatchNorm, Conv4, classifier
from metautils.pretrained import Prepared
from metautils.sampling import EpisodeSampler
from metautils.train import CHECKPOINT, CheckpointMismatch, load_weights, meta_train

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
QUERIES = 15
DRAWN = ("glyphs", "omniglot")  # a drawing turned by 90 degrees is a new character; a photo is not


Make = Callable[[torch.Size, int, bool, int], Learner]


@dataclass(frozen=True)
class Preset:
    """Length and episodes of training, number of test episodes a setting."""

    steps: int
    ways: int
    shots: int
    queries: int
    episodes: int
    tasks: int = 1
    lr: float = 1e-3


@dataclass(frozen=True)
class Method:
    """How to make a learner for images of some channels, and how to train it.

    Attributes:
        make: from the shape of an image, ways, whether queries may see one another, and the number
            of training classes.
        presets: by name.
        rotations: of drawings in training: all four as classes, or one for a class and task.
        any_ways: tested with other ways than it was trained with.
        any_shots: tested with other shots than it was trained with.
    """

    make: Make
    presets: dict[str, Preset]
    rotations: str = "episode"
    any_ways: bool = False
    any_shots: bool = False

    def settings(self, ways: int, shots: int) -> tuple[tuple[int, int], ...]:
        """What a learner is tested in that was trained with these ways and shots."""
        if not self.any_ways:
            return ((ways, shots),)
        return SETTINGS if self.any_shots else ((5, shots), (20, shots))


def _adapting(learner: type[MAML], **options: Any) -> Make:
    """A learner that adapts, on the strided network of Finn et al. 2017."""

    def make(image: torch.Size, ways: int, transductive: bool, _: int) -> Learner:
        net = classifier(Conv4(image[0], strided=True, norm=BatchNorm), 64, ways)
        return learner(net, **options, transductive=transductive)

    return make


def _meta_lstm(image: torch.Size, ways: int, *_: Any) -> Learner:
    """On the network of Ravi and Larochelle 2017, of 32 filters; never transductive."""
    norm = partial(nn.BatchNorm2d, momentum=0.95)
    return MetaLSTM(classifier(Conv4(image[0], width=32, norm=norm), 32, ways))


def _relation(image: torch.Size, *_: Any) -> Learner:
    """On the maps of Sung et al. 2018, with cross-entropy, which learns faster than squares."""
    relate = RelationModule(size=image[-1] // 4)
    return RelationNet(Conv4(image[0], pools=2), relate, task_loss)


def _matching(image: torch.Size, *_: Any) -> Learner:
    """With a factor of 10 before the softmax, which Vinyals et al. 2016 do without."""
    return MatchingNet(Conv4(image[0]), scale=10.0)


def _classifying(fit: Fit, head: Callable[[int, int], nn.Module] = nn.Linear) -> Make:
    """A Conv-4 that learns to tell the training classes apart, as Chen et al. 2019 pretrain."""

    def make(image: torch.Size, ways: int, transductive: bool, classes: int) -> Learner:
        body = Conv4(image[0])
        with torch.no_grad():
            features = body.eval()(torch.zeros(1, *image)).shape[1]
        return Baseline(body.train(), head(features, classes), fit)

    return make


def _resnet50(image: torch.Size, ways: int, transductive: bool, classes: int) -> Learner:
    """The same with a ResNet-50 from scratch, on images of 64 pixels or more."""
    body = Prepared(pretrained.body(None), max(64, image[-1]))
    return Baseline(body, nn.Linear(pretrained.FEATURES, classes), nearest_centroid)


# 60-way 1-shot with 5 queries a class is how Snell et al. 2017 train on Omniglot.
COMPARING = {"quick": Preset(200, 20, 1, 5, 600), "full": Preset(3000, 60, 1, 5, 1000)}
RELATION = {"quick": Preset(200, 20, 1, 5, 600), "full": Preset(10000, 20, 1, 5, 1000)}
ADAPTING = {
    "quick": Preset(300, 5, 1, 5, 600, tasks=8, lr=3e-3),
    "full": Preset(20000, 5, 1, 5, 1000, tasks=8, lr=3e-3),
}
CLASSIFYING = {"quick": Preset(200, 64, 1, 1, 600), "full": Preset(1250, 64, 1, 5, 1000)}
RESNET = {"quick": Preset(200, 64, 1, 1, 600), "full": Preset(1800, 64, 1, 1, 1000)}
META_LSTM = {"quick": Preset(300, 5, 1, 5, 600), "full": Preset(12000, 5, 1, 5, 1000, lr=2e-3)}
METHODS = {
    "protonet": Method(lambda s, *_: ProtoNet(Conv4(s[0])), COMPARING, "classes", True, True),
    "matching": Method(_matching, COMPARING, "classes", True, True),
    "relation": Method(_relation, RELATION, "classes", True),
    "centroid": Method(_classifying(nearest_centroid), CLASSIFYING, "classes", True, True),
    "baseline": Method(_classifying(linear_head), CLASSIFYING, "classes", True, True),
    "baseline_pp": Method(
        _classifying(cosine_head, CosineHead), CLASSIFYING, "classes", True, True
    ),
    "resnet50": Method(_resnet50, RESNET, "classes", True, True),
    "maml": Method(_adapting(MAML, test_steps=3), ADAPTING),
    "fomaml": Method(_adapting(FOMAML, test_steps=3), ADAPTING),
    "anil": Method(_adapting(ANIL, test_steps=3), ADAPTING),
    "meta_sgd": Method(_adapting(MetaSGD), ADAPTING),
    "meta_lstm": Method(_meta_lstm, META_LSTM),
    "reptile": Method(_adapting(Reptile, test_steps=50), ADAPTING),
}


def train(args: argparse.Namespace) -> None:
    """Train, test and write `record.json`; the same command goes on after an interruption."""
    method, made_by = METHODS[args.method], results.provenance(args.device)
    parts = data.load(args.data, args.seed, args.split)
    for name, part in zip(Parts._fields, parts, strict=True):
        if not len(part):
            raise ValueError(f"{args.data} leaves no class for {name}: choose a set with more.")
    preset = _preset(method.presets[args.preset], args, len(parts.train))
    rotations = method.rotations if args.data in DRAWN else "none"
    asked = method.settings(preset.ways, preset.shots)
    _settings(_rotated(parts.test, rotations), asked)  # told before the training, not after it
    ways, turned = preset.ways, rotations == "episode"
    source = _rotated(parts.train, rotations).to(args.device)
    learner = _learner(args.method, source, ways, args.transductive, len(source), args.seed)
    learner = learner.to(args.device)
    episodes = EpisodeSampler(
        source, ways, preset.shots, preset.queries, preset.tasks, turned, args.seed
    )
    validation = _rotated(parts.validation, rotations).to(args.device)
    n, tasks = min(20 if method.any_ways else ways, len(validation)), min(preset.tasks, 10)
    choose = EpisodeSampler(validation, n, preset.shots, preset.queries, tasks, turned, args.seed)
    history = meta_train(
        learner,
        episodes,
        preset.steps,
        preset.lr,
        choose,
        every=max(250, preset.steps // 24),
        out=args.out,
    )
    record = {
        "method": args.method,
        "learner": learner.extra_repr(),
        "data": args.data,
        "tested_on": args.data,
        "split": args.split if args.data == "omniglot" else "classes",
        "classes": dict(zip(Parts._fields, map(len, parts), strict=True)),
        "rotations": rotations,
        "seed": args.seed,
        "steps": preset.steps,
        "train": {"ways": ways, "shots": preset.shots, "queries": preset.queries,
                  "tasks": preset.tasks, "transductive": learner.transductive},
        **_test(learner, parts.test, rotations, preset.episodes, args.device, asked),
        "minutes": round(history.seconds / 60, 2),
        "preset": args.preset,
        **made_by,
    }  # fmt: skip
    results.write(record, args.out / "record.json")
    print(f"{record['minutes']} minutes of training; record in {args.out / 'record.json'}")


def evaluate_again(args: argparse.Namespace) -> None:
    """Score a trained checkpoint anew, on its own test classes or on another set."""
    path = args.run / "record.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: train with --out {args.run} first.")
    record = json.loads(path.read_text())
    method, trained = METHODS[record["method"]], record["train"]
    name, split = args.data or record["data"], args.split or record["split"]
    parts = data.load(name, record["seed"], split if name == "omniglot" else "random")
    transductive = args.transductive and trained.get("transductive", True)
    classes = record["classes"]["train"] * (4 if record["rotations"] == "classes" else 1)
    learner = _learner(
        record["method"], parts.test, trained["ways"], transductive, classes, record["seed"]
    ).to(args.device)
    load_weights(learner, args.run / CHECKPOINT)
    episodes = method.presets[record["preset"]].episodes
    asked = method.settings(trained["ways"], trained["shots"])
    record |= {
        "learner": learner.extra_repr(),
        "tested_on": f"{name}, {split} split" if name == "omniglot" else name,
        "classes": record["classes"] | {"test": len(parts.test)},
        **_test(learner, parts.test, args.rotations, episodes, args.device, asked),
    }
    how = "" if args.transductive else "-inductive"
    out = args.run / f"record-{Path(name).name}-{args.rotations}{how}.json"
    results.write(record, out)
    print(f"Record in {out}")


def finetune_folder(args: argparse.Namespace) -> None:
    """Fine-tune a ResNet-50 on a folder of images; the same command goes on if interrupted."""
    asked = {name: getattr(args, name) for name in ("size", "epochs", "batch", "pull", "seed")}
    recipe = Recipe(**{k: v for k, v in asked.items() if v is not None}, mirror=args.mirror)
    weights = None if args.weights == "none" else args.weights
    if weights is None and args.pull is not None:
        raise ValueError("--l2-sp pulls to pretrained weights, so it needs other --weights.")
    if args.pull is not None and args.pull < 0:
        raise ValueError(f"--l2-sp is {args.pull}: a strength is 0 or more.")
    tested = finetune.run(args.data, args.out, recipe, weights, args.device, args.workers)
    print(tested)
    print(f"Classifier in {args.out / finetune.MODEL}, record in {args.out / 'record.json'}")


def classify(args: argparse.Namespace) -> None:
    """Say what is on images, with the classifier of a fine-tuning."""
    net = finetune.load(args.run / finetune.MODEL)
    for image in args.images:
        ranked = list(net.classify(image).items())[:3]
        print(f"{image}:", ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in ranked))


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


def _preset(preset: Preset, args: argparse.Namespace, classes: int) -> Preset:
    """The preset with the ways and shots asked for, and no more ways than there are classes."""
    ways, shots = args.ways or min(preset.ways, classes), args.shots or preset.shots
    return replace(preset, ways=ways, shots=shots)


def _learner(
    method: str, bank: ClassBank, ways: int, transductive: bool, classes: int, seed: int
) -> Learner:
    torch.manual_seed(seed)
    return METHODS[method].make(bank.images.shape[1:], ways, transductive, classes)


def _rotated(bank: ClassBank, rotations: str) -> ClassBank:
    return bank.with_rotations() if rotations == "classes" else bank


def _settings(bank: ClassBank, asked: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """What was asked for, as far as the bank can fill it; all its classes where there are few."""
    fewest, shots = int(bank.counts.min()), sorted({k for _, k in asked})
    known = [(n, k) for n, k in asked if n <= len(bank)]
    if len(asked) > 1:
        known = known or [(len(bank), k) for k in shots]
    settings = [(n, k) for n, k in known if k < fewest]
    if len(bank) < 2 or not settings:
        ways = asked[0][0] if len(asked) == 1 else 2
        raise ValueError(
            f"Testing needs {ways} classes of {shots[0] + 1} images or more; there are "
            f"{len(bank)}, the smallest of {fewest}: give more classes or images."
        )
    return settings


def _test(
    learner: Learner,
    bank: ClassBank,
    rotations: str,
    episodes: int,
    device: torch.device,
    asked: tuple[tuple[int, int], ...],
) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of the learner, and of class means in raw pixels on the same episodes."""
    bank = _rotated(bank, rotations).to(device)
    settings = _settings(bank, asked)
    queries = min(QUERIES, int(bank.counts.min()) - max(k for _, k in settings))
    # Features cannot be turned, so a test that turns images embeds them anew in every task.
    once = isinstance(learner, Baseline) and rotations != "episode"
    trained = learner.on_features(bank) if once else (learner, bank)
    rows = {}
    for name, (each, images) in {
        "evaluations": trained,
        "baseline": (ProtoNet(nn.Flatten()), bank),
    }.items():
        print("trained" if name == "evaluations" else "class means in pixels, for comparison")
        scores = evaluate(
            each, images, settings, queries, episodes, rotations == "episode", progress=True
        )
        print(*(f"  {score}" for score in scores), sep="\n")
        rows[name] = results.evaluation_rows(scores, rotations)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metautils", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("train", help=train.__doc__, description=train.__doc__)
    one.add_argument("method", choices=METHODS)
    one.add_argument(
        "--data", default="glyphs", help="glyphs, omniglot, cifar_fs or a folder of images"
    )
    one.add_argument("--split", default="random", choices=["random", "background"])
    one.add_argument("--preset", default="quick", choices=["quick", "full"])
    one.add_argument("--out", type=Path, required=True, help="folder for checkpoint and record")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--ways", type=_positive, help="of the training episodes")
    one.add_argument("--shots", type=_positive, help="of the training episodes")
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
    three.add_argument("name", help="glyphs, omniglot, digits, cifar_fs or a folder")
    three.add_argument("--split", default="random", choices=["random", "background"])
    three.set_defaults(run_command=describe)

    tune = commands.add_parser(
        "finetune", help=finetune_folder.__doc__, description=finetune_folder.__doc__
    )
    tune.add_argument("--data", type=Path, required=True, help="folder, a subfolder for each class")
    tune.add_argument("--out", type=Path, required=True, help="folder for classifier and record")
    tune.add_argument(
        "--weights", default="imagenet", help="imagenet (default), none, or a file of weights"
    )
    tune.add_argument("--size", type=_positive, help="of the images in pixels, 224 by default")
    tune.add_argument("--batch", type=_positive, help="images in a step")
    tune.add_argument("--epochs", type=_positive, help="of all layers, at most")
    tune.add_argument("--l2-sp", dest="pull", type=float, help="strength of a pull to the start")
    tune.add_argument(
        "--no-mirror", dest="mirror", action="store_false", help="for letters, digits, signs"
    )
    tune.add_argument("--workers", type=int, default=0, help="processes that read images")
    tune.add_argument("--seed", type=int, default=0)
    tune.set_defaults(run_command=finetune_folder)

    tell = commands.add_parser("classify", help=classify.__doc__, description=classify.__doc__)
    tell.add_argument("run", type=Path, help="the --out folder of a fine-tuning")
    tell.add_argument("images", type=Path, nargs="+")
    tell.set_defaults(run_command=classify)

    four = commands.add_parser("results", help="print all records as Markdown")
    four.set_defaults(run_command=lambda args: print(results.page()))

    where = "cuda" if torch.cuda.is_available() else "cpu"
    for command in (one, two, tune):
        command.add_argument("--device", type=_device, default=where)
    for command in (one, two):
        command.add_argument(
            "--inductive",
            dest="transductive",
            action="store_false",
            help="normalise queries by the support set, not by one another",
        )
    return parser


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        message = f"{name!r} is no device of this machine: try cpu"
        raise argparse.ArgumentTypeError(message) from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number
