"""The inner loop against torch's optimisers, the library `higher`, and finite differences."""

import copy
import warnings
from functools import partial
from itertools import islice, pairwise

import pytest
import torch
from helpers import elsewhere, flat, gradient, images_to_learn, relative, slope_error
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from metautils.adapt import SGD, Adam, Adapted, adapt, inner_steps, over_tasks
from metautils.learners.learned_optimizer import LSTMOptimizer
from metautils.nets import BatchNorm, Conv4, batch_norm_mode, classifier, mlp

OPTIMIZERS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3}),
}
EACH = pytest.mark.parametrize("kind", OPTIMIZERS)
STEPS = pytest.mark.parametrize("steps", [1, 3, 5])


def ours(kind, **changed):
    make, _, options = OPTIMIZERS[kind]
    return make(**(options | changed))


def conv_net(norm=BatchNorm, seed=0, dtype=torch.float64):
    """Two blocks and a linear head; no bias before the normalisation, which would cancel it."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, bias=False), norm(4), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, bias=False), norm(4), nn.MaxPool2d(2), nn.ReLU()]
    return classifier(nn.Sequential(*layers, nn.Flatten()), 16, 3).to(dtype)


def own_batch(channels):
    """Torch's batch normalisation without running statistics."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def images(dtype=torch.float64, **sizes):
    """Tensors of some tasks: support_x, support_y, query_x, query_y."""
    e = images_to_learn(dtype=dtype, **sizes)
    return e.support_x, e.support_y, e.query_x, e.query_y


def one_task():
    return [x[0] for x in images()]


def curve(seed=0):
    """A point set for `mlp`."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 1, generator=g, dtype=torch.float64) for _ in range(4)]


def small_mlp(seed=0):
    torch.manual_seed(seed)
    return mlp(width=8).double()


def fit(x, y):
    """The loss of a support set."""
    return lambda f: F.cross_entropy(f(x), y) if y.dtype == torch.int64 else F.mse_loss(f(x), y)


def meta_loss(net, optimizer, steps, data, **options):
    """The query loss after some steps on the support set, of one task."""
    x, y, qx, qy = data
    return fit(qx, qy)(adapt(net, fit(x, y), optimizer, steps, **options))


def state_of(net):
    return {name: x.clone() for name, x in net.state_dict().items()}


def untouched(net, before):
    after = net.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)


# Values


@EACH
@STEPS
@pytest.mark.parametrize("make", [conv_net, small_mlp])
def test_steps_are_those_of_torch(kind, steps, make):
    net, (x, y, *_) = make(), one_task() if make is conv_net else curve()
    theirs, (_, optimizer, options) = copy.deepcopy(net), OPTIMIZERS[kind]
    optimizer = optimizer(theirs.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        fit(x, y)(theirs).backward()
        optimizer.step()
    before = state_of(net)
    f = adapt(net, fit(x, y), ours(kind), steps)
    assert relative(flat(f.parameters.values()), flat(theirs.parameters())) < 1e-12
    assert relative(f(x).detach(), theirs(x).detach()) < 1e-11
    assert untouched(net, before)
    assert all(p.grad is None for p in net.parameters())


def test_yields_the_module_after_0_1_2_steps():
    net, (x, y, *_) = small_mlp(), curve()
    path = list(islice(inner_steps(net, fit(x, y), ours("adam")), 4))
    assert torch.equal(path[0](x), net(x))
    losses = [float(fit(x, y)(f).detach()) for f in path]
    assert all(later < earlier for earlier, later in pairwise(losses))
    for k, f in enumerate(path):
        alone = adapt(net, fit(x, y), ours("adam"), k)
        assert torch.equal(flat(alone.parameters.values()), flat(f.parameters.values()))


def test_rates_by_name_and_by_step():
    """A rate for each tensor, each entry or each step moves what it names and nothing else."""
    net, (x, y, *_) = small_mlp(), curve()
    theta = dict(net.named_parameters())
    grads = dict(zip(theta, torch.autograd.grad(fit(x, y)(net), theta.values()), strict=True))
    g = torch.Generator().manual_seed(0)
    scalar = {n: torch.rand((), generator=g) for n in theta}
    entry = {n: torch.rand(p.shape, generator=g, dtype=p.dtype) for n, p in theta.items()}
    for rates in (scalar, entry):
        phi = adapt(net, fit(x, y), SGD(rates)).parameters
        for n, p in theta.items():
            torch.testing.assert_close(phi[n], p - rates[n] * grads[n], rtol=1e-12, atol=1e-14)
    by_step = adapt(net, fit(x, y), SGD([0.1, 0.3]), 2)
    first = adapt(net, fit(x, y), SGD(0.1))
    middle = copy.deepcopy(net)
    middle.load_state_dict({n: p.detach() for n, p in first.parameters.items()})
    second = adapt(middle, fit(x, y), SGD(0.3))
    assert torch.equal(flat(by_step.parameters.values()), flat(second.parameters.values()))


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_clip_scales_the_whole_gradient_down_to_a_norm_and_never_up(share):
    net, (x, y, *_) = small_mlp(), curve()
    whole = gradient(fit(x, y)(net), list(net.parameters()))
    f = adapt(net, fit(x, y), SGD(1.0), clip=share * float(whole.norm()))
    moved = flat(net.parameters()) - flat(f.parameters.values())
    torch.testing.assert_close(moved, min(share, 1.0) * whole, rtol=1e-9, atol=1e-12)


def test_works_without_recording_gradients():
    net, data = conv_net(), one_task()
    with torch.no_grad():
        quiet = meta_loss(net, ours("momentum"), 3, data)
    assert quiet.grad_fn is None
    torch.testing.assert_close(quiet, meta_loss(net, ours("momentum"), 3, data).detach())


# Meta-gradients


@pytest.fixture(scope="module")
def higher():
    """The library of Grefenstette et al. 2019; its source warns on first import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("higher", reason="the library higher is not installed")


@EACH
@STEPS
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_meta_gradient_is_that_of_higher(higher, kind, steps, dtype, bar):
    """Ours for all tasks at once with our batch norm, theirs one by one with torch's."""
    net, theirs = conv_net(dtype=dtype), conv_net(own_batch, dtype=dtype)
    theirs.load_state_dict(net.state_dict())
    # higher adds eps before the bias correction and not after it: only without eps do both agree.
    changed = {"eps": 1e-16} if kind == "adam" else {}
    data = images(dtype)

    def task(*one):
        return meta_loss(net, ours(kind, **changed), steps, one)

    value = over_tasks(task, net, *data, vectorise=True).mean()
    _, optimizer, options = OPTIMIZERS[kind]
    losses = []
    for x, y, qx, qy in zip(*data, strict=True):
        inner = optimizer(theirs.parameters(), **(options | changed))
        with higher.innerloop_ctx(theirs, inner, copy_initial_weights=False) as (f, step):
            for _ in range(steps):
                step.step(fit(x, y)(f))
            losses.append(fit(qx, qy)(f))
    expected = gradient(torch.stack(losses).mean(), list(theirs.parameters()))
    assert relative(gradient(value, list(net.parameters())), expected) < bar


def test_place_of_eps_makes_a_difference_that_is_seen(higher):
    """So the comparison above sees a difference as small as where eps is added."""
    net, data = conv_net(own_batch), one_task()
    inner = torch.optim.Adam(net.parameters(), 0.01, (0.8, 0.99), 1e-3)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (f, step):
        step.step(fit(*data[:2])(f))
        theirs = gradient(fit(*data[2:])(f), list(net.parameters()))
    mine = gradient(meta_loss(net, ours("adam"), 1, data), list(net.parameters()))
    assert relative(mine, theirs) > 1e-4


@EACH
@STEPS
@pytest.mark.parametrize("make", [conv_net, small_mlp])
def test_meta_gradient_by_finite_differences(kind, steps, make):
    net, data = make(), one_task() if make is conv_net else curve()
    error = slope_error(lambda: meta_loss(net, ours(kind), steps, data), list(net.parameters()))
    assert error < 1e-8


def learned(form, net, steps):
    """Rates of a form, and their leaves: some of them below 0, which a learned one may be."""
    g = torch.Generator().manual_seed(0)

    def rate(*shape):
        return (0.06 * torch.rand(shape, generator=g).double() - 0.01).requires_grad_()

    theta = dict(net.named_parameters())
    made = {
        "scalar": lambda: torch.tensor(0.03, dtype=torch.float64, requires_grad=True),
        "by tensor": lambda: {n: rate() for n in theta},
        "by entry": lambda: {n: rate(*p.shape) for n, p in theta.items()},
        "by step": lambda: [rate() for _ in range(steps)],
        "by step and tensor": lambda: [{n: rate() for n in theta} for _ in range(steps)],
    }[form]()
    rows = made if isinstance(made, list) else [made]
    leaves = [x for row in rows for x in (row.values() if isinstance(row, dict) else [row])]
    return made, leaves


FORMS = ["scalar", "by tensor", "by entry", "by step", "by step and tensor"]


@EACH
@STEPS
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_learned_rates_by_finite_differences(kind, steps, form):
    net, data = conv_net(), one_task()
    rates, leaves = learned(form, net, steps)

    def value():
        return meta_loss(net, ours(kind, lr=rates), steps, data)

    assert slope_error(value, leaves) < 1e-8
    assert slope_error(value, list(net.parameters())) < 1e-8


@EACH
@STEPS
@pytest.mark.parametrize("clip", [0.2, 50.0])
def test_gradient_through_the_clip_by_finite_differences(kind, steps, clip):
    """One norm below that of the support gradient, one above it."""
    net, data = conv_net(), one_task()
    norm = float(gradient(fit(*data[:2])(net), list(net.parameters())).norm())
    assert 0.4 < norm < 25

    def value():
        return meta_loss(net, ours(kind), steps, data, clip=clip)

    assert slope_error(value, list(net.parameters())) < 1e-8


@EACH
@STEPS
@pytest.mark.parametrize("only", [("head",), ("embed.0", "embed.5.weight")])
def test_gradient_of_a_part_by_finite_differences(kind, steps, only):
    net, data = conv_net(), one_task()

    def value():
        return meta_loss(net, ours(kind), steps, data, only=only)

    assert slope_error(value, list(net.parameters())) < 1e-8


# First order


@EACH
@STEPS
def test_first_order_is_the_query_gradient_at_phi(kind, steps):
    net, (x, y, qx, qy) = conv_net(), one_task()
    theta = list(net.parameters())
    f = adapt(net, fit(x, y), ours(kind), steps, first_order=True)
    there = copy.deepcopy(net)
    there.load_state_dict({name: p.detach() for name, p in f.parameters.items()})
    expected = gradient(fit(qx, qy)(there), list(there.parameters()))
    assert relative(gradient(fit(qx, qy)(f), theta), expected) < 1e-12
    second = adapt(net, fit(x, y), ours(kind), steps)
    torch.testing.assert_close(flat(f.parameters.values()), flat(second.parameters.values()))
    assert relative(gradient(fit(qx, qy)(second), theta), expected) > 1e-3


def nodes(tensors):
    """Names of the operations on the way from tensors back to the leaves."""
    seen, todo = set(), [x.grad_fn for x in tensors]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return [node.name() for node in seen]


@EACH
@STEPS
def test_first_order_keeps_no_graph_of_the_steps(kind, steps):
    """One subtraction a step and parameter, where the second order keeps every convolution."""
    net, (x, y, *_) = conv_net(), one_task()
    f = adapt(net, fit(x, y), ours(kind), steps, first_order=True)
    count = len(f.parameters)
    kept = nodes(f.parameters.values())
    assert sorted(set(kept)) == ["SubBackward0", "torch::autograd::AccumulateGrad"]
    assert len(kept) == count * (steps + 1)
    full = nodes(adapt(net, fit(x, y), ours(kind), steps).parameters.values())
    assert sum("Convolution" in name for name in full) >= 2 * steps


def test_first_order_still_learns_rates():
    """With phi = theta - alpha g and g constant, the gradient for alpha is -g times the query's."""
    net, (x, y, qx, qy) = conv_net(), one_task()
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    f = adapt(net, fit(x, y), SGD(alpha), first_order=True)
    (found,) = torch.autograd.grad(fit(qx, qy)(f), [alpha])
    phi = {name: p.detach().requires_grad_() for name, p in f.parameters.items()}
    there = gradient(fit(qx, qy)(Adapted(net, phi, {})), list(phi.values()))
    here = gradient(fit(x, y)(net), list(net.parameters()))
    torch.testing.assert_close(found, -here @ there)


# Parts of a module


@pytest.mark.parametrize(
    ("only", "moved"),
    [
        ("head", {"head.weight", "head.bias"}),
        (("head",), {"head.weight", "head.bias"}),
        (["head.bias"], {"head.bias"}),
        (("embed.0", "head.weight"), {"embed.0.weight", "embed.0.bias", "head.weight"}),
        ({"embed"}, {f"embed.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")}),
    ],
)
def test_only_names_what_moves(only, moved):
    net, (x, y, *_) = small_mlp(), curve()
    f = adapt(net, fit(x, y), SGD(0.1), 2, only=only)
    theta = dict(net.named_parameters())
    assert {name for name, p in f.parameters.items() if not torch.equal(p, theta[name])} == moved
    assert all(f.parameters[name] is theta[name] for name in theta.keys() - moved)


@pytest.mark.parametrize("only", ["he", "head.weigh", "body", ("head", "he"), "head."])
def test_only_a_whole_name_counts(only):
    wrong = only[-1] if isinstance(only, tuple) else only
    with pytest.raises(ValueError, match=f"^only='{wrong}' names none of the parameters embed.0.w"):
        adapt(small_mlp(), fit(*curve()[:2]), SGD(0.1), only=only)


def test_only_does_not_reach_a_longer_name():
    net = nn.ModuleDict({"head": nn.Linear(1, 1), "header": nn.Linear(1, 1)})
    f = adapt(net, lambda f: sum(p.sum() for p in f.parameters.values()), SGD(0.1), only="head")
    moved = {name for name, p in net.named_parameters() if not torch.equal(f.parameters[name], p)}
    assert moved == {"head.weight", "head.bias"}


def test_shared_parameters_move_together():
    """As torch.optim moves them: once, by the sum of both gradients."""

    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        net[2].weight = net[0].weight
        return net

    net, theirs = make(), make()
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(theirs(x), y).backward()
        optimizer.step()
    f = adapt(net, fit(x, y), SGD(0.1), 3)
    torch.testing.assert_close(f(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert (
        slope_error(lambda: meta_loss(net, SGD(0.1), 3, (x, y, x, y)), [*net.parameters()]) < 1e-8
    )


# Frozen parameters


FROZEN = pytest.mark.parametrize(
    "frozen", [("embed.0",), ("head",), ("embed.0.weight", "head.bias"), ("embed",)], ids=str
)


def freeze(net, names):
    """Parameters of these names or below them no longer learn; the names of all of them."""
    found = {
        n: p for n, p in net.named_parameters() if f"{n}.".startswith(tuple(f"{x}." for x in names))
    }
    for p in found.values():
        p.requires_grad_(False)
    return set(found)


@EACH
@FROZEN
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("vectorise", [True, False])
def test_frozen_parameters_stay_in_the_inner_loop(kind, frozen, first_order, vectorise):
    """As an inner loop written out has it, and torch's optimisers, which pass them over."""
    net, curves = small_mlp(), [torch.stack(x) for x in zip(*map(curve, range(3)), strict=True)]
    kept, theta = freeze(net, frozen), dict(net.named_parameters())
    ends = []
    for x, y in zip(*curves[:2], strict=True):
        theirs, (_, optimizer, options) = copy.deepcopy(net), OPTIMIZERS[kind]
        optimizer = optimizer([p for p in theirs.parameters() if p.requires_grad], **options)
        for _ in range(3):
            optimizer.zero_grad()
            fit(x, y)(theirs).backward()
            optimizer.step()
        ends.append(flat(theirs.parameters()))

    def task(x, y, *_):
        f = adapt(net, fit(x, y), ours(kind), 3, first_order=first_order)
        assert all(f.parameters[name] is theta[name] for name in kept)
        return torch.cat([p.flatten() for p in f.parameters.values()])

    found = over_tasks(task, net, *curves, vectorise=vectorise)
    assert relative(found.detach(), torch.stack(ends)) < 1e-12


@FROZEN
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("vectorise", [True, False])
def test_frozen_parameters_get_no_meta_gradient(frozen, first_order, vectorise):
    """And the others the one of an inner loop written by hand."""
    net, data = small_mlp(), [x[None] for x in curve()]
    kept, theta = freeze(net, frozen), dict(net.named_parameters())
    options = {"first_order": first_order}
    over_tasks(
        lambda *one: meta_loss(net, SGD(0.1), 3, one, **options), net, *data, vectorise=vectorise
    ).sum().backward()
    assert {name for name, p in theta.items() if p.grad is None} == kept
    x, y, qx, qy = curve()
    phi, learning = dict(theta), [name for name in theta if name not in kept]
    for _ in range(3):
        loss = fit(x, y)(partial(functional_call, net, phi))
        slopes = torch.autograd.grad(
            loss, [phi[name] for name in learning], create_graph=not first_order
        )
        phi |= {n: phi[n] - 0.1 * g for n, g in zip(learning, slopes, strict=True)}
    expected = gradient(
        fit(qx, qy)(partial(functional_call, net, phi)), [*map(theta.get, learning)]
    )
    assert relative(flat([theta[name].grad for name in learning]), expected) < 1e-12


def test_only_chooses_among_what_is_not_frozen():
    net, (x, y, *_) = small_mlp(), curve()
    freeze(net, ["head.bias", "embed.0"])
    f = adapt(net, fit(x, y), SGD(0.1), only=["head", "embed.0"])
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, f.parameters[n])}
    assert moved == {"head.weight"}


@pytest.mark.parametrize(
    ("frozen", "only", "told"),
    [
        (["head", "embed"], (), r"embed\.0\.weight, .*, head\.bias"),
        (["head"], "head", r"head\.weight, head\.bias"),
    ],
)
def test_nothing_left_to_adapt(frozen, only, told):
    net = small_mlp()
    freeze(net, frozen)
    refused(rf"^{told}: all that could adapt is frozen, so give .*only=", net=net, only=only)


def test_frozen_parameters_take_no_part_in_the_norm_of_a_clip():
    net, (x, y, *_) = small_mlp(), curve()
    kept, theta = freeze(net, ["embed.0"]), dict(net.named_parameters())
    f = adapt(net, fit(x, y), SGD(1.0), clip=1e-3)
    moved = flat([p - theta[name] for name, p in f.parameters.items() if name not in kept])
    torch.testing.assert_close(moved.norm(), torch.tensor(1e-3, dtype=torch.float64))


def test_shared_parameters_are_frozen_by_one_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    net[2].weight.requires_grad_(False)
    x = torch.rand(4, 3, dtype=torch.float64)
    f = adapt(net, fit(x, x), SGD(0.1))
    assert f.parameters["0.weight"] is net[0].weight
    assert not torch.equal(f.parameters["2.bias"], net[2].bias)


def test_tensors_in_the_place_of_parameters_adapt_in_any_case():
    """As where the module is run by functional_call with tensors of no gradient of their own."""
    net, (x, y, *_) = small_mlp(), curve()
    expected = adapt(net, fit(x, y), SGD(0.1)).parameters
    given = {name: p.detach() for name, p in net.named_parameters()}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return adapt(self.net, fit(x, y), SGD(0.1)).parameters

    found = functional_call(Outer(), {f"net.{name}": p for name, p in given.items()}, (x, y))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Buffers


class Counter(nn.Module):
    """Counts its own calls in a buffer, changed in place or replaced."""

    def __init__(self, in_place):
        super().__init__()
        self.line, self.in_place = nn.Linear(1, 1).double(), in_place
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.line(x)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
def test_counter_is_kept_by_the_task_and_not_by_the_module(in_place, first_order):
    net, (x, y, *_) = Counter(in_place), curve()
    path = list(islice(inner_steps(net, fit(x, y), SGD(0.1), first_order=first_order), 4))
    assert [int(f.buffers["calls"]) for f in path] == [0, 1, 2, 3]
    path[0](x)
    path[1](x)
    assert [int(f.buffers["calls"]) for f in path] == [1, 2, 2, 3]
    assert int(net.calls) == 0


@pytest.mark.parametrize("first_order", [True, False])
def test_running_statistics_belong_to_the_task(first_order):
    net = conv_net(nn.BatchNorm2d)
    before, data = state_of(net), images()

    def run(k, steps=3):
        x, y = data[0][k], data[1][k]
        path = inner_steps(net, fit(x, y), SGD(0.1), first_order=first_order)
        return list(islice(path, steps + 1))

    def seen(f):
        return {name: x.clone() for name, x in {**f.parameters, **f.buffers}.items()}

    first, second = run(0), run(1)
    again = run(1)
    assert untouched(net, before)
    for a, b in zip(second, again, strict=True):
        assert all(torch.equal(x, seen(b)[name]) for name, x in seen(a).items())
    counts = [int(f.buffers["embed.1.num_batches_tracked"]) for f in first]
    assert counts == [0, 1, 2, 3]
    kept = [seen(f) for f in first]
    first[-1](data[2][0])
    list(islice(inner_steps(net, fit(data[0][0], data[1][0]), SGD(0.1)), 3))
    for f, old in zip(first[:-1], kept[:-1], strict=True):
        assert all(torch.equal(x, old[name]) for name, x in seen(f).items())
    assert int(first[-1].buffers["embed.1.num_batches_tracked"]) == 4
    means = [f.buffers["embed.1.running_mean"] for f in (first[1], second[1])]
    assert not torch.equal(*means)


def test_running_statistics_are_those_of_training_on_the_task():
    net, (x, y, *_) = conv_net(nn.BatchNorm2d), one_task()
    theirs = copy.deepcopy(net)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        fit(x, y)(theirs).backward()
        optimizer.step()
    f = adapt(net, fit(x, y), SGD(0.1), 3)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(f.buffers[name], buffer, rtol=1e-12, atol=1e-12)


def test_tasks_in_a_loop_do_not_share_running_statistics():
    net, (x, y, qx, qy) = conv_net(nn.BatchNorm2d), images()
    before = state_of(net)

    def task(*one):
        return meta_loss(net, SGD(0.1), 2, one)

    together = over_tasks(task, net, x, y, qx, qy, vectorise=False)
    for k in range(2):
        one = (v[k : k + 1] for v in (x, y, qx, qy))
        assert torch.equal(over_tasks(task, net, *one, vectorise=False)[0], together[k])
    assert untouched(net, before)


# A gradient of exactly 0


@pytest.mark.parametrize(
    ("optimizer", "clip"), [(Adam(0.1), None), (SGD(0.1), 1.0), (Adam(0.1), 1.0)]
)
@pytest.mark.parametrize("whole", [False, True])
@STEPS
def test_dead_units_leave_a_finite_meta_gradient(optimizer, clip, whole, steps):
    """A gradient that is 0 for some parameters, or for all."""
    net, (x, y, qx, qy) = small_mlp(), curve()
    with torch.no_grad():
        net.embed[2].bias.fill_(-100)  # never active: nothing reaches what lies before
    if whole:
        y = net(x).detach()  # and no error is left for the head
    options = {"only": ("embed", "head"), "clip": clip}
    value = meta_loss(net, optimizer, steps, (x, y, qx, qy), **options)
    inner = gradient(fit(x, y)(net), list(net.parameters()))
    assert bool(inner.any()) is not whole
    found = gradient(value, list(net.parameters()))
    assert found.isfinite().all()
    assert found.any()


# All tasks at once


NETS = {
    "pooled": lambda: classifier(Conv4(width=4, norm=BatchNorm), 4, 3),
    "strided": lambda: classifier(Conv4(width=4, strided=True, norm=BatchNorm), 4, 3),
    "batch norm of torch": lambda: classifier(Conv4(width=4, norm=own_batch), 4, 3),
    "instance norm": lambda: classifier(
        Conv4(width=4, pools=2, norm=lambda c: nn.InstanceNorm2d(c, affine=True)), 64, 3
    ),
    "group norm": lambda: classifier(Conv4(width=4, norm=lambda c: nn.GroupNorm(2, c)), 4, 3),
    "mlp": lambda: mlp(width=8),
    "layer norm": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.LayerNorm([14, 14]), nn.Tanh(), nn.Flatten(),
        nn.LayerNorm(392), nn.Linear(392, 3, bias=False), nn.LayerNorm(3, bias=False),
        nn.LayerNorm(3, elementwise_affine=False),
    ),
}  # fmt: skip


@EACH
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("first_order", [True, False])
def test_vmap_equals_the_loop(kind, name, first_order):
    torch.manual_seed(0)
    net = NETS[name]().double()
    data = images(tasks=3)
    if name == "mlp":
        data = [torch.stack(x) for x in zip(*map(curve, range(3)), strict=True)]

    def task(*one):
        return meta_loss(net, ours(kind), 3, one, first_order=first_order)

    found = []
    for vectorise in (True, False):
        batch_norm_mode(net, fused=not vectorise)
        values = over_tasks(task, net, *data, vectorise=vectorise)
        assert values.shape == (3,)
        found.append((values.detach(), gradient(values.sum(), list(net.parameters()))))
    (values, slopes), (values_again, slopes_again) = found
    assert relative(values, values_again) < 1e-12
    assert relative(slopes, slopes_again) < 1e-12


def test_batches_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        over_tasks(lambda a, b: a + b, nn.Identity(), torch.ones(2), torch.ones(3), vectorise=False)


def with_layer(layer):
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(784, 3)).double()


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.Dropout(0.5), r"^1 \(Dropout\) draws random numbers, which vectorised tasks would sh"),
        (nn.Dropout2d(0.5), r"^1 \(Dropout2d\) draws random numbers"),
        (nn.BatchNorm2d(4), r"^1 \(BatchNorm2d\) cannot be vectorised, as it writes running stat"),
        (
            nn.InstanceNorm2d(4, track_running_stats=True),
            r"^1 \(InstanceNorm2d\) cannot be vectorised, as it writes running statistics: use",
        ),
    ],
)
def test_layers_that_vmap_gets_wrong_are_refused(layer, sentence):
    net = with_layer(layer)

    def run(vectorise):
        return over_tasks(
            lambda *d: meta_loss(net, SGD(0.1), 1, d), net, *images(), vectorise=vectorise
        )

    with pytest.raises(ValueError, match=sentence) as caught:
        run(True)
    assert "vectorise=False" in str(caught.value)
    assert run(False).isfinite().all()


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5).eval(), nn.Dropout(0.0), nn.BatchNorm2d(4).eval()]
)
def test_layers_at_rest_are_vectorised(layer):
    net = with_layer(layer)

    def run(vectorise):
        return over_tasks(
            lambda *d: meta_loss(net, SGD(0.1), 1, d), net, *images(), vectorise=vectorise
        )

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


class Around(nn.Module):
    """Sequences `(n, 4, 3)` through a layer in the middle to three logits."""

    def __init__(self, middle, width=8):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, width), middle, nn.Linear(width, 3)
        self.double()

    def forward(self, x):
        x = self.middle(self.first(x))
        return self.last((x[0] if isinstance(x, tuple) else x).mean(1))


def sequences(tasks=2):
    """Tasks of sequences: support_x, support_y, query_x, query_y."""
    g = torch.Generator().manual_seed(0)
    x, qx = (torch.randn(tasks, 6, 4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.arange(6).remainder(3).expand(tasks, 6)
    return x, y, qx, y


def vmapped(net, data, vectorise=True):
    """Meta-losses of all tasks after two steps."""
    return over_tasks(
        lambda *one: meta_loss(net, SGD(0.1), 2, one), net, *data, vectorise=vectorise
    )


class Cells(nn.Module):
    """A recurrent layer of one step at a time."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = None
        for each in x.unbind(1):
            h = self.cell(each, h)
        return (h[0] if isinstance(h, tuple) else h)[:, None]


NOT_FOR_VMAP = {
    "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
    "gru": lambda: nn.GRU(8, 8, batch_first=True),
    "rnn": lambda: nn.RNN(8, 8, batch_first=True),
    "lstm cell": lambda: Cells(nn.LSTMCell(8, 8)),
    "gru cell": lambda: Cells(nn.GRUCell(8, 8)),
    "rnn cell": lambda: Cells(nn.RNNCell(8, 8)),
    "rrelu": nn.RReLU,
}


@pytest.mark.parametrize("make", NOT_FOR_VMAP.values(), ids=NOT_FOR_VMAP)
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_vmap_does_not_run_are_told(make, training):
    torch.manual_seed(0)
    net = Around(make()).train(training)
    with pytest.raises(
        ValueError, match=r"^middle.*\) cannot be vectorised, as .*vectorise=False\.$"
    ):
        vmapped(net, sequences())
    assert vmapped(net, sequences(), vectorise=False).isfinite().all()


class Of(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def filled(x):
    """Into a tensor that was made without regard to what there is of each task."""
    new = torch.zeros(x.shape, dtype=x.dtype)
    new += x
    return new


RANDOM, BRANCH = "it draws random numbers", "it makes a number of a tensor, or branches on one"
DYNAMIC = "it makes a tensor whose size depends on what is computed"
WHAT_VMAP_CANNOT = {
    "functional dropout": (F.dropout, RANDOM),
    "noise like it": (lambda x: x + torch.randn_like(x), RANDOM),
    "noise of a shape": (lambda x: x + torch.randn(8), RANDOM),
    "noise in place": (lambda x: x + torch.empty(8).normal_(), RANDOM),
    "gumbel": (F.gumbel_softmax, RANDOM),
    "mask": (lambda x: x * torch.bernoulli(torch.full((8,), 0.5)), RANDOM),
    "order": (lambda x: x[..., torch.randperm(8)], RANDOM),
    "branch": (lambda x: x if x.sum() > 0 else 2 * x, BRANCH),
    "number": (lambda x: x * float(x.detach().mean()), BRANCH),
    "item": (lambda x: x * x.detach().mean().item(), BRANCH),
    "list": (lambda x: x * x.mean().detach().tolist(), "it takes numbers out of a tensor"),
    "rows": (lambda x: x[:, (x.sum((0, 2)) > -1e3).nonzero().flatten()], DYNAMIC),
    "boolean mask": (lambda x: x + x[x > 0].sum(), DYNAMIC),
    "in place": (filled, "it changes a tensor in place that the tasks share"),
}


@pytest.mark.parametrize(("function", "told"), WHAT_VMAP_CANNOT.values(), ids=WHAT_VMAP_CANNOT)
def test_what_vmap_cannot_run_is_told(function, told):
    torch.manual_seed(0)
    net = Around(Of(function))
    sentence = rf"^This cannot be vectorised \({told}.*\): give vectorise=False, .*\.$"
    with pytest.raises(ValueError, match=sentence) as caught:
        vmapped(net, sequences())
    assert "\n" not in str(caught.value)
    assert vmapped(net, sequences(), vectorise=False).isfinite().all()


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_is_vectorised_at_rest_alone(norm):
    torch.manual_seed(0)
    net = Around(norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"^This cannot be vectorised \(.* give vectorise=False"):
        vmapped(net, sequences())
    assert vmapped(net, sequences(), vectorise=False).isfinite().all()
    found = [vmapped(net.eval(), sequences(), vectorise) for vectorise in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: x @ torch.ones(5, 5, dtype=x.dtype), "shapes cannot be multiplied"),
        (lambda x: torch.zeros(3).add_(x.new_ones(7, 3)), "broadcast shape"),
        (lambda x: x.view(5), "invalid for input of size"),
    ],
)
def test_other_errors_under_vmap_keep_their_words(wrong, words):
    with pytest.raises(RuntimeError, match=words):
        vmapped(Around(Of(wrong)), sequences())


class ChannelsNorm(nn.LayerNorm):
    """Over another dimension than the last."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Scaled(nn.Module):
    """A normalisation called in a `forward` of its own, with weight and bias."""

    def __init__(self, normalise, size=8):
        super().__init__()
        self.normalise = normalise
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return self.normalise(x, self.weight, self.bias)


def by_channel(normalise):
    """The last dimension in the place of channels."""
    return lambda x, w, b: normalise(x.transpose(1, 2), w, b).transpose(1, 2)


def at_rest(x, w, b):
    return F.batch_norm(x, x.new_zeros(8), x.new_ones(8), w, b)


NORMS = {
    "layer": lambda: Scaled(lambda x, w, b: F.layer_norm(x, (8,), w, b)),
    "layer by name": lambda: Scaled(lambda x, w, b: F.layer_norm(x, [8], bias=b, weight=w)),
    "layer, no bias": lambda: Scaled(lambda x, w, b: F.layer_norm(x, (8,), w) + 0 * b),
    "layer of torch": lambda: Scaled(lambda x, w, b: torch.layer_norm(x, (8,), w, b)),
    "layer in two dimensions": lambda: Scaled(
        lambda x, w, b: F.layer_norm(x, (4, 8), w, b), (4, 8)
    ),
    "batch": lambda: Scaled(
        by_channel(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True))
    ),
    "batch of torch": lambda: Scaled(
        by_channel(lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False))
    ),
    "batch at rest": lambda: Scaled(by_channel(at_rest)),
    "instance": lambda: Scaled(by_channel(lambda x, w, b: F.instance_norm(x, weight=w, bias=b))),
    "group": lambda: Scaled(by_channel(lambda x, w, b: F.group_norm(x, 2, w, b))),
    "group by name": lambda: Scaled(
        by_channel(lambda x, w, b: F.group_norm(x, 2, weight=w, bias=b))
    ),
    "root of squares": lambda: Scaled(lambda x, w, b: F.rms_norm(x, (8,), w) + b),
    "another class": lambda: ChannelsNorm(4),
    "layers in layers": lambda: nn.Sequential(
        nn.Sequential(nn.LayerNorm(8), NORMS["layer"]()), nn.Tanh(), NORMS["batch"]()
    ),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_normalisations_under_vmap_are_those_of_the_loop(name, whole):
    """To the second order, where torch's kernels that scale as well are wrong."""
    torch.manual_seed(0)
    net = Around(NORMS[name]())
    for p in net.parameters():  # a weight of 1 would hide a part of the error
        p.data.add_(0.1 * torch.randn_like(p))

    def task(x, y, qx, qy):
        if whole:
            return meta_loss(net, SGD(0.1), 2, (x, y, qx, qy))
        first, middle = net.first(x), net.middle
        return meta_loss(middle, SGD(0.1), 2, (first, first.sin().detach(), first, first.cos()))

    found = []
    for vectorise in (True, False):
        values = over_tasks(task, net, *sequences(), vectorise=vectorise)
        used = list((net if whole else net.middle).parameters())
        found.append((values.detach(), gradient(values.sum(), used)))
    (values, slopes), (values_again, slopes_again) = found
    assert relative(values, values_again) < 1e-12
    assert relative(slopes, slopes_again) < 1e-12


def test_running_statistics_in_a_forward_are_told():
    def normalise(x):
        return F.batch_norm(x, x.new_zeros(4), torch.ones(4).double(), training=True)

    net = Around(Of(normalise))
    with pytest.raises(ValueError, match=r"^This cannot be vectorised \(it changes a tensor in pl"):
        vmapped(net, sequences())
    assert vmapped(net, sequences(), vectorise=False).isfinite().all()


def test_nothing_is_left_on_a_module_that_was_vectorised():
    """Not where it fails on the way either, before or in its `forward`."""
    net = Around(Of(F.dropout))
    before = modes(), hooks(net)
    with pytest.raises(ValueError, match="it draws random numbers"):
        vmapped(net, sequences())
    assert (modes(), hooks(net)) == before

    def refuse(*_):
        raise RuntimeError("no")

    net = Around(nn.Identity())
    net.middle.register_forward_pre_hook(refuse)
    before = modes(), hooks(net)
    with pytest.raises(RuntimeError, match="no"):
        vmapped(net, sequences())
    assert (modes(), hooks(net)) == before


def modes():
    return torch._C._len_torch_function_stack()


def hooks(net):
    return [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in net.modules()]


# Layers whose fast kernels have no second derivative


class SelfAttention(nn.Module):
    """Attention of torch, of its layer for several heads, or by the formula."""

    def __init__(self, how):
        super().__init__()
        self.how, self.heads = how, nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        if self.how == "heads":
            return self.heads(x, x, x, need_weights=False)[0]
        if self.how == "torch":
            return F.scaled_dot_product_attention(x, x, x) + 0 * self.heads(x, x, x)[0]
        return (x @ x.mT / 8**0.5).softmax(-1) @ x + 0 * self.heads(x, x, x)[0]


TWICE = {
    "attention": lambda: SelfAttention("torch"),
    "heads": lambda: SelfAttention("heads"),
    "transformer": lambda: nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, activation="gelu", batch_first=True
    ),
    "lstm": NOT_FOR_VMAP["lstm"],
    "gru": NOT_FOR_VMAP["gru"],
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("vectorise", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_and_recurrent_layers_have_meta_gradients(name, vectorise, training):
    """Against finite differences; in evaluation mode too, where torch takes short cuts."""
    if vectorise and name in NOT_FOR_VMAP:
        pytest.skip("vmap does not run it")
    torch.manual_seed(0)
    net, data = Around(TWICE[name]()).train(training), sequences()
    assert slope_error(lambda: vmapped(net, data, vectorise).sum(), [*net.parameters()]) < 1e-8


@pytest.mark.parametrize("first_order", [True, False])
def test_attention_of_torch_is_that_of_the_formula(first_order):
    found = []
    for how in ("torch", "formula"):
        torch.manual_seed(0)
        net = Around(SelfAttention(how))
        one = [x[0] for x in sequences()]
        loss = meta_loss(net, SGD(0.1), 2, one, first_order=first_order)
        found.append(gradient(loss, [*net.parameters()]))
    assert relative(*found) < 1e-10


def test_fast_kernels_are_used_where_nothing_is_differentiated_twice():
    seen = []

    def attend(x):
        seen.append((sdp_kernels(), torch.backends.cudnn.enabled))
        return F.scaled_dot_product_attention(x, x, x)

    def run(**options):
        seen.clear()
        net = Around(nn.Sequential(Of(attend), nn.Identity()))
        net.idle = nn.RNN(1, 1)
        return meta_loss(
            net, SGD(0.1), 1, [x[0] for x in sequences()], allow_unused=True, **options
        )

    usual = sdp_kernels(), torch.backends.cudnn.enabled
    run()
    assert seen == [((False, False, True), False), usual]  # the support set, then the queries
    run(first_order=True)
    assert seen == [usual, usual]
    with torch.no_grad():
        run()
    assert seen == [usual, usual]


def sdp_kernels():
    """Whether torch may use each kernel of attention: two fused ones, and the plain one."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def test_fused_batch_norm_is_never_wrong_in_silence():
    """As a learner in a loop leaves it."""
    net, data = conv_net(), images()
    batch_norm_mode(net, fused=True)

    def slope(vectorise):
        values = over_tasks(
            lambda *one: meta_loss(net, SGD(0.1), 1, one), net, *data, vectorise=vectorise
        )
        return gradient(values.sum(), list(net.parameters()))

    assert relative(slope(True), slope(False)) < 1e-10


# What is refused


@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize(
    "lr",
    [
        0.0, -0.1, 0, float("nan"), torch.tensor(0.0), torch.tensor([0.1, -0.1]),
        {"a": torch.tensor(0.1), "b": torch.tensor(-0.1)}, [0.1, 0.0],
        [{"a": torch.tensor(0.1)}, {"a": torch.tensor(0.0)}],
    ],
    ids=str,
)  # fmt: skip
def test_rate_must_be_above_0(make, lr):
    with pytest.raises(ValueError, match=r"^The inner rate is .*; it must be above 0\.$"):
        make(lr)


def containers(net):
    """The same rates in torch's containers and in plain ones: one a step, a name, or both."""
    names = dict(net.named_parameters())
    rates = {n: nn.Parameter(torch.tensor(0.05 + 0.01 * k)) for k, n in enumerate(names)}
    flat_names = {name.replace(".", "_"): rate for name, rate in rates.items()}
    few = [nn.Parameter(torch.tensor(rate)) for rate in (0.1, 0.2)]
    return [
        (nn.ParameterList(few), few),
        (nn.ParameterDict(flat_names), rates),
        (flat_names, rates),
        ([nn.ParameterDict(flat_names)] * 2, [rates] * 2),
        (nn.ModuleList([nn.ParameterDict(flat_names), nn.ParameterDict(flat_names)]), [rates] * 2),
    ]


@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize("which", range(5))
def test_rates_in_containers_of_torch(make, which):
    net, (x, y, qx, qy) = small_mlp(), curve()
    found = []
    for lr in containers(net)[which]:
        loss = meta_loss(net, make(lr), 2, (x, y, qx, qy))
        steps = [lr] if isinstance(lr, dict | nn.ParameterDict) else [*lr]
        leaves = []
        for step in steps:  # torch may sort the names
            names = sorted(step, key=lambda n: n.replace(".", "_")) if hasattr(step, "keys") else []
            leaves += [step[name] for name in names] or [step]
        slope = gradient(loss, leaves)
        assert slope.all()
        found.append((loss.detach(), slope))
    torch.testing.assert_close(*found)


def test_rates_in_containers_of_torch_that_do_not_fit():
    refused(
        r"^There are rates for 2 steps, but this is step 3",
        steps=3,
        optimizer=SGD(nn.ParameterList([torch.tensor(0.1), torch.tensor(0.2)])),
    )
    refused(
        r"^There is no rate for 'embed\.0\.bias', only for embed_0_weight: add one",
        optimizer=SGD(nn.ParameterDict({"embed_0_weight": torch.tensor(0.1)})),
    )


@pytest.mark.parametrize("make", [SGD, Adam])
def test_learned_rate_may_be_below_0(make):
    rate = torch.tensor(-0.1, requires_grad=True)
    net, (x, y, *_) = small_mlp(), curve()
    for lr in (rate, [rate], dict.fromkeys(dict(net.named_parameters()), rate)):
        f = adapt(net, fit(x, y), make(lr))
        assert fit(x, y)(f) > fit(x, y)(net)  # uphill


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5])
def test_momentum_must_be_in_range(momentum):
    sentence = f"^momentum is {momentum}; it must be at least 0 and below 1"
    with pytest.raises(ValueError, match=sentence):
        SGD(0.1, momentum)


@pytest.mark.parametrize("betas", [(-0.1, 0.9), (0.9, 1.0), (1.0, 0.9), (0.9, 2.0)])
def test_betas_must_be_in_range(betas):
    with pytest.raises(ValueError, match=r"^betas are \(.*; both must be at least 0 and below 1"):
        Adam(0.1, betas)


def refused(sentence, net=None, loss=None, steps=1, optimizer=None, **options):
    net = net or small_mlp()
    before = state_of(net)
    with pytest.raises(ValueError, match=sentence):
        adapt(net, loss or fit(*curve()[:2]), optimizer or SGD(0.1), steps, **options)
    assert untouched(net, before)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda f: f(curve()[0]), r"\(7, 1\)"),
        (lambda f: f(curve()[0]).mean()[None], r"\(1,\)"),
        (lambda f: float(f(curve()[0]).detach().mean()), "float"),
        (lambda f: None, "NoneType"),
    ],
)
def test_loss_must_be_a_scalar(value, told):
    refused(
        rf"^The inner loss is {told}, not a scalar tensor: average it over the supp", loss=value
    )


class Spare(nn.Module):
    """Two layers of which the second is never called."""

    def __init__(self):
        super().__init__()
        self.line, self.spare = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()

    def forward(self, x):
        return self.line(x)


@pytest.mark.parametrize("vectorise", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
def test_unused_parameters_are_named_or_left(vectorise, first_order):
    net, data = Spare(), [x[None] for x in curve()]

    def run(**options):
        def task(x, y, *_):
            f = adapt(net, fit(x, y), SGD(0.1), 2, first_order=first_order, **options)
            return torch.cat([p.flatten() for p in f.parameters.values()])

        return over_tasks(task, net, *data, vectorise=vectorise)

    sentence = r"^spare\.weight, spare\.bias: no part of the inner loss depends on this\. Adapt"
    with pytest.raises(ValueError, match=sentence) as caught:
        run()
    assert "only=" in str(caught.value)
    assert "allow_unused=True" in str(caught.value)
    (left,), (told,) = run(allow_unused=True), run(only="line")
    assert torch.equal(left, told)
    assert torch.equal(left[2:], flat(net.spare.parameters()))
    assert not torch.equal(left[:2], flat(net.line.parameters()))


def test_loss_of_no_parameter_names_them_all():
    names = r"^embed\.0\.weight, .*, head\.bias: no part of the inner loss"
    refused(names, loss=lambda f: torch.zeros(()))


def test_parameter_used_with_weight_0_counts_as_used():
    """Its gradient is 0, but the loss depends on it."""
    net, (x, y, *_) = Spare(), curve()
    f = adapt(net, lambda f: fit(x, y)(f) + 0 * f.parameters["spare.weight"].sum(), SGD(0.1),
              only=("line", "spare.weight"))  # fmt: skip
    assert torch.equal(f.parameters["spare.weight"], net.spare.weight)


@pytest.mark.parametrize("clip", [0, 0.0, -1.0])
def test_clip_must_be_positive(clip):
    refused(f"^clip is {clip}; a norm must be above 0", clip=clip)


def test_steps_must_not_be_negative():
    refused("^steps is -1; it must be at least 0", steps=-1)


def test_module_without_parameters():
    refused("^The module has no parameters, so there is nothing to adapt", net=nn.ReLU())


def test_rate_of_a_parameter_is_missing():
    rates = SGD({"embed.0.weight": 0.1})
    refused(
        r"^There is no rate for 'embed\.0\.bias', only for embed\.0\.weight: add one",
        optimizer=rates,
    )


def test_rates_for_too_few_steps():
    refused("^There are rates for 2 steps, but this is step 3", steps=3, optimizer=SGD([0.1, 0.2]))


# Cutting the way back


def tensors_in(x):
    return [x] if isinstance(x, torch.Tensor) else [t for v in x.values() for t in tensors_in(v)]


def any_optimizer(kind):
    torch.manual_seed(0)
    return LSTMOptimizer(4).double() if kind == "learned" else ours(kind)


WITH_LEARNED = pytest.mark.parametrize("kind", [*OPTIMIZERS, "learned"])


@WITH_LEARNED
@pytest.mark.parametrize("cut", [0, 2])
def test_detached_path_has_the_same_values_and_no_way_back(kind, cut):
    net, (x, y, *_) = small_mlp(), curve()
    optimizer, theta = any_optimizer(kind), list(net.parameters())
    whole = list(islice(inner_steps(net, fit(x, y), optimizer), 5))
    path = []
    for f in islice(inner_steps(net, fit(x, y), optimizer), 5):
        path.append(f)
        if f.k == cut:
            f.detach_()
            kept = tensors_in(f.parameters) + tensors_in(f.state)
            assert not any(t.requires_grad for t in kept)
    for f, other in zip(path, whole, strict=True):
        for mine, expected in ((f.parameters, other.parameters), (f.state, other.state)):
            pairs = zip(tensors_in(mine), tensors_in(expected), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert gradient(fit(x, y)(whole[4]), theta).any()
    assert all(p.requires_grad for p in theta)
    end = fit(x, y)(path[4])
    assert end.requires_grad == (kind == "learned")  # its own weights are still learned
    if kind == "learned":
        found = gradient(end, [*theta, *optimizer.parameters()])
        count = len(flat(theta))
        assert not found[:count].any()
        assert found[count:].any()


@WITH_LEARNED
def test_what_came_before_a_cut_still_leads_back(kind):
    net, (x, y, *_) = small_mlp(), curve()
    f, other = (adapt(net, fit(x, y), any_optimizer(kind), 2) for _ in range(2))
    before = fit(x, y)(f)
    f.detach_()
    expected = gradient(fit(x, y)(other), list(net.parameters()))
    assert torch.equal(gradient(before, list(net.parameters())), expected)
    assert expected.any()


def test_memory_may_hold_other_things_than_tensors():
    kept = {"v": {"a": torch.ones(2, requires_grad=True)}, "count": 3, "last": None}
    f = Adapted(small_mlp(), {}, {}, kept)
    f.detach_()
    assert (f.state["count"], f.state["last"]) == (3, None)
    assert not f.state["v"]["a"].requires_grad


def test_gradient_of_a_rate_after_a_cut_is_that_of_the_last_step():
    """phi_3 = phi_2 - alpha g(phi_2), in which phi_2 is a constant."""
    net, (x, y, qx, qy) = small_mlp(), curve()
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    path = inner_steps(net, fit(x, y), SGD(alpha))
    f = next(islice(path, 2, None))
    f.detach_()
    there = copy.deepcopy(net)
    there.load_state_dict(f.parameters)
    (found,) = torch.autograd.grad(fit(qx, qy)(next(path)), [alpha])
    here = gradient(fit(x, y)(there), list(there.parameters()))
    end = adapt(there, fit(x, y), SGD(0.1), first_order=True)
    after = gradient(fit(qx, qy)(end), list(there.parameters()))
    torch.testing.assert_close(found, -here @ after, rtol=1e-10, atol=1e-12)


def test_steps_are_counted():
    """In what is yielded and in what the inner loss is given."""
    net, (x, y, *_), seen = small_mlp(), curve(), []

    def loss(f):
        seen.append(f.k)
        return fit(x, y)(f)

    path = inner_steps(net, loss, SGD(0.1))
    assert [f.k for f in islice(path, 4)] == [0, 1, 2, 3]
    assert seen == [0, 1, 2]
    assert adapt(net, loss, SGD(0.1), 5).k == 5


# A module that changes on the way


def replaced(net):
    net.head = nn.Linear(8, 2).double()


def added(net):
    net.embed.register_parameter("extra", nn.Parameter(torch.ones(3).double()))


def deleted(net):
    net.head.bias = None


@WITH_LEARNED
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replaced, r"'head\.weight' has shape \(2, 8\), at the first it was \(1, 8\)"),
        (added, r"'embed\.extra' has shape \(3,\), at the first it was None"),
        (deleted, r"'head\.bias' has shape None, at the first it was \(1,\)"),
    ],
)
@pytest.mark.parametrize("k", [0, 2])
def test_change_of_the_parameters_between_steps_is_refused(kind, change, told, k):
    net, (x, y, *_) = small_mlp(), curve()
    path = inner_steps(net, fit(x, y), any_optimizer(kind))
    next(islice(path, k, None))
    change(net)
    after = state_of(net)
    sentence = rf"^Before inner step {k + 1} the module's {told} \(None: missing\): build the whole"
    with pytest.raises(ValueError, match=sentence) as caught:
        next(path)
    assert "\n" not in str(caught.value)
    assert untouched(net, after)


def test_layer_replaced_by_one_of_the_same_shape_changes_nothing():
    """The steps go on from phi, which has its own parameters."""
    net, (x, y, *_) = small_mlp(), curve()
    expected = adapt(net, fit(x, y), SGD(0.1), 3)
    path = inner_steps(net, fit(x, y), SGD(0.1))
    next(path)
    net.head = nn.Linear(8, 1).double()
    found = next(islice(path, 2, None))
    assert torch.equal(flat(found.parameters.values()), flat(expected.parameters.values()))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_default_device_plays_no_part(kind):
    """Rates that are plain numbers are checked on the CPU."""
    assert elsewhere(lambda: kind([0.1, torch.tensor(0.1, device="cpu")])).lr[0] == 0.1
    with pytest.raises(ValueError, match="must be above 0"):
        elsewhere(lambda: kind(0.0))


# Optimisers of torch, and the adapted model as a module

TORCH_OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "nesterov": True},
    ),
    "adam": (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
}
EACH_OF_TORCH = pytest.mark.parametrize("name", TORCH_OPTIMIZERS)


def of_torch(name, net, grouped):
    """An optimiser as people have it: no decay on biases, and another rate for the last layer."""
    kind, options = TORCH_OPTIMIZERS[name]
    if not grouped:
        return kind(net.parameters(), **options)
    weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    plain = {"params": biases, "weight_decay": 0.0}
    return kind([{"params": weights[:-1]}, plain, {"params": weights[-1:], "lr": 0.02}], **options)


@EACH_OF_TORCH
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("make", [conv_net, small_mlp])
def test_an_optimiser_of_torch_makes_the_steps_that_torch_makes(name, grouped, make):
    net, (x, y, *_) = make(), one_task() if make is conv_net else curve()
    theirs = copy.deepcopy(net)
    optimizer = of_torch(name, theirs, grouped)
    for _ in range(4):
        optimizer.zero_grad()
        fit(x, y)(theirs).backward()
        optimizer.step()
    before = state_of(net)
    f = adapt(net, fit(x, y), of_torch(name, net, grouped), 4)
    assert relative(flat(f.parameters.values()), flat(theirs.parameters())) < 1e-12
    assert untouched(net, before)


@EACH_OF_TORCH
def test_meta_gradient_through_an_optimiser_of_torch(name):
    net, data = small_mlp(), curve()

    def loss():
        return meta_loss(net, of_torch(name, net, True), 3, data)

    assert slope_error(loss, list(net.parameters())) < 1e-7


@pytest.mark.parametrize("vectorise", [True, False], ids=["vmap", "loop"])
def test_an_optimiser_of_torch_over_tasks(vectorise):
    net = small_mlp()
    optimizer = of_torch("nesterov", net, True)
    batches = [torch.stack(each) for each in zip(curve(0), curve(1), strict=True)]

    def task(x, y, qx, qy):
        return meta_loss(net, optimizer, 2, (x, y, qx, qy))

    found = over_tasks(task, net, *batches, vectorise=vectorise)
    alone = torch.stack([task(*curve(seed)) for seed in (0, 1)])
    assert relative(found.detach(), alone.detach()) < 1e-12


def test_what_is_in_no_group_or_has_rate_0_stays():
    net, (x, y, *_) = small_mlp(), curve()
    first, *others = net.parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": others[:1], "lr": 0.0}], lr=0.1)
    f = adapt(net, fit(x, y), optimizer, 3)
    moved = [not torch.equal(f.parameters[name], p) for name, p in net.named_parameters()]
    assert moved == [True] + [False] * len(others)


def test_what_an_optimiser_remembers_is_not_taken_over():
    net, (x, y, *_) = small_mlp(), curve()
    optimizer = of_torch("nesterov", net, False)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    start = state_of(net)
    optimizer.step()
    net.load_state_dict(start)
    fresh = of_torch("nesterov", net, False)
    one, other = (adapt(net, fit(x, y), each, 2).parameters for each in (optimizer, fresh))
    assert torch.equal(flat(one.values()), flat(other.values()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop makes no inner steps here: use SGD, Adam"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), "SGD with dampening=0.5"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "Adam with amsgrad=True"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "AdamW with maximize=True"),
        (lambda p: torch.optim.SGD(small_mlp().parameters(), 0.1), "that the module has not"),
    ],
)
def test_optimisers_of_torch_that_cannot_be_had(make, told):
    net, (x, y, *_) = small_mlp(), curve()
    with pytest.raises(ValueError, match=told):
        adapt(net, fit(x, y), make(net.parameters()))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_weight_decay_must_not_be_negative(kind):
    with pytest.raises(ValueError, match="weight_decay is -1"):
        kind(0.1, weight_decay=-1)


def adapted_with_memory():
    """What has shared and frozen parameters, running statistics and a buffer that is not saved."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].weight = net[2].weight
    net[0].bias.requires_grad_(False)
    net.register_buffer("seen", torch.zeros(2), persistent=False)
    net.double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 4
    return net, adapt(net, lambda f: F.cross_entropy(f(x), y), SGD(0.5), 3), x


def test_the_adapted_model_as_a_module_answers_the_same(tmp_path):
    net, f, x = adapted_with_memory()
    before = state_of(net)
    own = f.as_module().eval()
    saved = tmp_path / "adapted.pt"
    torch.save(own.state_dict(), saved)
    again = copy.deepcopy(net).eval()
    again.load_state_dict(torch.load(saved, weights_only=True))
    net.eval()
    wanted = f(x)
    for each in (own, again, copy.deepcopy(own)):
        assert type(each) is nn.Sequential
        assert torch.equal(each(x), wanted)
    assert not torch.equal(own[1].running_mean, net[1].running_mean)
    assert untouched(net, before)


def test_the_adapted_model_as_a_module_is_a_model_of_its_own():
    net, f, x = adapted_with_memory()
    own, phi = f.as_module(), flat(f.parameters.values()).detach().clone()
    assert own[3].weight is own[2].weight and not own[0].bias.requires_grad
    assert all(p.is_leaf and p.grad is None for p in own.parameters())
    optimizer = torch.optim.SGD(own.parameters(), 0.1)
    own(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(flat(f.parameters.values()), phi)
    assert all(p.grad is None for p in net.parameters())
