"""The memory network against the paper's equations in plain loops, its order and its protocol."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import blobs, numbered, together_and_alone
from torch import nn
from torch.nn import functional as F

from metautils.evaluate import by_presentation
from metautils.learners.mann import MANN, LSTMReader, in_a_random_row
from metautils.nets import Conv4
from metautils.sampling import EpisodeSampler

SMALL = {"features": 4, "ways": 3, "hidden": 6, "slots": 5, "width": 3, "heads": 2}
KINDS = pytest.mark.parametrize("kind", [MANN, LSTMReader])


def made(kind=MANN, embed=None, **changed):
    torch.manual_seed(0)
    known = SMALL if kind is MANN else {k: SMALL[k] for k in ("features", "ways", "hidden")}
    return kind(embed or nn.Identity(), **known | changed)


def rows(tasks=2, length=9, ways=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, length, 4, generator=g)
    return x, torch.randint(ways, (tasks, length), generator=g)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def textbook(net, x, y):
    """Santoro et al. 2016, equations 2 to 8, one number at a time, of one sequence."""
    p = {name: w.detach().double().numpy() for name, w in net.named_parameters()}
    h = c = np.zeros(net.cell.hidden_size)
    M = np.full((net.slots, net.width), 1e-6)
    w_r, w_u = np.zeros((net.heads, net.slots)), np.zeros(net.slots)
    r, label, logits = np.zeros((net.heads, net.width)), np.zeros(net.ways), []
    for x_t, y_t in zip(x.double().numpy(), y.tolist(), strict=True):
        seen = np.concatenate([x_t, label, r.ravel()])
        gates = p["cell.weight_ih"] @ seen + p["cell.bias_ih"]
        gates = gates + p["cell.weight_hh"] @ h + p["cell.bias_hh"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        k = np.tanh(p["key.weight"] @ h + p["key.bias"]).reshape(net.heads, net.width)
        alpha = p["gate.weight"] @ h + p["gate.bias"]
        least = np.argsort(w_u, kind="stable")[: net.heads]
        M = M.copy()
        M[least] = 0
        w_w = np.zeros_like(w_r)
        for head in range(net.heads):
            free = np.zeros(net.slots)
            free[least[head]] = 1
            w_w[head] = sigmoid(alpha[head]) * w_r[head] + (1 - sigmoid(alpha[head])) * free
        for slot in range(net.slots):
            for head in range(net.heads):
                M[slot] += w_w[head, slot] * k[head]
        w_r = np.zeros_like(w_r)
        for head in range(net.heads):
            for slot in range(net.slots):
                size = max(np.linalg.norm(k[head]) * np.linalg.norm(M[slot]), 1e-30)
                w_r[head, slot] = np.exp(net.scale * (k[head] @ M[slot]) / size)
            w_r[head] /= w_r[head].sum()
        w_u = net.gamma * w_u + w_r.sum(0) + w_w.sum(0)
        r = w_r @ M
        logits.append(p["head.weight"] @ np.concatenate([h, r.ravel()]) + p["head.bias"])
        label = np.eye(net.ways)[y_t]
    return torch.from_numpy(np.stack(logits))


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_equals_the_textbook(float64, scale):
    """More images than slots, so that some are written to again."""
    net, (x, y) = made(scale=scale), rows(length=9)
    expected = torch.stack([textbook(net, *row) for row in zip(x, y, strict=True)])
    torch.testing.assert_close(net.in_a_row(x, y), expected, atol=1e-9, rtol=1e-9)


def test_lstm_equals_torchs():
    net, (x, y) = made(LSTMReader), rows()
    whole = nn.LSTM(4 + 3, 6, batch_first=True)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    whole.load_state_dict({f"{n}_l0": getattr(net.cell, n) for n in names})
    before = F.pad(F.one_hot(y, 3).float()[:, :-1], (0, 0, 1, 0))
    expected = net.head(whole(torch.cat([x, before], -1))[0])
    torch.testing.assert_close(net.in_a_row(x, y), expected)


def test_memory_is_written_where_it_was_used_least():
    net, (x, y) = made(slots=8), rows()
    _, states = net.along(x, y)
    for before, after in pairwise(states):
        chosen = net.least_used(before.w_u)
        assert chosen.sum((1, 2)).tolist() == [2, 2]  # a slot for each head
        assert chosen.sum(1).max() == 1  # and no slot for two
        used = (before.w_u[:, None] * chosen).sum(-1)  # (n, heads)
        rest = before.w_u.masked_fill(chosen.sum(1) > 0, torch.inf).min(1).values
        assert (used.max(1).values <= rest).all()
        assert after.w_r.sum(-1).allclose(torch.ones(2, 2))


# Order in time


@KINDS
@pytest.mark.parametrize("place", range(9))
def test_no_answer_depends_on_its_own_label_or_on_later_places(kind, place):
    net, (x, y) = made(kind), rows()
    later_x, later_y = x.clone(), y.clone()
    later_x[:, place + 1 :] += 1
    later_y[:, place:] = (y[:, place:] + 1) % 3
    before, after = net.in_a_row(x, y), net.in_a_row(later_x, later_y)
    assert torch.equal(before[:, : place + 1], after[:, : place + 1])
    assert place == 8 or not torch.equal(before[:, place + 1], after[:, place + 1])


class Leaking(LSTMReader):
    """Wrong: with each image its own label."""

    def along(self, features, labels):
        logits, state = [], self.begin(len(features))
        for x in torch.cat([features, self.one_hot(labels, features)], -1).unbind(1):
            out, state = self.step(x, state)
            logits.append(out)
        return torch.stack(logits, 1), [state]


def test_leak_of_the_label_is_seen():
    """A learner that gets it is right from the first presentation on, others cannot be."""
    bank, scores = blobs(classes=12), []
    for kind in (LSTMReader, Leaking):
        net = made(kind, nn.Flatten(), features=16)
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        episodes = EpisodeSampler(bank, 3, 1, 3, tasks=8)
        for _ in range(60):
            (loss, *_), *_ = net.pieces(episodes.sample())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append(by_presentation(net, EpisodeSampler(bank, 3, 1, 3, 10, seed=1), 50)[:, 0])
    honest, leaking = (float(score.mean()) for score in scores)
    assert leaking == 100
    assert honest < 70


# Behind the one interface


@KINDS
def test_query_is_the_next_image_of_the_row(kind):
    net, (x, y) = made(kind).eval(), rows(length=6)
    q = torch.randn(2, 4, 4)
    order = net.order(2, 6)
    ordered, labels = x[:, order[0]], y[:, order[0]]
    for k in range(4):
        row = torch.cat([ordered, q[:, k : k + 1]], 1)
        last = net.in_a_row(row, torch.cat([labels, labels[:, :1]], 1))[:, -1]
        torch.testing.assert_close(net(x, y, q)[:, k], last)


@KINDS
def test_queries_one_at_a_time_change_nothing(kind):
    net = made(kind, Conv4(width=8), features=8, ways=5)
    together, alone = together_and_alone(net)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.001


# The row and its protocol


def test_row_holds_every_image_with_its_label_in_a_random_order():
    bank = blobs(classes=6)
    sampler = EpisodeSampler(bank, 3, 1, 4, tasks=5)
    e = sampler.sample()
    x, y = in_a_random_row(e, torch.Generator().manual_seed(3))
    assert x.shape == (5, 15, 1, 4, 4)
    known = torch.cat([e.support_x, e.query_x], 1).flatten(2)
    labels = torch.cat([e.support_y, e.query_y], 1)
    for t in range(5):
        same = (x[t].flatten(1)[:, None] == known[t][None]).all(-1)
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * 15
        assert torch.equal(y[t], labels[t][same.long().argmax(1)])
    assert not torch.equal(y[0], y[1])
    again = in_a_random_row(e, torch.Generator().manual_seed(3))
    assert torch.equal(again[0], x)


class Remembers(LSTMReader):
    """Names what it has met before, exactly, and of the rest says 0."""

    def in_a_row(self, x, y):
        same = (x[:, :, None, 1] == x[:, None, :, 1]) & torch.ones(x.shape[1], x.shape[1]).tril(
            -1
        ).bool()
        known = same.to(x.dtype) @ F.one_hot(y, self.ways).to(x.dtype)
        return known + 1e-3 * F.one_hot(torch.zeros_like(y), self.ways)


def test_accuracy_by_presentation_counts_presentations():
    net = Remembers(nn.Identity(), 2, 3)
    found = by_presentation(net, EpisodeSampler(numbered(*[9] * 6), 3, 1, 4, tasks=4), 20)
    assert found.shape == (20, 5)
    assert found[:, 0].tolist() == pytest.approx([100 / 3] * 20)  # the class of label 0 only
    assert (found[:, 1:] == 100).all()


def test_heads_need_slots():
    with pytest.raises(ValueError, match="6 heads need as many slots, and 1 or more; slots is 5"):
        made(heads=6)
