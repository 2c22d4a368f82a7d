"""Neural processes: distributions that know no order, and who is told what."""

import pytest
import torch
from helpers import meta_loss, one_by_one, predict, slope_error
from torch.nn import functional as F

from metautils.data.regression import GaussianProcessSampler
from metautils.errors import BadArgument
from metautils.learners.neural_process import AttentiveNeuralProcess, ConditionalNeuralProcess
from metautils.train import meta_train

KINDS = pytest.mark.parametrize("kind", [ConditionalNeuralProcess, AttentiveNeuralProcess])


def small(kind, inputs=2, outputs=1, **more):
    torch.manual_seed(0)
    net = kind(inputs, outputs, 16, **more)
    with torch.no_grad():
        for p in net.parameters():  # far from the even weights of the beginning
            p.add_(0.2 * torch.randn_like(p))
    return net


def points(support=5, queries=4, outputs=1, inputs=2, tasks=3):
    g = torch.Generator().manual_seed(1)
    shapes = (support, inputs), (support, outputs), (queries, inputs)
    return tuple(torch.randn(tasks, *s, generator=g) for s in shapes)


def told(net, *data):
    d = net.predict_distribution(*data)
    return torch.stack([d.mean, d.stddev])


@KINDS
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("support", [0, 1, 5])
def test_distribution_is_one_for_each_number(kind, support, outputs):
    net, data = small(kind, outputs=outputs), points(support, outputs=outputs)
    found = told(net, *data)
    assert found.shape == (2, 3, 4, outputs)
    assert found.isfinite().all()
    assert torch.equal(net(*data), found[0])


@KINDS
def test_order_of_the_support_set_plays_no_part(kind):
    net, (x, y, q) = small(kind), points()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    found, expected = told(net, x[:, order], y[:, order], q), told(net, x, y, q)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    other = told(net, x, y[:, order], q)  # that of x and y to one another does
    assert (other - expected).abs().max() > 1e-3


@KINDS
def test_queries_one_at_a_time_change_nothing(kind):
    net, e = small(kind, inputs=1), GaussianProcessSampler(6, 9, 2).sample()
    together = predict(net, e)
    torch.testing.assert_close(together, one_by_one(net, e), atol=1e-6, rtol=1e-5)
    assert together.std() > 0.01


def test_conditional_one_by_hand():
    """The mean of what each point gives, and one network for mean and deviation."""
    net, (x, y, q) = small(ConditionalNeuralProcess, floor=0.3), points()
    for task in range(3):
        each = [net.encoder(torch.cat([a, b])) for a, b in zip(x[task], y[task], strict=True)]
        r = torch.stack(each).mean(0)
        for k in range(4):
            mu, raw = net.decoder(torch.cat([r, q[task, k]]))
            found = told(net, x, y, q)[:, task, k, 0]
            expected = torch.stack([mu, 0.3 + F.softplus(raw)])
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_attentive_one_by_hand():
    """Of one head: softmax of scaled products, keys of x alone, values of x and y."""
    net, (x, y, q) = small(AttentiveNeuralProcess, heads=1), points()
    a = net.attention
    (wq, wk, wv), (bq, bk, bv) = a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3)
    keys = F.linear(net.places(x), wk, bk)
    values = F.linear(net.encoder(torch.cat([x, y], -1)), wv, bv)
    scores = F.linear(net.places(q), wq, bq) @ keys.mT / 16**0.5
    expected = a.out_proj(scores.softmax(-1) @ values)
    torch.testing.assert_close(net.read(x, y, q), expected, atol=1e-5, rtol=1e-5)
    assert scores.softmax(-1).std(-1).mean() > 0.01


def test_queries_are_told_the_same_only_without_attention():
    x, y, q = points()
    r = small(ConditionalNeuralProcess).read(x, y, q)
    assert torch.equal(r, r[:, :1].expand_as(r))
    r = small(AttentiveNeuralProcess).read(x, y, q)
    assert (r - r[:, :1]).abs().max() > 1e-3


@KINDS
@pytest.mark.parametrize("floor", [0.01, 0.5])
def test_sigma_stays_above_the_floor(kind, floor):
    net = small(kind, floor=floor)
    with torch.no_grad():
        net.decoder[-1].bias.sub_(100)
    sigma = told(net, *points())[1]
    torch.testing.assert_close(sigma, torch.full_like(sigma, floor), atol=1e-3, rtol=0)
    assert sigma.min() >= floor


@KINDS
def test_loss_is_the_negative_log_likelihood_of_all_given_some(kind, monkeypatch):
    net, e = small(kind, inputs=1), GaussianProcessSampler(5, 3, 2).sample()
    x, y = torch.cat([e.support_x, e.query_x], 1), torch.cat([e.support_y, e.query_y], 1)
    for n in (0, 3, 7):
        monkeypatch.setattr(torch, "randint", lambda high, *_, n=n, **__: torch.tensor(n))
        ((loss, mean, targets),) = net.pieces(e)
        mu, sigma = told(net, x[:, :n], y[:, :n], x)
        by_hand = (
            0.5 * ((y - mu) / sigma) ** 2 + sigma.log() + 0.5 * torch.log(torch.tensor(6.28319))
        )
        torch.testing.assert_close(loss, by_hand.mean(), atol=1e-5, rtol=1e-5)
        assert torch.equal(mean, mu) and torch.equal(targets, y)


def test_every_number_of_support_points_but_all_occurs(monkeypatch):
    net, e, seen = (
        small(ConditionalNeuralProcess, inputs=1),
        GaussianProcessSampler(2, 3).sample(),
        [],
    )
    read = net.read
    monkeypatch.setattr(net, "read", lambda x, y, q: (seen.append(x.shape[1]), read(x, y, q))[1])
    for _ in range(100):
        meta_loss(net, e)
    assert set(seen) == {0, 1, 2, 3, 4}


@KINDS
def test_gradient_equals_finite_differences(kind, float64, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(4))
    net, e = small(kind, inputs=1), GaussianProcessSampler(5, 3, 2).sample()
    leaves = [net.encoder[0].weight, net.decoder[-1].weight]
    assert slope_error(lambda: meta_loss(net, e), leaves) < 1e-7


@KINDS
def test_half_precision_around_it_changes_nothing(kind):
    net, data = small(kind), points()
    with torch.autocast("cpu", torch.bfloat16):
        found = told(net, *data)
    assert torch.equal(found, told(net, *data))


@KINDS
def test_it_learns(kind):
    """After a moment the likelihood is above that of the prior, N(0, 1 + noise^2)."""
    torch.manual_seed(0)
    net = kind(width=32)
    history = meta_train(
        net, GaussianProcessSampler(6, 10, 16, length=1.0), 150, lr=5e-3, progress=False
    )
    assert sum(history.loss[-50:]) / 50 < 1.2 < 1.35 < history.loss[0]


@KINDS
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda n, x, y, q: n(x[..., :1], y, q), r"Inputs have the shape \(3, 5, 1\), but .* n, 2"),
        (lambda n, x, y, q: n(x, y, q[..., :1]), r"Inputs have the shape \(3, 4, 1\), but .* n, 2"),
        (lambda n, x, y, q: n(x, y[..., 0], q), r"Targets have the shape \(3, 5\), .*\(3, 5, 1\)"),
        (lambda n, x, y, q: n(x, y[:, :4], q), r"Targets have the shape \(3, 4, 1\), .*\(3, 5, 1"),
        (lambda n, x, y, q: n(x, y * torch.nan, q), "A target is NaN or infinite: leave that"),
        (lambda n, *_: type(n)(0), "inputs=0, outputs=1, width=128, floor=0.1: all must be above"),
        (lambda n, *_: type(n)(floor=0.0), "inputs=1, .* floor=0.0: all must be above 0"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_sentence(kind, call, told):
    with pytest.raises(BadArgument, match=f"^{told}") as caught:
        call(small(kind), *points())
    assert "\n" not in str(caught.value)


def test_heads_must_divide_the_width():
    with pytest.raises(BadArgument, match="^width=20, heads=8: width must be a multiple of heads"):
        AttentiveNeuralProcess(width=20)
