"""The baseline of the Meta-LSTM: `python tools/finetune.py OUT` -> results/finetune_omniglot.json.

The same network learns to tell all training characters apart, in the ordinary way; then, for every
task, it gets a fresh head and is fine-tuned on the support set. Rate and number of
steps are chosen on validation characters, for each choice of what moves and what normalises.
"""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import trange

from metautils import data, results
from metautils.adapt import SGD
from metautils.data.bank import as_float
from metautils.evaluate import evaluate
from metautils.files import save_atomically
from metautils.learners.meta_lstm import MetaLSTM
from metautils.nets import Conv4, classifier

SEED, STEPS, BATCH, WAYS = 0, 6000, 128, 5
RATES, AFTER, TASKS = (0.01, 0.03, 0.1, 0.3, 1.0), (5, 20), 600


class FineTuned(MetaLSTM):
    """Gradient descent from the pretrained weights, with the Meta-LSTM's statistics or frozen."""

    def __init__(self, net, lr, steps, only, frozen):
        super().__init__(net, steps)
        self.lr, self.frozen, self.options = lr, frozen, {"first_order": True, "only": only}

    def optimizer(self):
        return SGD(self.lr)

    def train(self, mode=True):
        super().train(mode)
        self.net.train(not self.frozen)
        return self

    def _predict(self, f, support_x, queries):
        predictions = super()._predict(f, support_x, queries)
        self.net.train(not self.frozen)
        return predictions


def pretrained(train, out):
    """The network's body after ordinary classification of all training characters."""
    torch.manual_seed(SEED)
    net = classifier(
        Conv4(1, width=32, norm=partial(nn.BatchNorm2d, momentum=0.05)), 32, len(train)
    )
    path = out / "body.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.embed
    labels = torch.repeat_interleave(torch.arange(len(train)), train.counts)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    right = 0.0
    for _ in (bar := trange(STEPS, desc="pretrain")):
        rows = torch.randint(len(labels), (BATCH,))
        logits = net(as_float(train.images[rows]).contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
        right += 0.01 * (100 * float((logits.argmax(-1) == labels[rows]).float().mean()) - right)
        bar.set_postfix({"accuracy": f"{right:.1f} %"}, refresh=False)
    save_atomically(net.state_dict(), path)
    return net.embed


def tuned(body, bank, shots, only, frozen):
    """Rate and steps that did best on 60 validation episodes, from a fresh head of zeros."""
    scores = {}
    for steps in AFTER:
        for lr in RATES:
            learner = FineTuned(with_head(body), lr, steps, only, frozen)
            score = evaluate(learner, bank, [(WAYS, shots)], 15, 60, True, SEED + 1)[0]
            scores[lr, steps] = score.accuracy
    return max(scores, key=scores.get)


def with_head(body):
    net = classifier(copy.deepcopy(body), 32, WAYS)
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.95  # as the Meta-LSTM's, where statistics are not frozen
    return net


torch.set_num_threads(1)
out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
made = results.provenance(torch.device("cpu"))
parts = data.load("omniglot", SEED, "random")
body = pretrained(parts.train.with_rotations(), out)
rows = []
for shots in (1, 5):
    for only in ((), ("head",)):
        for frozen in (False, True):
            lr, steps = tuned(body, parts.validation, shots, only, frozen)
            learner = FineTuned(with_head(body), lr, steps, only, frozen)
            score = evaluate(learner, parts.test, [(WAYS, shots)], 15, TASKS, True, SEED)[0]
            told = "head" if only else "all layers", "pretraining" if frozen else "the support set"
            accuracy = f"{score.accuracy:.2f} ± {score.ci95:.2f}"
            rows.append([f"{WAYS}-way {shots}-shot", *told, lr, steps, accuracy])
            print(*rows[-1], flush=True)
heads = ["Task", "Fine-tuned", "Statistics of", "Rate", "Steps", "Accuracy"]
record = {
    "what": "Fine-tuning from classification of all training characters, 600 test tasks",
    "tables": [{"title": "Fine-tuned", "heads": heads, "rows": rows}],
    "steps": STEPS, "seed": SEED, **made,
}  # fmt: skip
(results.folder() / "finetune_omniglot.json").write_text(json.dumps(record, indent=1) + "\n")
print(results.tables("finetune_omniglot")["Fine-tuned"])
