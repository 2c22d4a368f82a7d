"""Quadratic tasks are what the paper says they are, drawn the same from the same seed."""

import pytest
import torch
from helpers import (
    check_that_episodes_are_drawn_on_the_cpu,
    check_that_episodes_follow_the_seed,
    check_that_the_generator_is_all_it_remembers,
    tensors_of,
)
from torch import nn

from metautils.data.quadratics import QuadraticSampler
from metautils.learners.base import task_loss


@pytest.mark.parametrize(("dimensions", "tasks"), [(10, 16), (3, 5), (1, 1)])
def test_shapes(dimensions, tasks):
    episode = QuadraticSampler(dimensions, tasks).sample()
    w, y, *queries = tensors_of(episode)
    assert (w.shape, y.shape) == ((tasks, dimensions, dimensions), (tasks, dimensions, 1))
    assert {z.dtype for z in tensors_of(episode)} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(queries, (w, y), strict=True))
    assert episode.tasks == tasks
    assert episode.classes is None


def test_squared_error_of_a_linear_model_is_the_quadratic():
    """|W phi - y|^2 / d, written out entry by entry."""
    w, y, *_ = tensors_of(QuadraticSampler(4, 3, seed=2).sample())
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
    plain, (w, y, *_) = (tensors_of(QuadraticSampler(4, 5000, s).sample()) for s in (0, spread))
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
    check_that_episodes_follow_the_seed(lambda seed: QuadraticSampler(3, 2, seed=seed))


def test_state_of_the_generator_is_all_it_remembers():
    check_that_the_generator_is_all_it_remembers(QuadraticSampler(3, 2))


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


def test_default_device_plays_no_part():
    check_that_episodes_are_drawn_on_the_cpu(lambda: QuadraticSampler(5, tasks=3, seed=1))


def test_same_tasks_in_the_default_dtype(float64):
    found = QuadraticSampler(seed=1).sample()
    torch.set_default_dtype(torch.float32)
    expected = QuadraticSampler(seed=1).sample()
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(a, b.double(), rtol=1e-5, atol=1e-5)
