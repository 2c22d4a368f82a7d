"""From a folder to a classifier, by number of images: transfer_dogs_vs_cats, transfer_digits.

The default command's two stages on a part of the training images, a fifth of which chooses; the
test images are the same for all. One set is near to ImageNet, which holds dogs and cats, the other
is far from it.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metautils import data, pretrained
from metautils.classifier import Classifier, test
from metautils.data import labelled
from metautils.data.labelled import Split
from metautils.evaluate import wilson95
from metautils.files import DataError, data_folder, read_json, write_json
from metautils.finetune import Recipe, both_stages, stage_one
from records import Experiment


def transfer(
    out: Path,
    device: torch.device,
    *,
    folder: str,
    weights: str,
    recipe: dict[str, Any],
    rows: list[dict[str, int]],
) -> dict[str, Any]:
    """A row for each number of images; `rows` hold images and draws."""
    whole = labelled.load(_folder(folder, out), progress=True)
    found = {
        row["images"]: [
            answers(
                drawn(whole, row["images"], seed),
                weights,
                Recipe(**recipe, seed=seed),
                out / f"{row['images']}-{seed}",
                device,
            )
            for seed in range(row["draws"])
        ]
        for row in rows
    }
    seconds = sum(one["seconds"] for each in found.values() for one in each)
    return {
        "what": f"The default of fine-tuning on {folder}, with {weights}",
        "tables": [table(found)],
        "minutes": round(seconds / 60, 1),
        "pictures": len(whole.test),
    }


def _folder(name: str, out: Path) -> Path:
    """A set of this name as a folder of images."""
    if name == "digits":
        return _digits(out / name)
    place = data_folder()
    if place is None:
        raise DataError(f"METAUTILS_DATA is not set: name the folder that holds {name}/.")
    return place / name


def _digits(root: Path) -> Path:
    """scikit-learn's digits as files, the first 50 of each class for training."""
    bank = data.load("digits").test
    for k in range(len(bank)):
        for i, drawing in enumerate(bank[k]):
            place = root / ("train" if i < 50 else "test") / str(k)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing[0].numpy()).save(place / f"{i:03d}.png")
    return root


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


def answers(
    split: Split, weights: str, recipe: Recipe, out: Path, device: torch.device
) -> dict[str, Any]:
    """Which test images are right, by the probe and in the end; from an earlier run if there."""
    kept = out / "answers.json"
    if kept.exists():
        return read_json(kept)
    began = time.perf_counter()
    torch.manual_seed(recipe.seed)
    net = Classifier(pretrained.body(weights), split.train.classes, recipe.size).to(device)
    start = copy.deepcopy(net.state_dict())
    told = both_stages(net, split, recipe, out)
    right, seconds = _right(net, split), time.perf_counter() - began
    probe = right
    if any(row["chosen"] and row["share"] for row in told.get("choice", {}).get("rows", [])):
        net.load_state_dict(start)
        stage_one(net, split, recipe, out)
        probe = _right(net, split)
    found = {"probe": probe, "right": right, "seconds": seconds, "told": told}
    write_json(found, kept)
    print(
        f"  {out.name}: {100 * sum(probe) / len(right):.1f}, {100 * sum(right) / len(right):.1f} %"
    )
    return found


def _right(net: Classifier, split: Split) -> list[int]:
    tested = test(net, split.test)
    return (tested.chances.argmax(1) == tested.labels).int().tolist()


def table(found: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Accuracy of the probe and of what the command ends with, and their paired difference."""
    rows = []
    for images, draws in found.items():
        probe, right = (torch.tensor([d[x] for d in draws]).double() for x in ("probe", "right"))
        total = right.shape[1]
        trained = sum("left_out" not in d["told"] for d in draws)
        low, high = wilson95(round(float(right.sum(1).mean())), total)
        rows.append(
            [
                images,
                f"{100 * probe.mean():.1f}",
                f"{100 * right.mean():.1f}",
                f"{low:.1f} to {high:.1f}",
                ", ".join(f"{100 * each.mean():.1f}" for each in right),
                paired(right - probe),
                f"{trained} of {len(draws)}",
                f"{sum(d['seconds'] for d in draws) / len(draws) / 60:.1f}",
            ]
        )
    heads = ["Images a class", "Probe", "Default", "95 % interval", "By draw"]
    heads += ["Default above probe", "Draws with stage two", "Minutes"]
    return {"title": f"{total} test images", "heads": heads, "rows": rows}


def paired(difference: Tensor) -> str:
    """Mean and 95 % interval over test images of `(draws, images)`, in percent.

    The draws of an image are averaged first: they are not independent.
    """
    each = 100 * difference.mean(0)  # (images,)
    return f"{each.mean():+.1f} ± {1.96 * float(each.std()) / math.sqrt(len(each)):.1f}"


# Of each draw there is another seed; the classes are of one size, so none weighs more.
RECIPE = {k: x for k, x in asdict(Recipe()).items() if k not in ("seed", "class_weights")}
EXPERIMENTS = {
    "transfer_dogs_vs_cats": Experiment(
        transfer,
        {
            "folder": "dogs-vs-cats",
            "weights": pretrained.LITE0,
            "recipe": RECIPE,
            "rows": [
                {"images": 5, "draws": 5},
                {"images": 20, "draws": 5},
                {"images": 100, "draws": 3},
                {"images": 500, "draws": 1},
            ],
        },
        minutes=34,
        tiny={"rows": [{"images": 5, "draws": 1}], "recipe": RECIPE | {"size": 32, "epochs": 1}},
    ),
    "transfer_digits": Experiment(
        transfer,
        {
            "folder": "digits",
            "weights": pretrained.LITE0,
            "recipe": RECIPE | {"size": 64, "lr": 1e-3, "mirror": False, "epochs": 20},
            "rows": [{"images": 20, "draws": 3}, {"images": 50, "draws": 1}],
        },
        minutes=10,
        tiny={"rows": [{"images": 5, "draws": 1}], "recipe": RECIPE | {"size": 32, "epochs": 1}},
    ),
}
