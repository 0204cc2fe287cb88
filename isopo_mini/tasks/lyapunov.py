"""Discrete Lyapunov equations, X = constant + A X Aᵀ, solved or refused: by what rounding leaves of the answer.

A loop A is *unstable* when an eigenvalue is not inside the unit circle; the equation may still have a solution, which
means nothing. A stable one is *ill-conditioned* when a change of its entries by rounding moves the solution as much as
the solution itself, either since its spectral radius is 1 up to rounding, or since paths grow far before they shrink.

Units are no reason: a state in metres and one in nanometres are brought to one scale first, by powers of 2, exactly.
"""

import warnings

import numpy as np
import scipy  # its parts load themselves when they are used: they take half a second
import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = np.finfo(np.float64).eps
LARGEST_CONDITION = 1e-3 / EPSILON  # at least three digits of the solution are right


def require_stable(loop: Float[Tensor, "n n"], radius: float) -> None:
    """Check that `radius`, the largest modulus of an eigenvalue of the closed loop, is below 1.

    Raises:
        ValueError: it is not; where rounding of the entries moves the eigenvalue across 1, the error says that, too.
    """
    if radius < 1:
        return
    doubt = _rounding_of_radius(_balanced(loop)[0])
    unsure = f" ± {doubt:.1g}, which rounding cannot tell from a stable one" if doubt > max(radius - 1, 1e-10) else ""
    raise ValueError(f"gain: expected a stable closed loop A − BKC, got spectral radius {radius:.6g}{unsure}")


def solve(loop: Float[Tensor, "n n"], constant: Float[Tensor, "n n"], radius: float) -> Float[Tensor, "n n"]:
    """X = constant + loop X loopᵀ, symmetric, for a stable loop.

    Args:
        loop: A, with spectral radius below 1.
        constant: symmetric.
        radius: its spectral radius, for the error.

    Raises:
        ValueError: fewer than three digits of X would be right, or X is larger than float64 can hold.
    """
    balanced, scale = _balanced(loop)
    condition = _condition(balanced)
    if not condition < LARGEST_CONDITION:
        raise ValueError(_ill_conditioned(radius, condition))
    with np.errstate(over="ignore", invalid="ignore"):
        both = np.outer(scale, scale)
        solution = scipy.linalg.solve_discrete_lyapunov(balanced, constant.cpu().numpy() / both) * both
    if not np.isfinite(solution).all():
        raise ValueError("gain: expected a cost that float64 can hold, got entries that overflow")
    return torch.from_numpy((solution + solution.T) / 2).to(loop)


def _balanced(loop: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """D⁻¹AD with rows and columns of similar size, and the diagonal of D, powers of 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy reads large scales as indices, which it does not use
        balanced, (scale, _) = scipy.linalg.matrix_balance(loop.cpu().numpy(), permute=False, separate=True)
    return balanced, scale


def _condition(loop: np.ndarray) -> float:
    """‖L‖ ‖L⁻¹‖ of L: X ↦ X − AXAᵀ, infinite where its solution is not to be trusted at all.

    L⁻¹ maps positive matrices to positive ones, so its norm is that of what it makes of I; which is at least I.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            largest = scipy.linalg.solve_discrete_lyapunov(loop, np.eye(len(loop)))
            eigenvalues = np.linalg.eigvalsh((largest + largest.T) / 2)
    except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning, RuntimeWarning, ValueError):
        return np.inf
    if not eigenvalues[0] > 0.5:
        return np.inf
    return float((1 + np.linalg.norm(loop, 2) ** 2) * eigenvalues[-1])


def _rounding_of_radius(loop: np.ndarray) -> float:
    """By how much the largest eigenvalue moves when entries move by rounding, to first order: ε‖A‖ / |yᴴx|."""
    values, left, right = scipy.linalg.eig(loop, left=True, right=True)
    leading = np.abs(values).argmax()
    overlap = np.abs(np.vdot(left[:, leading], right[:, leading]))
    return float(EPSILON * np.linalg.norm(loop, 2) / max(overlap, np.finfo(np.float64).tiny))


def _ill_conditioned(radius: float, condition: float) -> str:
    """What is wrong with a loop that is stable."""
    reason = "1 up to rounding" if 1 - radius < 1e-8 else "stable, but paths grow far before they shrink"
    return (
        f"gain: expected a closed loop A − BKC whose cost rounding leaves digits of, got spectral radius "
        f"{radius:.17g}, {reason} (condition number {condition:.1g})"
    )
