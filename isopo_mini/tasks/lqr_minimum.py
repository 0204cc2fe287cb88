"""Local minima of the cost of a linear system: steps that never leave the stable gains, and never raise the cost."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.tasks.lqr import LinearQuadratic


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where `local_minimum` stopped.

    Args:
        gain: K, `(m, p)`; stable.
        cost: J(K).
        converged: whether K is a minimum: the Hessian H is positive definite and Newton's step would lower J by no
            more than `tolerance` times J.
        predicted_fall: ½ gᵀH⁻¹g / J with g the gradient, by which share Newton's step would lower J; infinite where
            H is not positive definite.
        steps: how many were taken.
    """

    gain: Float[Tensor, "m p"]
    cost: float
    converged: bool
    predicted_fall: float
    steps: int


def local_minimum(
    system: LinearQuadratic,
    gain: Float[Tensor, "m p"] | None = None,
    *,
    max_steps: int = 200,
    tolerance: float = 1e-18,
) -> Minimum:
    """Newton's method from a stable gain, and Gauss–Newton where the Hessian is not positive definite.

    Each step is halved until the new gain is stable and its cost falls by a share of what the gradient promises
    (Armijo's rule). No step of fixed length can do that: the stable set of another system is another one. Where costs
    no longer differ by more than rounding, a step has to make the gradient smaller instead.

    Args:
        system: the system.
        gain: where to begin, stable; 0 when None.
        max_steps: after so many the search ends, converged or not.
        tolerance: see `Minimum.converged`. The gain is off by about its square root, relatively.

    Returns:
        The gain, and whether it is a minimum. It is a local one: of another start another one may be found.

    Raises:
        ValueError: the first gain is not stable.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> found = local_minimum(LinearQuadratic(A=one, B=one, Q=one, R=one, Sigma=one), 0.5 * one)
        >>> found.gain, found.converged  # 1 over the golden ratio
        (tensor([[0.6180]], dtype=torch.float64), True)

    Reference:
        Nocedal and Wright, Numerical Optimization, 2006, chapter 3.
    """
    checks.require_at_least("max_steps", max_steps, 0)
    checks.require_positive("tolerance", tolerance)
    if gain is None:
        gain = torch.zeros(system.num_controls, system.num_outputs, dtype=torch.float64, device=system.A.device)
    gain, cost = gain.detach().double(), system.cost(gain).item()
    for steps in range(max_steps + 1):
        gradient = system.gradient(gain)
        step, predicted_fall = _newton(system, gain, gradient, cost)
        better = _better(system, gain, step, gradient, cost) if steps < max_steps else None
        if better is None:
            break
        gain, cost = better
    return Minimum(gain, cost, predicted_fall <= tolerance, predicted_fall, steps)


def _newton(system: LinearQuadratic, gain: Tensor, gradient: Tensor, cost: float) -> tuple[Tensor, float]:
    """The step to take from K and by which share Newton's step would lower J: see `Minimum`."""
    factor, failed = torch.linalg.cholesky_ex(system.hessian(gain))
    if failed:
        return system.gauss_newton(gain) / 2, torch.inf  # descends wherever the gradient is not zero
    step = torch.cholesky_solve(gradient.reshape(-1, 1), factor).reshape(gain.shape)
    return step, ((step * gradient).sum() / 2).item() / cost


def _better(
    system: LinearQuadratic, gain: Tensor, step: Tensor, gradient: Tensor, cost: float
) -> tuple[Tensor, float] | None:
    """K − ηD and its cost for the first η = 1, ½, ¼, … that makes it better; None when none does."""
    slope, rounding = (step * gradient).sum().item(), 1e-12 * cost
    if slope < rounding:  # too near to compare costs
        moved, moved_cost = gain - step, _cost_or_infinity(system, gain - step)
        closer = moved_cost < cost + rounding and system.gradient(moved).norm() < gradient.norm() / 2
        return (moved, moved_cost) if closer else None
    for halvings in range(50):
        share = 0.5**halvings
        moved = gain - share * step
        moved_cost = _cost_or_infinity(system, moved)
        if moved_cost <= cost - 1e-4 * share * slope:
            return moved, moved_cost
    return None


def _cost_or_infinity(system: LinearQuadratic, gain: Tensor) -> float:
    """J(K), infinite for a gain that is not stable, or that rounding cannot tell from one."""
    try:
        return system.cost(gain).item()
    except ValueError:
        return torch.inf
