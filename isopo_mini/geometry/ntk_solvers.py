"""c = λ(K + λI)⁻¹A, solved three ways, without the checks of `isopo.ntk_coefficients`, which would make a GPU wait."""

import torch
from jaxtyping import Float
from torch import Tensor


def is_above_rounding(ratio: float, gram: Float[Tensor, "S _"]) -> bool:
    """Whether `solve_ntk` can be trusted with λ = ratio · tr K/S, for a K, or columns of gradients, of this precision.

    λ has to be larger than the rounding errors of K, S·ε·tr K/S, or K + λI need not be invertible; and larger than √ε
    of double precision, or the solve loses more than half of its digits. It is asked of the ratio, which a transform
    knows, and not of λ, for which a GPU would have to be waited for.
    """
    return ratio > max(len(gram) * torch.finfo(gram.dtype).eps, torch.finfo(torch.float64).eps ** 0.5)


def solve_ntk(
    gram: Float[Tensor, "S S"], advantages: Float[Tensor, "S"], damping: Float[Tensor, ""]
) -> Float[Tensor, "S"]:
    """`ntk_coefficients` without the checks, which would make a GPU wait; λ = 0 stands for a layer without gradient.

    For a λ that `is_above_rounding`. Solved as (K/λ + I) c = A: the smallest eigenvalue is then 1 whatever the scale of
    K, and a layer whose gradients all vanish (K = 0, λ = 0) keeps c = A. In double precision, which costs next to
    nothing at these sizes: what is left is the rounding of K itself. A Cholesky factor would need half the
    multiplications, but one call is faster than three.
    """
    smallest = torch.finfo(torch.float64).tiny
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    system = torch.addcdiv(identity, gram.double(), damping.double().clamp_min(smallest))
    return in_precision_of(advantages, torch.linalg.solve_ex(system, advantages.double())[0])


def solve_ntk_by_eigenvalues(
    gram: Float[Tensor, "S S"], advantages: Float[Tensor, "S"], damping: Float[Tensor, ""]
) -> Float[Tensor, "S"]:
    """`solve_ntk` for a λ that is not above rounding, where K + λI may be singular or indefinite.

    c = Σ_i λ/(μ_i + λ) v_i v_iᵀA with the eigenvalues μ_i ≥ 0 of K: those below 0, or a rounding error above, are 0.
    So no part of A grows, and what lies in the null space of K stays as it is. Some ten times slower, and a GPU waits.
    """
    precise = gram.double()
    unit = precise.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    eigenvalues, vectors = torch.linalg.eigh(precise / unit)
    rounding = len(gram) * torch.finfo(torch.float64).eps * eigenvalues[-1]
    eigenvalues = torch.where(eigenvalues > rounding, eigenvalues, 0.0)
    damping = (damping.double() / unit).clamp_min(torch.finfo(torch.float64).tiny)
    shares = damping / (eigenvalues + damping)
    return in_precision_of(advantages, vectors @ (shares * (vectors.mT @ advantages.double())))


def solve_ntk_by_columns(
    columns: Float[Tensor, "S P"], advantages: Float[Tensor, "S"], damping: Float[Tensor, ""]
) -> Float[Tensor, "S"]:
    """`solve_ntk` for K = GGᵀ of few columns: λ(GGᵀ + λI)⁻¹A = A − G(GᵀG + λI)⁻¹GᵀA, a system of P equations.

    For a λ that `is_above_rounding`; λ = 0 stands for a layer without gradient.
    """
    precise = columns.double()
    damping = damping.double().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(precise.shape[1], dtype=torch.float64, device=precise.device)
    target = advantages.double()
    weights = torch.linalg.solve_ex(identity + precise.mT @ precise / damping, precise.mT @ target / damping)[0]
    return in_precision_of(advantages, target - precise @ weights)


def over_scale(coefficients: Float[Tensor, "S"], scale: Float[Tensor, ""]) -> Float[Tensor, "S"]:
    """c divided by one number of the layer; 0 where that is 0: the layer has no gradient then."""
    quotients = coefficients.double() / scale.double()
    return torch.where(scale == 0, 0.0, quotients).to(coefficients.dtype)


def in_precision_of(given: Tensor, computed: Tensor) -> Tensor:
    """What was computed, in the dtype of what was given, or in single precision if that is half."""
    return computed.to(torch.promote_types(given.dtype, torch.float32))
