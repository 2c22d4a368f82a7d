"""The implicit gradient against differences of a problem that is really solved, in float64."""

from functools import partial

import pytest
import torch
from helpers import relative
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F

from metautils.errors import BadArgument
from metautils.hypergradients import conjugate_gradients, direct, implicit_gradient, neumann

FOUR = torch.Generator().manual_seed(0)
X, Q = torch.randn(2, 12, 4, generator=FOUR).double()
Y, A = torch.randint(0, 2, (2, 12), generator=FOUR).double()


def inner(phi, theta):
    """Logistic regression with a weight decay for every weight, and a weight for every example."""
    decay, weights = theta[:4].exp(), theta[4:].sigmoid()
    each = F.binary_cross_entropy_with_logits(X @ phi, Y, reduction="none")
    return (weights * each).mean() + (decay * phi.square()).sum() / 2


def outer(phi):
    return F.binary_cross_entropy_with_logits(Q @ phi, A)


def solved(theta):
    """Newton's method, to the last digit."""
    phi = torch.zeros(4).double()
    for _ in range(12):
        slope = grad(inner)
        phi = phi - torch.linalg.solve(jacrev(slope)(phi, theta), slope(phi, theta))
    return phi


def differences(theta, h=1e-4):
    """Central differences of fourth order, of all entries."""
    steps = h * torch.eye(len(theta)).double()
    f = {k: torch.stack([outer(solved(theta + k * e)) for e in steps]) for k in (-2, -1, 1, 2)}
    return (f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * h)


THETA = torch.randn(16, generator=FOUR).double() - 1
SOLVERS = {
    "cg": partial(conjugate_gradients, steps=4),
    "neumann": partial(neumann, steps=2000, rate=0.5),
    "direct": direct,
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_implicit_gradient_by_finite_differences(solve):
    found = implicit_gradient(inner, outer, solved(THETA), THETA, solve)
    assert found.shape == THETA.shape and not found.requires_grad
    assert relative(found, differences(THETA)) < 1e-8


def test_it_is_wrong_where_the_inner_problem_is_not_solved():
    truth, phi = differences(THETA), torch.zeros(4).double()
    assert relative(implicit_gradient(inner, outer, phi, THETA, direct), truth) > 0.1


def test_a_sum_of_k_terms_is_backpropagation_through_the_last_k_steps():
    """And one term is the step of T1-T2."""

    def last_steps(theta, phi, k):
        for _ in range(k):
            phi = phi - 0.3 * grad(inner)(phi, theta)
        return outer(phi)

    phi = solved(THETA)
    for k in (1, 2, 7):
        truncated = grad(last_steps)(THETA, phi, k)
        found = implicit_gradient(inner, outer, phi, THETA, partial(neumann, steps=k, rate=0.3))
        assert relative(found, truncated) < 1e-12


def test_products_are_as_few_as_said():
    counts = {}
    for name, solve in (("cg", SOLVERS["cg"]), ("neumann", partial(neumann, steps=5))):
        asked = []
        solve(lambda v, asked=asked: asked.append(v) or 2 * v, torch.ones(4))
        counts[name] = len(asked)
    assert counts == {"cg": 4, "neumann": 4}


def test_conjugate_gradients_go_on_at_the_solution_and_run_under_vmap():
    h = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 4.0]))]).double()
    b = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]).double()
    found = vmap(lambda h, b: conjugate_gradients(lambda v: h @ v, b, steps=6))(h, b)
    torch.testing.assert_close(found, torch.linalg.solve(h, b), rtol=1e-12, atol=0)


def test_conjugate_gradients_make_no_step_along_what_curves_down():
    h, b = torch.diag(torch.tensor([-1.0, -2.0])), torch.tensor([1.0, 0.0])
    assert conjugate_gradients(lambda v: h @ v, b, steps=3).tolist() == [0.0, 0.0]
    h, b = torch.diag(torch.tensor([1.0, -0.5])), torch.tensor([1.0, 1.0])  # met at the second
    found = [conjugate_gradients(lambda v: h @ v, b, steps=k) for k in (1, 2, 5)]
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_conjugate_gradients_hide_no_nan():
    for factor, b in ((2.0, torch.tensor([torch.nan, 1.0])), (torch.nan, torch.ones(2))):
        for steps in (1, 3):
            found = conjugate_gradients(lambda v, k=factor: k * v, b, steps)
            assert found.isnan().all()


@pytest.mark.parametrize(("phi", "theta"), [((2, 2), (4,)), ((4,), (2, 2))])
def test_matrices_are_refused(phi, theta):
    with pytest.raises(BadArgument, match=r"must be vectors.*\(2, 2\).*flatten them"):
        implicit_gradient(inner, outer, torch.zeros(phi), torch.zeros(theta))


@pytest.mark.parametrize(
    ("solve", "told"),
    [
        (partial(conjugate_gradients, steps=0), "steps is 0; it must be at least 1"),
        (partial(neumann, steps=0), "steps is 0; it must be at least 1"),
        (partial(neumann, rate=0.0), r"rate is 0\.0; it must be above 0"),
    ],
)
def test_numbers_out_of_range_are_told(solve, told):
    with pytest.raises(BadArgument, match=told):
        solve(lambda v: v, torch.ones(2))
