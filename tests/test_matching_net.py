"""MatchingNet against the paper's formulas in plain loops, and against another implementation."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    LABELS,
    RAGGED,
    images_to_learn,
    meta_loss,
    slope_error,
    task,
    together_and_alone,
)
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.learners.base import task_loss
from metautils.learners.matching_net import MatchingNet
from metautils.learners.protonet import ProtoNet, cosine
from metautils.nets import Conv4

SCALES = pytest.mark.parametrize("scale", [0.5, 1.0, 10.0])


def matching(scale=1.0):
    """On features as they are."""
    return MatchingNet(nn.Identity(), scale)


def textbook(support_x, support_y, query_x, scale):
    """Equations 1 and 2 of Vinyals et al. 2016, one number at a time: log-probabilities."""
    support_x, query_x = support_x.double().numpy(), query_x.double().numpy()
    result = np.zeros((*query_x.shape[:2], int(support_y.max()) + 1))
    for t, q in np.ndindex(*query_x.shape[:2]):
        query, weights = query_x[t, q], []
        for x in support_x[t]:
            cosine = x @ query / np.sqrt(x @ x) / np.sqrt(query @ query)
            weights.append(np.exp(scale * cosine))
        for weight, label in zip(weights, support_y[t], strict=True):
            result[t, q, label] += weight / sum(weights)
    return torch.from_numpy(np.log(result)).float()


@LABELS
@SCALES
def test_equals_the_textbook(labels, scale):
    x, y, q = task(labels)
    outputs = matching(scale)(x, y, q)
    assert outputs.shape == (2, 7, max(labels) + 1)
    torch.testing.assert_close(outputs, textbook(x, y, q, scale), atol=1e-5, rtol=1e-5)


class NoContext(nn.Module):
    """In place of easyfsl's LSTMs: nothing is added to the features."""

    def forward(self, x, state=None):
        return (torch.zeros_like(state[0]), state[1]) if state else (x.new_zeros(1, 1, 10), None)


@LABELS
def test_equals_easyfsl(labels):
    """It normalises the support alone, so queries get their length of 1 before."""
    methods = pytest.importorskip("easyfsl.methods")
    x, y, q = task(labels, tasks=3)
    q = F.normalize(q, dim=-1)
    ours = matching()(x, y, q)
    for t in range(3):
        peer = methods.MatchingNetworks(
            nn.Identity(),
            feature_dimension=5,
            support_encoder=NoContext(),
            query_encoder=NoContext(),
        )
        peer.process_support_set(x[t], y[t])
        theirs = peer(q[t]).exp() - 1e-6  # which it adds so that there is always a logarithm
        torch.testing.assert_close(ours[t].exp(), theirs, atol=1e-6, rtol=1e-5)


# What the probabilities may be


@LABELS
@SCALES
def test_probabilities_add_to_1(labels, scale):
    total = matching(scale)(*task(labels)).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, 7))


@pytest.mark.parametrize("ways", [2, 5, 20])
def test_one_shot_of_features_that_are_not_negative_is_never_certain(ways):
    """At best a query is one of the support and at right angles to the others."""
    best = torch.eye(ways)[None]
    y = torch.arange(ways)[None]
    outputs = matching()(best, y, best)
    highest, lowest_loss = math.e / (math.e + ways - 1), math.log(1 + (ways - 1) / math.e)
    assert float(outputs.exp().max()) == pytest.approx(highest)
    assert float(matching().loss(outputs, y)) == pytest.approx(lowest_loss)
    x, _, q = (part.abs() for part in task(list(range(ways)), tasks=9))
    outputs = matching()(x, y.expand(9, -1), q)
    assert outputs.exp().max() < highest
    assert -outputs.max() > lowest_loss


def test_floor_of_the_loss_at_5_ways():
    y = torch.arange(5)[None]
    loss = matching().loss(matching()(torch.eye(5)[None], y, torch.eye(5)[None]), y)
    assert float(loss) == pytest.approx(0.905, abs=5e-4)


def test_odds_end_at_e_squared():
    """Of a query that is one of two opposites; at another scale s they end at e^2s."""
    ends = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    for scale in (1.0, 3.0):
        a, b = matching(scale)(ends, torch.tensor([[0, 1]]), ends[:, :1]).flatten()
        assert float(a - b) == pytest.approx(2 * scale)
    outputs = matching()(*task(list(range(5)), queries=50))
    assert (outputs.amax(-1) - outputs.amin(-1)).max() < 2


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_weight_too_small_for_its_digits_is_still_a_number(scale):
    """The probability of the wrong class is 0 in single precision, its logarithm is not."""
    x = torch.tensor([[[1.0, 0.0], [-1.0, 1e-3], [-1.0, 0.0]]], requires_grad=True)
    q = torch.tensor([[[1.0, 0.0], [2.0, 1e-3]]], requires_grad=True)
    net, y = matching(scale), torch.tensor([[0, 1, 1]])
    outputs = net(x, y, q)
    assert outputs[..., 1].exp().max() == 0
    assert outputs.isfinite().all()
    assert float(outputs[0, 0, 1].detach()) == pytest.approx(math.log(2) - 2 * scale, rel=1e-3)
    net.loss(outputs, torch.tensor([[1, 1]])).backward()
    assert x.grad.isfinite().all()
    assert q.grad.isfinite().all()
    assert q.grad[0, 1].abs().max() > 0.01


def test_loss_is_the_negative_log_probability():
    """Cross-entropy does no second softmax to what is normalised already."""
    outputs = matching()(*task(RAGGED))
    y = torch.arange(7).expand(2, -1) % 3
    by_hand = -outputs.gather(-1, y[..., None]).mean()
    torch.testing.assert_close(task_loss(outputs.flatten(0, 1), y.flatten()), by_hand)
    torch.testing.assert_close(matching().loss(outputs, y), by_hand)


def test_length_of_the_features_changes_nothing():
    x, y, q = task(RAGGED)
    lengths = torch.rand(2, 6, 1) + 0.1
    torch.testing.assert_close(matching()(lengths * x, y, 30 * q), matching()(x, y, q))


@SCALES
def test_one_shot_orders_classes_as_a_cosine_protonet(scale):
    x, y, q = task(list(range(5)), queries=50)
    ours = matching(scale)(x, y, q)
    other = ProtoNet(nn.Identity(), cosine)(x, y, q)
    assert torch.equal(ours.argsort(-1), other.argsort(-1))
    # More than the order: the same logits but for the scale.
    torch.testing.assert_close(ours, (scale * other).log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_several_shots_are_not_a_cosine_protonet():
    x, y, q = task([0, 0, 0, 1, 1, 1], queries=50)
    other = ProtoNet(nn.Identity(), cosine)(x, y, q)
    assert not torch.equal(matching()(x, y, q).argmax(-1), other.argmax(-1))


def test_class_with_more_shots_gains():
    """Equation 1 sums over the support: of alike images, a class has its share of them."""
    x, y, q = torch.ones(1, 6, 5), torch.tensor([RAGGED]), torch.ones(1, 1, 5)
    expected = torch.tensor([3, 1, 2]) / 6
    torch.testing.assert_close(matching()(x, y, q).exp().flatten(), expected)


# What depends on what


def test_order_of_the_support_set_does_not_matter():
    x, y, q = task(RAGGED, tasks=1)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    torch.testing.assert_close(matching()(x, y, q), matching()(x[:, order], y[:, order], q))


def test_other_labels_for_the_classes_move_the_probabilities():
    x, y, q = task(RAGGED)
    new = torch.tensor([2, 0, 1])
    torch.testing.assert_close(matching()(x, new[y], q)[..., new], matching()(x, y, q))


def test_batch_of_tasks_equals_one_at_a_time():
    x, y, q = task(RAGGED, tasks=4)
    net = MatchingNet(nn.Linear(5, 3))
    alone = torch.cat([net(x[t : t + 1], y[t : t + 1], q[t : t + 1]) for t in range(4)])
    torch.testing.assert_close(net(x, y, q), alone, atol=1e-6, rtol=1e-6)


def test_queries_one_at_a_time_change_nothing():
    """The method is inductive: in evaluation mode a query says nothing about another."""
    torch.manual_seed(0)
    net = MatchingNet(Conv4(width=8), scale=10)
    together, alone = together_and_alone(net)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.01
    assert not net.transductive


# Gradient and settings


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradient_equals_finite_differences(scale, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # features are cut to single precision
    torch.manual_seed(0)
    net, e = MatchingNet(Conv4(width=4).double(), scale), images_to_learn()
    assert slope_error(lambda: meta_loss(net, e), list(net.parameters())) < 1e-7


def test_gradient_reaches_every_support_image_and_weight():
    torch.manual_seed(0)
    (x, y, q), net = task(RAGGED), MatchingNet(nn.Linear(5, 3))
    x.requires_grad_()
    net.loss(net(x, y, q), torch.zeros(2, 7, dtype=torch.int64)).backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_cosines_are_in_single_precision_under_autocast():
    """Half precision has three digits: many cosines would be equal, and the first class wins."""
    x, y, q = (part if part.dtype == torch.int64 else part.abs() for part in task(RAGGED))
    exact = matching()(x, y, q)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = matching()(x, y, q)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, exact)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=f"scale is {scale}; it must be above 0"):
        matching(scale)


def test_repr_tells_the_scale():
    assert matching().extra_repr() == "scale=1.0"
    assert matching(10.0).extra_repr() == "scale=10.0"
