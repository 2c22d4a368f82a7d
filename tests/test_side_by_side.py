"""Trainings for a GPU make the steps that `meta_train` makes, and ask the device for no number."""

import copy
import sys

import pytest
import torch
from helpers import ROOT, blobs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metautils.learners.maml import MAML
from metautils.learners.matching_net import MatchingNet
from metautils.learners.meta_lstm import CLIP, MetaLSTM
from metautils.learners.protonet import ProtoNet
from metautils.learners.relation_net import RelationNet
from metautils.nets import mlp
from metautils.precision import all_digits, fast_autocast
from metautils.sampling import EpisodeSampler

sys.path.insert(0, str(ROOT / "experiments"))
import side_by_side


def flat():
    return nn.Sequential(nn.Flatten(), *mlp(64, 3))


LEARNERS = {
    "maml": lambda: MAML(flat(), steps=2, vectorise=True),
    "meta_lstm": lambda: MetaLSTM(flat(), steps=2),
    "protonet": lambda: ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))),
    "matching": lambda: MatchingNet(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 10.0),
    "relation": lambda: RelationNet(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), lambda a, b: a @ b.mT
    ),
}


def training(name="protonet", steps=6, **episodes):
    torch.manual_seed(0)
    told = {"ways": 3, "shots": 1, "queries": 2, "tasks": 2} | episodes
    sampler = EpisodeSampler(blobs(classes=8, images=6, size=8), **told)
    made = side_by_side.Training(LEARNERS[name](), sampler, steps, 0.01, CLIP)
    made.learner.train()
    return made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(side_by_side, "CHUNK", 4)


@pytest.mark.parametrize("name", LEARNERS)
def test_step_is_one_of_adam_along_the_meta_gradient(name):
    made = training(name)
    own = copy.deepcopy(made.learner)
    adam = torch.optim.Adam(own.parameters(), 0.01)
    for k in range(3):
        episode = made.episode()
        made.step()
        adam.param_groups[0]["lr"] = float(made.rates[k])
        adam.zero_grad()
        pieces, total = own.pieces(episode), 0.0
        while True:
            with fast_autocast(torch.device("cpu")):
                piece = next(pieces, None)
            if piece is None:
                break
            with all_digits(torch.device("cpu")):
                piece[0].backward()
            total += float(piece[0].detach())
        nn.utils.clip_grad_norm_(own.parameters(), CLIP)
        adam.step()
        assert float(made.losses[k]) == pytest.approx(total, rel=1e-6)
    for mine, theirs in zip(made.learner.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Asked(TorchDispatchMode):
    """Notes what makes a number of a tensor, or a tensor whose size depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name()
        indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []
        masks = [x for x in indices if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if masks or "_local_scalar_dense" in name or "nonzero" in name:
            self.found.append(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LEARNERS)
def test_step_asks_for_no_number(name, monkeypatch):
    made = training(name, rotate=name == "maml", vary=name == "relation")
    # Adam of a GPU keeps its own numbers there; a rate that is checked is on the CPU.
    monkeypatch.setattr(made.optimizer, "step", lambda: None)
    monkeypatch.setattr(  # only on a CPU does torch's own look at the labels
        torch.nn.functional, "one_hot", lambda y, n: (y[..., None] == torch.arange(n)).long()
    )
    monkeypatch.setattr("metautils.adapt._checked", lambda rate: rate)
    made.step()
    with Asked() as asked:
        made.step()
    assert not asked.found


def test_episodes_are_those_of_a_sampler():
    made = training(rotate=True)
    bank = made.episodes.bank
    known = torch.stack([bank.images.float().div(255).rot90(k, (-2, -1)) for k in range(4)])
    episode = made.episode()
    assert episode.support_x.shape == (2, 3, 1, 8, 8) and episode.query_x.shape == (2, 6, 1, 8, 8)
    assert episode.query_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    for task in range(2):
        seen = []
        for x, y in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)):
            for image, label in zip(x[task], y[task], strict=True):
                turn, row = (known == image).flatten(2).all(2).nonzero()[0].tolist()
                seen.append((int(label), turn, row, row // 6))
        assert len({row for _, _, row, _ in seen}) == len(seen)  # no image twice
        # One class and one turn for each label.
        assert len({(label, turn, owner) for label, turn, _, owner in seen}) == 3


def test_photos_are_shifted_and_mirrored():
    made = training(vary=True)
    rows, turns = torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    moves = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1]])[None, None]
    x = made.seen(rows, turns, moves)[0, 0]
    image = made.episodes.bank.images[0]
    assert torch.equal(x[0], image)
    assert torch.equal(x[1], torch.cat([image[:, 1:], image[:, -1:]], 1))
    assert torch.equal(x[2], image.flip(-1))
    drawn = made.draw()[2]
    assert drawn[..., :2].abs().max() == 1 and set(drawn[..., 2].unique().tolist()) == {0, 1}


def test_rate_falls_to_zero_in_the_steps_there_is_time_for():
    made = training(steps=8)
    assert made.rates[0] == 0.01 and made.rates[-1] < 0.001
    made.plan(5)
    assert made.steps == 5 and made.rates[4] < 0.002 and not made.rates[5:].any()
    made.plan(100)
    assert made.steps == 8


def test_all_of_them_learn_and_are_told_once():
    made, told = [training(steps=6), training("maml", steps=3)], []
    side_by_side.train(made, 1.0, told.append)
    assert told == made and [each.count for each in made] == [6, 3]
    assert all(each.losses.gt(0).all() for each in made)
