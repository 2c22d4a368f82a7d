"""The implicit gradient: how an outer loss moves with what shaped the solution of an inner problem.

At a minimum `phi` of `inner_loss(phi, theta)` the inner gradient is zero whatever `theta` is, so

    gradient = - M^T H^-1 g,    H = d2 inner / dphi dphi,  M = d2 inner / dphi dtheta,

with `g` the gradient of the outer loss at `phi` (Bengio 2000). No step that led to `phi` is needed.
H is never built: whoever solves `H v = g` gets a function that multiplies with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp

from metautils.errors import BadArgument

Product = Callable[[Tensor], Tensor]
Solve = Callable[[Product, Tensor], Tensor]


def conjugate_gradients(product: Product, b: Tensor, steps: int = 10) -> Tensor:
    """Solve `H v = b` for a symmetric positive H by so many products (Hestenes and Stiefel 1952).

    In exact arithmetic as many steps as H has different eigenvalues are enough. It ends for good
    where it meets a direction in which H does not curve upwards, as may be where phi is no minimum:
    the result is then that of the products before, zero if it is the first. What is not a number
    comes out as such. Runs under `torch.vmap`.

    Args:
        product: multiplies a vector of the shape of `b` with H.
        b: `(n,)`.
        steps: products, at least 1.

    Raises:
        ValueError: if steps is below 1.

    Example:
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
        >>> conjugate_gradients(lambda v: H @ v, b, steps=2)
        tensor([1.0000, 1.0000])
    """
    _check(steps)
    v, r, p = torch.zeros_like(b), b, b
    rr = r @ r
    going = rr != 0  # so that NaN goes on, and is seen
    for _ in range(steps):
        Hp = product(p)
        curvature = p @ Hp
        going = going & ~(curvature <= 0)
        alpha = torch.where(going, rr / curvature, 0.0)
        v, r = v + alpha * p, r - alpha * Hp
        before, rr = rr, r @ r
        going = going & (rr != 0)
        p = r + torch.where(going, rr / before, 0.0) * p
    return v


def neumann(product: Product, b: Tensor, steps: int = 10, rate: float = 0.1) -> Tensor:
    """The first terms of `H^-1 = rate * sum_j (I - rate H)^j`, times b (Lorraine et al. 2020).

    At a solved inner problem this is what backpropagation through the last `steps` of gradient
    descent at that rate gives. One term leaves `rate * b`, no second derivative of phi at all:
    T1-T2 (Luketina et al. 2016).

    Args:
        product: multiplies a vector of the shape of `b` with H.
        b: `(n,)`.
        steps: terms, at least 1; there is one product less.
        rate: above 0; the sum converges below 2 over the greatest eigenvalue of H.

    Raises:
        ValueError: if steps is below 1 or the rate is not above 0.

    Example:
        >>> H, b = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 4.0])
        >>> neumann(lambda v: H @ v, b, steps=60, rate=0.5)
        tensor([1., 2.])
    """
    _check(steps)
    if rate <= 0:
        raise BadArgument(f"rate is {rate}; it must be above 0.")
    term = total = b
    for _ in range(steps - 1):
        term = term - rate * product(term)
        total = total + term
    return rate * total


def direct(product: Product, b: Tensor) -> Tensor:
    """Solve `H v = b` with H written out, by as many products as it has columns.

    Args:
        product: multiplies a vector of the shape of `b` with H.
        b: `(n,)`; n squared numbers are held.

    Example:
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
        >>> direct(lambda v: H @ v, b)
        tensor([1., 1.])
    """
    columns = [product(e) for e in torch.eye(len(b), dtype=b.dtype, device=b.device)]
    return torch.linalg.solve(torch.stack(columns), b)  # (n, n), symmetric


def implicit_gradient(
    inner_loss: Callable[[Tensor, Tensor], Tensor],
    outer_loss: Callable[[Tensor], Tensor],
    phi: Tensor,
    theta: Tensor,
    solve: Solve = conjugate_gradients,
) -> Tensor:
    """The gradient of `outer_loss` at the solution of an inner problem, in what shapes it.

    Right only where phi *is* a minimum of the inner loss: nothing here checks that. If theta enters
    the outer loss directly as well, add that part.

    Args:
        inner_loss: of phi and theta, a scalar, twice differentiable.
        outer_loss: of phi, a scalar.
        phi: `(n,)`, the solution.
        theta: `(m,)`: hyperparameters, weights of examples, a point that phi is pulled to.
        solve: of a product with the inner Hessian and a vector, such as
            `functools.partial(conjugate_gradients, steps=5)`, `neumann` or `direct`.

    Returns:
        `(m,)`, without a graph of its own.

    Raises:
        ValueError: if phi or theta is no vector.

    Example:
        >>> def inner(phi, theta):  # the solution is phi = theta / 3
        ...     return phi.square().sum() + 0.5 * (phi - theta).square().sum()
        >>> theta = torch.tensor([3.0, 6.0])
        >>> implicit_gradient(inner, lambda phi: phi.sum(), theta / 3, theta)
        tensor([0.3333, 0.3333])
    """
    if phi.dim() != 1 or theta.dim() != 1:
        raise BadArgument(
            "phi and theta must be vectors, but have the shapes "
            f"{tuple(phi.shape)} and {tuple(theta.shape)}: flatten them."
        )
    phi, theta = phi.detach(), theta.detach()
    # One graph, of the inner gradient; every product is one backward pass through it.
    _, times = vjp(grad(inner_loss), phi, theta)
    v = solve(lambda u: times(u)[0], grad(outer_loss)(phi))
    return -times(v)[1].detach()


def _check(steps: int) -> None:
    if steps < 1:
        raise BadArgument(f"steps is {steps}; it must be at least 1.")
