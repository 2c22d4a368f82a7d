"""A classifier of all training classes, and the heads that are fitted to a task's support set."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import (
    LABELS,
    RAGGED,
    blobs,
    check_that_evaluation_leaves_no_trace,
    numbered,
    one_by_one,
    predict,
    task,
)
from torch import nn
from torch.nn import functional as F

import metautils.data.bank
from metautils.data.bank import as_float
from metautils.evaluate import evaluate
from metautils.learners.baseline import (
    DECAY,
    SCALE,
    STEP,
    STEPS,
    Baseline,
    CosineHead,
    cosine_head,
    linear_head,
    nearest_centroid,
)
from metautils.learners.protonet import ProtoNet, cosine
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

FITS = pytest.mark.parametrize("fit", [nearest_centroid, linear_head, cosine_head])
HEADS = pytest.mark.parametrize("head", [nn.Linear, CosineHead])


def baseline(head=nn.Linear, fit=linear_head, seed=0):
    """For the six classes of `blobs`."""
    torch.manual_seed(seed)
    embed = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    return Baseline(embed, head(16, 6), fit)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


# CosineHead


@pytest.mark.parametrize("scale", [0.5, SCALE])
def test_cosine_head_by_hand(scale):
    torch.manual_seed(0)
    head, x = CosineHead(5, 3, scale), torch.randn(7, 5)
    cosines = unit(x.double().numpy()) @ unit(head.weight.detach().double().numpy()).T
    torch.testing.assert_close(head(x), torch.from_numpy(scale * cosines).float())
    assert head.bias is None
    # Neither the length of the features nor that of the weights plays a part.
    outputs = head(x).detach()
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[0.01], [3.0], [500.0]]))
    torch.testing.assert_close(head(x * torch.logspace(-3, 3, 7)[:, None]), outputs)


# Heads that are fitted to a task


@LABELS
def test_nearest_centroid_is_protonet_with_cosines(labels):
    x, y, q = task(labels)
    outputs = nearest_centroid(x, y, q)
    distances = -ProtoNet(nn.Identity(), cosine)(x, y, q)
    assert torch.equal(outputs.argmax(-1), distances.argmin(-1))
    torch.testing.assert_close(outputs, SCALE * (1 - distances))


def descended(weight, slope):
    """Weights after the steps of gradient descent with momentum and decay, in double precision."""
    speed = np.zeros_like(weight)
    for _ in range(STEPS):
        speed = 0.9 * speed + slope(weight) + DECAY * weight
        weight = weight - STEP * speed
    return weight


def textbook_linear(x, y, q):
    """Gradient of the cross-entropy of a linear layer written out, for one task."""
    truth = np.eye(y.max() + 1)[y]

    def slope(weight):
        chances = np.exp(SCALE * x @ weight.T)
        return SCALE * (chances / chances.sum(1, keepdims=True) - truth).T @ x / len(x)

    return SCALE * q @ descended(np.zeros((y.max() + 1, x.shape[1])), slope).T


def textbook_cosine(x, y, q):
    """A CosineHead from the class means on; its gradient by autograd, for one task."""
    head = CosineHead(x.shape[1], y.max() + 1).double()

    def slope(weight):
        head.weight.data = torch.from_numpy(weight)
        loss = F.cross_entropy(head(torch.from_numpy(x)), torch.from_numpy(y))
        return torch.autograd.grad(loss, head.weight)[0].numpy()

    means = np.stack([x[y == k].mean(0) for k in range(y.max() + 1)])
    head.weight.data = torch.from_numpy(descended(unit(means), slope))
    return head(torch.from_numpy(q)).detach().numpy()


@LABELS
@pytest.mark.parametrize(
    ("fit", "textbook"), [(linear_head, textbook_linear), (cosine_head, textbook_cosine)]
)
def test_fitted_heads_equal_the_textbook_task_by_task(labels, fit, textbook):
    x, y, q = task(labels)
    outputs = fit(x, y, q)
    for t in range(2):
        sizes = [unit(part[t].double().numpy()) for part in (x, q)]
        expected = torch.from_numpy(textbook(sizes[0], y[t].numpy(), sizes[1])).float()
        torch.testing.assert_close(outputs[t], expected, atol=1e-3, rtol=1e-3)


@LABELS
@FITS
def test_what_can_be_told_apart_is_told_apart(labels, fit):
    """A direction for each class, some noise, and lengths that say nothing."""
    noise, y, _ = task(labels, shape=(20,))
    x = (F.one_hot(y, 20) + 0.1 * noise) * torch.linspace(0.1, 9, y.shape[1])[:, None]
    query = torch.eye(20)[: max(labels) + 1].expand(2, -1, -1)
    outputs = fit(x, y, torch.cat([x, query], 1))
    assert outputs.shape == (2, len(labels) + len(set(labels)), len(set(labels)))
    truth = torch.cat([y, torch.arange(len(set(labels))).expand(2, -1)], 1)
    assert torch.equal(outputs.argmax(-1), truth)


@FITS
def test_tasks_are_independent_and_queries_are_answered_alone(fit):
    x, y, q = task(list(range(5)) * 3, tasks=4)
    together = fit(x, y, q)
    for t in range(4):
        one = slice(t, t + 1)
        torch.testing.assert_close(fit(x[one], y[one], q[one]), together[one], atol=1e-5, rtol=1e-5)
    alone = torch.cat([fit(x, y, each) for each in q.split(1, 1)], 1)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@FITS
def test_fitting_needs_no_gradients_and_leaves_none(fit):
    x, y, q = task(RAGGED)
    expected, copies = fit(x, y, q), [part.clone() for part in (x, y, q)]
    with torch.no_grad():
        outputs = fit(x, y, q)
    assert torch.equal(outputs, expected)
    assert not outputs.requires_grad
    assert all(map(torch.equal, (x, y, q), copies))
    assert x.grad is None


@FITS
@pytest.mark.parametrize("inside", [True, False], ids=["drawn inside", "drawn before"])
def test_fitting_in_inference_mode_gives_the_same_answers(fit, inside):
    """Whose tensors can have no gradient; `fit` by itself, and behind a body."""
    torch.manual_seed(0)
    body = nn.Linear(5, 4)
    expected = fit(*task(RAGGED)), Baseline(body, nn.Identity(), fit)(*task(RAGGED))
    before = task(RAGGED)
    with torch.inference_mode():
        e = task(RAGGED) if inside else before
        outputs = fit(*e), Baseline(body, nn.Identity(), fit)(*e)
    assert all(map(torch.equal, outputs, expected))


@FITS
def test_heads_are_fitted_in_single_precision_under_autocast(fit):
    """Half precision has three digits, too few to fit a head with."""
    learner, e = Baseline(nn.Identity(), nn.Identity(), fit), task(RAGGED)
    exact = learner(*e)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = learner(*e)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, exact)


# Baseline


@HEADS
def test_pieces_are_the_cross_entropy_over_all_classes(head):
    learner = baseline(head)
    e = EpisodeSampler(blobs(), 3, 2, 4, tasks=2).sample()
    ((loss, logits, labels),) = learner.pieces(e)
    x, truth = [], []
    for t in range(2):
        for images, answers in ((e.support_x, e.support_y), (e.query_x, e.query_y)):
            x += list(images[t])
            truth += [int(e.classes[t, label]) for label in answers[t]]
    assert labels.tolist() == truth
    assert len(set(truth)) > 3  # the tasks are of different classes
    torch.testing.assert_close(logits, learner.head(learner.embed(torch.stack(x))))
    by_hand = -logits.log_softmax(1)[range(len(truth)), truth].mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in learner.parameters())


def test_labels_of_the_pieces_are_the_classes_of_the_bank():
    """Every image of this bank says of which class it is."""
    bank, seen = numbered(*[6] * 7), []
    learner = Baseline(nn.Identity(), nn.Linear(2, 7))
    learner.head.register_forward_hook(lambda head, x, outputs: seen.append(x[0]))
    ((_, _, labels),) = learner.pieces(EpisodeSampler(bank, 4, 2, 3, tasks=5).sample())
    assert torch.equal(labels, seen[0][:, 1].long())
    assert set(labels.tolist()) == set(range(7))


@HEADS
def test_training_learns_the_classes_of_the_bank(head):
    learner = baseline(head)
    history = meta_train(learner, EpisodeSampler(blobs(), 6, 1, 2), 80, lr=1e-2, progress=False)
    assert sum(history.accuracy[:5]) / 5 < 60
    assert sum(history.accuracy[-10:]) / 10 > 95
    with torch.no_grad():
        logits = learner.eval().head(learner.embed(as_float(blobs().images)))
    truth = torch.arange(6).repeat_interleave(8)
    assert (logits.argmax(1) == truth).float().mean() > 0.95


@FITS
def test_predicts_a_task_by_the_features_of_its_body_alone(fit):
    learner = baseline(fit=fit).eval()
    e = EpisodeSampler(blobs(), 3, 2, 2, tasks=2).sample()
    with torch.no_grad():
        x, q = learner.embed(e.support_x.flatten(0, 1)), learner.embed(e.query_x.flatten(0, 1))
        learner.head.weight.fill_(torch.nan)  # the head of the training plays no part
    expected = fit(x.unflatten(0, (2, 6)), e.support_y, q.unflatten(0, (2, 6)))
    outputs = predict(learner, e)
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one_by_one(learner, e), outputs, atol=1e-4, rtol=1e-4)


def test_evaluation_leaves_no_trace():
    check_that_evaluation_leaves_no_trace(baseline())


@FITS
def test_on_features_gives_the_same_answers(fit, monkeypatch):
    monkeypatch.setattr(metautils.data.bank, "fast_autocast", lambda device: nullcontext())
    learner, bank = baseline(fit=fit), blobs()
    predict(learner, EpisodeSampler(bank, 6, 2, 6).sample())  # moves the running statistics
    quick, features = learner.on_features(bank)
    assert features.images.shape == (48, 16)
    assert (features.names, features.counts.tolist()) == (bank.names, bank.counts.tolist())
    slow, fast = (EpisodeSampler(each, 3, 2, 3, tasks=2).sample() for each in (bank, features))
    assert torch.equal(slow.query_y, fast.query_y)
    outputs = predict(learner.eval(), slow)
    torch.testing.assert_close(predict(quick, fast), outputs, atol=1e-3, rtol=1e-3)


def test_on_features_scores_the_same():
    """In the precision of the processor, which may be half."""
    learner, bank = baseline(), blobs(classes=6, images=12)
    meta_train(learner, EpisodeSampler(bank, 6, 2, 2), 20, progress=False)
    quick, features = learner.on_features(bank)
    scores = [
        evaluate(*each, [(5, 1)], queries=5, episodes=60)[0].per_episode
        for each in ((learner, bank), (quick, features))
    ]
    assert scores[0].std() > 1
    assert (scores[0] - scores[1]).abs().mean() < 1


@FITS
def test_repr_tells_how_tasks_are_fitted(fit):
    assert baseline(fit=fit).extra_repr() == f"fit={fit.__name__}"
