"""Quadratic tasks are what the paper says they are, drawn the same from the same seed."""

from itertools import islice

import pytest
import torch
from torch import nn

from metautils.data.quadratics import QuadraticSampler
from metautils.learners.base import task_loss


def parts(episode):
    return episode.support_x, episode.support_y, episode.query_x, episode.query_y


@pytest.mark.parametrize(("dimensions", "tasks"), [(10, 16), (3, 5), (1, 1)])
def test_shapes(dimensions, tasks):
    episode = QuadraticSampler(dimensions, tasks).sample()
    w, y, *queries = parts(episode)
    assert (w.shape, y.shape) == ((tasks, dimensions, dimensions), (tasks, dimensions, 1))
    assert {z.dtype for z in parts(episode)} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(queries, (w, y), strict=True))
    assert episode.tasks == tasks
    assert episode.classes is None


def test_squared_error_of_a_linear_model_is_the_quadratic():
    """|W phi - y|^2 / d, written out entry by entry."""
    w, y, *_ = parts(QuadraticSampler(4, 3, seed=2).sample())
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    phi = model.weight[0].tolist()
    for task in range(3):
        rows = zip(w[task].tolist(), y[task, :, 0].tolist(), strict=True)
        errors = [sum(a * p for a, p in zip(row, phi, strict=True)) - b for row, b in rows]
        expected = sum(error**2 for error in errors) / 4
        assert task_loss(model(w[task]), y[task]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("part", ["support_x", "support_y"])
def test_without_spread_all_entries_are_standard_normal(part):
    """Moments to the fourth of ten thousand numbers and more, each within five of its errors."""
    x = getattr(QuadraticSampler(5, 4000, spread=0).sample(), part).flatten().double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (variance / len(x)) ** 0.5
        assert float((x**power).mean()) == pytest.approx(expected, abs=5 * error)


def test_matrix_and_target_have_no_entry_in_common():
    """So a target is no copy of a column: all numbers of an episode differ."""
    episode = QuadraticSampler(4, 5).sample()
    numbers = torch.cat([episode.support_x.flatten(), episode.support_y.flatten()])
    assert len(numbers.unique()) == len(numbers) == 5 * 4 * 5


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_spread_multiplies_columns_and_whole_matrices(spread):
    """Logarithms of the factors: one of a column and one of the matrix, both uniform.

    Each has the variance spread^2 / 12, so columns of a matrix vary by that about their mean, and
    all columns of all matrices by twice as much.
    """
    plain, (w, y, *_) = (parts(QuadraticSampler(4, 5000, s).sample()) for s in (0, spread))
    assert torch.equal(y, plain[1])
    factors = (w / plain[0]).double().log10()
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=0, atol=1e-5)
    factors = factors[:, 0]
    assert factors.abs().max() < spread + 1e-5
    assert float(factors.mean()) == pytest.approx(0, abs=0.02 * spread)
    assert float(factors.var(1).mean()) == pytest.approx(spread**2 / 12, rel=0.03)
    assert float(factors.var()) == pytest.approx(spread**2 / 6, rel=0.03)
    apart = (factors.amax(1) - factors.amin(1)).max()  # one column at either end of the range
    assert 0.95 * spread < apart < spread + 1e-5


def test_same_seed_same_episodes():
    first, again, other = (QuadraticSampler(3, 2, seed=seed) for seed in (4, 4, 5))
    torch.manual_seed(9)  # the global generator has no part in it
    several = list(islice(first, 3))
    for a, b in zip(several, islice(again, 3), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(parts(a), parts(b), strict=True))
    assert not torch.equal(several[0].support_x, several[1].support_x)
    assert not torch.equal(several[0].support_x, other.sample().support_x)


def test_state_of_the_generator_is_all_it_remembers():
    sampler = QuadraticSampler(3, 2)
    sampler.sample()
    state = sampler.generator.get_state()
    expected = sampler.sample()
    sampler.generator.set_state(state)
    assert torch.equal(sampler.sample().support_y, expected.support_y)


def test_settings_tell_episodes_apart():
    made = QuadraticSampler(3, 4, 0.5, seed=7)
    expected = {"seed": 7, "family": "quadratics", "dimensions": 3, "tasks": 4, "spread": 0.5}
    assert made.settings == expected
    made.sample()
    assert made.settings == expected


@pytest.mark.parametrize(
    ("name", "value"), [("dimensions", 0), ("dimensions", -1), ("tasks", 0), ("spread", -0.1)]
)
def test_numbers_must_be_in_range(name, value):
    sentence = f"{name}={value}.*: at least 1, 1 and 0 are needed"
    with pytest.raises(ValueError, match=sentence):
        QuadraticSampler(**{name: value})
