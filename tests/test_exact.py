"""Exact answers against other ways to the same numbers."""

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.linear_model import Ridge

from metautils.errors import BadArgument
from metautils.exact import dmmse, gp_posterior, rbf, ridge


def points(shots=5, inputs=3, outputs=1, tasks=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (shots, inputs), (shots, outputs), (6, inputs)
    return tuple(torch.randn(tasks, *s, generator=g, dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("strength", [0.01, 0.25, 3.0])
@pytest.mark.parametrize("shots", [1, 2, 3, 20])
def test_ridge_is_that_of_scikit_learn(shots, strength, outputs):
    x, y, q = points(shots, outputs=outputs)
    found = ridge(x, y, q, strength)
    for k in range(len(x)):
        model = Ridge(strength, fit_intercept=False).fit(x[k], y[k])
        expected = model.predict(q[k]).reshape(found[k].shape)
        np.testing.assert_allclose(found[k], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shots", [1, 2, 3, 20])
def test_strength_0_is_the_shortest_least_squares(shots):
    x, y, q = points(shots)
    found = ridge(x, y, q, 0.0)
    for k in range(len(x)):
        w = np.linalg.lstsq(x[k].numpy(), y[k].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[k], q[k].numpy() @ w, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, ridge(x, y, q, 1e-9), rtol=1e-5, atol=1e-5)  # the limit


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_ridge_of_the_right_strength_is_the_least_error_there_is(noise):
    """Of 20,000 tasks as they are drawn, no other strength has a smaller one."""
    g = torch.Generator().manual_seed(0)
    x, q = (torch.randn(20_000, n, 4, generator=g) for n in (5, 1))
    w = torch.randn(20_000, 4, 1, generator=g)
    y = x @ w + noise * torch.randn(20_000, 5, 1, generator=g)
    errors = {
        share: float((ridge(x, y, q, share * noise**2) - q @ w).square().mean())
        for share in (0.5, 0.8, 1.0, 1.25, 2.0)
    }
    assert min(errors, key=errors.get) == 1.0


def test_without_a_point_the_answer_is_that_of_the_prior():
    x, y, q = points(shots=0)
    assert not ridge(x, y, q, 0.5).any() and not ridge(x, y, q, 0.0).any()
    mean, std = gp_posterior(x, y, q, 1.0, 0.5)
    assert not mean.any()
    torch.testing.assert_close(std, torch.full_like(std, math.sqrt(1.25)))
    w = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(dmmse(x, y, q, w, 0.5), (q @ w.mean(0))[..., None])


def test_dmmse_by_the_rule_of_bayes():
    """Products of normal densities, point by point."""
    x, y, q = points()
    w = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = dmmse(x, y, q, w, noise=0.7)
    for k in range(len(x)):
        densities = torch.distributions.Normal(x[k] @ w.mT, 0.7).log_prob(y[k]).exp()  # (S, M)
        weight = densities.prod(0)
        expected = q[k] @ (weight[:, None] * w).sum(0) / weight.sum()
        torch.testing.assert_close(found[k, :, 0], expected)


def test_dmmse_over_very_many_vectors_is_ridge():
    """Drawn from the prior for which ridge is the posterior mean."""
    x, y, q = points(tasks=3, shots=3)
    w = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = (dmmse(x, y, q, w, 1.0) - ridge(x, y, q, 1.0)).abs().max()
    assert error < 0.05


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(("length", "noise"), [(0.4, 0.1), (1.5, 0.5)])
def test_gaussian_process_is_that_of_scikit_learn(length, noise, outputs):
    x, y, q = points(outputs=outputs, inputs=2)
    mean, std = gp_posterior(x, y, q, length, noise)
    kernel = RBF(length, "fixed") + WhiteKernel(noise**2, "fixed")
    for k in range(len(x)):
        model = GaussianProcessRegressor(kernel, alpha=0).fit(x[k], y[k])
        m, s = model.predict(q[k], return_std=True)
        np.testing.assert_allclose(mean[k], m.reshape(mean[k].shape), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(std[k], np.broadcast_to(s.reshape(6, -1), mean[k].shape))


def test_length_may_be_one_for_each_task():
    x, _, q = points()
    lengths = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    found = rbf(x, q, lengths[:, None, None])
    for k, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[k : k + 1], rbf(x[k : k + 1], q[k : k + 1], length))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda *p: ridge(*p, -0.1), "strength is -0.1; it must be at least 0"),
        (lambda *p: dmmse(*p, torch.ones(2, 3), 0.0), "noise is 0.0; it must be above 0"),
        (lambda *p: gp_posterior(*p, 0.0, 0.1), "length is 0.0; it must be above 0"),
        (lambda *p: gp_posterior(*p, 1.0, 0.0), "noise is 0.0; it must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, told):
    with pytest.raises(BadArgument, match=f"^{told}"):
        call(*points())


def test_answers_have_the_dtype_of_the_targets():
    x, y, q = (z.float() for z in points())
    assert ridge(x, y, q, 0.1).dtype == gp_posterior(x, y, q, 1.0, 0.1)[1].dtype == torch.float32
