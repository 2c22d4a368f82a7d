"""Accuracy by number of images: `python tools/transfer.py FOLDER WEIGHTS`.

Writes `results/transfer_FOLDER.json`. FOLDER has train/CLASS/IMAGE and test/CLASS/IMAGE. WEIGHTS
are a ResNet-50's, such as the checkpoint of `python -m metautils train resnet50 --data cifar_fs`.
A fifth of the images of a row choose the epoch. The same command goes on after an interruption,
row by row.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from metautils import finetune, pretrained, results
from metautils.data import labelled
from metautils.evaluate import wilson95
from metautils.finetune import Classifier, Recipe, stage_one, stage_two

DRAWS = {5: 3, 20: 3, 100: 2, 500: 1}  # images a class: how often they are drawn
EPOCHS = {5: 40, 20: 40, 100: 24, 500: 12}
PULL = 0.1
SCRATCH_RATE = 0.01


def drawn(whole, images, seed):
    """A split with so many training images a class, a fifth of them for validation."""
    generator = torch.Generator().manual_seed(seed)
    pool = labelled.Images(Path(whole.train.root))
    rows = [[], []]
    for label in range(len(pool.classes)):
        own = torch.tensor([k for k, y in enumerate(pool.targets) if y == label])
        if len(own) < images:
            sys.exit(f"Class {pool.classes[label]} has {len(own)} images, fewer than {images}.")
        own = own[torch.randperm(len(own), generator=generator)][:images].tolist()
        held = max(1, images // 5)
        rows[0] += own[held:]
        rows[1] += own[:held]
    return whole._replace(train=pool.only(rows[0]), validation=pool.only(rows[1]))


def accuracies(split, weights, recipe, kept):
    """Right answers and minutes by method; `kept` holds those of an earlier run."""
    found = json.loads(kept.read_text()) if kept.exists() else {}

    def note(name, net, began):
        right = finetune.test(net, split.test, recipe).right
        found[name] = {"right": right, "minutes": (time.perf_counter() - began) / 60}
        results.write_json(found, kept)
        print(f"  {name}: {100 * right / len(split.test):.1f} %", flush=True)

    torch.manual_seed(recipe.seed)
    random = Classifier(pretrained.body(None), split.train.classes, recipe.size)
    longer = 2 * recipe.epochs
    scratch = replace(recipe, lr=SCRATCH_RATE, epochs=longer, step=longer // 2, patience=longer)
    if "from scratch" not in found:
        began = time.perf_counter()
        stage_two(random, split, scratch)
        note("from scratch", random, began)
    for name, pull in {"fine-tuned": None, "fine-tuned, L2-SP": PULL}.items():
        if name in found:
            continue
        began = time.perf_counter()
        net = Classifier(pretrained.body(weights), split.train.classes, recipe.size)
        stage_one(net, split, recipe)
        if pull is None:
            note("linear probe", net, began)
        stage_two(net, split, replace(recipe, pull=pull))
        note(name, net, began)
    return found


def table(found, total):
    """Mean accuracy over draws, with the interval for so many test images, and each draw's."""
    rows = []
    for images, runs in found.items():
        for name in ("from scratch", "linear probe", "fine-tuned", "fine-tuned, L2-SP"):
            right = [run[name]["right"] for run in runs]
            mean = sum(right) / len(right)
            low, high = wilson95(round(mean), total)
            by_draw = ", ".join(f"{100 * r / total:.1f}" for r in right)
            rows.append(
                [images, name, f"{100 * mean / total:.1f}", f"{low:.1f} to {high:.1f}", by_draw]
            )
    heads = ["Images a class", "Method", "Accuracy", "95 % interval (test images)", "By draw"]
    return {"title": f"{total} test images", "heads": heads, "rows": rows}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, weights = Path(sys.argv[1]), Path(sys.argv[2])
    made = results.provenance(torch.device("cpu"))
    whole = labelled.load(folder, progress=True)
    found = {}
    for images, draws in DRAWS.items():
        epochs = EPOCHS[images]
        recipe = Recipe(size=64, lr=3e-3, epochs=epochs, step=2 * epochs // 3, patience=epochs)
        found[images] = []
        for seed in range(draws):
            print(f"{images} images a class, draw {seed}", flush=True)
            place = Path("runs") / "transfer" / folder.name / weights.parent.name
            kept = place / f"{images}-{seed}.json"
            split = drawn(whole, images, seed)
            found[images].append(accuracies(split, weights, replace(recipe, seed=seed), kept))
    runs = [run for each in found.values() for run in each]
    minutes = sum(each["minutes"] for run in runs for each in run.values())
    record = {
        "what": f"Fine-tuning a ResNet-50 on {folder.name}, images of 64 pixels",
        "tables": [table(found, len(whole.test))],
        "minutes": round(minutes, 1),
        **made,
    }
    path = results.folder() / f"transfer_{folder.name.replace('-', '_')}.json"
    results.write_json(record, path)
    print(*results.tables(path.stem).values())
