"""Train or test a method by name, from the data to the record."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

from metautils import classifier, data, methods, pretrained, results
from metautils.checkpoint import CHECKPOINT, load_weights
from metautils.classifier import MODEL
from metautils.data.bank import ClassBank, Parts
from metautils.errors import BadArgument
from metautils.evaluate import evaluate
from metautils.files import DataError, check_apart, check_folder, read_json, reading, written_at
from metautils.learners.base import WARM_UP, Learner, Method, Preset, Problem, takes_features
from metautils.learners.protonet import ProtoNet
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

QUERIES = 15
DRAWN = ("glyphs", "omniglot")  # a drawing turned by 90 degrees is a new character; a photo is not
RECORD = "record.json"
ON_BODY = 128  # pixels, height and width, of what a pretrained body sees
VALIDATED = 40  # images a class by which the weights of a body are chosen: each costs milliseconds


def train(
    name: str,
    source: str,
    out: Path,
    *,
    preset: str = "quick",
    split: str = "random",
    seed: int = 0,
    transductive: bool = True,
    device: str | torch.device = "cpu",
    body: str | None = None,
    validation_episodes: int = 100,
    **changed: float | None,
) -> dict[str, Any]:
    """Train a method, test it, and write `record.json`; the same call goes on if interrupted.

    Args:
        name: of the method, see `metautils.methods.find`.
        source: of the images, see `metautils.data.load`.
        out: folder for checkpoint and record.
        preset: "quick" or "full".
        split: of Omniglot.
        seed: of the split, the weights and the episodes.
        transductive: whether queries may be normalised by one another.
        device: where to train.
        body: what learns on, by its name in `metautils.pretrained.body`; None: a small network of
            the method's own, from scratch.
        validation_episodes: of each validation.
        changed: numbers of the preset to replace, such as `ways=10`; None leaves it.

    Returns:
        The record.

    Raises:
        DataError: if the data cannot be had, or `out` lies among them.
        ValueError: if they are too few for the method, or it has no such preset, or can train no
            body.
    """
    method, made_by = methods.find(name), results.provenance(torch.device(device))
    presets = method.presets if body is None else _on_body(name, method)
    if preset not in presets:
        raise BadArgument(f"{name} has no preset {preset!r}, only {', '.join(presets)}.")
    if source not in data.NAMES:
        check_apart(out, Path(source))
    parts = _parts(source, seed, split, body)
    for part, bank in zip(Parts._fields, parts, strict=True):
        if not len(bank):
            raise BadArgument(f"{source} leaves no class for {part}: choose a set with more.")
    told = _preset(presets[preset], changed, len(parts.train))
    rotations = method.rotations if source in DRAWN else "none"
    asked = method.tests(told.ways, told.shots)
    _settings(_rotated(parts.test, rotations), asked)  # told before the training, not after it
    banks = [_rotated(bank, rotations).to(device) for bank in parts[:2]]
    shape = banks[0].images.shape[1:]
    problem = Problem(shape, told.ways, len(banks[0]), transductive, told.shots)
    learner = _learner(method, problem, seed, body).to(device)
    if body is not None:
        banks[1] = banks[1].some(max(VALIDATED, told.shots + told.queries))
    vary = body is not None and source not in DRAWN
    episodes, choose = _samplers(method, told, banks, rotations == "episode", seed, vary)
    # The weights and the best ones, two numbers of Adam for each, all this beside the old file.
    check_folder(out, 8 * sum(x.nbytes for x in learner.state_dict().values()))
    before = written_at(out / CHECKPOINT)
    history = meta_train(
        learner, episodes, told.steps, told.lr, choose, validation_episodes,
        every=max(250, told.steps // 24) if body is None else max(1, told.steps // 5),
        out=out, clip=told.clip, warm_up=None if body is None else WARM_UP, body=body,
    )  # fmt: skip
    finished_before = before == written_at(out / CHECKPOINT)
    record = {
        "method": name,
        "learner": learner.extra_repr(),
        **({} if body is None else {"body": body}),
        "data": source,
        "tested_on": source,
        "split": split if source == "omniglot" else "classes",
        "classes": dict(zip(Parts._fields, map(len, parts), strict=True)),
        "digests": {part: bank.digest for part, bank in parts._asdict().items()}
        | {"known_classes": _known_classes(parts)},
        "rotations": rotations,
        "seed": seed,
        "steps": told.steps,
        "train": {
            **{key: getattr(told, key) for key in ("ways", "shots", "queries", "tasks", "lr")},
            "transductive": learner.transductive,
        },
        **_test(learner, parts.test, rotations, told.episodes, device, asked),
        "minutes": round(history.seconds / 60, 2),
        "trained_by": results.kept(out / RECORD, made_by) if finished_before else made_by,
        "preset": preset,
        **made_by,
    }
    results.write(record, out / RECORD)
    return record


def evaluate_again(
    run: Path,
    *,
    source: str | None = None,
    split: str | None = None,
    rotations: str = "none",
    transductive: bool = True,
    device: str | torch.device = "cpu",
) -> Path:
    """Score a trained checkpoint anew, on its own test classes or on another set.

    Args:
        run: folder of a training.
        source: another set of images.
        split: of Omniglot; without it the one that was trained on, or "random".
        rotations: of drawings: "none", all four as "classes", or one a class and "episode".
        transductive: as in `train`.
        device: where to test.

    Returns:
        Where the new record lies, in `run`. It says by what this test was made, and under
        "trained_by" by what the training was.

    Raises:
        DataError: if there is no such training, or the images cannot be had.
        CheckpointMismatch: if the images do not fit the network.
    """
    made_by, record = results.provenance(torch.device(device)), _record(run)
    method, trained = methods.find(record["method"]), record["train"]
    source, known = source or record["data"], record["split"]
    # Another split of the same set mixes the classes anew, so it is no other set.
    same = _place(source) == _place(record["data"])
    split = split or ("random" if known == "classes" else known)
    parts = _parts(source, record["seed"], split, record.get("body"))
    digests = record.get("digests", {})
    if same and _known_classes(parts) != digests.get("known_classes", _known_classes(parts)):
        raise DataError(
            f"{source} has other classes than in training, which may be among those of the test "
            "now: train anew, or test on another set."
        )
    helped = transductive and trained.get("transductive", True)
    learner = _trained(run, record, parts.test.images.shape[1:], helped).to(device)
    episodes = record["evaluations"][0]["episodes"]
    asked = method.tests(trained["ways"], trained["shots"])
    digest = parts.test.digest
    record |= {
        "trained_by": results.trained_by(record),
        "learner": learner.extra_repr(),
        "tested_on": f"{source}, {split} split" if source == "omniglot" else source,
        "classes": record["classes"] | {"test": len(parts.test)},
        "digests": digests | {"test": digest},
        **_test(learner, parts.test, rotations, episodes, device, asked),
        **made_by,
    }
    out = run / _file_name(source, digest, rotations, transductive)
    results.write(record, out)
    return out


def trained_body(run: Path) -> tuple[pretrained.Body, int]:
    """The body of a training on one, or of a fine-tuning, and the size of its images in pixels.

    Args:
        run: the folder of either, or the file of a classifier.

    Raises:
        DataError: if there is none, or it was trained without a body.
    """
    file = run if run.is_file() else run / MODEL
    if file.exists():
        net = classifier.load(file)
        return net.body, net.size
    record = _record(run)
    if record.get("body") is None:
        raise DataError(
            f"{run} holds a small network of its own that knows no photos: train with --body, or "
            "name the --out folder of a fine-tuning."
        )
    learner = _trained(run, record, torch.Size([3, ON_BODY, ON_BODY]), True)
    return learner.embed[-1], ON_BODY


def _trained(run: Path, record: dict[str, Any], image: torch.Size, transductive: bool) -> Learner:
    """The learner of a training with its weights, for images of a shape."""
    classes = record["classes"]["train"] * (4 if record["rotations"] == "classes" else 1)
    how = record["train"]
    problem = Problem(image, how["ways"], classes, transductive, how["shots"])
    method = methods.find(record["method"])
    learner = _learner(method, problem, record["seed"], record.get("body"))
    load_weights(learner, run / CHECKPOINT)
    return learner


def _place(source: str) -> str | Path:
    """A set by its name, a folder wherever one stands."""
    return source if source in data.NAMES else Path(source).resolve()


def _known_classes(parts: Parts) -> str:
    """A digest of the names of those that a training has seen."""
    names = repr((parts.train.names, parts.validation.names))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _file_name(source: str, digest: str, rotations: str, transductive: bool) -> str:
    """Another for each test, and the same for the same: folders of one name hold other images."""
    name = re.sub(r"[^\w.-]", "_", Path(source).resolve().name)[:40]  # as every system allows it
    how = "" if transductive else "-inductive"
    return f"record-{name}-{digest[:8]}-{rotations}{how}.json"


def _record(run: Path) -> dict[str, Any]:
    """The record of a training."""
    path = run / RECORD
    with reading(path):
        if not path.exists():
            raise DataError(f"{path} does not exist: train with --out {run} first.")
    record = read_json(path)
    if not isinstance(record, dict) or not set(results.FIELDS) <= record.keys():
        raise DataError(f"{path} is no record of a training: name the --out folder of one.")
    return record


def _preset(preset: Preset, changed: dict[str, float | None], classes: int) -> Preset:
    """The preset with the numbers asked for, and no more ways than there are classes."""
    preset = replace(preset, ways=min(preset.ways, classes))
    return replace(preset, **{name: x for name, x in changed.items() if x is not None})


def _learner(method: Method, problem: Problem, seed: int, body: str | None) -> Learner:
    torch.manual_seed(seed)
    if body is None:
        return method.make(problem)
    return method.on_body(problem, enlarging(pretrained.body(body), ON_BODY))


def enlarging(body: pretrained.Body, size: int) -> nn.Sequential:
    """The body behind a layer that gives all images its size, scaled as it knows them."""
    way = v2.InterpolationMode(body.interpolation)
    return nn.Sequential(v2.Resize((size, size), way, antialias=True), body)


def _on_body(name: str, method: Method) -> dict[str, Preset]:
    """The presets of a method that can train a body."""
    if method.on_body is None:
        able = [other for other, each in methods.known().items() if each.on_body]
        raise BadArgument(f"{name} trains no --body: only {', '.join(able)} do.")
    return method.body_presets


def _parts(source: str, seed: int, split: str, body: str | None) -> Parts:
    """The set; photos of a folder as large as a body sees them."""
    return data.load(source, seed, split, **({} if body is None else {"size": ON_BODY}))


def _samplers(
    method: Method, preset: Preset, banks: list[ClassBank], turned: bool, seed: int, vary: bool
) -> list[EpisodeSampler]:
    """Episodes to learn from, and those of validation classes to choose the weights on."""
    most = 20 if method.any_ways else preset.ways
    sizes = (preset.ways, preset.tasks), (min(most, len(banks[1])), min(preset.tasks, 10))
    return [
        EpisodeSampler(bank, ways, preset.shots, preset.queries, tasks, turned, seed, varied)
        for bank, (ways, tasks), varied in zip(banks, sizes, (vary, False), strict=True)
    ]


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
        raise BadArgument(
            f"Testing needs {ways} classes of {shots[0] + 1} images or more; there are "
            f"{len(bank)}, the smallest of {fewest}: give more classes or images."
        )
    return settings


def _test(
    learner: Learner,
    bank: ClassBank,
    rotations: str,
    episodes: int,
    device: str | torch.device,
    asked: tuple[tuple[int, int], ...],
) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of the learner, and of class means in raw pixels on the same episodes."""
    bank = _rotated(bank, rotations).to(device)
    settings = _settings(bank, asked)
    queries = min(QUERIES, int(bank.counts.min()) - max(k for _, k in settings))
    # Features cannot be turned, so a test that turns images embeds them anew in every task.
    once = takes_features(learner) and rotations != "episode"
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
