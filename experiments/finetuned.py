"""The baseline of the Meta-LSTM: the record finetune_omniglot.

The same network learns to tell all training characters apart, in the ordinary way; then, for every
task, it gets a fresh head and is fine-tuned on the support set. Rate and number of steps are
chosen on validation characters, for each choice of what moves and what normalises.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from metautils import data
from metautils.adapt import SGD, Adapted
from metautils.data.bank import ClassBank, as_float
from metautils.evaluate import evaluate
from metautils.files import load_safely, save_atomically
from metautils.learners.meta_lstm import MetaLSTM
from metautils.nets import Conv4, classifier
from records import Experiment, told


class FineTuned(MetaLSTM):
    """Gradient descent from the pretrained weights, with the Meta-LSTM's statistics or frozen."""

    def __init__(
        self, net: nn.Module, lr: float, steps: int, only: tuple[str, ...], frozen: bool
    ) -> None:
        super().__init__(net, steps)
        self.lr, self.frozen, self.options = lr, frozen, {"first_order": True, "only": only}

    def optimizer(self) -> SGD:
        return SGD(self.lr)

    def train(self, mode: bool = True) -> FineTuned:
        super().train(mode)
        self.net.train(not self.frozen)
        return self

    def _predict(self, f: Adapted, support_x: Tensor, queries: Tensor) -> Tensor:
        predictions = super()._predict(f, support_x, queries)
        self.net.train(not self.frozen)
        return predictions


def finetune(
    out: Path,
    device: torch.device,
    *,
    source: str,
    seed: int,
    steps: int,
    batch: int,
    ways: int,
    shots: list[int],
    rates: list[float],
    after: list[int],
    tuned_on: int,
    tasks: int,
) -> dict[str, Any]:
    """A row for each number of shots, of what moves, and of what normalises."""
    parts = data.load(source, seed)
    train = parts.train.with_rotations().to(device)
    validation, test = parts.validation.to(device), parts.test.to(device)
    body = pretrained(train, seed, steps, batch, out / "body.pt")

    def accuracy(bank: ClassBank, k: int, lr: float, after: int, tasks: int, seed: int, **how: Any):
        learner = FineTuned(with_head(body, ways), lr, after, **how)
        return evaluate(learner.to(device), bank, [(ways, k)], 15, tasks, True, seed)[0]

    rows = []
    for k in shots:
        for only in ((), ("head",)):
            for frozen in (False, True):
                how = {"only": only, "frozen": frozen}
                scores = {
                    (lr, n): accuracy(validation, k, lr, n, tuned_on, seed + 1, **how).accuracy
                    for n in after
                    for lr in rates
                }
                lr, n = max(scores, key=scores.get)
                names = (
                    "head" if only else "all layers",
                    "pretraining" if frozen else "the support set",
                )
                score = told(accuracy(test, k, lr, n, tasks, seed, **how))
                rows.append([f"{ways}-way {k}-shot", *names, lr, n, score])
                print(*rows[-1], flush=True)
    heads = ["Task", "Fine-tuned", "Statistics of", "Rate", "Steps", "Accuracy"]
    what = f"Fine-tuning from classification of all training characters, {tasks} test tasks"
    table = {"title": "Fine-tuned", "heads": heads, "rows": rows}
    return {"what": what, "tables": [table], "steps": steps, "seed": seed}


def pretrained(train: ClassBank, seed: int, steps: int, batch: int, path: Path) -> nn.Module:
    """The network's body after ordinary classification of all training characters."""
    torch.manual_seed(seed)
    device = train.images.device
    norm = partial(nn.BatchNorm2d, momentum=0.05)
    net = classifier(Conv4(train.images.shape[1], width=32, norm=norm), 32, len(train)).to(device)
    if path.exists():
        net.load_state_dict(load_safely(path))
        return net.embed
    labels = torch.repeat_interleave(torch.arange(len(train)), train.counts).to(device)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    right = 0.0
    for _ in (bar := trange(steps, desc="pretrain")):
        rows = torch.randint(len(labels), (batch,)).to(device)
        logits = net(as_float(train.images[rows]).contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
        right += 0.01 * (100 * float((logits.argmax(-1) == labels[rows]).float().mean()) - right)
        bar.set_postfix({"accuracy": f"{right:.1f} %"}, refresh=False)
    save_atomically(net.state_dict(), path)
    return net.embed


def with_head(body: nn.Module, ways: int) -> nn.Module:
    """A copy of the body with a head of zeros."""
    net = classifier(copy.deepcopy(body), 32, ways)
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.95  # as the Meta-LSTM's, where statistics are not frozen
    return net


EXPERIMENTS = {
    "finetune_omniglot": Experiment(
        finetune,
        {
            "source": "omniglot",
            "seed": 0,
            "steps": 6000,
            "batch": 128,
            "ways": 5,
            "shots": [1, 5],
            "rates": [0.01, 0.03, 0.1, 0.3, 1.0],
            "after": [5, 20],
            "tuned_on": 60,
            "tasks": 600,
        },
        minutes=60,
        tiny={
            "source": "glyphs",
            "steps": 2,
            "batch": 8,
            "ways": 2,
            "shots": [1],
            "rates": [0.1],
            "after": [1],
            "tuned_on": 2,
            "tasks": 2,
        },
    )
}
