"""What a memory adds: accuracy by presentation of an LSTM with and without one (Santoro 2016).

The minutes are the clock's, on a machine with other work: rows of equal steps differ by half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils import data
from metautils.data.bank import ClassBank
from metautils.evaluate import Evaluation, by_presentation, evaluate
from metautils.learners.mann import MANN, LSTMReader
from metautils.learners.protonet import ProtoNet
from metautils.nets import Conv4
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train
from records import Experiment, told

FEATURES = 64
EMPTY = 1e-6  # what a slot holds before the first image


class Standardised(nn.Module):
    """Features `(n, FEATURES)` of mean 0 and deviation 1 over a bank; nothing is learned."""

    def __init__(self, bank: ClassBank) -> None:
        super().__init__()
        self.register_buffer("mean", bank.images.mean(0))
        self.register_buffer("deviation", bank.images.std(0) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return (x - self.mean) / self.deviation


class NearestBefore(LSTMReader):
    """For comparison: the label of the nearest image before, of features as they are."""

    def in_a_row(self, x: Tensor, y: Tensor) -> Tensor:
        """One-hot, `(tasks, T, ways)`; zeros at the first place, where nothing was before."""
        far = torch.cdist(x, x)  # (tasks, T, T)
        later = torch.ones_like(far, dtype=torch.bool).triu()
        nearest = far.masked_fill(later, torch.inf).argmin(-1)  # (tasks, T)
        named = F.one_hot(y.gather(1, nearest), self.ways).to(x.dtype)
        return named * (torch.arange(x.shape[1], device=x.device) > 0)[:, None]


class Blank(MANN):
    """For comparison: nothing that was written is there any more when the next image comes."""

    def step(self, x: Tensor, state: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """As of `MANN`, from an empty memory."""
        return super().step(x, state._replace(M=torch.full_like(state.M, EMPTY)))


class Another(MANN):
    """For comparison: a memory as full as usual, but that of another task."""

    def step(self, x: Tensor, state: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """As of `MANN`, with the memories of a batch exchanged."""
        return super().step(x, state._replace(M=state.M.roll(1, 0)))


def recalled(
    out: Path,
    device: torch.device,
    *,
    source: str,
    seed: int,
    embedding: dict[str, int],
    rows: dict[str, int],
    steps: int,
    lr: float,
    episodes: int,
    arms: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Readers on the same frozen features, trained on the same rows, tested on new classes."""
    parts = data.load(source, seed)
    train, test = (x.with_rotations().to(device) for x in (parts.train, parts.test))
    torch.manual_seed(seed)
    compare = ProtoNet(Conv4(train.images.shape[1], width=FEATURES)).to(device)
    meta_train(
        compare, EpisodeSampler(train, embedding["ways"], 1, 5, seed=seed), embedding["steps"],
        out=out / "embedding", every=250,
    )  # fmt: skip
    compare.eval()
    train, test = train.map(compare.embed), test.map(compare.embed)
    tests = EpisodeSampler(test, **rows | {"tasks": 20}, seed=seed)
    table, nets = [], {}
    for title, arm in arms.items():
        torch.manual_seed(seed)
        net = nets[title] = _reader(arm, train, rows["ways"]).to(device)
        minutes = "-"
        if "of" in arm:
            net.load_state_dict(nets[arm["of"]].state_dict())
        elif arm["kind"] != "nearest":
            length = steps * arm.get("times", 1)
            history = meta_train(
                net, EpisodeSampler(train, **rows, seed=seed), length, lr, clip=10.0, every=250,
                out=out / title,
            )  # fmt: skip
            minutes = f"{history.seconds / 60:.0f}"
        tests.generator.manual_seed(seed)
        found = by_presentation(net, tests, episodes)  # (episodes, presentations)
        told_at = [Evaluation(rows["ways"], 1, 1, found[:, k - 1]) for k in (1, 2, 3, 5, 10)]
        one_shot = "-"
        if arm["kind"] != "nearest":
            (score,) = evaluate(net, test, [(rows["ways"], 1)], episodes=episodes, seed=seed)
            one_shot = told(score)
        table.append([title, *(told(each) for each in told_at), one_shot, minutes])
    heads = ["Reader", "1st", "2nd", "3rd", "5th", "10th", "1-shot", "Minutes"]
    return {
        "what": "MANN and LSTM, by presentation of a class",
        "tables": [{"title": "Percent right, new characters", "heads": heads, "rows": table}],
    }


def _reader(arm: dict[str, Any], train: ClassBank, ways: int) -> LSTMReader:
    how = {key: value for key, value in arm.items() if key not in ("kind", "times", "of")}
    if arm["kind"] == "nearest":
        return NearestBefore(nn.Identity(), FEATURES, ways)
    kind = {"mann": MANN, "blank": Blank, "another": Another, "lstm": LSTMReader}[arm["kind"]]
    return kind(Standardised(train), FEATURES, ways, **how)


EXPERIMENTS = {
    "memory_omniglot": Experiment(
        recalled,
        {
            "source": "omniglot",
            "seed": 0,
            "embedding": {"steps": 1000, "ways": 20},
            "rows": {"ways": 5, "shots": 1, "queries": 9, "tasks": 16},
            "steps": 3000,
            "lr": 2e-3,
            "episodes": 1000,
            "arms": {
                "Nearest image before": {"kind": "nearest"},
                "LSTM": {"kind": "lstm"},
                "LSTM, five times as many steps": {"kind": "lstm", "times": 5},
                "MANN, cosines x 10": {"kind": "mann", "scale": 10.0},
                "MANN, cosines x 10, memory blank in the test": {
                    "kind": "blank",
                    "scale": 10.0,
                    "of": "MANN, cosines x 10",
                },
                "MANN, cosines x 10, another task's memory": {
                    "kind": "another",
                    "scale": 10.0,
                    "of": "MANN, cosines x 10",
                },
                "MANN, plain cosines": {"kind": "mann", "scale": 1.0},
                "MANN, plain cosines, memory blank in the test": {
                    "kind": "blank",
                    "scale": 1.0,
                    "of": "MANN, plain cosines",
                },
                "MANN, plain cosines, another task's memory": {
                    "kind": "another",
                    "scale": 1.0,
                    "of": "MANN, plain cosines",
                },
                "MANN, cosines x 10, five times as many steps": {
                    "kind": "mann",
                    "scale": 10.0,
                    "times": 5,
                },
            },
        },
        110,
        {
            "source": "glyphs",
            "embedding": {"steps": 2, "ways": 5},
            "rows": {"ways": 3, "shots": 1, "queries": 9, "tasks": 2},
            "steps": 2,
            "episodes": 4,
        },
    )
}
