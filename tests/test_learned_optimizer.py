"""The LSTM optimiser: its parts, exact meta-gradients, truncation, and that it learns."""

import copy
import math
from functools import partial
from itertools import islice

import pytest
import torch
from helpers import elsewhere, flat, gradient, predict, relative, same_weights, slope_error
from torch import nn
from torch.nn import functional as F

from metautils.adapt import SGD, Adam, adapt, inner_steps
from metautils.checkpoint import CHECKPOINT, CheckpointMismatch
from metautils.data.quadratics import QuadraticSampler
from metautils.episode import Episode
from metautils.files import load_safely
from metautils.learners.base import task_loss
from metautils.learners.learned_optimizer import (
    FLOOR,
    Copies,
    FromScratch,
    LSTMCell,
    LSTMOptimizer,
    coordinates,
    log_sign,
    named,
)
from metautils.nets import classifier, mlp
from metautils.train import meta_train

FIRST_ORDER = pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])


def random(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def quadratics(dimensions=3, tasks=2, seed=0):
    """An episode in float64."""
    e = QuadraticSampler(dimensions, tasks, seed=seed).sample()
    return Episode(*(x.double() for x in (e.support_x, e.support_y, e.query_x, e.query_y)))


def linear(dimensions=3):
    """A model of so many numbers, as `QuadraticSampler` wants it."""
    return nn.Linear(dimensions, 1, bias=False).double()


def learned(hidden=6, seed=0, **options):
    torch.manual_seed(seed)
    return LSTMOptimizer(hidden, **options).double()


def lively():
    """An optimiser whose steps are large and depend on the gradients, as those of a trained one."""
    optimizer = learned(scale=0.3)
    with torch.no_grad():
        for p in optimizer.parameters():
            p *= 3
        optimizer.output.bias.zero_()
    return optimizer


class Noted:
    """Makes the steps of another optimiser and writes down its gradients and losses.

    Given such notes it makes the steps from them instead, whatever the gradients are now.
    """

    def __init__(self, optimizer, notes=None):
        self.optimizer, self.read, self.notes = optimizer, notes, []

    def step(self, phi, gradients, state, k, loss):
        if self.read is not None:
            gradients, loss = self.read[k]
        self.notes.append(({name: g.detach() for name, g in gradients.items()}, loss.detach()))
        return self.optimizer.step(phi, gradients, state, k, loss)


class Still:
    """Makes no step at all."""

    def step(self, phi, gradients, state, k, loss):
        return phi, {}


# The LSTM


@pytest.mark.parametrize(("inputs", "hidden", "n"), [(2, 5, 7), (4, 3, 1), (1, 1, 6)])
def test_cell_is_that_of_torch(inputs, hidden, n):
    """With coordinates last, and one bias where torch adds two."""
    torch.manual_seed(0)
    theirs, ours = nn.LSTMCell(inputs, hidden).double(), LSTMCell(inputs, hidden).double()
    with torch.no_grad():
        ours.weight.copy_(torch.cat([theirs.weight_ih, theirs.weight_hh], 1))
        ours.bias.copy_((theirs.bias_ih + theirs.bias_hh)[:, None])
    state, h, c = None, None, None
    for k in range(5):
        x = 3 * random(n, inputs, seed=k)
        state = theirs(x, state)
        h, c = ours(x.T, h, c)
        assert h.shape == c.shape == (hidden, n)
        for mine, expected in zip((h, c), state, strict=True):
            torch.testing.assert_close(mine.T, expected, rtol=1e-12, atol=1e-12)


def test_cell_starts_in_the_range_of_torch():
    torch.manual_seed(0)
    entries = flat(LSTMCell(30, 25).parameters())
    assert 0.19 < entries.max() < 0.2
    assert -0.2 < entries.min() < -0.19


def test_number_of_parameters():
    """4 h (i + h + 1) for each of the two layers, and h + 1 for the output."""
    sizes = [p.numel() for p in LSTMOptimizer(hidden=20).parameters()]
    assert sum(sizes) == 80 * (2 + 20 + 1) + 80 * (20 + 20 + 1) + 21 == 5141


# What the LSTM sees


def published(x, p):
    """Appendix A of the paper for one number."""
    if abs(x) >= math.exp(-p):
        return math.log(abs(x)) / p, math.copysign(1, x)
    return -1, math.exp(p) * x


@pytest.mark.parametrize("p", [10.0, 5.0])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_log_sign_is_the_published_formula(p, dtype, bar):
    sizes = torch.logspace(-12, 6, 181, dtype=dtype)
    x = torch.cat([sizes, -sizes, torch.zeros(1, dtype=dtype)])
    expected = torch.tensor([published(v, p) for v in x.tolist()], dtype=dtype).T
    found = log_sign(x, p)
    assert found.shape == (2, len(x))
    torch.testing.assert_close(found, expected, rtol=bar, atol=bar)
    if p == 10:
        assert torch.equal(log_sign(x), found)


def test_slope_of_log_sign_is_finite_everywhere():
    """1 / (p x) above the threshold and exp(p) below it; at 0 the logarithm has none."""
    x = torch.tensor([0.0, 1e-30, -1e-8, 0.5, -1e6], dtype=torch.float64, requires_grad=True)
    size, sign = (gradient(log_sign(x)[k].sum(), [x]) for k in range(2))
    above = x.detach().abs() > 1e-4
    torch.testing.assert_close(size, torch.where(above, 0.1 / x.detach(), 0.0))
    torch.testing.assert_close(sign, torch.where(above, 0.0, math.exp(10)).double())


def tensors():
    """Of all shapes, one of them with its channels last."""
    shapes = {"z": (), "k": (2, 3, 5, 4), "a": (7,), "m": (1, 4), "e": (2, 1, 3)}
    made = {name: random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    made["k"] = made["k"].to(memory_format=torch.channels_last)
    assert not made["k"].is_contiguous()
    return made


def test_coordinates_and_named_are_inverses():
    given = tensors()
    row = coordinates(given)
    assert row.shape == (sum(x.numel() for x in given.values()),)
    back = named(row, given)
    assert list(back) == list(given)
    for name, x in given.items():
        torch.testing.assert_close(back[name], x, rtol=0, atol=0)
    assert torch.equal(coordinates(back), row)
    assert torch.equal(coordinates(named(row[None], given)), row)  # as the output layer gives it


def test_layout_in_memory_does_not_matter():
    given = tensors()
    plain = {name: x.contiguous() for name, x in given.items()}
    assert torch.equal(coordinates(given), coordinates(plain))


def test_row_of_another_length_fits_no_names():
    with pytest.raises(RuntimeError, match="split_sizes"):
        named(torch.ones(3), {"a": torch.ones(2)})


# Every coordinate for itself


def follow(optimizer, history, start):
    """Parameters after each step along gradients that are given, by name."""
    phi, state, path = start, {}, []
    with torch.no_grad():
        for k, gradients in enumerate(history):
            phi, state = optimizer.step(phi, gradients, state, k, torch.tensor(1.0))
            path.append(phi)
    return path


def history_of(n, steps=5):
    """Gradients of many sizes, both signs, and a 0."""
    g = random(steps, n) * 10.0 ** random(steps, n, seed=1).mul(3)
    g[1, 0] = 0
    return g


def test_permuted_coordinates_get_permuted_updates():
    optimizer, g, start = learned(), history_of(12), random(12, seed=2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    path = follow(optimizer, [{"w": row} for row in g], {"w": start})
    other = follow(optimizer, [{"w": row[order]} for row in g], {"w": start[order]})
    for here, there in zip(path, other, strict=True):
        torch.testing.assert_close(there["w"], here["w"][order], rtol=1e-12, atol=1e-12)
    assert len((path[-1]["w"] - start).unique()) == 12  # or there would be nothing to permute


def test_update_depends_on_the_coordinate_s_own_history():
    """A gradient changed at the second step moves its own coordinate, from then on, and no other.

    For good: at the steps after it the gradients are the same, but the LSTM remembers.
    """
    optimizer, g, start = learned(), history_of(6), random(6, seed=2)
    changed = g.clone()
    changed[1, 3] = -5 * g[1, 3]
    path, other = (follow(optimizer, [{"w": row} for row in h], {"w": start}) for h in (g, changed))
    assert torch.equal(path[0]["w"], other[0]["w"])
    before = torch.zeros(6).double()
    for here, there in zip(path[1:], other[1:], strict=True):
        total = there["w"] - here["w"]
        moved = total - before
        assert moved[3].abs() > 1e-9
        torch.testing.assert_close(total[[0, 1, 2, 4, 5]], torch.zeros(5).double())
        before = total


def test_two_networks_joined_get_the_updates_that_each_gets_alone():
    optimizer = learned()
    g, h = history_of(6), random(5, 4, seed=7)
    start = {"one": random(2, 3, seed=2), "two": random(4, seed=3)}
    both = [{"one": a.view(2, 3), "two": b} for a, b in zip(g, h, strict=True)]
    joined = follow(optimizer, both, start)
    for name in start:
        alone = follow(optimizer, [{name: row[name]} for row in both], {name: start[name]})
        for here, there in zip(joined, alone, strict=True):
            torch.testing.assert_close(here[name], there[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ["gradients", "parameters and gradients"])
def test_order_of_the_names_does_not_matter(where):
    """Parameters and gradients find one another by name."""
    optimizer, g = learned(), history_of(5)
    start = {"b": random(3, seed=2), "a": random(2, seed=3)}
    rows = [{"b": row[:3], "a": row[3:]} for row in g]
    expected = follow(optimizer, rows, start)[-1]
    turned = [dict(reversed(row.items())) for row in rows]
    first = start if where == "gradients" else dict(reversed(start.items()))
    found = follow(optimizer, turned, first)[-1]
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-12)


def test_steps_are_those_of_torch_s_lstm():
    """Two layers of torch's over the whole history, and a linear output times the scale."""
    optimizer, g, start = learned(), history_of(7), random(7, seed=2)
    theirs = nn.LSTM(2, 6, num_layers=2).double()
    with torch.no_grad():
        for layer, cell in enumerate((optimizer.first, optimizer.second)):
            weights = (*cell.weight.split([2 if layer == 0 else 6, 6], 1), cell.bias[:, 0])
            for name, value in zip(("weight_ih", "weight_hh", "bias_ih"), weights, strict=True):
                theirs.get_parameter(f"{name}_l{layer}").copy_(value)
            theirs.get_parameter(f"bias_hh_l{layer}").zero_()
        h, _ = theirs(torch.stack([log_sign(row).T for row in g]))
        expected = start + 0.1 * optimizer.output(h)[..., 0].cumsum(0)
    found = torch.stack(
        [phi["w"] for phi in follow(optimizer, [{"w": r} for r in g], {"w": start})]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_update_does_not_see_the_parameter_and_scales_with_scale():
    g = [{"w": row} for row in history_of(6)]
    here = follow(learned(), g, {"w": torch.zeros(6).double()})
    for changed, start in (({}, random(6)), ({"scale": 0.4}, torch.zeros(6).double())):
        there = follow(learned(**changed), g, {"w": start})
        factor = changed.get("scale", 0.1) / 0.1
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(b["w"] - start, factor * a["w"], rtol=1e-10, atol=1e-12)


def test_untrained_optimiser_makes_small_steps():
    """Whatever the size of the gradients, which run from 1e-9 to 1e9."""
    g = torch.logspace(-9, 9, 50, dtype=torch.float64)
    for seed in range(5):
        (there,) = follow(learned(20, seed), [{"w": g}], {"w": torch.zeros(50).double()})
        assert 0 < there["w"].abs().max() < 0.1


@pytest.mark.parametrize("width", [2, 9])
def test_one_optimiser_serves_networks_of_any_width(width):
    optimizer, x, y = learned(), random(5, 1), random(5, 1, seed=1)
    net = mlp(width=width).double()
    f = adapt(net, lambda f: F.mse_loss(f(x), y), optimizer, 3)
    count = sum(p.numel() for p in net.parameters())
    assert count == width * width + 4 * width + 1
    assert f.state["h1"].shape == (6, count)
    assert all((f.parameters[n] != p).any() for n, p in net.named_parameters())


# Meta-gradients


def meta_loss(learner, e, seed=0):
    """Of the whole unroll, from the same fresh networks each time."""
    torch.manual_seed(seed)
    return sum(loss for loss, *_ in learner.pieces(e))


def from_scratch(steps=8, optimizer=None, **options):
    return FromScratch(linear, lively() if optimizer is None else optimizer, steps, **options)


def test_meta_gradient_of_a_training_by_finite_differences():
    learner, e = from_scratch(first_order=False), quadratics()
    error = slope_error(lambda: meta_loss(learner, e), list(learner.parameters()))
    assert error < 1e-7


@pytest.mark.parametrize("make", [linear, lambda: mlp(3, width=4).double()], ids=["linear", "mlp"])
def test_meta_gradient_of_inner_steps_by_finite_differences(make):
    """For the optimiser and for the start alike."""
    optimizer, e = lively(), quadratics(tasks=1)
    net, x, y = make(), e.support_x[0], e.support_y[0]

    def value():
        path = inner_steps(net, lambda f: F.mse_loss(f(x), y), optimizer)
        return sum(F.mse_loss(f(x), y) for f in islice(path, 6))

    assert slope_error(value, list(optimizer.parameters())) < 1e-7
    assert slope_error(value, list(net.parameters())) < 1e-7


def test_gradients_held_fixed_give_the_gradient_of_the_paper():
    """Training that reads the gradients of another one from notes, whatever its own are.

    Its slope by finite differences is the meta-gradient with the inner gradients as constants.
    """
    optimizer, e = lively(), quadratics()
    leaves = list(optimizer.parameters())
    found = gradient(meta_loss(from_scratch(optimizer=optimizer), e), leaves)
    noted = Noted(optimizer)
    meta_loss(from_scratch(optimizer=noted), e)
    replay = from_scratch(optimizer=Noted(optimizer, noted.notes))
    assert slope_error(lambda: meta_loss(replay, e), leaves) < 1e-7
    assert relative(found, gradient(meta_loss(replay, e), leaves)) < 1e-10
    full = gradient(meta_loss(from_scratch(optimizer=optimizer, first_order=False), e), leaves)
    assert relative(full, found) > 1e-3  # so the difference is one that this test sees


@FIRST_ORDER
def test_values_are_the_same_to_both_orders(first_order):
    e = quadratics()
    value = meta_loss(from_scratch(first_order=first_order), e).detach()
    torch.testing.assert_close(value, meta_loss(from_scratch(), e).detach(), rtol=1e-12, atol=0)


# Truncation


def starts(make, tasks, seed=0):
    """The weights of the fresh networks that a learner begins with."""
    torch.manual_seed(seed)
    return torch.stack([flat(make().parameters()) for _ in range(tasks)])


def by_hand(optimizer, e, steps, cuts):
    """Loss and gradient of every piece of a training on quadratics, with derivatives written out.

    After each of the `cuts` all goes on from numbers: parameters and memory know no past.
    """
    w, y, phi, state = e.support_x, e.support_y[..., 0], starts(linear, e.tasks), {}
    total, found = 0.0, []
    for k in range(steps):
        error = torch.einsum("tij,tj->ti", w, phi).detach() - y
        slope = 2 / w.shape[1] * torch.einsum("tij,ti->tj", w, error)
        new, state = optimizer.step({"w": phi}, {"w": slope}, state, k, torch.tensor(0.0))
        phi = new["w"]
        squares = (torch.einsum("tij,tj->ti", w, phi) - y).square().mean(1)
        total = total + (squares + FLOOR).log().mean() / steps
        if k + 1 in cuts:
            found.append((total.detach(), gradient(total, list(optimizer.parameters()))))
            phi, state = phi.detach(), {name: x.detach() for name, x in state.items()}
            total = 0.0
    return found


@pytest.mark.parametrize(
    ("truncation", "cuts"),
    [(1, range(1, 8)), (3, (3, 6, 7)), (7, (7,)), (10, (7,)), (None, (7,))],
)
def test_pieces_are_trainings_that_start_where_the_last_one_ended(truncation, cuts):
    learner, e = from_scratch(7, truncation=truncation), quadratics()
    leaves = list(learner.parameters())
    torch.manual_seed(0)
    pieces = [(loss.detach(), gradient(loss, leaves)) for loss, *_ in learner.pieces(e)]
    expected = by_hand(learner.optimizer, e, 7, cuts)
    assert len(pieces) == len(expected) == len(cuts)
    for (loss, slope), (value, right) in zip(pieces, expected, strict=True):
        torch.testing.assert_close(loss, value, rtol=1e-12, atol=1e-14)
        assert relative(slope, right) < 1e-10
    torch.manual_seed(0)
    mean = (learner.losses(e.support_x, e.support_y)[:, 1:] + FLOOR).log().mean()
    torch.testing.assert_close(sum(loss for loss, _ in pieces), mean, rtol=1e-12, atol=1e-12)
    whole = by_hand(learner.optimizer, e, 7, (7,))[0][1]
    off = relative(sum(slope for _, slope in pieces), whole)
    assert (off < 1e-10) if len(cuts) == 1 else (off > 1e-3)  # a cut loses a part of the gradient


def test_pieces_predict_the_queries_with_the_networks_of_that_moment():
    e = quadratics()
    e = Episode(e.support_x, e.support_y, e.query_x + 1, e.query_y)
    learner = from_scratch(5, truncation=2)
    torch.manual_seed(0)
    pieces = list(learner.pieces(e))
    assert len(pieces) == 3
    for steps, (_, predictions, targets) in zip((2, 4, 5), pieces, strict=True):
        learner.steps = steps
        torch.manual_seed(0)
        expected = learner(e.support_x, e.support_y, e.query_x)
        torch.testing.assert_close(predictions, expected.detach())
        assert predictions.grad_fn is None
        assert targets is e.query_y


@pytest.mark.parametrize("truncation", [None, 2])
def test_autocast_changes_nothing(truncation):
    """Half precision would cost the meta-gradient its digits, in any of the pieces."""
    e, found = QuadraticSampler(3, 4).sample(), []
    for enabled in (False, True):
        learner, rows = small(3, truncation, steps=6), []
        pieces = learner.pieces(e)
        while True:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                piece = next(pieces, None)
            if piece is None:
                break
            loss, predictions, _ = piece
            rows.append((predictions, gradient(loss, list(learner.parameters()))))
        found.append(rows)
    assert len(found[0]) == (1 if truncation is None else 3)
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


def test_autocast_changes_no_prediction():
    """A training that is tested is as exact as the one that taught it."""
    learner, e = small(3, steps=6), QuadraticSampler(3, 4).sample()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(0)
            found.append((predict(learner, e), learner.losses(e.support_x, e.support_y)))
    assert all(map(torch.equal, *found))


# Networks side by side


def small_conv():
    layers = [nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten()]
    return classifier(nn.Sequential(*layers), 3 * 3 * 3, 4).double()


def data_for(make, tasks=3, points=6):
    """Inputs and labels, or targets."""
    if make is small_conv:
        return random(tasks, points, 1, 5, 5), torch.arange(points).remainder(4).repeat(tasks, 1)
    return random(tasks, points, 2), random(tasks, points, 1, seed=1)


def small_mlp():
    return mlp(2, width=5).double()


NETS = pytest.mark.parametrize("make", [small_mlp, small_conv])


def fit(x, y):
    """The loss of one network."""
    return lambda f: task_loss(f(x), y)


def nets_of(make, count=3):
    torch.manual_seed(0)
    return [make() for _ in range(count)]


@NETS
def test_copies_give_what_each_network_gives(make):
    nets, (x, _) = nets_of(make), data_for(make)
    copies = Copies(nets)
    expected = torch.stack([net(one) for net, one in zip(nets, x, strict=True)])
    torch.testing.assert_close(copies(x), expected, rtol=1e-12, atol=1e-12)
    size = sum(p.numel() for p in nets[0].parameters())
    assert sum(p.numel() for p in copies.parameters()) == 3 * size


@NETS
def test_copies_are_copies(make):
    """What happens to them does not reach the networks they were made of."""
    nets, (x, _) = nets_of(make), data_for(make)
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    copies = Copies(nets)
    with torch.no_grad():
        for p in copies.parameters():
            p.zero_()
    assert not copies(x).any()
    assert all(same_weights(n.state_dict(), old) for n, old in zip(nets, before, strict=True))


@NETS
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "lstm"])
def test_copies_make_the_steps_that_each_network_makes_alone(make, name):
    made = {"sgd": SGD(0.1), "momentum": SGD(0.1, 0.9), "adam": Adam(0.01, eps=1e-3)}
    optimizer = (made | {"lstm": lively()})[name]
    nets, (x, y) = nets_of(make), data_for(make)

    def total(f):
        return sum(task_loss(*one) for one in zip(f(x), y, strict=True))

    together = adapt(Copies(nets), total, optimizer, 4)
    for k, net in enumerate(nets):
        alone = adapt(net, fit(x[k], y[k]), optimizer, 4)
        for name, p in alone.parameters.items():
            here = together.parameters[f"nets.{name}"][k]
            torch.testing.assert_close(here, p, rtol=1e-10, atol=1e-12)
            assert not torch.equal(p, net.get_parameter(name))


# Training from scratch


class Making:
    """Makes networks and keeps a copy of each as it was."""

    def __init__(self, make):
        self.make, self.made = make, []

    def __call__(self):
        net = self.make()
        self.made.append(copy.deepcopy(net))
        return net


@NETS
def test_sgd_trains_every_network_as_torch_does(make):
    making, (x, y), queries = Making(make), data_for(make), data_for(make)[0] + 0.3
    learner = FromScratch(making, SGD(0.1), steps=5)
    torch.manual_seed(0)
    losses = learner.losses(x, y)
    torch.manual_seed(0)
    predictions = learner(x, y, queries)
    assert losses.shape == (3, 6)
    assert len(making.made) == 6
    for k, net in enumerate(making.made[:3]):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for step in range(6):
            loss = fit(x[k], y[k])(net)
            torch.testing.assert_close(losses[k, step], loss.detach(), rtol=1e-10, atol=1e-12)
            if step < 5:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(predictions[k], net(queries[k]), rtol=1e-10, atol=1e-12)


def test_every_training_starts_anew():
    """From networks of the global generator: others each time, the same after the same seed."""
    learner, e, found = from_scratch(4), quadratics(), []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(learner.losses(e.support_x, e.support_y))
    assert torch.equal(found[0], found[2])
    assert (found[0][:, 0] != found[1][:, 0]).all()


def test_losses_keep_no_graph():
    e = quadratics()
    assert from_scratch(3).losses(e.support_x, e.support_y).grad_fn is None


def one_hot(points, tasks=2):
    """Every row of the inputs has a parameter of its own, and all targets are 1."""
    eye = torch.eye(points, dtype=torch.float64).repeat(tasks, 1, 1)
    ones = torch.ones(tasks, points, 1, dtype=torch.float64)
    return Episode(eye, ones, eye, ones)


def zeros(points):
    net = linear(points)
    nn.init.zeros_(net.weight)
    return net


@pytest.mark.parametrize("batch", [1, 5])
def test_every_step_sees_a_batch_drawn_anew(batch):
    """The gradient for parameter j is -2 / batch for each time that row j is in the batch."""
    points, noted = 40 * batch, Noted(Still())
    e = one_hot(points)
    learner = FromScratch(lambda: zeros(points), noted, 100, batch=batch)
    torch.manual_seed(0)
    learner(e.support_x, e.support_y, e.query_x)
    counts = torch.stack([g["nets.weight"][0, 0] * -batch / 2 for g, _ in noted.notes])
    assert len(counts) == 100
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(counts.sum(1), torch.full((100,), batch).double())
    assert counts.any(0).sum() > 0.8 * points
    if batch == 5:  # of which no two of a hundred are alike, but by a chance of one in 10^4
        assert len(counts.round().unique(dim=0)) == 100


def test_all_rows_are_seen_without_a_batch():
    e, noted = one_hot(8), Noted(Still())
    learner = FromScratch(lambda: zeros(8), noted, 2)
    learner(e.support_x, e.support_y, e.query_x)
    for gradients, _ in noted.notes:
        torch.testing.assert_close(gradients["nets.weight"], torch.full((2, 1, 8), -0.25).double())


def test_losses_are_those_of_the_whole_set_also_with_a_batch():
    e = quadratics(5)
    learner = FromScratch(lambda: linear(5), Still(), 6, batch=1)
    torch.manual_seed(0)
    losses = learner.losses(e.support_x, e.support_y)
    phi = starts(lambda: linear(5), 2)
    expected = (torch.einsum("tij,tj->ti", e.support_x, phi) - e.support_y[..., 0]).square().mean(1)
    torch.testing.assert_close(losses, expected[:, None].expand(2, 7), rtol=1e-12, atol=0)


def test_loss_that_counts_after_a_step_is_that_of_the_next_step_s_batch():
    """Pieces of a single step each: what they hold is what the optimiser is then told."""
    e, noted = quadratics(6, tasks=1), Noted(lively())
    learner = FromScratch(lambda: linear(6), noted, 7, truncation=1, batch=2)
    pieces = torch.stack([loss.detach() for loss, *_ in learner.pieces(e)])
    told = torch.stack([loss for _, loss in noted.notes])
    logarithms = (told[1:] + FLOOR).log()
    torch.testing.assert_close(7 * pieces[:-1], logarithms, rtol=1e-12, atol=1e-12)
    assert len(told.unique()) == 7


def test_problem_that_is_solved_has_a_finite_meta_loss_and_gradient():
    """The logarithm of 0 would have neither."""
    e, optimizer = one_hot(3), learned()
    solved = zeros(3)
    nn.init.ones_(solved.weight)
    nn.init.zeros_(optimizer.output.weight)
    nn.init.zeros_(optimizer.output.bias)
    learner = FromScratch(lambda: copy.deepcopy(solved), optimizer, 4)
    value = meta_loss(learner, e)
    assert float(value.detach()) == pytest.approx(math.log(FLOOR))
    assert gradient(value, list(optimizer.parameters())).isfinite().all()


def test_labels_are_learned_too():
    """Without any meta-training, by a fixed optimiser: the loss is then a cross-entropy."""
    x, y = data_for(small_conv)
    learner = FromScratch(small_conv, Adam(0.05), 60)
    torch.manual_seed(0)
    predictions = learner(x, y, x)
    assert predictions.shape == (3, 6, 4)
    assert (predictions.argmax(-1) == y).all()


# Meta-training


def small(d=2, truncation=5, steps=20, scale=0.1, **options):
    """A learner in single precision."""
    torch.manual_seed(0)
    optimizer = LSTMOptimizer(8, scale)
    return FromScratch(lambda: nn.Linear(d, 1, bias=False), optimizer, steps, truncation, **options)


def final(learner, d):
    """Mean loss at the end of trainings on problems that were held out."""
    held = QuadraticSampler(d, 64, seed=9).sample()
    torch.manual_seed(5)
    return learner.losses(held.support_x, held.support_y)[:, [0, -1]].mean(0)


@pytest.mark.parametrize(("d", "truncation"), [(2, 5), (3, None)])
def test_meta_training_teaches_to_train(d, truncation):
    learner = small(d, truncation)
    start, before = final(learner, d)
    history = meta_train(
        learner, QuadraticSampler(d, 16), 50, lr=2e-2, progress=False, clip=1.0, each_piece=True
    )
    after = final(learner, d)[1]
    assert after < 0.3 * min(start, before)
    assert len(history.loss) == 50
    assert history.accuracy == []


class Stopped(FromScratch):
    """Interrupted at its eighth episode, after the first of four pieces."""

    episodes = 0

    def pieces(self, episode):
        self.episodes += 1
        for k, piece in enumerate(super().pieces(episode)):
            if (self.episodes, k) == (8, 1):
                raise KeyboardInterrupt
            yield piece


Stopped.__name__ = FromScratch.__name__  # a checkpoint knows its learner


def run(learner, out, episodes=None, **changed):
    length = {"steps": 12, "every": 5, "progress": False, "clip": 1.0, "each_piece": True}
    return meta_train(learner, episodes or QuadraticSampler(2, 4), out=out, **(length | changed))


@pytest.mark.parametrize("batch", [None, 1])
def test_interrupted_and_resumed_ends_bit_identical(tmp_path, batch):
    """Though every training draws its networks and batches from the global generator."""
    whole = small(batch=batch)
    torch.manual_seed(1)
    history = run(whole, tmp_path / "whole")
    cut = small(batch=batch)
    cut.__class__ = Stopped
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(cut, tmp_path / "cut")
    assert load_safely(tmp_path / "cut" / CHECKPOINT)["notes"]["step"] == 5
    resumed = small(batch=batch)
    with torch.no_grad():
        resumed.optimizer.output.weight.zero_()
    torch.manual_seed(77)
    again = run(resumed, tmp_path / "cut")
    assert same_weights(resumed.state_dict(), whole.state_dict())
    assert again.loss == history.loss
    # Not so because nothing was drawn, or nothing learned:
    other = small(batch=batch)
    torch.manual_seed(77)
    assert run(other, None).loss != history.loss
    assert not same_weights(whole.state_dict(), small(batch=batch).state_dict())


def test_resuming_with_other_quadratics_is_refused(tmp_path):
    run(small(), tmp_path, steps=1)
    with pytest.raises(CheckpointMismatch, match="was made with dimensions=2, not 3: give the sa"):
        run(small(3), tmp_path, episodes=QuadraticSampler(3, 4), steps=1)


def norms_seen_by_adam(monkeypatch, learner, episodes, **outer):
    """The norm of the meta-gradient at each step of Adam in three episodes of meta-training."""
    norms, step = [], torch.optim.Adam.step

    def noted(self, *arguments, **options):
        norms.append(float(flat([p.grad for p in learner.parameters()]).norm()))
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", noted)
        meta_train(learner, episodes, 3, progress=False, **outer)
    return norms


@pytest.mark.parametrize(
    "changed",
    [{"truncation": 4}, {"batch": 1}, {"first_order": False}, {"steps": 10}, {"scale": 0.2}],
    ids=str,
)
def test_resuming_with_another_inner_loop_is_refused(tmp_path, changed):
    run(small(), tmp_path, steps=1)
    other = small(**changed)
    with pytest.raises(CheckpointMismatch, match=r"was made with learner=.*, not ") as caught:
        run(other, tmp_path, steps=1)
    assert other.extra_repr() in str(caught.value)


@pytest.mark.parametrize(("truncation", "pieces"), [(5, 4), (8, 3), (None, 1)])
def test_optimiser_can_be_updated_after_every_piece(monkeypatch, truncation, pieces):
    for each, updates in ((True, pieces), (False, 1)):
        learner = small(truncation=truncation)
        seen = norms_seen_by_adam(monkeypatch, learner, QuadraticSampler(2, 4), each_piece=each)
        assert len(seen) == 3 * updates


def test_meta_gradient_is_clipped_at_1(monkeypatch):
    """With a scale of 10 the unrolls are so wild that it matters."""
    found = {}
    for clip in (1.0, None):
        learner = small(truncation=20)
        learner.optimizer.scale = 10.0
        torch.manual_seed(0)
        found[clip] = norms_seen_by_adam(monkeypatch, learner, QuadraticSampler(2, 4), clip=clip)
    assert found[None][0] > 2
    assert found[1.0][0] == pytest.approx(1, rel=1e-4)
    assert max(found[1.0]) < 1 + 1e-4


# What is refused


@pytest.mark.parametrize("name", ["steps", "truncation", "batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be at least 1"):
        FromScratch(linear, SGD(0.1), **{name: value})


@pytest.mark.parametrize("options", [{"hidden": 0}, {"scale": 0.0}, {"scale": -0.1}])
def test_sizes_must_be_positive(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*: both must be above 0"):
        LSTMOptimizer(**options)


def test_memory_of_other_coordinates_is_refused():
    optimizer, phi = learned(), {"w": random(4)}
    _, state = optimizer.step(phi, phi, {}, 0, torch.tensor(1.0))
    phi = {"w": random(3), "b": random(3)}
    sentence = r"^The optimiser remembers 4 coordinates but is given 6 at inner step 2: parameters"
    with pytest.raises(ValueError, match=sentence):
        optimizer.step(phi, phi, state, 1, torch.tensor(1.0))


def spoiled(k, factor):
    """A loss whose gradient for the head's bias is the factor before step k + 1."""

    def loss(f):
        value = f(torch.ones(3, 1)).square().mean()
        return value + factor * f.parameters["head.bias"].sum() if f.k == k else value

    return loss


@FIRST_ORDER
@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("k", [0, 2])
def test_gradient_that_is_not_finite_is_told(first_order, factor, k):
    """With its parameter and its step; the network is left as it was."""
    torch.manual_seed(0)
    net, optimizer = mlp(width=4), LSTMOptimizer(4)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    path = inner_steps(net, spoiled(k, factor), optimizer, first_order=first_order)
    sentence = rf"^The inner gradient of head\.bias is not finite at inner step {k + 1} of the unro"
    made = []
    with pytest.raises(FloatingPointError, match=sentence) as caught:
        made.extend(path)
    assert "\n" not in str(caught.value)
    after = net.state_dict(), optimizer.state_dict()
    assert all(same_weights(a, b) for a, b in zip(after, before, strict=True))


def test_unroll_that_runs_away_is_told(tmp_path):
    """After a step or two of about 1e37 the gradient is beyond single precision."""
    learner = small()
    learner.optimizer.scale = 1e38
    before = copy.deepcopy(learner.state_dict())
    sentence = r"^The inner gradient of nets\.weight is not finite at inner step [23] of the unr"
    with pytest.raises(FloatingPointError, match=sentence + ".*Make fewer of them, clip"):
        run(learner, tmp_path)
    assert same_weights(learner.state_dict(), before)
    assert not (tmp_path / CHECKPOINT).exists()


def test_bad_inputs_are_told_at_the_first_step():
    e = QuadraticSampler(2, 4).sample()
    e.support_x[1, 0, 0] = math.inf
    sentence = r"^The inner gradient of nets\.weight is not finite at inner step 1 of .* the inputs"
    with pytest.raises(FloatingPointError, match=sentence):
        list(small().pieces(e))


def test_default_device_plays_no_part():
    """What an optimiser adds to its inputs lies beside them, and batches are drawn on the CPU."""
    torch.manual_seed(0)
    optimizer, x, y = LSTMOptimizer(8), torch.rand(4, 10, 2), torch.rand(4, 10, 1)

    def make():
        torch.manual_seed(1)
        net = partial(nn.Linear, 2, 1, device="cpu")
        return FromScratch(net, optimizer, steps=3, batch=2).losses(x, y)

    assert torch.equal(make(), elsewhere(make))


class Last(nn.Module):
    """What a recurrent layer says at the end of sequences `(n, 4, 2)`."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def test_networks_that_vmap_does_not_run_are_trained_one_by_one():
    torch.manual_seed(0)
    nets = [Last() for _ in range(3)]
    x = torch.randn(3, 5, 4, 2)
    found = Copies(nets)(x)
    torch.testing.assert_close(found, torch.stack([*map(Last.__call__, nets, x)]))
    learner = FromScratch(Last, LSTMOptimizer(), steps=2)
    assert learner(x, torch.randn(3, 5, 1), x).shape == (3, 5, 1)


def test_noise_in_networks_is_told():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    told = r"^This cannot be vectorised \(it draws random .*\): all networks .* them without it\.$"
    with pytest.raises(ValueError, match=told):
        Copies([Noisy(2, 1) for _ in range(3)])(torch.rand(3, 5, 2))


def test_frozen_parameters_of_every_network_stay():
    """But the optimiser trains the others."""

    def make():
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        net[0].requires_grad_(False)
        return net

    learner = FromScratch(make, LSTMOptimizer(), steps=2)
    path, _ = learner.train_networks(torch.rand(3, 5, 2), torch.rand(3, 5, 1))
    first, *_, last = islice(path, 3)
    moved = {n for n, p in first.parameters.items() if not torch.equal(p, last.parameters[n])}
    assert moved == {"nets.2.weight", "nets.2.bias"}


def test_what_is_read_and_what_counts_can_be_set():
    class Blind(LSTMOptimizer):
        def seen(self, gradients):
            return torch.zeros(2, len(gradients))

    class Summed(FromScratch):
        def scored(self, losses):
            return losses

    optimizer, phi = Blind(), {"w": torch.zeros(3)}
    steps = [
        optimizer.step(phi, {"w": g}, {}, 0, torch.tensor(1.0))[0]["w"]
        for g in (torch.zeros(3), torch.tensor([1.0, -20.0, 0.3]))
    ]
    assert torch.equal(*steps)
    episode = QuadraticSampler(4, tasks=3).sample()
    learner = Summed(lambda: nn.Linear(4, 1), optimizer, steps=5)
    torch.manual_seed(0)
    (piece, *_), *none = learner.pieces(episode)
    torch.manual_seed(0)
    losses = learner.losses(episode.support_x, episode.support_y)[:, 1:]
    assert not none
    torch.testing.assert_close(piece.detach(), losses.mean())
