"""RelationNet against the paper's formulas in NumPy, pair by pair, and against another package."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import blobs, images_to_learn, meta_loss, slope_error
from torch import Tensor, nn

from metautils.data.bank import split_classes
from metautils.evaluate import episode_accuracy
from metautils.learners.base import task_loss
from metautils.learners.relation_net import RelationModule, RelationNet, squared_error
from metautils.nets import Conv4
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

WIDTH = 3
RAGGED = [0, 0, 0, 1, 2, 2]  # labels of a support set whose classes differ in size
LABELS = [
    pytest.param(list(range(5)), id="5-way 1-shot"),
    pytest.param(list(range(3)) * 4, id="3-way 4-shot"),
    pytest.param(RAGGED, id="ragged"),
]
OBJECTIVES = pytest.mark.parametrize("objective", [squared_error, task_loss])


def task(labels, queries=4, tasks=2, shape=(1, 16, 16), seed=0):
    """Random images of a support set with these labels, in another order in each task."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(labels), generator=g) for _ in range(tasks)])
    support_x = torch.randn(tasks, len(labels), *shape, generator=g)
    query_x = torch.randn(tasks, queries, *shape, generator=g)
    return support_x, torch.tensor(labels)[order], query_x


def settled(net, seed=0):
    """The network in evaluation mode; batch normalisations have numbers that can be told apart."""
    g = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for x in (layer.running_mean, layer.bias.data):
                x.copy_(0.3 * torch.randn(len(x), generator=g))
            for x in (layer.running_var, layer.weight.data):
                x.copy_(0.5 + torch.rand(len(x), generator=g))
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= 3  # torch's own are so small that scores would hardly differ
    return net.eval()


def learner(objective=squared_error, size=4, seed=0):
    """All of it, narrow, for images four times the size of the maps."""
    torch.manual_seed(seed)
    net = RelationNet(Conv4(width=WIDTH, pools=2), RelationModule(WIDTH, size), objective)
    return settled(net, seed)


# The paper's computation, written out


def numpy_weights(net):
    return {name: x.double().numpy() for name, x in net.state_dict().items()}


def block(x, w, convolution, norm, pool):
    """Convolution 3x3, batch normalisation by running statistics, ReLU, and perhaps pooling."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    x = np.einsum("chwij,ocij->ohw", windows, w[f"{convolution}.weight"])
    x += w[f"{convolution}.bias"][:, None, None]
    mean, var = w[f"{norm}.running_mean"], w[f"{norm}.running_var"]
    scale = w[f"{norm}.weight"] / np.sqrt(var + 1e-5)
    x = (x - mean[:, None, None]) * scale[:, None, None] + w[f"{norm}.bias"][:, None, None]
    x = np.maximum(x, 0)
    h, v = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * h, : 2 * v].reshape(-1, h, 2, v, 2).max((2, 4)) if pool else x


def f(image, w):
    for k in range(4):
        image = block(image, w, f"embed.blocks.{k}.0", f"embed.blocks.{k}.1", pool=k < 2)
    return image


def g(pair, w):
    pair = block(pair, w, "relate.first", "relate.rest.0", pool=True)
    pair = block(pair, w, "relate.rest.3", "relate.rest.4", pool=True)
    hidden = np.maximum(w["relate.rest.8.weight"] @ pair.flatten() + w["relate.rest.8.bias"], 0)
    return float((w["relate.rest.10.weight"] @ hidden + w["relate.rest.10.bias"])[0])


def textbook(net, support_x, support_y, query_x):
    """Section 3.2 of Sung et al. 2018, one pair at a time, before the sigmoid."""
    w = numpy_weights(net)
    result = np.zeros((*query_x.shape[:2], int(support_y.max()) + 1))
    for t in range(len(query_x)):
        support = [f(x, w) for x in support_x[t].double().numpy()]
        for k in range(result.shape[-1]):
            members = [x for x, y in zip(support, support_y[t], strict=True) if y == k]
            for q, x in enumerate(query_x[t].double().numpy()):
                result[t, q, k] = g(np.concatenate([sum(members), f(x, w)]), w)
    return torch.from_numpy(result).float()


@pytest.mark.parametrize("labels", LABELS)
def test_equals_the_textbook(labels):
    net, (x, y, q) = learner(), task(labels)
    with torch.no_grad():
        outputs = net(x, y, q)
    assert outputs.shape == (2, 4, max(labels) + 1)
    assert outputs.std(-1).min() > 0.01  # far above what the comparison lets pass
    torch.testing.assert_close(outputs, textbook(net, x, y, q), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [4, 7, 8])
def test_module_equals_the_textbook(size):
    """Maps of 7x7 become 3x3, then 1x1, as poolings round down."""
    net = settled(RelationNet(nn.Identity(), RelationModule(WIDTH, size, hidden=5)))
    generator = torch.Generator().manual_seed(1)
    query, classes = (torch.randn(2, n, WIDTH, size, size, generator=generator) for n in (3, 4))
    with torch.no_grad():
        scores = net.relate(query.flatten(2), classes.flatten(2))
    assert scores.shape == (2, 3, 4)
    w = numpy_weights(net)
    for t, q, k in np.ndindex(2, 3, 4):
        pair = torch.cat([classes[t, k], query[t, q]]).double().numpy()
        assert float(scores[t, q, k]) == pytest.approx(g(pair, w), abs=1e-5, rel=1e-5)


def easyfsl_scores(net, x, y, q, times=1):
    """Of one task, by easyfsl with our networks, its class maps multiplied with a number."""
    methods = pytest.importorskip("easyfsl.methods")
    maps = nn.Sequential(net.embed, nn.Unflatten(1, (WIDTH, 4, 4)))
    module = nn.Sequential(net.relate.first, net.relate.rest, nn.Sigmoid())
    peer = methods.RelationNetworks(maps, feature_dimension=WIDTH, relation_module=module)
    peer.process_support_set(x, y)
    peer.prototypes = times * peer.prototypes
    return peer(q)


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_equals_easyfsl(shots):
    """It takes a class's mean, not the paper's sum: the same with one shot, else K times that."""
    net, (x, y, q) = learner(), task(list(range(4)) * shots, tasks=3)
    ours = net(x, y, q).sigmoid()
    for t in range(3):
        theirs = easyfsl_scores(net, x[t], y[t], q[t], times=shots)
        torch.testing.assert_close(ours[t], theirs, atol=1e-5, rtol=1e-5)
        mean = easyfsl_scores(net, x[t], y[t], q[t])
        assert torch.allclose(ours[t], mean, atol=1e-4) == (shots == 1)


# What depends on what


def test_order_of_the_support_set_does_not_matter():
    x, y, q = task(RAGGED, tasks=1)
    net, order = learner(), torch.tensor([5, 2, 0, 4, 1, 3])
    torch.testing.assert_close(net(x, y, q), net(x[:, order], y[:, order], q))


def test_other_labels_for_the_classes_move_the_scores():
    x, y, q = task(RAGGED)
    net, new = learner(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(x, new[y], q)[..., new], net(x, y, q))


def test_batch_of_tasks_equals_one_at_a_time():
    x, y, q = task(RAGGED, tasks=3)
    net = learner()
    alone = torch.cat([net(x[t : t + 1], y[t : t + 1], q[t : t + 1]) for t in range(3)])
    torch.testing.assert_close(net(x, y, q), alone, atol=1e-5, rtol=1e-5)


def test_queries_one_at_a_time_change_nothing():
    """The method is inductive: in evaluation mode a query says nothing about another."""
    x, y, q = task(RAGGED, queries=6)
    net = learner()
    alone = torch.cat([net(x, y, q[:, k : k + 1]) for k in range(6)], 1)
    torch.testing.assert_close(net(x, y, q), alone, atol=1e-5, rtol=1e-5)
    assert not net.transductive


def test_relation_is_not_symmetric():
    """Unlike a distance: nothing makes r(a, b) equal to r(b, a), nor r(a, a) the highest."""
    relate = learner().relate
    a, b = torch.randn(2, 1, 5, WIDTH * 16, generator=torch.Generator().manual_seed(0))
    there, back = relate(a, b), relate(b, a).mT
    assert (there - back).abs().min() > 1e-4


def test_scores_are_in_single_precision_under_autocast():
    net, (x, y, q) = learner(), task(RAGGED)
    exact = net(x, y, q)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(x, y, q)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, exact, atol=0.05, rtol=0.05)


# The objective


def test_squared_error_of_a_hand():
    """Sigmoids of 1/2 and 3/4, which should be 0 and 1."""
    scores = torch.tensor([[0.0, math.log(3)]])
    assert float(squared_error(scores, torch.tensor([1]))) == pytest.approx((1 / 4 + 1 / 16) / 2)


@pytest.mark.parametrize("ways", [2, 5, 20])
def test_squared_error_of_the_same_score_for_all(ways):
    """Where training stands as long as the module tells nothing: 0.16 in 5 ways."""
    p = 1 / ways
    scores = torch.full((3, ways), math.log(p / (1 - p)))
    loss = squared_error(scores, torch.tensor([0, 1, 1]))
    assert float(loss) == pytest.approx(p * (1 - p), rel=1e-5)


def test_gradient_of_squared_error():
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1])
    squared_error(scores, labels).backward()
    p = scores.detach().sigmoid()
    by_hand = 2 * (p - torch.eye(3)[labels]) * p * (1 - p) / 12
    torch.testing.assert_close(scores.grad, by_hand)


@OBJECTIVES
def test_loss_is_the_objective(objective):
    outputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    expected = objective(outputs.flatten(0, 1), labels.flatten())
    assert torch.equal(learner(objective).loss(outputs, labels), expected)


def test_objective_is_squared_error_unless_told():
    assert RelationNet(nn.Identity(), nn.Identity()).objective is squared_error


@OBJECTIVES
def test_repr_tells_the_objective(objective):
    assert learner(objective).extra_repr() == f"objective={objective.__name__}"


@OBJECTIVES
def test_gradient_reaches_every_weight(objective):
    net, e = learner(objective), images_to_learn(shots=2, dtype=torch.float32)
    meta_loss(net, e).backward()
    still = {name for name, p in net.named_parameters() if p.grad.abs().max() < 1e-6}
    # A number added to all scores does not change a softmax.
    assert still == ({"relate.rest.10.bias"} if objective is task_loss else set())
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"embed", "relate"}


@OBJECTIVES
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_gradient_equals_finite_differences(objective, mode, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # scores are cut to single precision
    net, e = learner(objective).double().train(mode), images_to_learn()
    for part in (net.embed, net.relate):
        assert slope_error(lambda: meta_loss(net, e), list(part.parameters())) < 1e-7


# Sizes, and a training


@pytest.mark.parametrize("size", [3, 1])
def test_maps_too_small_are_told(size):
    sentence = f"Maps of {size}x{size} cannot be halved twice: they must be 4x4"
    with pytest.raises(ValueError, match=sentence):
        RelationModule(size=size)


def test_number_of_weights():
    """Of the paper's module on Omniglot, with 7x7 maps of 64 filters."""
    blocks = (9 * 128 * 64 + 64) + (9 * 64 * 64 + 64) + 2 * 2 * 64
    expected = blocks + (64 * 8 + 8) + (8 + 1)
    assert sum(p.numel() for p in RelationModule().parameters()) == expected


@OBJECTIVES
def test_learns_classes_it_has_not_seen(objective):
    """Chance is 20 % of the queries."""
    torch.manual_seed(0)
    net = RelationNet(Conv4(width=8, pools=2), RelationModule(8, 4), objective)
    bank = blobs(classes=40, size=4)  # and each pixel four times as high and wide
    bank = replace(bank, images=bank.images.repeat_interleave(4, -1).repeat_interleave(4, -2))
    train, test, _ = split_classes(bank, (30, 10, 0))

    def accuracy():
        return float(episode_accuracy(net, EpisodeSampler(test, 5, 1, 3), 40).mean())

    before = accuracy()
    meta_train(net, EpisodeSampler(train, 5, 1, 3, tasks=2), 150, 5e-3, progress=False)
    assert before < 40
    assert accuracy() > 60
