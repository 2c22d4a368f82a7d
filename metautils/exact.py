"""Exact answers to problems of regression, to hold against what was learned.

They are computed on the CPU in float64, so that they are right wherever the points lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metautils.errors import BadArgument


def ridge(support_x: Tensor, support_y: Tensor, query_x: Tensor, strength: float) -> Tensor:
    """Linear regression without a constant: predictions `(tasks, Q, outputs)`.

    The weights with the least `|X w - y|^2 + strength |w|^2`. Where weights are drawn from N(0, I)
    and targets have noise, the posterior mean is the one of strength `noise**2`: no other answer
    has a smaller expected squared error.

    Args:
        support_x: `(tasks, S, d)`.
        support_y: `(tasks, S, outputs)`.
        query_x: `(tasks, Q, d)`.
        strength: 0 is least squares; of several solutions the shortest.

    Raises:
        ValueError: if strength is below 0.

    Example:
        >>> x, one = torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 1, 1)
        >>> ridge(x, 2 * x, one, strength=0.0).item(), ridge(x, 2 * x, one, strength=5.0).item()
        (2.0, 1.0)
    """
    if strength < 0:
        raise BadArgument(f"strength is {strength}; it must be at least 0.")
    x, y, q = _all_digits(support_x, support_y, query_x)
    if strength == 0:
        w = torch.linalg.pinv(x) @ y  # (tasks, d, outputs)
    else:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        w = torch.linalg.solve(x.mT @ x + strength * eye, x.mT @ y)
    return (q @ w).to(support_y)


def dmmse(
    support_x: Tensor, support_y: Tensor, query_x: Tensor, weights: Tensor, noise: float
) -> Tensor:
    """The posterior mean where only M weight vectors can be, all as likely: `(tasks, Q, 1)`.

    The best answer on tasks of which weights are among those, and a poor one on others: what a
    learner does that has memorised its M training tasks (`dMMSE` of Raventos et al. 2023).

    Args:
        support_x: `(tasks, S, d)`.
        support_y: `(tasks, S, 1)`.
        query_x: `(tasks, Q, d)`.
        weights: `(M, d)`.
        noise: standard deviation of the targets.

    Raises:
        ValueError: if noise is not above 0.

    Example:
        >>> x, y, weights = torch.ones(1, 9, 1), torch.ones(1, 9, 1), torch.tensor([[-1.0], [1.0]])
        >>> dmmse(x, y, 3 * torch.ones(1, 1, 1), weights, noise=0.5).item()
        3.0
    """
    _above_zero(noise=noise)
    x, y, q, w = _all_digits(support_x, support_y, query_x, weights)
    errors = (x @ w.mT - y).square().sum(1)  # (tasks, S, M) to (tasks, M)
    posterior = (-errors / (2 * noise**2)).softmax(-1)  # (tasks, M)
    mean = posterior @ w  # (tasks, d)
    return (q @ mean[..., None]).to(support_y)


def rbf(a: Tensor, b: Tensor, length: float | Tensor) -> Tensor:
    """The kernel `exp(-|a - b|^2 / (2 length^2))` of all pairs, `(tasks, n, m)`.

    Args:
        a: `(tasks, n, inputs)`.
        b: `(tasks, m, inputs)`.
        length: scale, one for all tasks, or `(tasks, 1, 1)`.

    Example:
        >>> rbf(torch.zeros(1, 1, 1), torch.tensor([[[0.0], [2.0]]]), length=2.0)
        tensor([[[1.0000, 0.6065]]])
    """
    apart = (a[:, :, None] - b[:, None]).square().sum(-1)  # (tasks, n, m, inputs) to (tasks, n, m)
    return (-apart / (2 * length**2)).exp()


def gp_posterior(
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    length: float,
    noise: float,
) -> tuple[Tensor, Tensor]:
    """What is known of each query's target under a Gaussian process with the kernel `rbf`.

    Algorithm 2.1 of Rasmussen and Williams 2006.

    Args:
        support_x: `(tasks, S, inputs)`.
        support_y: `(tasks, S, outputs)`, of mean 0 and variance `1 + noise**2`.
        query_x: `(tasks, Q, inputs)`.
        length: scale of the kernel.
        noise: standard deviation of the targets about the function.

    Returns:
        Mean and standard deviation, both `(tasks, Q, outputs)`. The deviation is that of a target,
        so noise is in it: far from the support set it is `sqrt(1 + noise**2)`.

    Raises:
        ValueError: if length or noise is not above 0.

    Example:
        >>> x = torch.zeros(1, 1, 1)
        >>> mean, std = gp_posterior(x, x + 1, torch.tensor([[[0.0], [99.0]]]), 1.0, noise=0.1)
        >>> mean.flatten(), std.flatten()
        (tensor([0.9901, 0.0000]), tensor([0.1411, 1.0050]))
    """
    _above_zero(length=length, noise=noise)
    x, y, q = _all_digits(support_x, support_y, query_x)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    L = torch.linalg.cholesky(rbf(x, x, length) + noise**2 * eye)  # (tasks, S, S)
    across = rbf(x, q, length)  # (tasks, S, Q)
    mean = across.mT @ torch.cholesky_solve(y, L)
    v = torch.linalg.solve_triangular(L, across, upper=False)  # (tasks, S, Q)
    std = (1 + noise**2 - v.square().sum(1)).sqrt()  # (tasks, Q)
    return mean.to(support_y), std[..., None].expand_as(mean).to(support_y)


def _all_digits(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().cpu().double() for x in tensors]


def _above_zero(**numbers: float) -> None:
    for name, value in numbers.items():
        if value <= 0:
            raise BadArgument(f"{name} is {value}; it must be above 0.")
