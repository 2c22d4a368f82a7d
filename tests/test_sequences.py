"""Inputs that are no images: sequences of tokens through an embedding and a small transformer."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.adapt import SGD, adapt
from metautils.data.bank import ClassBank
from metautils.evaluate import evaluate
from metautils.learners.maml import MAML
from metautils.learners.protonet import ProtoNet
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

TOKENS, LENGTH = 20, 6


def sentences(classes: int = 10, each: int = 12, seed: int = 0) -> ClassBank:
    """Every class has three words of its own, of which its sentences are made, with some noise."""
    g = torch.Generator().manual_seed(seed)
    own = torch.stack([torch.randperm(TOKENS, generator=g)[:3] for _ in range(classes)])
    choice = torch.randint(3, (classes, each * LENGTH), generator=g)
    words = own.gather(1, choice).view(classes * each, LENGTH)
    noise = torch.rand(words.shape, generator=g) < 0.2
    words = torch.where(noise, torch.randint(TOKENS, words.shape, generator=g), words)
    return ClassBank(words, torch.full((classes,), each), tuple(map(str, range(classes))))


class Reader(nn.Module):
    """Tokens `(n, LENGTH)` int64 to `(n, outputs)`."""

    def __init__(self, outputs: int, attend: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(TOKENS, 16), nn.Linear(16, outputs)
        self.layer = nn.Identity()
        if attend:
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


@pytest.mark.parametrize("attend", [True, False], ids=["transformer", "mean"])
@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (ProtoNet, 16),
        (partial(MAML, lr=0.3, steps=2), 3),
        (partial(MAML, lr=0.3, steps=2, vectorise=False), 3),
    ],
    ids=["protonet", "maml", "one by one"],
)
def test_learners_learn_from_tokens(kind, outputs, attend):
    learner, bank = kind(Reader(outputs, attend)), sentences()
    tasks = EpisodeSampler(bank, ways=3, shots=3, queries=5, tasks=2)
    assert tasks.sample().support_x.dtype == torch.int64
    meta_train(learner, tasks, 50, lr=1e-2, progress=False)
    (score,) = evaluate(learner, bank, [(3, 3)], queries=5, episodes=40, seed=1)
    assert score.accuracy > 75


def test_networks_that_read_tokens_adapt():
    """The embedding too; of it, the words that occur."""
    net, e = Reader(3), EpisodeSampler(sentences(), ways=3, shots=3, queries=5).sample()
    x, y = e.support_x[0], e.support_y[0]
    f = adapt(net, lambda f: F.cross_entropy(f(x), y), SGD(0.3), steps=5)
    assert F.cross_entropy(f(x), y) < 0.5 * F.cross_entropy(net(x), y)
    moved = (f.parameters["embed.weight"] != net.embed.weight).any(1)
    assert set(moved.nonzero().flatten().tolist()) == set(x.flatten().tolist())
    F.cross_entropy(f(e.query_x[0]), e.query_y[0]).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
