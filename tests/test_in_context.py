"""The transformer against torch's own, who sees whom, and gradient descent by attention."""

import pytest
import torch
from helpers import meta_loss, one_by_one, predict, relative, slope_error, tensors_of
from torch import nn

from metautils.data.regression import LinearSampler
from metautils.errors import BadArgument
from metautils.evaluate import squared_errors
from metautils.learners import in_context
from metautils.learners.in_context import Block, InContext, linear_attention
from metautils.train import meta_train


def small(seed=0, **more):
    """With weights large enough that attention is far from even."""
    torch.manual_seed(seed)
    net = InContext(**({"inputs": 3, "length": 8, "width": 16, "layers": 2} | more))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def row(examples=8, outputs=1, tasks=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tasks, examples, n, generator=g) for n in (3, outputs))


@pytest.mark.parametrize("causal", [True, False])
def test_block_is_that_of_torch(causal):
    torch.manual_seed(0)
    block = Block(16, 4)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_": block.qkv, "self_attn.out_proj.": block.out,
        "norm1.": block.norms[0], "norm2.": block.norms[1],
        "linear1.": block.mlp[0], "linear2.": block.mlp[2],
    }  # fmt: skip
    named = {a + b: w for a, part in pairs.items() for b, w in part.state_dict().items()}
    theirs.load_state_dict(named)
    x, sees = torch.randn(3, 7, 16), torch.ones(7, 7, dtype=torch.bool)
    sees = sees.tril() if causal else sees
    expected = theirs(x, src_mask=~sees)
    torch.testing.assert_close(block(x, sees), expected, atol=1e-6, rtol=1e-5)


def who_changes(net, place, part):
    """Which places' predictions change, `(T,)`, when an x or a y changes."""
    x, y = row()
    before = net.along(x, y)
    changed = (x.clone(), y.clone())
    changed[part == "y"][:, place] += 1
    return (net.along(*changed) != before).any(-1).any(0)


@pytest.mark.parametrize("place", range(8))
def test_no_place_sees_its_own_target_or_what_comes_later(place):
    """And each sees all that came before."""
    places = torch.arange(8)
    assert torch.equal(who_changes(small(), place, "x"), places >= place)
    assert torch.equal(who_changes(small(), place, "y"), places > place)


def test_a_mask_that_leaks_is_seen(monkeypatch):
    """By one place: then a prediction sees its own target."""
    sees = in_context._sees
    monkeypatch.setattr(in_context, "_sees", lambda *a: sees(*a) | sees(*a).roll(1, 1))
    assert who_changes(small(), 3, "y")[3]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("support", [0, 1, 4, 7])
def test_a_query_is_the_last_place_of_a_row(support, outputs):
    net = small(outputs=outputs)
    (x, y), (q, _) = row(support, outputs), row(5, seed=2)
    found = net(x, y, q)
    assert found.shape == (2, 5, outputs)
    for k in range(5):
        whole = torch.cat([x, q[:, k : k + 1]], 1)
        unseen = torch.full((2, 1, outputs), 9.0)
        last = net.along(whole, torch.cat([y, unseen], 1))[:, -1]
        torch.testing.assert_close(found[:, k], last, atol=1e-6, rtol=1e-6)


def test_queries_one_at_a_time_change_nothing():
    net, e = small(), LinearSampler(3, 7, 9, tasks=2).sample()
    together, alone = predict(net, e), one_by_one(net, e)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    assert together.std() > 0.01


def test_queries_that_see_one_another_are_seen(monkeypatch):
    def leaky(s, q, device):
        return torch.ones(s + q, s + q, dtype=torch.bool, device=device).tril()

    monkeypatch.setattr(in_context, "_sees", leaky)
    net, e = small(), LinearSampler(3, 7, 9, tasks=2).sample()
    assert (predict(net, e) - one_by_one(net, e)).abs().max() > 1e-3


def test_the_order_of_the_examples_counts():
    """They stand in a row; a place is part of what is read."""
    net, (x, y), (q, _) = small(), row(5), row(2, seed=3)
    assert not torch.allclose(net(x, y, q), net(x.flip(1), y.flip(1), q), atol=1e-3)


def test_meta_loss_is_the_mean_over_all_places():
    net, e = small(), LinearSampler(3, 5, 3, tasks=4).sample()
    ((loss, predictions, y),) = net.pieces(e)
    assert predictions.shape == y.shape == (4, 8, 1)
    each = []
    for k in range(8):
        found = net(*(z[:, :k] for z in (predictions_x(e), y)), predictions_x(e)[:, k : k + 1])
        each.append((found[:, 0] - y[:, k]).square().mean())
    torch.testing.assert_close(loss, torch.stack(each).mean())


def predictions_x(e):
    return torch.cat([e.support_x, e.query_x], 1)


def test_gradient_equals_finite_differences(float64):
    net, e = small(), LinearSampler(3, 3, 2, tasks=2).sample()
    leaves = [net.places, net.blocks[0].qkv.weight, *net.read_y.parameters()]
    assert slope_error(lambda: meta_loss(net, e), leaves) < 1e-7


def test_every_weight_is_learned():
    net = small()
    meta_loss(net, LinearSampler(3, 5, 3, tasks=2).sample()).backward()
    assert all(bool(p.grad.any()) for p in net.parameters())


def test_half_precision_around_it_changes_nothing():
    net, (x, y), (q, _) = small(), row(5), row(2, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x, y, q), net.along(x, y)
    assert torch.equal(found[0], net(x, y, q)) and torch.equal(found[1], net.along(x, y))


def test_it_learns_from_its_context():
    """Two lines, `y = x` and `y = -x`: one example tells which, and without one there is none."""
    torch.manual_seed(0)
    net, two = InContext(1, length=4, width=32, layers=2), torch.tensor([[1.0], [-1.0]])
    meta_train(net, LinearSampler(1, 2, 2, 32, weights=two), 150, lr=5e-3, progress=False)
    test = LinearSampler(1, 3, 1, 500, seed=1, weights=two)
    x, y = (torch.cat(z, 1) for z in zip(*pairs_of(test), strict=True))
    errors = (predict_along(net, x, y) - y).square().mean((0, 2))
    assert errors[0] > 0.8
    assert errors[-1] < 0.6 * errors[0]
    assert float(squared_errors(net, test, 500).mean()) < 0.6


@torch.no_grad()
def predict_along(net, x, y):
    return net.along(x, y)


def pairs_of(sampler):
    x, y, qx, qy = tensors_of(sampler.sample())
    return (x, y), (qx, qy)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda n: n(*row(8), row(2)[0]), "There are 8 examples, but .* places for 7 here: give"),
        (lambda n: n.along(*row(9)), "There are 9 examples, but .* places for 8 here: give fewer"),
        (lambda n: n.along(*row(0)), "The row is empty: give one example or more"),
        (lambda n: n.along(row(4)[0], row(4)[1] * torch.nan), "A target is NaN or infinite: leave"),
        (lambda n: n(row(4)[0], row(4)[1] / 0, row(2)[0]), "A target is NaN or infinite: leave"),
        (lambda n: n(*row(4), row(2)[0][..., :2]), r"Inputs .* \(2, 2, 2\), but"),
        (lambda n: n.along(row(4)[0][..., :2], row(4)[1]), r"Inputs have .* \(2, 4, 2\), but"),
        (lambda n: n(row(4)[0], row(4)[1][..., 0], row(2)[0]), r"Targets .* \(2, 4\), .*\(2, 4, 1"),
        (lambda n: n(row(4)[0], row(3)[1], row(2)[0]), r"Targets .* \(2, 3, 1\)"),
        (lambda n: n(*row(4, outputs=2), row(2)[0]), r"Targets .* \(2, 4, 2\), .*\(2, 4, 1"),
        (lambda n: InContext(3, width=9), "inputs=3, .* width=9, layers=3, heads=2: all 1 or more"),
        (lambda n: InContext(0), "inputs=0, outputs=1, length=12, .*: all 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_in_one_sentence(call, told):
    with pytest.raises(BadArgument, match=f"^{told}") as caught:
        call(small())
    assert "\n" not in str(caught.value)


def test_a_row_that_is_full_is_read_to_its_end():
    assert small().along(*row(8)).shape == (2, 8, 1)
    assert small()(*row(7), row(2)[0]).shape == (2, 2, 1)


@pytest.mark.parametrize("outputs", [1, 2])
def test_linear_attention_is_one_step_of_gradient_descent(outputs, float64):
    """Proposition 1 of von Oswald et al. 2023: the weights are written down, none is learned."""
    torch.manual_seed(0)
    x, y, q, lr, d, n = *row(9, outputs), row(4, seed=2)[0], 0.3, 3, 9
    x, y, q = x.double(), y.double(), q.double()
    w = torch.randn(outputs, d, requires_grad=True)  # where the step begins
    key = torch.zeros(d + outputs, d + outputs)
    key[:d, :d] = torch.eye(d)
    value = torch.zeros(d + outputs, d + outputs)
    value[d:, :d], value[d:, d:] = lr / n * w.detach(), -lr / n * torch.eye(outputs)
    tokens, queries = torch.cat([x, y], -1), torch.cat([q, -q @ w.detach().mT], -1)
    found = -linear_attention(tokens, queries, key, key, value)[..., d:]
    for task in range(2):
        loss = (x[task] @ w.mT - y[task]).square().sum() / (2 * n)
        (slope,) = torch.autograd.grad(loss, w)
        expected = q[task] @ (w - lr * slope).mT
        assert relative(found[task], expected.detach()) < 1e-12
    assert relative(found, q @ w.detach().mT) > 0.1  # the step moves the predictions
