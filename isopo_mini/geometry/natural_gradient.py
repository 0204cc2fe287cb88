"""Four ways to solve (F + λI) x = g, the damped natural gradient. They agree; they differ in what they cost.

solve            P × P matrix            O(P³)            when P is small
solve_dual       N × N Gram matrix       O(N²P + N³)      when there are few samples
solve_cg         products F·v only       O(P) memory      when neither fits
solve_rank_one   one score               O(P)             one sample: Sherman–Morrison

Without damping, and for an F that is singular by construction, as every softmax's is: `solve_singular` of `singular`.

Dense systems are solved in double precision and returned in the precision of what was given, at least single.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.geometry.singular import solve_singular as solve_singular
from isopo_mini.precision import at_least_float32, common_dtype, euclidean_norm, require_fits


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
        damping: λ ≥ 0. It may be 0 only when F is not singular; the Fisher of a tabular softmax always is. Then, and
            for a λ within rounding error of 0, see `solve_singular`.

    Returns:
        `(P,)`.

    Raises:
        ValueError: shapes disagree, a number is not finite, λ < 0, F is not symmetric, F is singular and
            λ = 0 or too small to make a difference, F + λI is not positive definite, or x does not fit its dtype.

    Source: Amari, Natural gradient works efficiently in learning, Neural Computation 10 (1998).
    """
    sizes = checks.require_shape("fisher", fisher, "P P")
    checks.require_numbers("fisher", fisher)
    checks.require_vector("gradient", gradient, fisher, "fisher", sizes)
    checks.require_at_least("damping", damping, 0)
    checks.require_symmetric("fisher", fisher)
    matrix = fisher.double()
    # A Cholesky factor of a singular matrix often exists in floating point, and solves nothing.
    rounding = len(fisher) * torch.finfo(torch.float64 if damping > 0 else fisher.dtype).eps
    if damping <= rounding * matrix.diagonal().sum():
        eigenvalues = torch.linalg.eigvalsh(matrix)
        if eigenvalues[0] + damping <= rounding * eigenvalues[-1]:
            raise ValueError(
                f"damping: expected a number > {rounding * eigenvalues[-1] if damping > 0 else 0:.2g}, since fisher is "
                f"singular (eigenvalues from {eigenvalues[0]:g} to {eigenvalues[-1]:g}), got {damping:g}"
            )
    x = _solve_positive_definite("fisher + damping · I", _damped(matrix, damping), gradient.double())
    return require_fits("(fisher + damping · I)⁻¹ gradient", x.to(common_dtype((fisher, gradient))))


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
        ValueError: shapes disagree, nothing was given, a number is not finite, λ ≤ 0, or x does not fit its dtype.

    Source: Chen and Heyl, MinSR, Nature Physics 20 (2024), arXiv 2302.01941, use the same identity.
    """
    sizes = checks.require_shape("scores", scores, "N P")
    checks.require_numbers("scores", scores)
    checks.require_vector("advantages", advantages, scores, "scores", sizes, axis="N")
    checks.require_positive("damping", damping)
    precise, shares = scores.double(), advantages.double() / len(scores)
    gram = precise @ precise.mT / len(scores)  # K/N
    if damping > torch.finfo(gram.dtype).eps ** 0.5 * gram.trace():
        weights = _solve_positive_definite("gram + damping · I", _damped(gram, damping), shares)
    else:
        # What lies in the null space of K would be divided by a tiny λ, and Sᵀ would have to cancel it again.
        eigenvalues, vectors = torch.linalg.eigh(gram)
        kept = eigenvalues > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]
        basis = vectors[:, kept]
        weights = basis @ ((basis.mT @ shares) / (eigenvalues[kept] + damping))
    x = precise.mT @ weights
    return require_fits("(fisher + damping · I)⁻¹ gradient", x.to(common_dtype((scores, advantages))))


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
    checks.require_numbers("gradient", gradient)
    checks.require_at_least("damping", damping, 0)
    checks.require_at_least("max_iterations", max_iterations, 1)
    checks.require_positive("tolerance", tolerance)
    gradient = at_least_float32(gradient)
    x = torch.zeros_like(gradient)
    scale = euclidean_norm(gradient, dim=0).item()
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
    x = require_fits("(fisher + damping · I)⁻¹ gradient", scale * x)
    return x, Convergence(iterations, residual_norm, residual_norm <= tolerance)


def solve_rank_one(score: Float[Tensor, "P"], vector: Float[Tensor, "P"], damping: float) -> Float[Tensor, "P"]:
    """Natural gradient of a single sample, by Sherman–Morrison.

    x = (ssᵀ + λI)⁻¹ v = (v − s (s·v) / (λ + ‖s‖²)) / λ. For v = A s this is A s / (λ + ‖s‖²). Written so, a small λ
    would divide a difference of nearly equal vectors. Computed as v∥/(λ + ‖s‖²) + v⊥/λ, with v∥ along s and v⊥ across;
    entries of v⊥ below the rounding error of v's are 0.

    Args:
        score: s, `(P,)`. It may be zero.
        vector: v, `(P,)`.
        damping: λ > 0.

    Returns:
        `(P,)`.

    Raises:
        ValueError: shapes disagree, nothing was given, a number is not finite, λ ≤ 0, or x does not fit its dtype.
    """
    sizes = checks.require_shape("score", score, "P")
    checks.require_numbers("score", score)
    checks.require_vector("vector", vector, score, "score", sizes)
    checks.require_positive("damping", damping)
    dtype, vector = common_dtype((score, vector)), vector.double()
    norm = euclidean_norm(score.double(), dim=0)
    direction = score.double() / norm.clamp_min(torch.finfo(torch.float64).tiny)
    along = direction * direction.dot(vector)
    along = along + direction * direction.dot(vector - along)  # once more, for the rounding error of a long product
    across = vector - along
    rounding = 8 * torch.finfo(torch.float64).eps * vector.abs()
    across = torch.where(across.abs() > rounding, across, 0.0)
    x = along / (damping + norm.square()) + across / damping
    return require_fits("(score scoreᵀ + damping · I)⁻¹ vector", x.to(dtype))


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
