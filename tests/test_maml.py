"""MAML and its kin: exact meta-gradients, what each adapts, and that they learn."""

import copy
from collections import OrderedDict
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import (
    blob_tasks,
    blobs,
    check_that_a_stopped_training_resumes,
    check_that_evaluation_leaves_no_trace,
    convolutions_round,
    flat,
    gradient,
    group_norm,
    images_to_learn,
    one_block,
    one_by_one,
    predict,
    relative,
    same_weights,
    slope_error,
    task,
    train_on_blobs,
    weights_of,
)
from torch import nn
from torch.nn import functional as F

from metautils.adapt import adapt
from metautils.checkpoint import CheckpointMismatch
from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.evaluate import episode_accuracy, evaluate, squared_errors
from metautils.learners.anil import ANIL
from metautils.learners.maml import FOMAML, MAML
from metautils.learners.meta_lstm import MetaLSTM
from metautils.learners.meta_sgd import MetaSGD
from metautils.learners.reptile import Reptile
from metautils.nets import BatchNorm, Conv4, StepBatchNorm, batch_norm_mode, classifier, mlp
from metautils.train import meta_train

LEARNERS = [MAML, FOMAML, ANIL, MetaSGD, Reptile]
ALL = pytest.mark.parametrize("kind", LEARNERS)
STRIDED = pytest.mark.parametrize("strided", [True, False], ids=["strided", "pooled"])
TRANSDUCTIVE = pytest.mark.parametrize(
    "transductive", [True, False], ids=["transductive", "inductive"]
)
VECTORISE = pytest.mark.parametrize("vectorise", [True, False], ids=["vmap", "loop"])


def conv(kind, steps=1, strided=True, norm=BatchNorm, seed=0, **options):
    """A learner on a narrow Conv4, in float64."""
    torch.manual_seed(seed)
    lr = 0.01 if kind is Reptile else 0.1
    net = classifier(Conv4(width=4, strided=strided, norm=norm), 4, 3)
    return kind(net, lr, steps, **options).double()


def small(kind, norm=BatchNorm, **options):
    """A learner on one block, for `blobs`."""
    return kind(one_block(norm), **options)


# Meta-gradients


@pytest.mark.parametrize("kind", [MAML, ANIL, MetaSGD])
@STRIDED
@pytest.mark.parametrize("steps", [1, 3, 5])
@TRANSDUCTIVE
@VECTORISE
def test_meta_gradient_by_finite_differences(kind, strided, steps, transductive, vectorise):
    learner = conv(kind, steps, strided, transductive=transductive, vectorise=vectorise)
    e = images_to_learn()
    assert slope_error(lambda: learner.meta_loss(e)[0], list(learner.parameters())) < 1e-8


def test_meta_gradient_of_lines_in_closed_form():
    """Model theta x on tasks y = a x + b, one step: all can be written down.

    With M, C, D the means of x^2, x y over the support and q, r those over the queries,
    phi = theta - 2 alpha (M theta - C), and the gradient is (1 - 2 alpha M) 2 (q phi - r).
    """
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 1, 1, generator=g, dtype=torch.float64) for _ in range(2))
    x, qx = (torch.randn(4, n, 1, generator=g, dtype=torch.float64) for n in (3, 6))
    e = Episode(x, a * x + b, qx, a * qx + b)
    net = nn.Linear(1, 1, bias=False).double()
    theta, alpha = float(net.weight.detach()), 0.3
    means = [z.mean((1, 2)) for z in (x**2, x * e.support_y, qx**2, qx * e.query_y)]
    m, c, q, r = means
    phi = theta - 2 * alpha * (m * theta - c)
    first_order = 2 * (q * phi - r)
    exact = {MAML: ((1 - 2 * alpha * m) * first_order).mean(), FOMAML: first_order.mean()}
    for kind, expected in exact.items():
        for vectorise in (True, False):
            loss, predictions = kind(net, alpha, vectorise=vectorise).meta_loss(e)
            torch.testing.assert_close(predictions, phi[:, None, None] * qx)
            found = gradient(loss, [net.weight])[0]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@ALL
@STRIDED
@TRANSDUCTIVE
def test_loop_equals_vmap(kind, strided, transductive):
    e, found = images_to_learn(tasks=3), []
    for vectorise in (True, False):
        learner = conv(kind, 3, strided, transductive=transductive, vectorise=vectorise)
        assert len(list(learner.pieces(e))) == (1 if vectorise else 3)
        loss, predictions = learner.meta_loss(e)
        assert predictions.shape == (3, 6, 3)
        slope = gradient(loss, list(learner.parameters()))
        found.append((flat([loss]), flat([predictions]), slope))
    # A bias before a normalisation has gradient 0 but for rounding, which Reptile's Adam enlarges.
    bar = 1e-7 if kind is Reptile else 1e-12
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < bar


@ALL
@pytest.mark.parametrize("at_once", [1, 2])
def test_tasks_in_parts_give_the_gradient_of_all(kind, at_once):
    """As `meta_train` adds them up: each part weighted by its share of the tasks."""
    learner, e = conv(kind, 3, vectorise=False), images_to_learn(tasks=3)
    leaves = list(learner.parameters())
    state = torch.get_rng_state()  # Reptile draws minibatches
    whole = gradient(learner.meta_loss(e)[0], leaves)
    torch.set_rng_state(state)
    pieces = list(e.parts(at_once))
    total = sum(gradient(learner.meta_loss(p)[0] * (p.tasks / 3), leaves) for p in pieces)
    assert relative(total, whole) < 1e-12


@STRIDED
def test_what_is_faster_is_chosen(strided):
    """On a CPU: convolutions one task after another, all else at once; but as one says."""
    images, points = images_to_learn(tasks=3), RegressionSampler(SINUSOIDS, 5, tasks=3).sample()
    for made, episode, pieces in (
        (conv(MAML, strided=strided), images, 3),
        (conv(MAML, strided=strided, vectorise=True), images, 1),
        (MAML(mlp()), points, 1),
        (MAML(mlp(), vectorise=False), points, 3),
    ):
        assert len(list(made.pieces(episode))) == pieces


class Sequences(nn.Module):
    """Sequences `(n, 4, 3)` through a layer in the middle to three logits."""

    def __init__(self, middle):
        super().__init__()
        self.middle, self.head = middle, nn.Linear(8, 3)

    def forward(self, x):
        x = self.middle(x)
        return self.head((x[0] if isinstance(x, tuple) else x).mean(1))


@ALL
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.LSTM(3, 8, batch_first=True),
        lambda: nn.GRU(3, 8, batch_first=True),
        lambda: nn.Sequential(nn.Linear(3, 8), nn.RReLU()),
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)),
        lambda: nn.Sequential(
            nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ),
    ],
    ids=["lstm", "gru", "rrelu", "dropout", "transformer"],
)
def test_tasks_run_one_by_one_where_vmap_cannot(kind, training, middle):
    """Unless one says otherwise."""
    learner = kind(Sequences(middle()), 0.1, 2).train(training)
    x, y, q = task([0, 1, 2, 0], shape=(4, 3))
    loss = sum(loss for loss, *_ in learner.pieces(Episode(x, y, q, torch.zeros(2, 7).long())))
    assert gradient(loss, [*learner.parameters()]).isfinite().all()
    assert predict(learner.eval(), Episode(x, y, q, torch.zeros(2, 7).long())).isfinite().all()


def test_noise_in_a_network_is_told_with_what_to_do():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    net = nn.Sequential(OrderedDict(body=nn.Identity(), head=Noisy(5, 3)))
    x, y, q = task([0, 1, 2])
    with pytest.raises(
        ValueError, match=r"^This cannot be vectorised \(it draws random .*vectorise="
    ):
        MAML(net)(x, y, q)
    assert MAML(net, vectorise=False)(x, y, q).isfinite().all()


# What each learner is


def by_hand(learner, e, task, optimizer, steps):
    """A copy of the network after training on one task's support set with torch's optimiser."""
    return trained_on(learner, [(e.support_x[task], e.support_y[task])] * steps, optimizer)


def trained_on(learner, batches, optimizer):
    """A copy of the network after a step of torch's optimiser on each batch."""
    net = copy.deepcopy(learner.net)
    optimizer = optimizer(net)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def all_of(e):
    """Images and labels of support and query sets together."""
    return torch.cat([e.support_x, e.query_x], 1), torch.cat([e.support_y, e.query_y], 1)


@pytest.mark.parametrize("steps", [1, 3])
@VECTORISE
def test_fomaml_moves_by_the_query_gradient_at_phi(steps, vectorise):
    learner, e = conv(FOMAML, steps, vectorise=vectorise), images_to_learn()
    slopes = []
    for k in range(e.tasks):
        net = by_hand(learner, e, k, lambda n: torch.optim.SGD(n.parameters(), 0.1), steps)
        value = F.cross_entropy(net(e.query_x[k]), e.query_y[k])
        slopes.append(gradient(value, list(net.parameters())))
    found = gradient(learner.meta_loss(e)[0], list(learner.parameters()))
    assert relative(found, torch.stack(slopes).mean(0)) < 1e-12
    second = conv(MAML, steps, vectorise=vectorise)
    torch.testing.assert_close(predict(learner, e), predict(second, e))
    exact = gradient(second.meta_loss(e)[0], list(second.parameters()))
    assert relative(found, exact) > 0.01


@pytest.mark.parametrize("kind", [MAML, FOMAML])
@VECTORISE
def test_predictions_are_those_of_a_network_trained_by_hand(kind, vectorise):
    learner, e = conv(kind, 4, strided=False, vectorise=vectorise), images_to_learn()
    for k in range(e.tasks):
        net = by_hand(learner, e, k, lambda n: torch.optim.SGD(n.parameters(), 0.1), 4)
        torch.testing.assert_close(predict(learner, e)[k], net(e.query_x[k]).detach())


def test_anil_moves_the_head_and_nothing_else():
    learner, e = conv(ANIL, 3), images_to_learn()
    for k in range(e.tasks):
        net = by_hand(learner, e, k, lambda n: torch.optim.SGD(n.head.parameters(), 0.1), 3)
        assert same_weights(net.embed.state_dict(), learner.net.embed.state_dict())
        torch.testing.assert_close(predict(learner, e)[k], net(e.query_x[k]).detach())
    assert relative(predict(learner, e), predict(conv(MAML, 3), e)) > 0.01
    body = gradient(learner.meta_loss(e)[0], list(learner.net.embed.parameters()))
    assert body.norm() > 1e-3  # but training moves the body too


def test_meta_sgd_with_equal_rates_is_maml():
    learner, other, e = conv(MetaSGD, 3), conv(MAML, 3), images_to_learn()
    assert [r.shape for r in learner.rates] == [p.shape for p in learner.net.parameters()]
    other.lr = learner.rates[0].flatten()[0].item()  # 0.1 in single precision
    assert all(r.eq(other.lr).all() for r in learner.rates)
    torch.testing.assert_close(predict(learner, e), predict(other, e), rtol=1e-12, atol=1e-12)
    slopes = [gradient(m.meta_loss(e)[0], list(m.net.parameters())) for m in (learner, other)]
    assert relative(*slopes) < 1e-12


def test_meta_sgd_learns_a_rate_for_every_entry():
    """But where the gradient is 0: a bias before a batch normalisation cancels."""
    learner, e = conv(MetaSGD, 3), images_to_learn()
    before = predict(learner, e)
    names = [name for name, _ in learner.net.named_parameters()]
    slopes = torch.autograd.grad(learner.meta_loss(e)[0], list(learner.rates))
    idle = {n for n, s in zip(names, slopes, strict=True) if s.abs().max() < 1e-9}
    assert idle == {f"embed.blocks.{k}.0.bias" for k in range(4)}
    with torch.no_grad():
        learner.rates[names.index("head.bias")][1] = -0.1
    assert relative(predict(learner, e), before) > 1e-3


def without_momentum(net):
    """The Adam of Reptile's experiments, torch's own."""
    return torch.optim.Adam(net.parameters(), 0.01, betas=(0.0, 0.999))


@pytest.mark.parametrize(("steps", "batch"), [(1, 4), (5, 4), (3, 99)])
@VECTORISE
def test_reptile_moves_towards_where_the_tasks_end(steps, batch, vectorise):
    """theta - phi as an average over tasks, phi from torch's Adam on minibatches of a task."""
    e = images_to_learn()
    learner = conv(Reptile, steps, batch=batch, vectorise=vectorise)
    theta, ends, answers = flat(learner.net.parameters()), [], []
    # A bias before batch normalisation has a gradient of 0 but for rounding, which Adam enlarges.
    names = [n for n, p in learner.net.named_parameters() for _ in range(p.numel())]
    sound = torch.tensor([not n.endswith(".0.bias") for n in names])
    (x, y), state = all_of(e), torch.get_rng_state()
    for k, order in enumerate(learner.minibatches(*x.shape[:2])):
        end = trained_on(learner, [(x[k, o], y[k, o]) for o in order], without_momentum)
        ends.append(flat(end.parameters()))
        answers.append(end(e.query_x[k]).detach())
    expected = theta - torch.stack(ends).mean(0)
    torch.set_rng_state(state)
    loss, predictions = learner.meta_loss(e)
    found = gradient(loss, list(learner.net.parameters()))
    assert relative(found[sound], expected[sound]) < 1e-8
    assert found[~sound].abs().max() < 1e-6
    torch.testing.assert_close(predictions, torch.stack(answers))
    half_squares = torch.stack([(theta - phi).square().sum() / 2 for phi in ends]).mean()
    torch.testing.assert_close(loss.detach(), half_squares)


def test_reptile_goes_through_a_task_before_it_begins_anew():
    """Minibatches are parts of the task in a new order each round, and may begin in one round and
    end in the next; drawn for all tasks at once or one by one they are the same."""
    learner = conv(Reptile, 5, batch=4)
    torch.manual_seed(0)
    order = learner.minibatches(tasks=3, examples=10)
    assert order.shape == (3, 5, 4)
    rounds = order.flatten(1).unflatten(1, (2, 10))  # (tasks, 5 * 4) to (tasks, rounds, examples)
    assert (rounds.sort(-1).values == torch.arange(10)).all()
    assert len({tuple(each.tolist()) for each in rounds.flatten(0, 1)}) == 6
    torch.manual_seed(0)
    assert torch.equal(order, torch.cat([learner.minibatches(1, 10) for _ in range(3)]))


@pytest.mark.parametrize("epsilon", [1.0, 0.25])
def test_reptile_takes_its_outer_step(epsilon):
    """`theta + epsilon * (phi - theta)`, with the epsilon that meta_train is given."""
    learner, state = small(Reptile, lr=0.01, steps=2, batch=4), torch.get_rng_state()
    theta = flat(learner.parameters())
    loss, _ = learner.meta_loss(blob_tasks().sample())
    expected = theta - epsilon * gradient(loss, list(learner.parameters()))
    torch.set_rng_state(state)
    meta_train(learner, blob_tasks(), 1, lr=epsilon, progress=False)
    torch.testing.assert_close(flat(learner.parameters()), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, theta, atol=1e-3)


@VECTORISE
def test_reptile_learns_only_what_it_adapts(vectorise):
    """Theta moves towards phi, so what stays in the inner steps stays in training."""
    learner = conv(Reptile, 3, only=["head"], vectorise=vectorise)
    learner.meta_loss(images_to_learn())[0].backward()
    learning = {name for name, p in learner.net.named_parameters() if p.grad.any()}
    assert learning == {"head.weight", "head.bias"}


@TRANSDUCTIVE
def test_reptile_shows_what_it_would_predict(transductive):
    """In training too, queries are normalised as the learner says; every phi has seen them all."""
    learner, e = conv(Reptile, 2, batch=99, transductive=transductive), images_to_learn()
    x, y = all_of(e)
    batch_norm_mode(learner.net, fused=False)
    for k, found in enumerate(learner.meta_loss(e)[1]):
        f = adapt(
            learner.net, lambda f, k=k: F.cross_entropy(f(x[k]), y[k]), learner.optimizer(), 2
        )
        torch.testing.assert_close(found, learner._predict(f, e.support_x[k], e.query_x[k]))


# The parts of MAML++


def parts_of_maml_pp(steps=3, kind=MAML, **options):
    """A learner with all of them, in the middle of the annealing."""
    given = {"learned_rates": True, "multi_step_loss": 10} | options
    learner = conv(kind, steps, norm=partial(StepBatchNorm, steps=steps), **given)
    if learner.multi_step_loss:
        learner.meta_steps += 4
    return learner


@pytest.mark.parametrize("kind", [MAML, ANIL])
@pytest.mark.parametrize("steps", [1, 3])
@VECTORISE
def test_meta_gradient_of_maml_pp_by_finite_differences(kind, steps, vectorise):
    learner = parts_of_maml_pp(steps, kind, vectorise=vectorise)
    e = images_to_learn()
    assert slope_error(lambda: learner.meta_loss(e)[0], list(learner.parameters())) < 1e-8


@pytest.mark.parametrize("kind", [MAML, FOMAML, ANIL])
def test_loop_equals_vmap_in_maml_pp(kind):
    e, found = images_to_learn(tasks=3), []
    for vectorise in (True, False):
        learner = parts_of_maml_pp(kind=kind, vectorise=vectorise)
        loss, predictions = learner.meta_loss(e)
        slope = gradient(loss, list(learner.parameters()))
        tested = predict(learner.eval(), e)
        kept = [x for name, x in learner.net.named_buffers()]
        found.append((flat([loss]), flat([predictions]), slope, flat([tested]), flat(kept)))
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-12


@VECTORISE
def test_multi_step_loss_is_the_weighted_sum_over_the_steps(vectorise):
    learner = conv(MAML, 3, multi_step_loss=10, vectorise=vectorise)
    e = images_to_learn()
    plain = conv(MAML, 3, vectorise=vectorise)
    after = plain.after_steps(e.support_x, e.support_y, e.query_x, [1, 2, 3])
    losses = [plain.loss(after[:, k], e.query_y) for k in range(3)]
    for meta_step, weights in (
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (5, [1 / 6, 1 / 6, 2 / 3]),
        (10, [0, 0, 1]),
        (99, [0, 0, 1]),
    ):
        learner.meta_steps.fill_(meta_step)
        assert learner.step_weights() == pytest.approx(weights)
        loss, predictions = learner.meta_loss(e)
        expected = sum(w * each for w, each in zip(weights, losses, strict=True))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(predictions, after[:, -1])
    learner.meta_steps.fill_(0)
    torch.testing.assert_close(learner.eval().meta_loss(e)[0], losses[-1])


def test_meta_steps_are_counted_once_an_episode_and_kept():
    learner = small(MAML, steps=2, multi_step_loss=4)
    meta_train(learner, blob_tasks(tasks=3), 3, progress=False)
    assert learner.state_dict()["meta_steps"] == 3
    assert learner.step_weights() == pytest.approx([1 / 8, 7 / 8])


def test_learned_rates_start_alike_and_part():
    """One for each tensor and step, each with a meta-gradient of its own."""
    learner, e = conv(MAML, 3, learned_rates=True), images_to_learn()
    same = conv(MAML, 3)
    same.lr = float(learner.rates[0]["head_bias"].detach())  # 0.1 in single precision
    torch.testing.assert_close(predict(learner, e), predict(same, e), rtol=1e-12, atol=1e-12)
    names = [name.replace(".", "_") for name, _ in learner.net.named_parameters()]
    assert [set(each) for each in learner.rates] == [set(names)] * 3
    slopes = torch.autograd.grad(learner.meta_loss(e)[0], list(learner.rates.parameters()))
    assert len({round(float(s), 12) for s in slopes if s.abs() > 1e-9}) > 20
    with torch.no_grad():
        learner.rates[2]["head_bias"] += 0.1
    assert relative(predict(learner, e), predict(same, e)) > 1e-3


@VECTORISE
def test_statistics_of_a_step_are_those_of_batches_at_that_step(vectorise):
    """Of support sets at phi_0 and phi_1, of queries at phi_2: a share of the mean over tasks."""
    steps = 2
    learner = small(MAML, partial(StepBatchNorm, steps=steps), steps=steps, vectorise=vectorise)
    e = blob_tasks(tasks=3).sample()
    convolution, norm = learner.net.embed[0], learner.net.embed[1]
    plain = small(MAML, steps=steps)
    wanted_mean, wanted_var = torch.zeros(steps + 1, 8), torch.ones(steps + 1, 8)
    for k in range(steps + 1):
        means, variances = [], []
        for x, y, q in zip(e.support_x, e.support_y, e.query_x, strict=True):
            options = {"optimizer": plain.optimizer(), "steps": k}
            f = adapt(plain.net, lambda f, x=x, y=y: F.cross_entropy(f(x), y), **options)
            own = {
                n.removeprefix("embed.0."): p for n, p in f.parameters.items() if "embed.0." in n
            }
            seen = torch.func.functional_call(convolution, own, (q if k == steps else x,))
            means.append(seen.mean((0, 2, 3)))
            variances.append(seen.var((0, 2, 3), correction=0))
        share = 1 - (1 - StepBatchNorm.momentum) ** e.tasks
        wanted_mean[k] = share * torch.stack(means).mean(0)
        wanted_var[k] = 1 - share + share * torch.stack(variances).mean(0)
    learner(e.support_x, e.support_y, e.query_x)
    torch.testing.assert_close(norm.mean, wanted_mean.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.var, wanted_var.detach(), rtol=1e-4, atol=1e-6)


@VECTORISE
def test_with_statistics_of_each_step_queries_do_not_see_one_another(vectorise):
    learner = parts_of_maml_pp(vectorise=vectorise)
    e = images_to_learn()
    assert not learner.transductive
    assert relative(one_by_one(learner, e), predict(learner, e)) > 1e-3  # in training they do
    learner.eval()
    torch.testing.assert_close(one_by_one(learner, e), predict(learner, e))


def test_queries_are_normalised_by_the_statistics_of_their_step():
    learner, e = parts_of_maml_pp().eval(), images_to_learn()
    tensors = e.support_x, e.support_y, e.query_x
    with torch.no_grad():
        before = learner.after_steps(*tensors, range(4))
    for k in range(4):
        changed = copy.deepcopy(learner)
        changed.net.embed.blocks[0][1].mean[k] += 1
        with torch.no_grad():
            after = changed.after_steps(*tensors, range(4))
        moved = [relative(after[:, j], before[:, j]) > 1e-6 for j in range(4)]
        assert moved == [j == k for j in range(4)]


def test_statistics_are_the_same_for_all_tasks_at_once_and_one_after_another():
    found = []
    for vectorise in (True, False):
        norm = partial(StepBatchNorm, steps=2)
        learner, e = small(MAML, norm, steps=2, vectorise=vectorise), blob_tasks(tasks=8).sample()
        for _ in range(20):
            list(learner.pieces(e))
        found.append(flat(x for name, x in learner.net.named_buffers()))
    assert relative(*found) < 0.02


def test_maml_pp_leaves_no_trace_of_an_evaluation_and_resumes(tmp_path):
    def make():
        norm = partial(StepBatchNorm, steps=2)
        return small(MAML, norm, steps=2, learned_rates=True, multi_step_loss=8)

    learner = make()
    before = weights_of(learner)
    train_on_blobs(learner, tmp_path / "first")
    changed = [name for name, x in learner.state_dict().items() if not torch.equal(x, before[name])]
    assert {"meta_steps", "rates.0.head_weight", "net.embed.1.mean"} <= set(changed)
    check_that_evaluation_leaves_no_trace(learner)
    check_that_a_stopped_training_resumes(make, 15, tmp_path)
    assert learner.extra_repr() != small(MAML, steps=2).extra_repr()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: small(MAML, steps=2, test_steps=3, learned_rates=True), "test_steps=3 is above"),
        (lambda: small(MAML, multi_step_loss=-1), "multi_step_loss is -1"),
        (lambda: small(Reptile, partial(StepBatchNorm, steps=1)), "Reptile keeps no running"),
        (lambda: small(Reptile, batch=0), "batch is 0"),
    ],
)
def test_parts_of_maml_pp_that_do_not_fit(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("kind", "option"),
    [(MetaSGD, "learned_rates"), (Reptile, "learned_rates"), (Reptile, "multi_step_loss")],
)
def test_what_a_method_has_no_use_for_is_no_option_of_it(kind, option):
    with pytest.raises(TypeError, match=option):
        small(kind, **{option: 1})


# Frozen parameters


@pytest.mark.parametrize("kind", [*LEARNERS, MetaLSTM])
@VECTORISE
def test_frozen_weights_are_the_same_to_the_last_bit_after_training(kind, vectorise):
    """Neither the inner loop nor Adam sees them, nor does the clip; all others learn."""
    options = {} if kind is MetaLSTM else {"vectorise": vectorise}
    learner = small(kind, nn.BatchNorm2d if kind is MetaLSTM else BatchNorm, **options)
    learner.net.embed.requires_grad_(False)
    learner.net.head.bias.requires_grad_(False)
    before = weights_of(learner.net)
    meta_train(learner, blob_tasks(tasks=2), 3, lr=0.1, progress=False, clip=1.0)
    after = learner.net.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "head.weight"
    }
    assert all(p.grad is None for p in learner.net.embed.parameters())


@ALL
@VECTORISE
def test_frozen_body_leaves_an_inner_loop_of_the_head(kind, vectorise):
    """The same as naming what adapts, with no gradient for what does not."""
    if kind is ANIL:
        pytest.skip("it adapts the head in any case")
    e, found = images_to_learn(), []
    for options in ({"only": ["head"]}, {}):
        learner = conv(kind, 3, vectorise=vectorise, **options)
        if not options:
            learner.net.embed.requires_grad_(False)
        loss, predictions = learner.meta_loss(e)
        found.append((predictions, gradient(loss, list(learner.net.head.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    learner.meta_loss(e)[0].backward()
    assert all(p.grad is None for p in learner.net.embed.parameters())


def test_learner_with_nothing_left_to_adapt():
    learner, e = conv(ANIL), images_to_learn()
    learner.net.head.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^head\.weight, head\.bias: all that could adapt is froz"
    ):
        learner(e.support_x, e.support_y, e.query_x)


# Transduction


@ALL
@STRIDED
@pytest.mark.parametrize("norm", [BatchNorm, group_norm])
@TRANSDUCTIVE
def test_queries_one_at_a_time(kind, strided, norm, transductive):
    """Change nothing for a learner that calls itself inductive, and much for a transductive one."""
    learner, e = conv(kind, 2, strided, norm, transductive=transductive).eval(), images_to_learn()
    assert learner.transductive == (transductive and norm is BatchNorm)
    together, alone = predict(learner, e), one_by_one(learner, e)
    if learner.transductive:
        assert relative(alone, together) > 0.01
    else:
        assert relative(alone, together) < 1e-12


def test_statistics_of_the_support_set_normalise_inductive_queries():
    """One step of rate nearly 0: the queries pass through the network of theta."""
    learner, e = conv(MAML, transductive=False, strided=False), images_to_learn(tasks=1)
    learner.lr = 1e-30
    h = torch.cat([e.support_x[0], e.query_x[0]])
    for convolution, norm, pool, relu in learner.net.embed.blocks:
        h = convolution(h).detach()
        mean, var = h[:6].mean((0, 2, 3)), h[:6].var((0, 2, 3), correction=0)
        h = relu(pool(F.batch_norm(h, mean, var, norm.weight, norm.bias)))
    expected = learner.net.head(h.flatten(1))[6:].detach()
    torch.testing.assert_close(predict(learner, e)[0], expected, rtol=1e-10, atol=1e-10)


@ALL
@TRANSDUCTIVE
def test_order_of_the_support_set_does_not_matter(kind, transductive):
    learner, e = conv(kind, 3, transductive=transductive).eval(), images_to_learn()
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    x, y = e.support_x[:, order], e.support_y[:, order]
    shuffled = Episode(x, y, e.query_x, e.query_y, e.classes)
    # Reptile's Adam enlarges rounding where a gradient is 0: its predictions keep fewer digits.
    bar = 1e-6 if kind is Reptile else 1e-10
    assert relative(predict(learner, shuffled), predict(learner, e)) < bar


# Steps and modes


@ALL
def test_evaluation_mode_takes_the_test_steps(kind):
    learner, e = conv(kind, 2, test_steps=5), images_to_learn()
    path = learner.after_steps(e.support_x, e.support_y, e.query_x, range(6)).detach()
    assert path.shape == (2, 6, 6, 3)
    torch.testing.assert_close(predict(learner.train(), e), path[:, 2])
    torch.testing.assert_close(predict(learner.eval(), e), path[:, 5])
    assert all(relative(a, b) > 1e-6 for a, b in pairwise(path.unbind(1)))
    assert conv(kind, 4).test_steps == 4


@ALL
@VECTORISE
def test_after_steps_gives_those_asked_for_in_order_of_steps(kind, vectorise):
    learner, e = conv(kind, vectorise=vectorise), images_to_learn()
    data = e.support_x, e.support_y, e.query_x
    few = learner.after_steps(*data, [0, 3])
    torch.testing.assert_close(few, learner.after_steps(*data, range(4))[:, [0, 3]])
    before = torch.stack([learner.net(x) for x in e.query_x])
    torch.testing.assert_close(few[:, 0], before)


@ALL
@VECTORISE
@TRANSDUCTIVE
def test_predicting_leaves_the_learner_as_it_was(kind, vectorise, transductive):
    learner = conv(kind, 2, vectorise=vectorise, transductive=transductive)
    before, e = weights_of(learner), images_to_learn()
    quiet = predict(learner, e)
    loud = learner(e.support_x, e.support_y, e.query_x)
    torch.testing.assert_close(quiet, loud.detach(), rtol=1e-12, atol=1e-12)
    learner.meta_loss(e)[0].backward()
    assert same_weights(weights_of(learner), before)


@ALL
@VECTORISE
def test_predictions_in_inference_mode(kind, vectorise):
    learner = conv(kind, 2, vectorise=vectorise).eval()
    expected = predict(learner, images_to_learn())
    with torch.inference_mode():
        e = images_to_learn()
        assert torch.equal(learner(e.support_x, e.support_y, e.query_x), expected)


@ALL
def test_evaluation_leaves_the_learner_as_it_was(kind):
    check_that_evaluation_leaves_no_trace(small(kind, group_norm, test_steps=3))


@TRANSDUCTIVE
def test_evaluation_tells_whether_queries_help_one_another(transductive):
    learner = conv(MAML, transductive=transductive).float()
    (score,) = evaluate(learner, blobs(size=16), [(3, 1)], queries=2, episodes=4)
    assert score.transductive is transductive
    assert ("3-way 1-shot, transductive: " in str(score)) is transductive


@ALL
@VECTORISE
def test_autocast_changes_nothing(kind, vectorise):
    """Half precision would cost the second derivative its digits."""
    learner, found = conv(kind, 3, vectorise=vectorise).float(), []
    for enabled in (False, True):
        torch.manual_seed(0)  # Reptile draws minibatches
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, predictions = learner.meta_loss(images_to_learn(dtype=torch.float32))
        found.append((predictions, gradient(loss, list(learner.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Watched(nn.Linear):
    """Notes whether convolutions would round where it is called."""

    def forward(self, x):
        self.seen.append(convolutions_round())
        return super().forward(x)


@ALL
@VECTORISE
def test_no_convolution_rounds_in_the_inner_loop(kind, vectorise):
    head, targets = Watched(8, 3), torch.arange(7).remainder(3).expand(2, 7)
    learner = kind(nn.Sequential(OrderedDict(body=nn.Linear(5, 8), head=head)), vectorise=vectorise)
    learner.ways, head.seen = 3, []  # known, so that no call only counts the outputs
    learner.meta_loss(Episode(*task([0, 1, 2]), targets))[0].backward()
    predict(learner.eval(), Episode(*task([0, 1, 2]), targets))
    assert len(head.seen) > 3
    assert not any(head.seen)
    assert convolutions_round()


# What is refused


@ALL
@pytest.mark.parametrize("labels", [[-1, 0, 1], [0, 1, 3]])
def test_label_out_of_range(kind, labels):
    learner, e = conv(kind), images_to_learn(shots=1)
    told = rf"^Support labels run from {labels[0]} to {labels[-1]}, but the network has 3 outputs"
    with pytest.raises(ValueError, match=told):
        learner(e.support_x, torch.tensor([labels, labels]), e.query_x)


@ALL
@pytest.mark.parametrize(
    ("net", "options", "sentence"),
    [
        (nn.ReLU, {}, "^The network has no parameters, so there is nothing to adapt"),
        (
            lambda: classifier(Conv4(width=4), 4, 3), {},
            r"^embed\.blocks\.0\.1 is BatchNorm2d, whose statistics would mix tasks: .*norm=B",
        ),
        (mlp, {"lr": 0.0}, r"^The inner rate is 0\.0; it must be above 0"),
        (mlp, {"lr": -0.1}, r"^The inner rate is -0\.1; it must be above 0"),
        (mlp, {"steps": 0}, "^steps=0, test_steps=None: at least 1 and 0 are needed"),
        (mlp, {"test_steps": -1}, "test_steps=-1: at least 1 and 0 are needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_made(kind, net, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(net(), **options)


def test_anil_needs_a_head():
    learner, e = ANIL(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double()), images_to_learn()
    with pytest.raises(ValueError, match="^only='head' names none of the parameters 1.weight, 1.b"):
        learner(e.support_x, e.support_y, e.query_x)


# Learning


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (MAML, {}, 200),
        (FOMAML, {}, 200),
        (ANIL, {}, 200),
        (MetaSGD, {}, 200),
        (Reptile, {"lr": 5e-3, "steps": 5, "batch": 6, "test_steps": 2}, 80),
    ],
)
def test_training_raises_the_accuracy(kind, options, steps):
    rate = 0.5 if kind is Reptile else 1e-2
    learner = small(kind, **({"lr": 0.05} | options))

    def accuracy():
        return float(episode_accuracy(learner, blob_tasks(50, seed=3), 100).mean())

    before = accuracy()
    history = meta_train(learner, blob_tasks(), steps, lr=rate, progress=False)
    assert len(history.loss) == len(history.accuracy) == steps
    assert accuracy() > max(80, before + 10)


@VECTORISE
def test_interrupted_and_resumed_ends_bit_identical(tmp_path, vectorise):
    call = 8 if vectorise else 16  # where tasks are run one by one, each is one call
    make = partial(small, MAML, steps=2, vectorise=vectorise)
    check_that_a_stopped_training_resumes(make, call, tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"lr": 0.2}, "lr=0.4"), ({"steps": 2}, "steps=1"), ({"transductive": True}, "transductive")],
)
def test_resuming_with_another_inner_loop_is_refused(tmp_path, changed, told):
    train_on_blobs(small(MAML, transductive=False), tmp_path, steps=1)
    other = small(MAML, **({"transductive": False} | changed))
    before = weights_of(other)
    with pytest.raises(CheckpointMismatch, match=rf"was made with learner=.*{told}.*, not ") as got:
        train_on_blobs(other, tmp_path, steps=1)
    assert other.extra_repr() in str(got.value)
    assert same_weights(weights_of(other), before)


def test_sinusoids_are_learned():
    """Section 5.1 of Finn et al. 2017, for a moment: adapted predictions become far better."""
    torch.manual_seed(0)
    learner = MAML(mlp(), lr=0.01, steps=1)
    tasks = RegressionSampler(SINUSOIDS, shots=10, tasks=25)
    history = meta_train(learner, tasks, 800, lr=5e-3, progress=False)
    assert history.accuracy == []

    def error(steps):
        learner.test_steps = steps
        fresh = RegressionSampler(SINUSOIDS, shots=10, tasks=100, seed=1)
        return float(squared_errors(learner, fresh, 200).mean())

    assert error(1) < 0.5 * error(0)
    assert error(5) < error(1)
