"""The accuracy is the learner's, and its interval covers the truth as often as it says."""

import math

import numpy as np
import pytest
import torch
from helpers import blobs, numbered, tiny
from torch import nn
from torch.distributions import Normal

from metautils.data.bank import NUMBERS_AT_ONCE, ClassBank
from metautils.data.regression import LINES, GaussianProcessSampler, RegressionSampler
from metautils.evaluate import (
    Evaluation,
    coverage95,
    episode_accuracy,
    evaluate,
    interval95,
    log_likelihood,
    squared_errors,
    wilson95,
)
from metautils.exact import gp_posterior
from metautils.learners.base import Learner
from metautils.learners.neural_process import ConditionalNeuralProcess
from metautils.learners.protonet import ProtoNet
from metautils.sampling import EpisodeSampler

EXTREMES = [(0, 1), (1, 1), (0, 300), (300, 300)]


class Chance(Learner):
    """Predicts without looking."""

    def forward(self, support_x, support_y, query_x):
        return torch.rand(*query_x.shape[:2], int(support_y.max()) + 1)


class Notes(Learner):
    """Always predicts label 0, and notes in which mode it was asked and for what."""

    def __init__(self):
        super().__init__()
        self.drop, self.asked, self.modes = nn.Dropout(), [], []

    def forward(self, support_x, support_y, query_x):
        self.asked.append(query_x.clone())
        self.modes.append((self.training, self.drop.training, torch.is_grad_enabled()))
        return torch.eye(int(support_y.max()) + 1)[torch.zeros(query_x.shape[:2]).long()]


def test_interval_covers_the_truth_19_times_in_20():
    """2,000 evaluations of 600 episodes of 75 queries, some episodes harder than others."""
    random = np.random.default_rng(0)
    chance = random.beta(18, 2, size=(2000, 600))
    values = torch.from_numpy(100 * random.binomial(75, chance) / 75)
    covered = 0
    for row in values:
        e = Evaluation(5, 1, 15, row)
        covered += abs(e.accuracy - 90) <= e.ci95
    assert 0.935 <= covered / 2000 <= 0.965


def test_interval_by_hand():
    assert interval95(torch.tensor([10.0, 20.0, 30.0, 40.0])) == pytest.approx(
        1.96 * np.std([10, 20, 30, 40], ddof=1) / 2
    )


@pytest.mark.parametrize("n", [0, 1])
def test_interval_needs_two(n):
    with pytest.raises(ValueError, match=f"An interval needs at least 2 episodes, not {n}"):
        interval95(torch.ones(n))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        (182, 263, 63.38, 74.47),
    ],
)
def test_interval_of_wilson_is_the_published_one(right, total, low, high):
    """Table I of Newcombe 1998, method 3; the last row is the first, with right and wrong told."""
    assert wilson95(right, total) == pytest.approx((low, high), abs=0.006)


@pytest.mark.parametrize(("right", "total"), [(3, 7), (59, 60), (500, 1000), *EXTREMES])
def test_ends_of_the_interval_are_1_96_standard_errors_away(right, total):
    """The standard error that the accuracy would have if the end were the truth."""
    low, high = (p / 100 for p in wilson95(right, total))
    assert 0 <= low < high <= 1
    for p, sign in ((low, 1), (high, -1)):
        away = 1.96 * math.sqrt(p * (1 - p) / total)
        assert right / total - p == pytest.approx(sign * away, abs=1e-7)


@pytest.mark.parametrize(("right", "total"), EXTREMES)
def test_interval_of_wilson_is_wide_where_all_answers_are_alike(right, total):
    low, high = wilson95(right, total)
    assert (low if right == 0 else high) == pytest.approx(100 * right / total)
    assert high - low == pytest.approx(100 * 1.96**2 / (total + 1.96**2))


@pytest.mark.parametrize("total", [20, 60, 300])
def test_interval_of_wilson_covers_the_truth_19_times_in_20(total):
    """By the exact probability of each count, averaged over accuracies from 50 to 99 %."""
    ends, covered = [wilson95(right, total) for right in range(total + 1)], []
    for p in np.linspace(0.5, 0.99, 50):
        chances = (math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(total + 1))
        found = zip(chances, ends, strict=True)
        covered.append(sum(chance for chance, (low, high) in found if low <= 100 * p <= high))
    assert 0.94 <= np.mean(covered) <= 0.96


@pytest.mark.parametrize(("right", "total"), [(5, 4), (-1, 4), (0, 0)])
def test_interval_of_wilson_needs_a_count(right, total):
    with pytest.raises(ValueError, match=f"{right} right of {total}: give a count of 1 image"):
        wilson95(right, total)


def test_perfect_learner_gets_100():
    bank = numbered(8, 8, 8, 8)
    images = nn.functional.one_hot(bank.images[:, 1].long()).float()
    perfect = ClassBank(images, bank.counts, bank.names)
    (score,) = evaluate(ProtoNet(nn.Identity()), perfect, [(4, 1)], queries=7, episodes=30)
    assert score.per_episode.tolist() == [100] * 30
    assert (score.accuracy, score.ci95) == (100, 0)
    assert str(score) == "4-way 1-shot: 100.00 ± 0.00 %"


def test_random_learner_is_at_chance():
    torch.manual_seed(0)
    scores = evaluate(Chance(), numbered(*[20] * 6), [(2, 1), (5, 3)], episodes=600)
    for score, chance in zip(scores, (50, 20), strict=True):
        assert abs(score.accuracy - chance) < 2 * score.ci95
        assert 0.2 < score.ci95 < 2


def test_constant_learner_gets_exactly_one_class_right():
    scores = evaluate(Notes(), numbered(*[9] * 5), [(2, 1), (5, 1)], queries=3, episodes=4)
    assert [s.per_episode.tolist() for s in scores] == [[50] * 4, pytest.approx([20] * 4)]


def test_several_settings_in_one_call():
    settings = [(2, 1), (3, 2), (5, 4)]
    scores = evaluate(tiny(), blobs(), settings, queries=3, episodes=7)
    assert [(s.ways, s.shots) for s in scores] == settings
    assert all(s.queries == 3 and s.per_episode.shape == (7,) for s in scores)
    for s in scores:
        (alone,) = evaluate(tiny(), blobs(), [(s.ways, s.shots)], queries=3, episodes=7)
        assert torch.equal(alone.per_episode, s.per_episode)
        right = s.per_episode / 100 * 3 * s.ways  # a whole number of queries
        torch.testing.assert_close(right, right.round(), atol=1e-4, rtol=0)


def test_same_seed_same_values_and_other_seed_others():
    first, again, other = (
        evaluate(tiny(), blobs(), [(3, 1)], queries=4, episodes=40, seed=seed)[0].per_episode
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rotation_reaches_the_episodes():
    upright, turned = Notes(), Notes()
    for learner, rotate in ((upright, False), (turned, True)):
        evaluate(learner, blobs(), [(2, 1)], queries=2, episodes=5, rotate=rotate)
    sums = [torch.stack(x.asked).flatten(3).sum(-1) for x in (upright, turned)]
    torch.testing.assert_close(sums[0][0], sums[1][0])  # the same images
    assert not torch.equal(upright.asked[0], turned.asked[0])  # but turned


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_evaluation_for_the_while(training):
    learner = Notes().train(training)
    evaluate(learner, numbered(5, 5), [(2, 1)], queries=2, episodes=2)
    assert learner.modes == [(False, False, False)]
    assert (learner.training, learner.drop.training) == (training, training)


@pytest.mark.parametrize(("tasks", "episodes"), [(1, 5), (4, 10), (4, 3)])
def test_as_many_values_as_episodes_asked_for(tasks, episodes):
    sampler = EpisodeSampler(blobs(), 3, 1, 2, tasks=tasks)
    alone = EpisodeSampler(blobs(), 3, 1, 2, tasks=tasks)
    values = episode_accuracy(tiny(), sampler, episodes)
    assert values.shape == (episodes,)
    learner = tiny().eval()
    e = alone.sample()
    for k in range(min(tasks, episodes)):
        logits = learner(e.support_x[k : k + 1], e.support_y[k : k + 1], e.query_x[k : k + 1])
        right = (logits.argmax(-1) == e.query_y[k]).float().mean()
        assert float(values[k]) == pytest.approx(100 * float(right))


@pytest.mark.parametrize("transductive", [True, False])
def test_tells_whether_the_learner_is_transductive(transductive):
    learner = Notes()
    learner.transductive = transductive
    (score,) = evaluate(learner, numbered(5, 5), [(2, 1)], queries=2, episodes=4)
    assert score.transductive is transductive
    told = "2-way 1-shot, transductive: " if transductive else "2-way 1-shot: "
    assert str(score) == f"{told}50.00 ± 0.00 %"


class LeastSquares(Learner):
    """Fits a line to the support set, and predicts too much by a constant."""

    error = 0.0

    def forward(self, support_x, support_y, query_x):
        assert not self.training
        ones = [torch.cat([x, torch.ones_like(x)], -1).double() for x in (support_x, query_x)]
        return ones[1] @ torch.linalg.lstsq(ones[0], support_y.double()).solution + self.error


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.0), (0.5, 0.25), (-2.0, 4.0)])
@pytest.mark.parametrize(("tasks", "episodes"), [(1, 3), (4, 10)])
def test_squared_errors_of_regression(error, expected, tasks, episodes):
    learner = LeastSquares()
    learner.error = error
    values = squared_errors(learner, RegressionSampler(LINES, 5, tasks=tasks), episodes)
    assert values.shape == (episodes,)
    torch.testing.assert_close(values, torch.full_like(values, expected), rtol=1e-3, atol=1e-4)
    assert learner.training


class Exact(Learner):
    """The posterior of a Gaussian process, its sigma multiplied by something."""

    factor = 1.0

    def predict_distribution(self, support_x, support_y, query_x):
        assert not self.training and not torch.is_grad_enabled()
        mean, std = gp_posterior(support_x, support_y, query_x, length=0.5, noise=0.2)
        return Normal(mean, self.factor * std)


def process(tasks=50, seed=0):
    return GaussianProcessSampler(4, 20, tasks, seed, length=0.5, noise=0.2)


def exact(factor):
    learner = Exact()
    learner.factor = factor
    return learner


def test_log_likelihood_by_hand():
    e = process(2).sample()
    values = log_likelihood(exact(1.5), process(2), 2)
    mean, std = gp_posterior(e.support_x, e.support_y, e.query_x, 0.5, 0.2)
    for k in range(2):
        pairs = zip(mean[k, :, 0], 1.5 * std[k, :, 0], e.query_y[k, :, 0], strict=True)
        each = [
            -0.5 * ((y - m) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi) for m, s, y in pairs
        ]
        assert float(values[k]) == pytest.approx(float(sum(each) / 20), abs=1e-4)


def test_the_exact_distribution_has_the_greatest_likelihood_and_covers_95_percent():
    """On average: narrower bands cover less and wider ones more."""
    found = {f: log_likelihood(exact(f), process(), 500).mean() for f in (0.7, 1.0, 1.4)}
    assert max(found, key=found.get) == 1.0
    learner = exact(1.0).train()
    covered = coverage95(learner, process(), 500)
    assert covered.shape == (500,) and learner.training
    assert float(covered.mean()) == pytest.approx(95, abs=2 * interval95(covered))
    # A band of half the width covers 67.3 % of a normal distribution.
    half = coverage95(exact(0.5), process(), 500)
    assert float(half.mean()) == pytest.approx(67.3, abs=2 * interval95(half))
    assert coverage95(exact(9.0), process(), 60).tolist() == [100] * 60


def test_neural_process_is_judged_by_its_own_distribution():
    torch.manual_seed(0)
    net, e = ConditionalNeuralProcess(width=8), process(3).sample()
    d = net.predict_distribution(e.support_x, e.support_y, e.query_x)
    torch.testing.assert_close(
        log_likelihood(net, process(3), 3), d.log_prob(e.query_y).mean((1, 2)).detach()
    )


def test_bank_too_small_is_told():
    with pytest.raises(ValueError, match="20 ways need 20 classes but there are 6"):
        evaluate(tiny(), blobs(), [(20, 1)], queries=2, episodes=2)
    with pytest.raises(ValueError, match="has 8 images but 5 shots and 15 queries need 20"):
        evaluate(tiny(), blobs(), [(2, 5)], episodes=2)


def test_progress_is_silent_unless_asked(capsys):
    evaluate(tiny(), blobs(), [(2, 1)], queries=2, episodes=2)
    assert capsys.readouterr() == ("", "")
    evaluate(tiny(), blobs(), [(2, 1)], queries=2, episodes=2, progress=True)
    assert "evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "calls"), [(8, 1), (500, 5)])
def test_large_images_are_tested_in_parts_of_the_same_episodes(size, calls):
    """Five tasks of four images of 500x500 pixels are more numbers than are worked on at once."""
    images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    bank, learner = ClassBank(images, torch.tensor([2, 2]), ("a", "b")), Notes()
    evaluate(learner, bank, [(2, 1)], queries=1, episodes=5)
    expected = EpisodeSampler(bank, 2, 1, 1, tasks=5).sample().query_x
    assert torch.equal(torch.cat(learner.asked), expected)
    assert len(learner.asked) == calls
    assert all(x.numel() <= NUMBERS_AT_ONCE for x in learner.asked)


class Single(torch.Tensor):
    """A tensor on a device without float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double:
            raise TypeError("no float64 here")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else result


def test_means_are_taken_where_there_is_float64():
    values = torch.tensor([60.0, 80.0, 70.0])
    here = Evaluation(5, 1, 15, values.as_subclass(Single))
    assert str(here) == str(Evaluation(5, 1, 15, values))
