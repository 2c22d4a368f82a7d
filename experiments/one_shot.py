"""Beside people: the record one_shot_omniglot.

Lake et al. (2015) let people and machines do 20 runs of 20 questions each: one drawing of each of
20 characters of an alphabet, and which of them is drawn here? All drawings are of the evaluation
alphabets. So the learner is trained on the background alphabets only, as by

    python -m metautils train protonet --data omniglot --split background --preset full

and in ways that differ from this in what their row says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metautils import data
from metautils.data import omniglot
from metautils.data.bank import ClassBank, as_float
from metautils.data.omniglot import OneShotRun
from metautils.evaluate import interval95
from metautils.learners.protonet import ProtoNet
from metautils.nets import Conv4
from metautils.precision import fast_autocast
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment


class OfOneAlphabet(EpisodeSampler):
    """Tasks whose classes are characters of one alphabet, each turned in any way."""

    def __init__(self, bank: ClassBank, ways: int, *rest: int, seed: int) -> None:
        super().__init__(bank, ways, *rest, seed=seed)
        groups: dict[str, list[int]] = {}
        for k, name in enumerate(bank.names):  # set/alphabet/character, with /rotNNN behind
            groups.setdefault(name.partition("/rot")[0].rpartition("/")[0], []).append(k)
        self.groups = [torch.tensor(g, device="cpu") for g in groups.values() if len(g) >= ways]

    def indices(self) -> tuple[Tensor, Tensor]:
        """As of any sampler, `(tasks, ways)` and `(tasks, ways, shots + queries)`."""
        many = (self.tasks,)
        picked = torch.randint(len(self.groups), many, generator=self.generator, device="cpu")
        classes = torch.stack([
            group[self._uniform(len(group)).topk(self.ways).indices]
            for group in (self.groups[k] for k in picked)
        ])  # fmt: skip
        order = self._uniform(self.tasks, self.ways, int(self.bank.counts[0]))
        images = order.topk(self.shots + self.queries).indices
        return classes, self.bank.starts[classes][..., None] + images


def trained(
    out: Path, device: torch.device, source: str, arm: dict[str, Any], seed: int
) -> ProtoNet:
    """The learner of an arm, with the weights that did best on the validation alphabets."""
    parts = data.load(source, seed, "background")
    banks = [b.with_rotations() if arm["rotations"] else b for b in parts[:2]]
    banks = [bank.to(device) for bank in banks]
    kind = OfOneAlphabet if arm["one_alphabet"] else EpisodeSampler
    steps = arm["steps"]
    torch.manual_seed(seed)
    learner = ProtoNet(Conv4()).to(device)
    learn = kind(banks[0], arm["ways"], 1, 5, seed=seed)
    choose = EpisodeSampler(banks[1], min(20, len(banks[1])), 1, 5, seed=seed)
    meta_train(
        learner, learn, steps, 1e-3, choose, min(100, steps),
        every=max(1, steps // 12), out=out / f"{slug(arm)}-{seed}",
    )  # fmt: skip
    return learner.eval()


def slug(arm: dict[str, Any]) -> str:
    """A name for its folder."""
    return "-".join(f"{key}-{value}".lower() for key, value in arm.items())


@torch.no_grad()
def errors(learner: ProtoNet, runs: Sequence[OneShotRun]) -> Tensor:
    """Percent answered wrongly in each run, `(runs,)`."""
    found = []
    for run in runs:
        x, q = as_float(run.support_x)[None], as_float(run.query_x)[None]
        y = torch.arange(x.shape[1], device=x.device)[None]
        with fast_autocast(x.device):
            logits = learner(x, y, q)[0]  # (queries, classes)
        found.append(100 * (logits.argmax(-1) != run.query_y).float().mean())
    return torch.stack(found).cpu()


def beside_people(
    out: Path, device: torch.device, *, source: str, arms: dict[str, Any], seeds: list[int]
) -> dict[str, Any]:
    """A row of errors for each way of training."""
    runs = [OneShotRun(*(x.to(device) for x in run)) for run in omniglot.one_shot_runs()]
    rows, first = [], None
    for name, arm in arms.items():
        each = torch.stack([
            errors(trained(out, device, source, arm, seed), runs) for seed in seeds
        ]).double()  # fmt: skip
        first = each if first is None else first
        more = (each - first).mean(0)
        rows.append([
            name,
            f"{each.mean():.1f} ± {interval95(each.mean(0)):.1f}",
            ", ".join(f"{x:.1f}" for x in each.mean(1)),
            f"{more.mean():+.1f} ± {interval95(more):.1f}" if name != next(iter(arms)) else "",
        ])  # fmt: skip
        print(*rows[-1], flush=True)
    heads = ["Trained on", "Errors, %", "By seed", "More than the first row, paired by run"]
    title = "20 runs of 20 questions, one drawing of each of 20 characters of an alphabet"
    what = "Prototypical Networks on the one-shot task of Lake et al. (2015)"
    return {"what": what, "tables": [{"title": title, "heads": heads, "rows": rows}]}


def _arm(
    ways: int = 60, rotations: bool = True, one_alphabet: bool = False, steps: int = 3000
) -> dict[str, Any]:
    return {"ways": ways, "rotations": rotations, "one_alphabet": one_alphabet, "steps": steps}


ARMS = {
    "60 ways, rotations as classes": _arm(),
    "20 ways": _arm(20),
    "20 ways, three times as many episodes": _arm(20, steps=9000),
    "20 ways, upright only": _arm(20, rotations=False),
}
EXPERIMENTS = {
    "one_shot_omniglot": Experiment(
        beside_people,
        {"source": "omniglot", "arms": ARMS, "seeds": [0, 1, 2]},
        minutes=90,
        tiny={
            "source": "glyphs",
            "arms": {
                "any": _arm(3, steps=2),
                "of one alphabet": _arm(3, one_alphabet=True, steps=2),
            },
        },
    )
}
