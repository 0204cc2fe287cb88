"""Four ways to solve (F + λI) x = g, the damped natural gradient. They agree; they differ in what they cost.

solve            P × P matrix            O(P³)            when P is small
solve_dual       N × N Gram matrix       O(N²P + N³)      when there are few samples
solve_cg         products F·v only       O(P) memory      when neither fits
solve_rank_one   one score               O(P)             one sample: Sherman–Morrison
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks


@dataclass(frozen=True)
class Convergence:
    """How a conjugate-gradient solve ended.

    Args:
        iterations: products with F that were made.
        residual_norm: ‖g − (F + λI)x‖ / ‖g‖, from the recurrence; 0 when g is 0.
        converged: whether that is within the tolerance.
    """

    iterations: int
    residual_norm: float
    converged: bool


def solve(fisher: Float[Tensor, "P P"], gradient: Float[Tensor, "P"], damping: float) -> Float[Tensor, "P"]:
    """Damped natural gradient by Cholesky: x = (F + λI)⁻¹ g.

    Args:
        fisher: F, symmetric and positive semi-definite, `(P, P)`.
        gradient: g, `(P,)`.
        damping: λ ≥ 0. It may be 0 only when F is not singular; the Fisher of a tabular softmax always is.

    Returns:
        `(P,)`.

    Raises:
        ValueError: shapes disagree, a number is not finite, λ < 0, F is not symmetric, F is singular and
            λ = 0, or F + λI is not positive definite.

    Source: Amari, Natural gradient works efficiently in learning, Neural Computation 10 (1998).
    """
    sizes = checks.require_shape("fisher", fisher, "P P")
    _require_numbers("fisher", fisher)
    _require_vector("gradient", gradient, fisher, "fisher", sizes)
    checks.require_at_least("damping", damping, 0)
    eps = torch.finfo(fisher.dtype).eps
    largest = fisher.abs().max().item()
    asymmetry = (fisher - fisher.mT).abs().max().item()
    if asymmetry > 100 * eps * largest:
        raise ValueError(f"fisher: expected a symmetric matrix, got entries that differ by {asymmetry:g}")
    if damping == 0:
        # A Cholesky factor of a singular matrix often exists in floating point, and solves nothing.
        eigenvalues = torch.linalg.eigvalsh(fisher)
        if eigenvalues[0] <= len(fisher) * eps * eigenvalues[-1]:
            raise ValueError(
                "damping: expected a number > 0, since fisher is singular "
                f"(eigenvalues from {eigenvalues[0]:g} to {eigenvalues[-1]:g}), got 0"
            )
    return _solve_positive_definite("fisher + damping · I", _damped(fisher, damping), gradient)


def solve_dual(scores: Float[Tensor, "N P"], advantages: Float[Tensor, "N"], damping: float) -> Float[Tensor, "P"]:
    """Natural gradient under the empirical Fisher, through the N × N Gram matrix; F is never formed.

    x = (SᵀS/N + λI)⁻¹ SᵀA/N = Sᵀ (SSᵀ/N + λI)⁻¹ A/N, the push-through identity.

    Args:
        scores: S, one row ∇log π a sample, `(N, P)`.
        advantages: A, `(N,)`.
        damping: λ > 0 (the Gram matrix is singular whenever N > P, or two samples are alike).

    Returns:
        `(P,)`.

    Raises:
        ValueError: shapes disagree, nothing was given, a number is not finite, or λ ≤ 0.

    Source: Chen and Heyl, MinSR, Nature Physics 20 (2024), arXiv 2302.01941, use the same identity.
    """
    sizes = checks.require_shape("scores", scores, "N P")
    _require_numbers("scores", scores)
    _require_vector("advantages", advantages, scores, "scores", sizes, axis="N")
    checks.require_positive("damping", damping)
    gram = scores @ scores.mT / len(scores)  # K/N
    weights = _solve_positive_definite("gram + damping · I", _damped(gram, damping), advantages / len(scores))
    return scores.mT @ weights


def solve_cg(
    fvp: Callable[[Tensor], Tensor],
    gradient: Float[Tensor, "P"],
    damping: float,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> tuple[Float[Tensor, "P"], Convergence]:
    """Damped natural gradient by conjugate gradients, from products F·v alone.

    Stops when ‖g − (F + λI)x‖ ≤ tolerance · ‖g‖. In exact arithmetic that takes no more iterations than F has
    different eigenvalues.

    Args:
        fvp: v ↦ F v, `(P,)` → `(P,)`, for example `fisher.fisher_vector_product` with its policy filled in.
        gradient: g, `(P,)`.
        damping: λ ≥ 0. With 0, a singular F is fine as long as g is in its range, as a policy gradient is.
        max_iterations: how many products to make at most.
        tolerance: relative size of the residual to stop at.

    Returns:
        x `(P,)`, and a `Convergence` that says whether the tolerance was reached.

    Raises:
        ValueError: a shape is wrong, a number is not finite, λ < 0, or vᵀ(F + λI)v ≤ 0 was met.

    Source: Hestenes and Stiefel (1952); for policies: Schulman et al., TRPO, arXiv 1502.05477, appendix C.
    """
    sizes = checks.require_shape("gradient", gradient, "P")
    _require_numbers("gradient", gradient)
    checks.require_at_least("damping", damping, 0)
    checks.require_at_least("max_iterations", max_iterations, 1)
    checks.require_positive("tolerance", tolerance)
    x = torch.zeros_like(gradient)
    scale = gradient.norm().item()
    if scale == 0:
        return x, Convergence(iterations=0, residual_norm=0.0, converged=True)
    residual = direction = gradient / scale  # of size one, so that a tiny gradient does not underflow
    square = residual.dot(residual)
    iterations = 0
    while iterations < max_iterations and square.sqrt() > tolerance:
        iterations += 1
        product = fvp(direction)
        checks.require_shape("fvp(vector)", product, "P", sizes)
        product = product + damping * direction
        curvature = direction.dot(product)
        if not 0 < curvature < torch.inf:
            raise ValueError(
                "fvp: expected vᵀ(F + damping · I)v to be finite and > 0, "
                f"got {curvature.item():g} in iteration {iterations}; try a larger damping"
            )
        step = square / curvature
        x = x + step * direction
        residual = residual - step * product
        previous, square = square, residual.dot(residual)
        direction = residual + (square / previous) * direction
    residual_norm = square.sqrt().item()
    return scale * x, Convergence(iterations, residual_norm, residual_norm <= tolerance)


def solve_rank_one(score: Float[Tensor, "P"], vector: Float[Tensor, "P"], damping: float) -> Float[Tensor, "P"]:
    """Natural gradient of a single sample, by Sherman–Morrison.

    x = (ssᵀ + λI)⁻¹ v = (v − s (s·v) / (λ + ‖s‖²)) / λ. For v = A s this is A s / (λ + ‖s‖²).

    Args:
        score: s, `(P,)`. It may be zero.
        vector: v, `(P,)`.
        damping: λ > 0.

    Returns:
        `(P,)`.

    Raises:
        ValueError: shapes disagree, nothing was given, a number is not finite, or λ ≤ 0.
    """
    sizes = checks.require_shape("score", score, "P")
    _require_numbers("score", score)
    _require_vector("vector", vector, score, "score", sizes)
    checks.require_positive("damping", damping)
    return (vector - score * (score.dot(vector) / (damping + score.dot(score)))) / damping


def _require_numbers(name: str, tensor: Tensor) -> None:
    """Floating-point, not empty, finite."""
    checks.require_floating(name, tensor)
    checks.require_not_empty(name, tensor)
    checks.require_finite(name, tensor)


def _require_vector(
    name: str, vector: Tensor, other: Tensor, other_name: str, sizes: dict[str, int], axis: str = "P"
) -> None:
    """A vector of numbers whose length and device fit the other argument."""
    checks.require_shape(name, vector, axis, sizes)
    _require_numbers(name, vector)
    checks.require_same_device(name, vector, other_name, other)


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """M + λI."""
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _solve_positive_definite(name: str, matrix: Tensor, vector: Tensor) -> Tensor:
    """M⁻¹ v by Cholesky, or an error that says how far M is from positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        smallest = torch.linalg.eigvalsh(matrix)[0].item()
        raise ValueError(
            f"{name}: expected a positive definite matrix, got smallest eigenvalue {smallest:g}; try a larger damping"
        )
    return torch.cholesky_solve(vector.unsqueeze(1), factor).squeeze(1)
