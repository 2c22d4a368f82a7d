"""Calibration: known errors, known temperatures, and answers that stay the same."""

import pytest
import torch
from torch.nn import functional as F

from metautils.certainty import calibration_error, fit_temperature


def answers(n=20000, ways=5, sharper=1.0, seed=0):
    """Logits, and labels drawn from the probabilities that `logits / sharper` give."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, ways, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return sharper * logits, labels


def test_error_by_hand():
    # Two bins: sure by .6 and right in 1 of 2; sure by .9 and right in 2 of 2.
    sure = torch.tensor([0.6, 0.6, 0.9, 0.9])
    probabilities = torch.stack([sure, 1 - sure], 1)
    found = calibration_error(probabilities, torch.tensor([0, 1, 0, 0]), bins=10)
    assert found == pytest.approx(100 * (2 * 0.1 + 2 * 0.1) / 4, abs=1e-3)


def test_certainty_of_one_is_in_the_last_bin():
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0
    assert calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 100


def test_true_probabilities_are_calibrated():
    logits, labels = answers()
    assert calibration_error(logits.softmax(-1), labels) < 1
    assert calibration_error((3 * logits).softmax(-1), labels) > 10


@pytest.mark.parametrize("sharper", [0.05, 1.0, 40.0])
def test_temperature_undoes_what_was_done(sharper):
    logits, labels = answers(sharper=sharper)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(sharper, rel=0.05)
    assert calibration_error((logits / found).softmax(-1), labels) < 1
    assert torch.equal((logits / found).argmax(-1), logits.argmax(-1))


def test_temperature_is_the_best():
    logits, labels = answers(n=500, sharper=3.0, seed=1)
    t = fit_temperature(logits, labels)
    best = F.cross_entropy(logits / t, labels)
    for other in (t * 1.05, t / 1.05):
        assert best < F.cross_entropy(logits / other, labels)


def test_all_right_wants_to_be_surer():
    """What has no best value stays between the limits."""
    surest = fit_temperature(torch.eye(4), torch.arange(4))
    assert 1e-3 <= surest < 0.1
    assert F.cross_entropy(torch.eye(4) / surest, torch.arange(4)) < 1e-6
    assert fit_temperature(-torch.eye(4), torch.arange(4)) == pytest.approx(1e3)


@pytest.mark.parametrize("shape", [(0, 5), (3, 5)])
def test_answers_that_do_not_fit_are_told(shape):
    with pytest.raises(ValueError, match=r"Probabilities .* of one answer or more"):
        calibration_error(torch.ones(shape) / 5, torch.zeros(0, dtype=torch.long))
