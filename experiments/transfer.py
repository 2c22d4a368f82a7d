"""Accuracy by number of images: the record transfer_dogs_vs_cats.

A ResNet-50 pretrained here on the base classes of CIFAR-FS, then a linear probe, fine-tuning with
and without L2-SP, and training from scratch. A fifth of the images of a row choose the epoch.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metautils import pretrained
from metautils.checkpoint import CHECKPOINT
from metautils.classifier import Classifier, test
from metautils.data import labelled
from metautils.data.labelled import Split
from metautils.evaluate import wilson95
from metautils.files import DataError, data_folder, read_json, write_json
from metautils.finetune import Recipe, stage_one, stage_two
from records import RUNS, Experiment

METHODS = ("from scratch", "linear probe", "fine-tuned", "fine-tuned, L2-SP")
Found = dict[str, dict[str, float]]  # method: images right, minutes


def transfer(
    out: Path,
    device: torch.device,
    *,
    folder: str,
    run: str,
    size: int,
    rows: list[dict[str, int]],
    lr: float,
    scratch_lr: float,
    pull: float,
) -> dict[str, Any]:
    """A row for each number of images and method; `rows` hold images, draws and epochs."""
    place = data_folder()
    if place is None:
        raise DataError(f"METAUTILS_DATA is not set: name the folder that holds {folder}/.")
    whole = labelled.load(place / folder, progress=True)
    found: dict[int, list[Found]] = {}
    for row in rows:
        images, epochs = row["images"], row["epochs"]
        recipe = Recipe(size=size, lr=lr, epochs=epochs, step=2 * epochs // 3, patience=epochs)
        found[images] = [
            accuracies(
                drawn(whole, images, seed),
                RUNS / run / CHECKPOINT,
                replace(recipe, seed=seed),
                (scratch_lr, pull),
                out / f"{images}-{seed}.json",
                device,
            )
            for seed in range(row["draws"])
        ]
    minutes = sum(x["minutes"] for each in found.values() for one in each for x in one.values())
    return {
        "what": f"Fine-tuning a ResNet-50 on {folder}, images of {size} pixels",
        "tables": [table(found, len(whole.test))],
        "minutes": round(minutes, 1),
    }


def drawn(whole: Split, images: int, seed: int) -> Split:
    """A split with so many training images a class, a fifth of them for validation."""
    generator = torch.Generator().manual_seed(seed)
    pool = labelled.Images(Path(whole.train.root))
    rows: list[list[int]] = [[], []]
    for label, name in enumerate(pool.classes):
        own = torch.tensor([k for k, y in enumerate(pool.targets) if y == label])
        if len(own) < images:
            raise DataError(f"Class {name} has {len(own)} images, fewer than {images}.")
        own = own[torch.randperm(len(own), generator=generator)][:images].tolist()
        held = max(1, images // 5)
        rows[0] += own[held:]
        rows[1] += own[:held]
    return whole._replace(train=pool.only(rows[0]), validation=pool.only(rows[1]))


def accuracies(
    split: Split,
    weights: Path,
    recipe: Recipe,
    others: tuple[float, float],
    kept: Path,
    device: torch.device,
) -> Found:
    """Right answers and minutes by method; `kept` holds those of an earlier run."""
    found = read_json(kept) if kept.exists() else {}
    scratch_lr, pull = others

    def note(name: str, net: Classifier, began: float) -> None:
        right = test(net, split.test, recipe.batch).right
        found[name] = {"right": right, "minutes": (time.perf_counter() - began) / 60}
        write_json(found, kept)
        print(f"  {name}: {100 * right / len(split.test):.1f} %", flush=True)

    def made(source: Path | None) -> Classifier:
        return Classifier(pretrained.body(source), split.train.classes, recipe.size).to(device)

    torch.manual_seed(recipe.seed)
    random, longer = made(None), 2 * recipe.epochs
    scratch = replace(recipe, lr=scratch_lr, epochs=longer, step=longer // 2, patience=longer)
    if "from scratch" not in found:
        began = time.perf_counter()
        stage_two(random, split, scratch)
        note("from scratch", random, began)
    for name, strength in {"fine-tuned": None, "fine-tuned, L2-SP": pull}.items():
        if name in found:
            continue
        began, net = time.perf_counter(), made(weights)
        stage_one(net, split, recipe)
        if strength is None:
            note("linear probe", net, began)
        stage_two(net, split, replace(recipe, pull=strength))
        note(name, net, began)
    return found


def table(found: dict[int, list[Found]], total: int) -> dict[str, Any]:
    """Mean accuracy over draws, with the interval for so many test images, and each draw's."""
    rows = []
    for images, runs in found.items():
        for name in METHODS:
            right = [run[name]["right"] for run in runs]
            mean = sum(right) / len(right)
            low, high = wilson95(round(mean), total)
            by_draw = ", ".join(f"{100 * r / total:.1f}" for r in right)
            accuracy, interval = f"{100 * mean / total:.1f}", f"{low:.1f} to {high:.1f}"
            rows.append([images, name, accuracy, interval, by_draw])
    heads = ["Images a class", "Method", "Accuracy", "95 % interval (test images)", "By draw"]
    return {"title": f"{total} test images", "heads": heads, "rows": rows}


EXPERIMENTS = {
    "transfer_dogs_vs_cats": Experiment(
        transfer,
        {
            "folder": "dogs-vs-cats",
            "run": "resnet50_cifar_fs",
            "size": 64,
            "rows": [
                {"images": 5, "draws": 3, "epochs": 40},
                {"images": 20, "draws": 3, "epochs": 40},
                {"images": 100, "draws": 2, "epochs": 24},
                {"images": 500, "draws": 1, "epochs": 12},
            ],
            "lr": 3e-3,
            "scratch_lr": 0.01,
            "pull": 0.1,
        },
        minutes=150,
        tiny={"rows": [{"images": 5, "draws": 1, "epochs": 2}], "size": 32},
        after=("resnet50_cifar_fs",),
    )
}
