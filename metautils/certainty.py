"""How sure a learner is, and how sure it may be: calibration (Guo et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from metautils.errors import BadArgument

POWERS = -3, 3  # of ten, between which T lies: logits may be squared distances, or cosines


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error, percent: equation 3 of Guo et al. 2017.

    Answers are sorted by their largest probability into bins of equal width. In each, the mean of
    these probabilities is compared with the share of right answers; the result is the mean
    difference, each bin counted by its answers. 0 is right, and what a few answers give by chance
    is above it.

    Args:
        probabilities: `(n, ways)`, each row adds up to 1.
        labels: `(n,)` int64.
        bins: of equal width between 0 and 1.

    Raises:
        ValueError: if there is no answer, or the shapes do not fit.

    Example:
        >>> import torch
        >>> calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]))
        40.0
    """
    if not len(labels) or probabilities.shape[:1] != labels.shape:
        raise BadArgument(
            f"Probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}: they "
            "must be (n, ways) and (n,), of one answer or more."
        )
    sure, answers = probabilities.double().max(-1)  # (n,) each
    over = sure - (answers == labels).double()  # (n,): how much surer than right
    places = (sure * bins).long().clamp(0, bins - 1)  # (n,)
    sums = over.new_zeros(bins).scatter_add(0, places, over)  # (bins,)
    return round(100 * float(sums.abs().sum()) / len(labels), 4)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which the cross-entropy of `logits / T` is least: section 4.2 of Guo et al. 2017.

    It changes no answer, only how sure they are. To be fitted on classes that are not tested.

    Args:
        logits: `(n, ways)`.
        labels: `(n,)` int64.

    Returns:
        A number between 0.001 and 1000; above 1 where the learner was too sure.

    Example:
        >>> import torch
        >>> round(fit_temperature(torch.eye(2)[[0, 0, 0, 0]] * 9, torch.tensor([0, 0, 0, 1])), 2)
        8.19
    """
    logits = logits.double()
    right = logits.gather(-1, labels[:, None]).mean()
    low, high = POWERS
    for _ in range(50):
        log = (low + high) / 2
        # The loss is convex in 1 / T. Its slope: the mean logit that is expected, less that of the
        # right answers.
        expected = ((logits / 10**log).softmax(-1) * logits).sum(-1).mean()
        low, high = (log, high) if expected > right else (low, log)  # too sure, or not enough
    return 10**high
