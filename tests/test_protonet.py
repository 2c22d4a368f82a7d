"""ProtoNet against the paper's formulas in plain loops, and against another implementation."""

import numpy as np
import pytest
import torch
from helpers import LABELS, RAGGED, Largest, task, together_and_alone
from torch import nn

from metautils.data.bank import NUMBERS_AT_ONCE
from metautils.errors import BadArgument
from metautils.learners import protonet
from metautils.learners.protonet import (
    ProtoNet,
    class_sums,
    cosine,
    euclidean,
    prototypes,
    squared_euclidean,
)
from metautils.nets import Conv4

DISTANCES = [squared_euclidean, euclidean, cosine]


def textbook(support_x, support_y, query_x):
    """Equations 1 and 2 of Snell et al. 2017, one number at a time: log-probabilities."""
    support_x, support_y, query_x = (x.numpy() for x in (support_x, support_y, query_x))
    ways = support_y.max() + 1
    result = np.zeros((*query_x.shape[:2], ways))
    for t in range(len(query_x)):
        for q, query in enumerate(query_x[t].astype(np.float64)):
            exponentials = []
            for k in range(ways):
                members = [x for x, y in zip(support_x[t], support_y[t], strict=True) if y == k]
                prototype = sum(x.astype(np.float64) for x in members) / len(members)
                distance = sum((a - b) ** 2 for a, b in zip(query, prototype, strict=True))
                exponentials.append(np.exp(-distance))
            result[t, q] = np.log(np.array(exponentials) / sum(exponentials))
    return torch.from_numpy(result).float()


@LABELS
def test_equals_the_textbook(labels):
    x, y, q = task(labels)
    logits = ProtoNet(nn.Identity())(x, y, q)
    assert logits.shape == (2, 7, max(labels) + 1)
    torch.testing.assert_close(logits.log_softmax(-1), textbook(x, y, q), atol=1e-5, rtol=1e-5)


@LABELS
@pytest.mark.parametrize("distance", [squared_euclidean, euclidean])
def test_predicts_like_easyfsl(labels, distance):
    """easyfsl takes the root of the distance; the nearest prototype stays the same."""
    methods = pytest.importorskip("easyfsl.methods")
    x, y, q = task(labels, queries=50, tasks=3)
    ours = ProtoNet(nn.Identity(), distance)(x, y, q)
    for t in range(3):
        peer = methods.PrototypicalNetworks(nn.Identity())
        peer.process_support_set(x[t], y[t])
        theirs = peer(q[t])
        assert torch.equal(ours[t].argmax(-1), theirs.argmax(-1))
        if distance is euclidean:
            torch.testing.assert_close(ours[t], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_batch_of_tasks_equals_one_at_a_time(distance):
    x, y, q = task(RAGGED, tasks=4)
    learner = ProtoNet(nn.Linear(5, 3), distance)
    together = learner(x, y, q)
    for t in range(4):
        alone = learner(x[t : t + 1], y[t : t + 1], q[t : t + 1])
        torch.testing.assert_close(together[t : t + 1], alone, atol=1e-6, rtol=1e-6)


def test_order_of_the_support_set_does_not_matter():
    x, y, q = task(RAGGED, tasks=1)
    learner, order = ProtoNet(nn.Identity()), torch.tensor([5, 2, 0, 4, 1, 3])
    torch.testing.assert_close(learner(x, y, q), learner(x[:, order], y[:, order], q))


def test_queries_one_at_a_time_change_nothing():
    """The method is inductive: in evaluation mode a query says nothing about another."""
    torch.manual_seed(0)
    together, alone = together_and_alone(ProtoNet(Conv4(width=8)))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.01


def test_prototypes_are_means_and_carry_gradient():
    x, y, _ = task(RAGGED, tasks=1)
    x.requires_grad_()
    means = prototypes(x, y, 3)
    for k in range(3):
        torch.testing.assert_close(means[0, k], x[0][y[0] == k].mean(0))
    means.sum().backward()
    share = 1 / torch.tensor(RAGGED).bincount()[y[0]].float()
    torch.testing.assert_close(x.grad[0], share[:, None].expand(-1, 5))


@pytest.mark.parametrize("of", [prototypes, class_sums])
@pytest.mark.parametrize("ways", [None, 3])
@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([[0, 0, 2, 2]], "Class 1 has no support image in task 0"),
        ([[0, 1, 2, 2], [0, 1, 1, 0]], "Class 2 has no support image in task 1"),
        ([[0, 1, -1, 2]], "support_y holds the label -1; count from 0"),
        ([[0.0, 1.0, 2.0]], r"support_y is torch\.float32 of shape \(1, 3\); give int64 labels"),
        ([0, 1, 2], r"support_y is torch\.int64 of shape \(3,\); give int64 labels"),
    ],
)
def test_labels_that_leave_a_class_without_a_mean_are_told(of, ways, labels, told):
    labels = torch.tensor(labels)
    with pytest.raises(BadArgument, match=f"^{told}") as caught:
        of(torch.rand(*labels.shape, 4), labels, ways)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("of", [prototypes, class_sums])
@pytest.mark.parametrize("ways", [0, 2, 4])
def test_other_ways_than_the_labels_make_are_told(of, ways):
    x, y, _ = task(RAGGED)
    told = rf"^The labels run to 2, which makes 3 ways, but ways is {ways}: give ways=3, or label"
    with pytest.raises(BadArgument, match=told):
        of(x, y, ways)
    assert torch.equal(of(x, y, 3), of(x, y))


def test_loss_sends_gradient_to_every_support_image():
    x, y, q = task(RAGGED)
    x.requires_grad_()
    learner = ProtoNet(nn.Linear(5, 3))
    learner.loss(learner(x, y, q), torch.zeros(2, 7, dtype=torch.int64)).backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert all(p.grad.abs().sum() > 0 for name, p in learner.named_parameters() if "weight" in name)


def test_loss_is_the_mean_cross_entropy():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    expected = (np.log(1 + np.exp(-2)) + np.log(2)) / 2
    loss = ProtoNet(nn.Identity()).loss(logits, torch.tensor([[0, 1]]))
    assert float(loss) == pytest.approx(expected)


def pairs(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 6, generator=g), torch.randn(2, 3, 6, generator=g)


def test_euclidean_equals_cdist():
    a, b = pairs()
    torch.testing.assert_close(euclidean(a, b), torch.cdist(a, b), atol=1e-5, rtol=1e-5)


def test_squared_euclidean_equals_cdist_squared():
    a, b = pairs()
    torch.testing.assert_close(squared_euclidean(a, b), torch.cdist(a, b).square())


def test_squared_euclidean_keeps_its_digits_far_from_the_origin():
    a = torch.tensor([[[1000.0, 1000.0]]])
    assert squared_euclidean(a, a + 0.125).item() == 2 * 0.125**2


def test_cosine_equals_numpy():
    a, b = pairs()
    x, y = a.double().numpy(), b.double().numpy()
    x, y = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y))
    expected = torch.from_numpy(1 - np.einsum("taf,tbf->tab", x, y)).float()
    torch.testing.assert_close(cosine(a, b), expected)


def test_cosine_knows_no_length_and_ends_at_0_and_2():
    a, b = pairs()
    torch.testing.assert_close(cosine(3 * a, 0.1 * b), cosine(a, b))
    ends = cosine(a[:, :1], torch.stack([a[:, 0], -a[:, 0]], 1))
    torch.testing.assert_close(ends, torch.tensor([0.0, 2.0]).expand(2, 1, 2))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_is_finite_where_a_query_equals_its_prototype(distance):
    a = torch.randn(1, 2, 4).requires_grad_()
    distance(a, a.detach().clone()).sum().backward()
    assert a.grad.isfinite().all()


def test_squared_distance_is_a_linear_classifier():
    """Equation 8 of the paper: -|q - c|^2 and 2 c . q - |c|^2 differ by |q|^2, the same for all."""
    x, y, q = task(RAGGED)
    c = prototypes(x, y, 3)
    linear = 2 * q @ c.mT - c.square().sum(-1)[:, None]
    logits = ProtoNet(nn.Identity())(x, y, q)
    torch.testing.assert_close(logits.softmax(-1), linear.softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_of_raw_pixels_do_not_fill_the_memory(distance):
    """All pairs at once would be 16 million numbers; the result is the same to the last bit."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, n, 20_000, generator=generator) for n in (40, 20))
    with Largest() as made:
        together = distance(a, b)
    assert made.numbers <= NUMBERS_AT_ONCE
    assert torch.equal(together, torch.cat([distance(part, b) for part in a.split(2, 1)], 1))


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_in_parts_carry_gradients(distance, monkeypatch):
    """Second ones too, and one batch of them all under vmap."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, n, 5, generator=generator, dtype=torch.float64) for n in (7, 3))
    slope = torch.func.grad(lambda a, b: distance(a, b).sin().sum())
    whole = torch.vmap(slope, (None, 0))(a, torch.stack([b, b + 1]))
    monkeypatch.setattr(protonet, "NUMBERS_AT_ONCE", 2 * b.numel())
    torch.testing.assert_close(torch.vmap(slope, (None, 0))(a, torch.stack([b, b + 1])), whole)
    assert torch.autograd.gradgradcheck(distance, (a.requires_grad_(), b.requires_grad_()))


def test_distances_are_in_single_precision_under_autocast():
    x, y, q = task(RAGGED)
    with torch.autocast("cpu", torch.bfloat16):
        assert ProtoNet(nn.Linear(5, 3))(x, y, q).dtype == torch.float32
