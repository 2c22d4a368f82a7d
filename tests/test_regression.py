"""Regression tasks are functions of their family, drawn the same from the same seed."""

import math

import pytest
import torch
from helpers import (
    check_that_episodes_are_drawn_on_the_cpu,
    check_that_episodes_follow_the_seed,
    check_that_the_generator_is_all_it_remembers,
    tensors_of,
)

from metautils.data.regression import (
    LINES,
    PLANES,
    SINUSOIDS,
    Family,
    GaussianProcessSampler,
    LinearSampler,
    RegressionSampler,
)
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.evaluate import squared_errors
from metautils.exact import rbf, ridge
from metautils.learners.base import Learner
from metautils.train import meta_train

FAMILIES = pytest.mark.parametrize("family", [SINUSOIDS, LINES, PLANES], ids=lambda f: f.name)


@FAMILIES
def test_shapes(family):
    episode = RegressionSampler(family, shots=5, queries=7, tasks=3).sample()
    x, y, qx, qy = tensors_of(episode)
    assert x.shape == (3, 5, family.inputs)
    assert qx.shape == (3, 7, family.inputs)
    assert (y.shape, qy.shape) == ((3, 5, 1), (3, 7, 1))
    assert {z.dtype for z in tensors_of(episode)} == {torch.float32}
    assert episode.classes is None
    assert episode.tasks == 3


@FAMILIES
def test_inputs_fill_the_domain_evenly(family):
    x = RegressionSampler(family, 50, 50, tasks=200).sample().support_x.double()
    low, high = family.domain
    assert low <= x.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < x.max() < high
    assert float(x.mean()) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert float(x.std()) == pytest.approx((high - low) / 12**0.5, rel=0.02)


def design(x):
    """Inputs and a column of ones, so that least squares finds slopes and the constant."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1).double()


@pytest.mark.parametrize("family", [LINES, PLANES], ids=lambda f: f.name)
def test_queries_lie_on_the_function_of_the_support(family):
    """The parameters found in the support set predict the queries, and lie in their ranges."""
    x, y, qx, qy = tensors_of(RegressionSampler(family, 6, 9, tasks=300).sample())
    found = torch.linalg.lstsq(design(x), y.double()).solution
    torch.testing.assert_close(design(qx) @ found, qy.double(), rtol=1e-3, atol=1e-4)
    for k, (low, high) in enumerate(family.ranges):
        column = found[:, k, 0]
        assert low - 1e-3 < column.min() < low + 0.1
        assert high - 0.1 < column.max() < high + 1e-3
    assert len(found[:, 0].unique()) == 300  # every task has a function of its own


def test_sinusoids_have_one_amplitude_and_phase_in_support_and_query():
    """a sin(x - b) is linear in sin x and cos x; section 5.1 of Finn et al. 2017."""
    episode = RegressionSampler(SINUSOIDS, 8, 20, 300).sample()
    x, y, qx, qy = (z.double() for z in tensors_of(episode))
    found = torch.linalg.lstsq(torch.cat([x.sin(), x.cos()], -1), y).solution
    torch.testing.assert_close(torch.cat([qx.sin(), qx.cos()], -1) @ found, qy, rtol=0, atol=1e-3)
    amplitude = found.norm(dim=1)[:, 0]
    phase = torch.atan2(-found[:, 1, 0], found[:, 0, 0])
    assert 0.099 < amplitude.min() < 0.2
    assert 4.9 < amplitude.max() < 5.001
    assert -0.01 < phase.min() < 0.1
    assert math.pi - 0.1 < phase.max() < math.pi + 0.01


@FAMILIES
def test_same_seed_same_episodes(family):
    check_that_episodes_follow_the_seed(lambda seed: RegressionSampler(family, 3, 2, 2, seed))


def test_state_of_the_generator_is_all_it_remembers():
    check_that_the_generator_is_all_it_remembers(RegressionSampler(SINUSOIDS, 3, 2))


def test_settings_tell_episodes_apart():
    made = RegressionSampler(LINES, 3, 2, 4, seed=7)
    expected = {"seed": 7, "family": "lines", "shots": 3, "queries": 2, "tasks": 4}
    assert made.settings == expected
    made.sample()
    assert made.settings == expected
    assert RegressionSampler(SINUSOIDS, 3, 2, 4, seed=7).settings != expected


@pytest.mark.parametrize("name", ["shots", "queries", "tasks"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_must_be_positive(name, value):
    sizes = {"shots": 1, "queries": 1, "tasks": 1} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be at least 1"):
        RegressionSampler(LINES, **sizes)


def test_family_of_ones_own():
    squares = Family("squares", 1, ((2.0, 3.0),), lambda x, a: a * x[..., 0] ** 2, (0.0, 1.0))
    x, y, *_ = tensors_of(RegressionSampler(squares, 4, tasks=5).sample())
    ratio = y / x**2
    assert (ratio.amax(1) - ratio.amin(1)).max() < 1e-3
    assert ((ratio > 1.999) & (ratio < 3.001)).all()


def sound(**changed):
    parts = {"support_x": torch.zeros(2, 3, 1), "support_y": torch.zeros(2, 3, 1)}
    parts |= {"query_x": torch.zeros(2, 5, 1), "query_y": torch.zeros(2, 5, 1)}
    return parts | changed


def test_episode_of_regression_needs_no_classes():
    assert Episode(**sound()).tasks == 2
    Episode(**sound(support_y=torch.zeros(2, 3, 4), query_y=torch.zeros(2, 5, 4)))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"support_y": torch.zeros(2, 4, 1)},
            r"support_y has shape \(2, 4, 1\) but support_x starts with \(2, 3\): give one",
        ),
        (
            {"query_y": torch.zeros(2, 5)},
            r"query_y has shape \(2, 5\) and holds float targets.*give query_y\.unsqueeze\(-1\)",
        ),
        (
            {"query_y": torch.zeros(2, 5, dtype=torch.int32)},
            "query_y is torch.int32; labels must be torch.int64",
        ),
        (
            {"query_y": torch.zeros(2, 5, 1, dtype=torch.int64)},
            r"query_y has shape \(2, 5, 1\) but query_x starts with \(2, 5\)",
        ),
        ({"classes": torch.zeros(2, 1).long()}, r"support_y has shape \(2, 3, 1\)"),
        (
            {"query_x": torch.zeros(1, 5, 1), "query_y": torch.zeros(1, 5, 1)},
            "support, query and classes hold 2, 1 tasks",
        ),
    ],
)
def test_episode_that_contradicts_itself(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        Episode(**sound(**changed))


@pytest.mark.parametrize(
    ("at_once", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])]
)
def test_episode_in_parts(at_once, sizes):
    whole = RegressionSampler(PLANES, 3, 2, tasks=5).sample()
    pieces = list(whole.parts(at_once))
    assert [piece.tasks for piece in pieces] == sizes
    for k, tensor in enumerate(tensors_of(whole)):
        assert torch.equal(torch.cat([tensors_of(piece)[k] for piece in pieces]), tensor)
    assert all(piece.classes is None for piece in pieces)


@pytest.mark.parametrize("family", [SINUSOIDS, LINES, PLANES], ids=lambda f: f.name)
def test_default_device_plays_no_part(family):
    check_that_episodes_are_drawn_on_the_cpu(lambda: RegressionSampler(family, 5, tasks=3, seed=1))


def test_same_tasks_in_the_default_dtype(float64):
    """The numbers drawn are the same; what is computed from them has the digits asked for."""
    found = RegressionSampler(PLANES, shots=3, seed=1).sample()
    torch.set_default_dtype(torch.float32)
    expected = RegressionSampler(PLANES, shots=3, seed=1).sample()
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(a, b.double(), rtol=1e-5, atol=1e-5)


# Linear functions with weights from N(0, I), and Gaussian processes


def linear(shots=5, queries=7, tasks=3, seed=0, **more):
    return LinearSampler(4, shots, queries, tasks, seed, **more)


def process(shots=5, queries=7, tasks=3, seed=0, **more):
    return GaussianProcessSampler(shots, queries, tasks, seed, **more)


POOL = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


SAMPLERS = pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (linear, 4),
        (lambda **own: linear(noise=0.5, weights=POOL, **own), 4),
        (process, 1),
        (lambda **own: process(length=(0.2, 1.0), **own), 1),
    ],
    ids=["linear", "few weights", "process", "lengths"],
)


@SAMPLERS
def test_samplers_have_the_one_interface(make, inputs):
    """As test_shapes and those of seed, generator and device for families."""
    x, y, qx, qy = tensors_of(make().sample())
    assert (x.shape, y.shape) == ((3, 5, inputs), (3, 5, 1))
    assert (qx.shape, qy.shape) == ((3, 7, inputs), (3, 7, 1))
    assert {z.dtype for z in (x, y, qx, qy)} == {torch.float32}
    check_that_episodes_follow_the_seed(lambda seed: make(seed=seed))
    check_that_the_generator_is_all_it_remembers(make())
    check_that_episodes_are_drawn_on_the_cpu(make)


@SAMPLERS
def test_samplers_draw_the_same_in_the_default_dtype(make, inputs, float64):
    found = make(seed=1).sample()
    torch.set_default_dtype(torch.float32)
    for a, b in zip(tensors_of(found), tensors_of(make(seed=1).sample()), strict=True):
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(a, b.double(), rtol=1e-3, atol=1e-3)


class Slope(Learner):
    """One number for all tasks."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(()))

    def forward(self, support_x, support_y, query_x):
        return self.theta * query_x[..., :1]


@SAMPLERS
def test_samplers_train_and_evaluate(make, inputs):
    assert len(meta_train(Slope(), make(), 2, progress=False).loss) == 2
    assert squared_errors(Slope(), make(), 4).shape == (4,)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_linear_tasks_have_weights_inputs_and_noise_of_the_normal_distribution(noise):
    x, y, qx, qy = tensors_of(linear(shots=40, queries=20, tasks=2000, noise=noise).sample())
    w = torch.linalg.lstsq(x, y).solution  # (tasks, d, 1), nearly the true ones
    for z, variance in ((w, 1 + noise**2 / 35), (x, 1.0), (qx, 1.0)):
        assert float(z.mean()) == pytest.approx(0, abs=0.05)
        assert float(z.var()) == pytest.approx(variance, rel=0.05)
    over = (w[:, :1] * w[:, 1:]).mean((0, 2))
    assert over.abs().max() < 0.1  # entries of w have nothing to do with one another
    # The error of a query is its own noise and that of w, whose covariance is (X'X)^-1.
    expected = noise**2 * (1 + 4 / 35)
    assert float((qx @ w - qy).square().mean()) == pytest.approx(expected, rel=0.05, abs=1e-6)


def test_few_weights_are_all_that_are_drawn_and_all_as_often():
    x, y, *_ = tensors_of(linear(tasks=6000, weights=POOL).sample())
    found = torch.linalg.lstsq(x, y).solution[..., 0]  # (tasks, d)
    apart, nearest = torch.cdist(found, POOL).min(1)
    assert float(apart.quantile(0.99)) < 1e-3
    counts = nearest.bincount(minlength=6)
    assert ((counts - 1000).abs() < 150).all()  # five standard deviations


def test_draws_of_the_process_have_the_covariance_of_the_kernel():
    """Whitened by it, all targets of a task are independent and of variance 1."""
    length, noise = 0.7, 0.3
    x, y, qx, qy = tensors_of(process(6, 4, 4000, length=length, noise=noise).sample())
    x, y = torch.cat([x, qx], 1).double(), torch.cat([y, qy], 1).double()
    assert -2 <= x.min() < -1.99 and 1.99 < x.max() <= 2
    cov = rbf(x, x, length) + noise**2 * torch.eye(10)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), y, upper=False)[..., 0]
    torch.testing.assert_close(white.mT @ white / 4000, torch.eye(10).double(), atol=0.1, rtol=0)


def test_lengths_are_drawn_in_their_range():
    """Neighbours differ by a variance of about (apart / length)^2, whose mean is known."""
    low, high = 0.5, 2.0
    x, y, *_ = tensors_of(process(60, 1, 3000, length=(low, high), noise=0.0).sample())
    x, order = x[..., 0].sort(1)
    y = y[..., 0].gather(1, order)
    slopes = y.diff(dim=1).square().sum(1) / x.diff(dim=1).square().sum(1)
    # E[1 / length^2] for a uniform length is 1 / (low * high).
    assert float(slopes.mean()) == pytest.approx(1 / (low * high), rel=0.1)
    assert slopes.log().std() > 1.5 * _spread_of_one_length()


def _spread_of_one_length():
    x, y, *_ = tensors_of(process(60, 1, 3000, length=1.0, noise=0.0).sample())
    x, order = x[..., 0].sort(1)
    y = y[..., 0].gather(1, order)
    return (y.diff(dim=1).square().sum(1) / x.diff(dim=1).square().sum(1)).log().std()


def test_settings_of_the_new_samplers_tell_episodes_apart():
    assert linear(noise=0.5).settings == {
        "seed": 0, "family": "linear", "shots": 5, "queries": 7, "tasks": 3,
        "dimensions": 4, "noise": 0.5, "weights": None,
    }  # fmt: skip
    first, second = (linear(weights=w).settings for w in (POOL, POOL + 1))
    assert first != second and first["weights"] != linear().settings["weights"]
    assert first == linear(weights=POOL).settings
    assert process().settings["length"] == (0.4, 0.4) != process(length=0.3).settings["length"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LinearSampler(0, 5), "dimensions=0, noise=0.0: at least 1 and 0 are needed"),
        (lambda: linear(noise=-1.0), "dimensions=4, noise=-1.0: at least 1 and 0 are needed"),
        (lambda: linear(weights=torch.ones(3, 5)), r"weights have the shape \(3, 5\); give \(M, 4"),
        (lambda: linear(weights=torch.ones(0, 4)), r"weights have the shape \(0, 4\); give \(M, 4"),
        (lambda: linear(shots=0), "shots is 0; it must be at least 1"),
        (lambda: process(length=0.0), "length=0.0, noise=0.1: give a length above 0, or a range"),
        (lambda: process(length=(2.0, 1.0)), r"length=\(2.0, 1.0\), noise=0.1: give a length"),
        (lambda: process(noise=-0.1), "length=0.4, noise=-0.1: give a length above 0"),
    ],
)
def test_samplers_refuse_what_does_not_fit(make, told):
    with pytest.raises(BadArgument, match=f"^{told}"):
        make()


def test_without_noise_least_squares_knows_all_of_a_linear_task():
    x, y, qx, qy = tensors_of(linear(shots=8, tasks=50).sample())
    torch.testing.assert_close(ridge(x, y, qx, 0.0), qy, rtol=1e-3, atol=1e-4)
