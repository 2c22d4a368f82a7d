"""iMAML: the gradient of a solved inner problem, and no step of it in memory."""

from itertools import islice

import pytest
import torch
from helpers import blob_tasks, flat, gradient, images_to_learn, one_block, relative
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F

from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.evaluate import squared_errors
from metautils.learners.imaml import IMAML
from metautils.learners.maml import MAML
from metautils.nets import BatchNorm, Conv4, StepBatchNorm, classifier, mlp
from metautils.train import meta_train

VECTORISE = pytest.mark.parametrize("vectorise", [True, False], ids=["vmap", "loop"])


def small(steps=200, products=50, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return IMAML(net, 0.1, steps, products=products, **options).double()


def waves(tasks=2):
    torch.set_default_dtype(torch.float64)
    try:
        return RegressionSampler(SINUSOIDS, 4, 5, tasks).sample()
    finally:
        torch.set_default_dtype(torch.float32)


@VECTORISE
def test_meta_gradient_by_finite_differences(vectorise):
    """Of the predictions' loss, whose inner problem 400 steps solve."""
    learner, e = small(400, vectorise=vectorise), waves()
    leaves = list(learner.parameters())
    loss, predictions = learner.meta_loss(e)
    torch.testing.assert_close(predictions, learner(e.support_x, e.support_y, e.query_x))
    found, start = gradient(loss, leaves), flat(leaves)
    d = torch.randn(len(start), generator=torch.Generator().manual_seed(1)).double()

    @torch.no_grad()
    def at(point):
        for x, numbers in zip(leaves, point.split([x.numel() for x in leaves]), strict=True):
            x.copy_(numbers.view(x.shape))
        return float(F.mse_loss(learner(e.support_x, e.support_y, e.query_x), e.query_y))

    h = 1e-4
    f = {k: at(start + k * h * d) for k in (-2, -1, 1, 2)}
    slope = (f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * h)
    assert abs(float(found @ d) / slope - 1) < 1e-8


@VECTORISE
@pytest.mark.parametrize("transductive", [True, False])
def test_formula_with_the_hessian_written_out(vectorise, transductive):
    """On convolutions with batch normalisation, at whatever point ten steps have led to."""
    torch.manual_seed(0)
    net = classifier(Conv4(width=2, norm=BatchNorm, strided=True), 2, 2)
    learner = IMAML(
        net, 0.02, 10, lam=60.0, products=200, vectorise=vectorise, transductive=transductive
    ).double()
    e = images_to_learn(ways=2, tasks=1)
    leaves = dict(net.named_parameters())
    found = gradient(learner.meta_loss(e)[0], list(leaves.values()))
    parts = [v[0] for v in (e.support_x, e.support_y, e.query_x, e.query_y)]
    with torch.no_grad():
        f = next(islice(learner.path(*parts[:2]), 10, None))
    phi = flat(list(f.parameters.values()))

    def at(phi):
        shapes = zip(leaves.items(), phi.split([p.numel() for p in leaves.values()]), strict=True)
        f.parameters = {name: x.view_as(p) for (name, p), x in shapes}
        return f

    g = jacrev(lambda v: F.cross_entropy(learner._predict(at(v), parts[0], parts[2]), parts[3]))
    h = jacrev(jacrev(lambda v: F.cross_entropy(at(v)(parts[0]), parts[1])))(phi)
    expected = torch.linalg.solve(torch.eye(len(phi)).double() + h / 60.0, g(phi))
    assert relative(found, expected) < 1e-8


def test_pieces_add_up_and_hold_no_graph_of_the_steps():
    learner, e = small(vectorise=False), waves(tasks=3)
    losses = [loss for loss, *_ in learner.pieces(e)]
    assert len(losses) == 3
    found = sum(gradient(x, list(learner.parameters())) for x in losses)
    other = small(vectorise=True)
    ((loss, *_),) = other.pieces(e)
    assert relative(found, gradient(loss, list(other.parameters()))) < 1e-9


def nodes(loss):
    """How many operations the graph of a loss holds."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_the_graph_does_not_grow_with_the_steps():
    e = waves()
    sizes = [nodes(small(steps, 3).meta_loss(e)[0]) for steps in (1, 50)]
    assert sizes[0] == sizes[1] < 20
    assert nodes(MAML(mlp().double(), 0.01, 50).meta_loss(e)[0]) > 20


def test_strong_pull_stays_and_weak_pull_leaves():
    e, far = waves(), []
    for lam in (8.0, 0.5):
        learner = small(lam=lam)
        with torch.no_grad():
            f = next(islice(learner.path(e.support_x[0], e.support_y[0]), 200, None))
        theta = flat(list(learner.parameters()))
        far.append(float((flat(list(f.parameters.values())) - theta).norm()))
    assert far[0] < far[1] / 2


def test_frozen_weights_stay():
    learner, e = small(), waves()
    learner.net[0].requires_grad_(False)
    loss, _ = learner.meta_loss(e)
    loss.backward()
    assert learner.net[0].weight.grad is None and learner.net[2].weight.grad.any()


def test_it_learns_sinusoids():
    torch.manual_seed(0)
    learner = IMAML(mlp(), 0.005, 8)
    episodes = RegressionSampler(SINUSOIDS, 10, 10, 10)
    before = squared_errors(learner, episodes, 50).mean()
    meta_train(learner, episodes, 80, 1e-2, progress=False, clip=10.0)
    assert squared_errors(learner, episodes, 50).mean() < 0.8 * before


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: IMAML(mlp(), lam=0.0), r"lam=0\.0, products=5: above 0"),
        (lambda: IMAML(mlp(), lam=float("nan")), "lam=nan, products=5: above 0"),
        (lambda: IMAML(mlp(), first_order=True), "leave out first_order"),
        (lambda: IMAML(mlp(), learned_rates=True), "leave out learned_rates"),
        (lambda: IMAML(mlp(), multi_step_loss=3), "leave out multi_step_loss"),
        (lambda: IMAML(mlp(), products=0), "products=0: above 0 and at least 1"),
        (lambda: IMAML(mlp(), only=["head"]), "IMAML adapts every weight"),
        (lambda: IMAML(one_block(lambda c: StepBatchNorm(c, steps=1))), "no running statistics"),
    ],
)
def test_what_it_cannot_do_is_told(make, told):
    with pytest.raises(BadArgument, match=told):
        make()


def test_labels_beyond_the_outputs_are_told_in_training_too():
    x, y = torch.rand(1, 3, 4), torch.arange(3)[None]
    with pytest.raises(ValueError, match="Support labels run from 0 to 2, but the network has 2"):
        IMAML(mlp(inputs=4, outputs=2), 0.1, 2).meta_loss(Episode(x, y, x, y))


def test_evaluation_mode_takes_its_own_number_of_steps():
    learner, e = small(16, test_steps=3).eval(), waves()
    predictions = learner.meta_loss(e)[1]
    torch.testing.assert_close(predictions, learner(e.support_x, e.support_y, e.query_x))
    assert not torch.allclose(predictions, learner.train().meta_loss(e)[1])


def test_value_of_the_meta_loss_is_the_loss_to_the_last_bit():
    learner, e = small(), waves()
    loss, predictions = learner.meta_loss(e)
    assert loss == learner.loss(predictions, e.query_y)


def test_settings_are_in_the_checkpoint():
    assert "lam=3.0, products=7" in IMAML(mlp(), lam=3.0, products=7).extra_repr()


def test_blobs_are_told_apart():
    torch.manual_seed(0)
    learner, e = IMAML(one_block(BatchNorm), 0.1, 8), blob_tasks().sample()
    assert learner(e.support_x, e.support_y, e.query_x).shape[:2] == e.query_y.shape
