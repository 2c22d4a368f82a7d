"""Which recipe of stage two holds: the record finetune_recipes.

Optimiser, rates and batch statistics are varied one by one, on the digits of scikit-learn, which
are far from ImageNet. Every recipe begins at the same probe, sees the same images in the same order
and with the same crops, and is tested as it ends: nothing is chosen, so that a bad end is seen.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from metautils import finetune, pretrained
from metautils.classifier import Classifier, batches, features, test, to_train
from metautils.data import labelled
from metautils.data.labelled import Split
from metautils.files import read_json, write_json
from metautils.finetune import CLIP, Recipe, stage_one
from metautils.fit import fit
from records import Experiment
from transfer import _digits, drawn, paired

Row = tuple[str, str]  # a recipe and its batch statistics, as the table names them
START = ("the probe, where all begin", "fixed")
MORE = ("the probe of the validation images too", "fixed")


def recipes(
    out: Path,
    device: torch.device,
    *,
    weights: str,
    size: int,
    batch: int,
    epochs: int,
    images: list[int],
    draws: int,
    recipes: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """A row for each recipe and each kind of batch statistics, columns for each number."""
    whole = labelled.load(_digits(out / "digits"), progress=True)
    net = Classifier(pretrained.body(weights), whole.train.classes, size).to(device)
    seen, start = features(net, whole.test, batch), copy.deepcopy(net.state_dict())
    found: dict[int, list[dict[Row, list[int]]]] = {count: [] for count in images}
    for count in images:
        for seed in range(draws):
            net.load_state_dict(start)
            split, place = drawn(whole, count, seed), out / f"{count}-{seed}"
            recipe = Recipe(size, batch, epochs, mirror=False, seed=seed)
            found[count].append(answers(net, split, recipe, recipes, seen, place))
    return {
        "what": f"Stage two on digits at {size} pixels with {weights}, by recipe: {epochs} epochs "
        "from the probe, and no choosing between the two",
        "tables": [table(found)],
        "pictures": len(whole.test),
    }


def answers(
    net: Classifier,
    split: Split,
    recipe: Recipe,
    recipes: dict[str, dict[str, Any]],
    seen: TensorDataset,
    out: Path,
) -> dict[Row, list[int]]:
    """Which test images each recipe has right, and the probe; from an earlier run if there.

    `seen` is what the pretrained body makes of the test images, so that a probe is quickly tested.
    """
    start, probe = copy.deepcopy(net.state_dict()), stage_one(net, split, recipe, out)
    found = {START: _right(probe.rehearsed, seen), MORE: _right(probe.head, seen)}
    for name, how in recipes.items():
        for statistics in ("fixed", "moving"):
            kept = out / f"{name}, {statistics}" / "answers.json"
            if not kept.exists():
                net.load_state_dict(start)
                net.head.load_state_dict(probe.rehearsed)
                write_json(trained(net, split, recipe, statistics == "fixed", how), kept)
            right = read_json(kept)["right"]
            found[name, statistics] = right
            print(f"  {out.name}, {name}, {statistics}: {100 * sum(right) / len(right):.1f} %")
    return found


def _right(head: dict[str, Tensor], seen: TensorDataset) -> list[int]:
    x, y = seen.tensors  # (n, features), (n,)
    return (linear(x, *head.values()).argmax(1) == y).int().tolist()


def trained(
    net: Classifier, split: Split, recipe: Recipe, fixed: bool, how: dict[str, Any]
) -> dict[str, list]:
    """Which test images are right after this training, and the loss of each epoch before."""
    torch.manual_seed(recipe.seed)  # the order and the crops are the same for every recipe
    optimizer, change = optimizer_of(net, **how), to_train(net, recipe.mirror)
    images = batches(split.train, recipe.batch, change, True)
    # Nothing is chosen, so a single image does for the validation that `fit` insists on.
    one = batches(split.validation.only([0]), 1, change)
    schedule = LambdaLR(optimizer, finetune._share_of_rate(recipe.epochs * len(images)))
    net.body.fixed = fixed
    rows = fit(net, images, one, optimizer, schedule, recipe.epochs, clip=CLIP, choose=False)
    net.body.fixed = True
    tested = test(net, split.test, recipe.batch)
    right = (tested.chances.argmax(1) == tested.labels).int().tolist()
    return {"right": right, "loss": [row.train_loss for row in rows]}


def optimizer_of(
    net: Classifier, optimizer: str, lr: float, head: float, halve: float, decay: float
) -> Optimizer:
    """SGD with momentum or AdamW, with a rate for the head and one for each stage of the body.

    The last stage has `lr`, and each before it `halve` times that of the next.
    """
    groups = [(list(net.head.parameters()), head)]
    groups += [(own, lr * halve**k) for k, own in enumerate(reversed(net.body.by_stage()))]
    told = [
        {"params": own, "lr": rate, "weight_decay": decay if wide else 0.0}
        for params, rate in groups
        for wide in (True, False)  # norms and biases are not held towards 0, as in `finetune`
        if (own := [w for w in params if (w.dim() > 1) == wide])
    ]
    return SGD(told, momentum=0.9) if optimizer == "SGD" else AdamW(told)


def table(found: dict[int, list[dict[Row, list[int]]]]) -> dict[str, Any]:
    """Accuracy by number of images and row, and the paired difference to where all begin."""
    draws = next(iter(found.values()))
    rows = {row: list(row) for row in draws[0]}
    for each in found.values():
        right = {row: torch.tensor([draw[row] for draw in each]).double() for row in rows}
        for row, x in right.items():  # (draws, test images)
            above = "" if row == START else paired(x - right[START])
            rows[row] += [f"{100 * x.mean():.1f}", above]
    heads = ["Recipe", "Batch statistics"]
    heads += [x for count in found for x in (f"{count} images a class", "Above the probe")]
    title = f"{len(draws[0][START])} test images, mean of {len(draws)} draw(s)"
    return {"title": title, "heads": heads, "rows": list(rows.values())}


OURS = {"optimizer": "AdamW", "lr": 1e-4, "head": 1e-4, "halve": 0.5, "decay": 0.01}
PLAIN = {"optimizer": "SGD", "lr": 1e-3, "head": 1e-3, "halve": 1.0, "decay": 1e-4}
EXPERIMENTS = {
    "finetune_recipes": Experiment(
        recipes,
        {
            "weights": pretrained.LITE0,
            "size": 64,
            "batch": 32,
            "epochs": 20,
            "images": [5, 20, 50],
            "draws": 3,
            "recipes": {
                "SGD 0.001, head 0.01": PLAIN | {"head": 1e-2},
                "SGD 0.001": PLAIN,
                "AdamW 0.0001 by stages": OURS,
                "AdamW 0.001 by stages": OURS | {"lr": 1e-3, "head": 1e-3},
            },
        },
        minutes=40,
        tiny={
            "size": 32,
            "epochs": 1,
            "images": [5],
            "draws": 1,
            "recipes": {"SGD 0.001": PLAIN, "AdamW 0.0001 by stages": OURS},
        },
    )
}
