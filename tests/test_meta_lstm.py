"""The Meta-LSTM: its cell, exact meta-gradients, batch normalisation, and that it learns."""

import math

import pytest
import torch
from helpers import (
    blob_tasks,
    check_that_a_stopped_training_resumes,
    check_that_evaluation_leaves_no_trace,
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
    train_on_blobs,
    weights_of,
)
from test_learned_optimizer import Noted, norms_seen_by_adam
from torch import nn
from torch.nn import functional as F

from metautils.adapt import SGD, adapt
from metautils.checkpoint import CheckpointMismatch
from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.evaluate import episode_accuracy
from metautils.learners import meta_lstm
from metautils.learners.learned_optimizer import log_sign
from metautils.learners.meta_lstm import MetaLSTM, MetaLSTMCell
from metautils.nets import BatchNorm, classifier, mlp
from metautils.train import meta_train

FIRST_ORDER = pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])


def running(channels):
    """Torch's batch normalisation, as the paper's: running averages that forget quickly."""
    return nn.BatchNorm2d(channels, momentum=0.95)


def own_batch(channels):
    """The same without running averages."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def conv_net(norm=running):
    """Two narrow blocks for `images_to_learn`."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), norm(4), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3), norm(4), nn.MaxPool2d(2), nn.ReLU()]
    return classifier(nn.Sequential(*layers, nn.Flatten()), 16, 3)


def smooth_net():
    torch.manual_seed(0)
    return classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh()), 4, 3)


def lively(cell):
    """Weights as large as after a training: every input of the gates matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (cell.W_F, cell.W_I, *cell.first.parameters()):
            p.uniform_(-0.6, 0.6)
        cell.b_F.fill_(2.5)
        cell.b_I.fill_(-1.0)


def conv(norm=running, steps=3, **options):
    """A learner in float64 whose steps are long enough to see."""
    net = conv_net(norm)
    learner = MetaLSTM(net, steps, hidden=5, **options).double()
    lively(learner.cell)
    return learner


def smooth(steps=4, **options):
    learner = MetaLSTM(smooth_net(), steps, hidden=5, **options).double()
    lively(learner.cell)
    return learner


def small_images():
    return images_to_learn(size=4)


def fields(e):
    return e.support_x, e.support_y, e.query_x, e.query_y, e.classes


def fit(x, y):
    """The loss of a support set."""
    return lambda f: F.cross_entropy(f(x), y) if y.dtype == torch.int64 else F.mse_loss(f(x), y)


# The cell


def test_number_of_parameters():
    """4 h (4 + h + 1) for the LSTM below; for either gate h + 2 weights and a bias."""
    sizes = [p.numel() for p in MetaLSTMCell(20).parameters()]
    assert sum(sizes) == 80 * 25 + 2 * 23 == 2046
    learner = MetaLSTM(smooth_net())
    c_0 = sum(p.numel() for p in learner.net.parameters())
    assert sum(p.numel() for p in learner.parameters()) == 2046 + c_0


def test_cell_is_that_of_the_paper():
    """Coordinate by coordinate, with torch's LSTM below, and the gates written out."""
    torch.manual_seed(0)
    cell = MetaLSTMCell(5).double()
    lively(cell)
    lstm = nn.LSTMCell(4, 5).double()
    with torch.no_grad():
        lstm.weight_ih.copy_(cell.first.weight[:, :4])
        lstm.weight_hh.copy_(cell.first.weight[:, 4:])
        lstm.bias_ih.copy_(cell.first.bias[:, 0])
        lstm.bias_hh.zero_()
    g = torch.Generator().manual_seed(0)
    phi = {"a": torch.randn(2, 2, generator=g).double(), "b": torch.randn(3, generator=g).double()}
    c, f, i, memory, state = flat(phi.values()), torch.zeros(7), torch.zeros(7), None, {}
    for k in range(4):
        slopes = {n: torch.randn(p.shape, generator=g).double() for n, p in phi.items()}
        loss = torch.rand((), generator=g).double()
        phi, state = cell.step(phi, slopes, state, k, loss)
        slope = flat(slopes.values())
        seen = torch.cat([log_sign(slope).T, log_sign(loss.repeat(7)).T], 1)
        memory = lstm(seen, memory)
        f, i = (
            torch.sigmoid(torch.cat([memory[0], c[:, None], gate[:, None]], 1) @ W + b)
            for W, b, gate in ((cell.W_F, cell.b_F, f), (cell.W_I, cell.b_I, i))
        )
        c = f * c - i * slope
        torch.testing.assert_close(flat(phi.values()), c.detach(), rtol=1e-12, atol=1e-12)
        assert phi["a"].shape == (2, 2)


@pytest.mark.parametrize("make", [lambda: mlp(width=6), lambda: conv_net(BatchNorm)],
                         ids=["mlp", "conv"])  # fmt: skip
@FIRST_ORDER
def test_with_gates_of_1_and_alpha_it_is_gradient_descent(make, first_order):
    torch.manual_seed(0)
    alpha, cell, net = 0.07, MetaLSTMCell(4).double(), make().double()
    with torch.no_grad():
        for p in cell.parameters():
            p.zero_()
        cell.b_F.fill_(40)  # of which the sigmoid is 1 to the last bit
        cell.b_I.fill_(math.log(alpha / (1 - alpha)))
    e = images_to_learn()
    x, y = e.support_x[0], e.support_y[0]
    if isinstance(net.embed[0], nn.Linear):
        x, y = x.flatten()[:6, None], x.flatten()[6:12, None]
    for steps in (1, 2, 5):
        found = adapt(net, fit(x, y), cell, steps, first_order=first_order)
        expected = adapt(net, fit(x, y), SGD(alpha), steps, first_order=first_order)
        assert (found.state["f"] == 1).all()
        for name, p in expected.parameters.items():
            torch.testing.assert_close(found.parameters[name], p, rtol=1e-12, atol=1e-12)
        assert relative(flat(expected.parameters.values()), flat(net.parameters())) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_fresh_cell_starts_as_gradient_descent_with_small_steps(seed):
    torch.manual_seed(seed)
    cell, net, e = MetaLSTMCell(), conv_net(), images_to_learn(dtype=torch.float32)
    f = adapt(net, fit(e.support_x[0], e.support_y[0]), cell)
    assert 0.98 < f.state["f"].min()
    assert f.state["f"].max() < 1
    assert 0.006 < f.state["i"].min()
    assert f.state["i"].max() < 0.02


def test_fresh_cells_are_the_same_after_the_same_seed_only():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(MetaLSTMCell(3).state_dict())
    assert same_weights(made[0], made[1])
    assert all((made[0][name] != made[2][name]).all() for name in made[0])


# Meta-gradients


def test_meta_gradient_by_finite_differences():
    """With nothing held fixed, for the start and for the cell."""
    learner, e = smooth(first_order=False), small_images()
    for part in (learner.net, learner.cell):
        assert slope_error(lambda: learner.meta_loss(e)[0], list(part.parameters())) < 1e-7


def test_gradients_and_losses_held_fixed_give_the_gradient_of_the_paper(monkeypatch):
    """Steps that read gradients and losses of other steps from notes, whatever their own are.

    Their slope by finite differences is the meta-gradient with both taken as constants.
    """
    learner, e, written = smooth(), small_images(), []
    parts = [list(part.parameters()) for part in (learner.net, learner.cell)]
    found = [gradient(learner.meta_loss(e)[0], leaves) for leaves in parts]

    def noting():
        written.append(Noted(learner.cell))
        return written[-1]

    monkeypatch.setattr(learner, "optimizer", noting)
    learner.meta_loss(e)
    assert [len(noted.notes) for noted in written] == [4, 4]  # four steps of either task

    def replayed():
        tasks = iter(written)
        monkeypatch.setattr(learner, "optimizer", lambda: Noted(learner.cell, next(tasks).notes))
        return learner.meta_loss(e)[0]

    full = smooth(first_order=False)
    exact = [gradient(full.meta_loss(e)[0], list(p.parameters())) for p in (full.net, full.cell)]
    for leaves, slope, other in zip(parts, found, exact, strict=True):
        assert slope_error(replayed, leaves) < 1e-7
        assert relative(slope, gradient(replayed(), leaves)) < 1e-10
        assert relative(other, slope) > 1e-3  # so the difference is one that this test sees


def test_start_and_cell_get_meta_gradients():
    """In every parameter: the gates' own memory has a part from the second step on."""
    learner, e = MetaLSTM(smooth_net(), steps=2), images_to_learn(size=4, dtype=torch.float32)
    learner.meta_loss(e)[0].backward()
    for name, p in learner.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        assert p.grad.isfinite().all(), name
    assert learner.cell.W_F.grad.all() and learner.cell.W_I.grad.all()


@pytest.mark.parametrize("norm", [running, BatchNorm, group_norm])
def test_second_order_gives_the_same_predictions_and_another_gradient(norm):
    e, found = images_to_learn(), []
    for first_order in (True, False):
        learner = conv(norm, first_order=first_order)
        loss, predictions = learner.meta_loss(e)
        found.append((predictions.detach(), gradient(loss, list(learner.parameters()))))
    (predictions, slope), (others, exact) = found
    torch.testing.assert_close(predictions, others, rtol=1e-10, atol=1e-10)
    assert exact.isfinite().all()
    assert relative(exact, slope) > 1e-3


def test_second_order_through_batch_normalisation_by_finite_differences():
    learner, e = conv(first_order=False, steps=2), images_to_learn(tasks=1)
    assert slope_error(lambda: learner.meta_loss(e)[0], list(learner.parameters())) < 1e-7


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_inner_gradients_are_clipped(monkeypatch, clip):
    learner, e, noted = smooth(clip=clip), small_images(), []

    def noting():
        noted.append(Noted(learner.cell))
        return noted[-1]

    monkeypatch.setattr(learner, "optimizer", noting)
    predict(learner, e)
    norms = torch.stack([flat(g.values()).norm() for task in noted for g, _ in task.notes])
    assert len(norms) == 8
    if clip == 0.05:
        torch.testing.assert_close(norms, torch.full((8,), clip).double())
    else:
        assert (norms > 0.05).all()


# Batch normalisation


def test_training_normalises_queries_by_their_own_batch():
    """As a network that keeps no statistics does at all times."""
    learner, other, e = conv(), conv(own_batch), images_to_learn()
    torch.testing.assert_close(predict(learner, e), predict(other, e), rtol=1e-12, atol=1e-12)
    assert relative(one_by_one(learner, e), predict(learner, e)) > 0.01


def test_tested_queries_do_not_see_one_another():
    learner, e = conv().eval(), images_to_learn()
    together = predict(learner, e)
    torch.testing.assert_close(one_by_one(learner, e), together, rtol=1e-10, atol=1e-10)
    assert relative(predict(learner.train(), e), together) > 0.01
    single = conv().float().eval()
    f = images_to_learn(dtype=torch.float32)
    assert (one_by_one(single, f) - predict(single, f)).abs().max() < 1e-5


def test_tested_queries_see_the_running_averages_of_their_task():
    """Steps by own batch, and averages over their batches, 0.05 of the old and 0.95 of the new."""
    learner, e = conv(steps=3).eval(), images_to_learn()
    found = predict(learner, e)
    net = conv_net(own_batch).double()
    for task in range(2):
        averages = [(torch.zeros(4).double(), torch.ones(4).double()) for _ in range(2)]
        f = None
        for steps in range(3):
            # The batch statistics of the support set in the network after so many steps.
            loss = fit(e.support_x[task], e.support_y[task])
            f = adapt(net, loss, learner.cell, steps, first_order=True, clip=10.0)
            h = e.support_x[task]
            for block in range(2):
                name = f"embed.{4 * block}"
                h = F.conv2d(h, f.parameters[f"{name}.weight"], f.parameters[f"{name}.bias"])
                var, mean = torch.var_mean(h, (0, 2, 3))
                averages[block] = tuple(
                    0.05 * old + 0.95 * new.detach()
                    for old, new in zip(averages[block], (mean, var), strict=True)
                )
                name = f"embed.{4 * block + 1}"
                h = F.batch_norm(h, None, None, f.parameters[f"{name}.weight"],
                                 f.parameters[f"{name}.bias"], training=True)  # fmt: skip
                h = F.max_pool2d(h, 2).relu()
        end = adapt(net, loss, learner.cell, 3, first_order=True, clip=10.0)
        tested = conv_net().double()
        tested.load_state_dict(
            {name: p.detach() for name, p in end.parameters.items()}
            | {f"embed.{4 * k + 1}.running_mean": averages[k][0] for k in range(2)}
            | {f"embed.{4 * k + 1}.running_var": averages[k][1] for k in range(2)},
            strict=False,
        )
        expected = tested.eval()(e.query_x[task]).detach()
        torch.testing.assert_close(found[task], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_no_statistics_leak(mode):
    """From task to task, from call to call, or into the module: each is as if it were the first."""
    learner, e = conv().train(mode), images_to_learn(tasks=1)
    other = images_to_learn(tasks=1, seed=5)
    twice = Episode(*(x.repeat_interleave(2, 0) for x in fields(e)))
    before = weights_of(learner)
    alone = predict(learner, e)
    assert torch.equal(predict(learner, twice), alone.repeat(2, 1, 1))
    predict(learner, other)
    assert torch.equal(predict(learner, e), alone)
    both = Episode(*map(torch.cat, zip(fields(other), fields(e), strict=True)))
    assert torch.equal(predict(learner, both)[1:], alone)
    assert same_weights(weights_of(learner), before)
    assert (learner.net.embed[1].running_mean == 0).all()


def test_mode_of_the_learner_can_be_changed_and_changed_back():
    learner, e = conv(), images_to_learn()
    before, training = weights_of(learner), predict(learner, e)
    tested = predict(learner.eval(), e)
    assert not learner.training
    assert torch.equal(predict(learner.train(), e), training)
    assert learner.training
    assert torch.equal(predict(learner.eval(), e), tested)
    assert same_weights(weights_of(learner), before)
    # Between two calls the network is ready for inner steps.
    assert all(layer.training for layer in learner.net.modules())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_failed_prediction_leaves_the_modes_as_they_were(mode):
    """Queries of another size than the network's: the next task is told nothing of it."""
    learner, e = conv().train(mode), images_to_learn()
    expected = predict(learner, e)
    with pytest.raises(RuntimeError):
        learner(e.support_x, e.support_y, e.query_x[..., :12])
    assert torch.equal(predict(learner, e), expected)


def test_network_given_in_evaluation_mode_makes_the_same_steps():
    learner, e = conv(), images_to_learn()
    resting = MetaLSTM(conv_net().eval(), 3, hidden=5).double()
    lively(resting.cell)
    torch.testing.assert_close(predict(resting, e), predict(learner, e), rtol=0, atol=0)


def test_evaluation_leaves_the_learner_as_it_was():
    check_that_evaluation_leaves_no_trace(small(steps=2))


def test_steps_of_tests_are_those_of_training():
    learner, e = conv(group_norm, steps=3), images_to_learn()
    path = learner.after_steps(e.support_x, e.support_y, e.query_x, range(5)).detach()
    for mode in (True, False):
        torch.testing.assert_close(predict(learner.train(mode), e), path[:, 3])


# Learning


def small(norm=running, steps=3, **options):
    """A learner on one block, for `blobs`."""
    return MetaLSTM(one_block(norm), steps, **options)


@pytest.mark.parametrize("norm", [running, group_norm])
def test_training_raises_the_accuracy(norm):
    learner = small(norm)

    def accuracy():
        return float(episode_accuracy(learner, blob_tasks(25, seed=3), 50).mean())

    before = accuracy()
    history = meta_train(learner, blob_tasks(4), 40, lr=1e-2, progress=False)
    assert len(history.loss) == len(history.accuracy) == 40
    assert accuracy() > max(70, before + 15)


def test_training_moves_start_and_cell():
    learner = small()
    before = weights_of(learner)
    meta_train(learner, blob_tasks(2), 1, progress=False)
    after = learner.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name, _ in learner.named_buffers()}


def test_regression_is_learned_as_well():
    learner = MetaLSTM(mlp(width=10), steps=3)
    history = meta_train(learner, RegressionSampler(SINUSOIDS, 5, tasks=8), 3, progress=False)
    assert all(map(math.isfinite, history.loss))
    assert history.accuracy == []


def test_interrupted_and_resumed_ends_bit_identical(tmp_path):
    """In the second task of the eighth episode: each is one call."""
    check_that_a_stopped_training_resumes(small, 16, tmp_path)


def test_settings_are_told():
    told = "steps=3, hidden=20, first_order=True, only=(), clip=10.0"
    assert small().extra_repr() == told
    changed = small(steps=7, hidden=4, clip=2.0, first_order=False).extra_repr()
    assert changed == "steps=7, hidden=4, first_order=False, only=(), clip=2.0"


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"steps": 2}, "steps=3"), ({"clip": 1.0}, "clip=10.0"), ({"first_order": False}, "er=True")],
)
def test_resuming_with_another_inner_loop_is_refused(tmp_path, changed, told):
    train_on_blobs(small(), tmp_path, steps=1)
    with pytest.raises(CheckpointMismatch, match=f"was made with learner=.*{told}.*, not "):
        train_on_blobs(small(**changed), tmp_path, steps=1)


def test_meta_gradient_is_clipped_at_a_quarter(monkeypatch):
    """And Adam takes one step an episode, though its tasks are run one by one."""
    found = {}
    for clip in (meta_lstm.CLIP, None):
        found[clip] = norms_seen_by_adam(monkeypatch, small(), blob_tasks(2), clip=clip)
    assert len(found[0.25]) == len(found[None]) == 3
    assert found[None][0] > 0.5
    assert found[0.25][0] == pytest.approx(0.25, rel=1e-4)


def test_autocast_changes_nothing():
    """Half precision would cost the meta-gradient its digits."""
    learner, found = conv().float(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, predictions = learner.meta_loss(images_to_learn(dtype=torch.float32))
        found.append((predictions, gradient(loss, list(learner.parameters()))))
    assert all(map(torch.equal, *found))


# What is refused


@pytest.mark.parametrize(
    ("net", "options", "sentence"),
    [
        (nn.ReLU, {}, "^The network has no parameters, so there is nothing to adapt"),
        (mlp, {"steps": 0}, "^steps=0, test_steps=None: at least 1 and 0 are needed"),
    ],
)
def test_what_cannot_be_made(net, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MetaLSTM(net(), **options)


@pytest.mark.parametrize("hidden", [0, -1])
def test_hidden_must_be_positive(hidden):
    with pytest.raises(ValueError, match=f"hidden.*{hidden}"):
        MetaLSTM(mlp(), hidden=hidden)


@pytest.mark.parametrize("labels", [[-1, 0, 1], [0, 1, 3]])
def test_label_out_of_range(labels):
    learner, e = conv(), images_to_learn(shots=1)
    told = rf"^Support labels run from {labels[0]} to {labels[-1]}, but the network has 3 outputs"
    with pytest.raises(ValueError, match=told):
        learner(e.support_x, torch.tensor([labels, labels]), e.query_x)


def test_memory_of_other_coordinates_is_refused():
    cell, phi = MetaLSTMCell(3), {"w": torch.ones(4)}
    _, state = cell.step(phi, phi, {}, 0, torch.tensor(1.0))
    phi = {"w": torch.ones(3), "b": torch.ones(3)}
    sentence = r"^The optimiser remembers 4 coordinates but is given 6 at inner step 2: parameters"
    with pytest.raises(ValueError, match=sentence):
        cell.step(phi, phi, state, 1, torch.tensor(1.0))


@FIRST_ORDER
@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("clip", [None, 10.0])
def test_gradient_that_is_not_finite_is_told(first_order, factor, k, clip):
    """With its parameter, and no other, and its step; the network is left as it was."""
    torch.manual_seed(0)
    net, cell = mlp(width=4), MetaLSTMCell(4)
    before = weights_of(net), weights_of(cell)

    def loss(f):
        value = f(torch.ones(3, 1)).square().mean()
        return value + factor * f.parameters["head.bias"].sum() if f.k == k else value

    sentence = rf"^The inner gradient of head\.bias is not finite at inner step {k + 1} of the unro"
    with pytest.raises(FloatingPointError, match=sentence) as caught:
        adapt(net, loss, cell, 4, first_order=first_order, clip=clip)
    assert "\n" not in str(caught.value)
    after = net.state_dict(), cell.state_dict()
    assert all(same_weights(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_bad_inputs_are_told_at_the_first_step(mode):
    learner, e = conv().train(mode), images_to_learn()
    before, expected = weights_of(learner), predict(learner, e)
    bad = e.support_x.clone()
    bad[1, 0, 0, 3, 3] = math.inf
    sentence = r"^The inner gradient of .*embed\.0\.weight.* is not finite at inner step 1 of the u"
    with pytest.raises(FloatingPointError, match=sentence):
        learner(bad, e.support_y, e.query_x)
    assert same_weights(weights_of(learner), before)
    assert torch.equal(predict(learner, e), expected)


def test_loss_that_is_not_finite_is_told():
    """Targets of 1e20: in single precision their square is infinite, but not the gradient."""
    torch.manual_seed(0)
    learner, x = MetaLSTM(mlp(width=4), steps=2), torch.ones(1, 3, 1)
    e = Episode(x, 1e20 * x, x, x)
    with pytest.raises(FloatingPointError, match="not finite at inner step 1"):
        learner.meta_loss(e)
