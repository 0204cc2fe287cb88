"""ISOPO's transforms of the advantages, as pure functions.

A policy-gradient step is Σ_s A_s g_s, with g_s = ∇ log π(y_s | x_s) the score of sequence s. Both variants of
ISOPO keep the scores and replace the advantages A by coefficients c, so the step becomes Σ_s c_s g_s:

- *NTK* ("interacting"): c = λ(K + λI)⁻¹A with the Gram matrix K_ss' = ⟨g_s, g_s'⟩. The step is λ times the damped
  natural gradient, since Sᵀ(SSᵀ + λI)⁻¹ = (SᵀS + λI)⁻¹Sᵀ.
- *Fisher-normalised* ("non-interacting"): c_s = A_s/‖g_s‖_F, so that every sequence moves the policy equally far.

Source: N. Abrahamsen, *ISOPO: Proximal policy gradients without pi-old*, arXiv 2512.23353, and the public
demonstration code that goes with it, for the token-sampled norm, the powers and the regularisers.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks


def ntk_coefficients(
    gram: Float[Tensor, "S S"], advantages: Float[Tensor, "S"], damping: float | Float[Tensor, ""]
) -> Float[Tensor, "S"]:
    """c = λ(K + λI)⁻¹A.

    As λ → ∞, c → A, which is REINFORCE. As λ → 0, c/λ → K⁻¹A, which is the natural gradient.

    Args:
        gram: K, symmetric and positive semi-definite. It may be singular: identical sequences share their coefficient.
        advantages: A.
        damping: λ > 0, in the units of K (squared gradient).

    Returns:
        c, in the units of A.

    Raises:
        ValueError: a shape differs, an entry is not finite, or λ is not positive.
    """
    _check_gram(gram)
    checks.require_shape("advantages", advantages, "S", {"S": gram.shape[0]})
    checks.require_floating("advantages", advantages)
    checks.require_finite("advantages", advantages)
    checks.require_positive("damping", float(damping))
    return solve_ntk(gram, advantages, torch.as_tensor(damping, dtype=gram.dtype, device=gram.device))


def solve_ntk(
    gram: Float[Tensor, "S S"], advantages: Float[Tensor, "S"], damping: Float[Tensor, ""]
) -> Float[Tensor, "S"]:
    """`ntk_coefficients` without the checks, which would make a GPU wait; λ = 0 stands for a layer without gradient.

    Solved as (K/λ + I) c = A: the smallest eigenvalue is then 1 whatever the scale of K, and a layer whose gradients
    all vanish (K = 0, λ = 0) keeps c = A. The precision is that of K, whose own rounding matters as much. A Cholesky
    factor would need half the multiplications, but at these sizes one call is faster than three.
    """
    smallest = torch.finfo(gram.dtype).tiny
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    system = torch.addcdiv(identity, gram, damping.to(gram.dtype).clamp_min(smallest))
    return torch.linalg.solve_ex(system, advantages.to(gram.dtype))[0].to(advantages.dtype)


def mean_eigenvalue(gram: Float[Tensor, "S S"]) -> Float[Tensor, ""]:
    """tr K / S, the mean squared norm of the gradients. λ = ρ times (a moving average of) this."""
    return gram.trace() / len(gram)


def fisher_norms(gram: Float[Tensor, "S S"]) -> Float[Tensor, "S"]:
    """‖g_s‖_F = √((1/S) Σ_s' K_ss'²) = √(g_sᵀ F̂ g_s), with the sequence-level empirical Fisher F̂ = SᵀS/S.

    Raises:
        ValueError: `gram` is not square or not finite.
    """
    _check_gram(gram)
    return root_mean_square(gram)


def root_mean_square(gram: Float[Tensor, "S S"]) -> Float[Tensor, "S"]:
    """`fisher_norms` without the checks, which would make a GPU wait."""
    return gram.square().mean(dim=1).sqrt()


def exact_fisher_norms(scores: Float[Tensor, "S P"], fisher: Float[Tensor, "P P"]) -> Float[Tensor, "S"]:
    """‖g_s‖_F = √(g_sᵀ F g_s) for a Fisher matrix that is at hand (bandits, MDPs, small networks).

    Raises:
        ValueError: shapes disagree or an entry is not finite.
    """
    sizes = checks.require_shape("scores", scores, "S P")
    checks.require_not_empty("scores", scores)
    checks.require_shape("fisher", fisher, "P P", sizes)
    checks.require_finite("scores", scores)
    checks.require_finite("fisher", fisher)
    squares = ((scores @ fisher) * scores).sum(dim=1)
    return squares.clamp_min(0.0).sqrt()  # rounding can leave -1e-17 where the norm is zero


def token_fisher_norms(
    overlaps: Float[Tensor, "S N"], token_norms: Float[Tensor, "N"] | None = None
) -> Float[Tensor, "S"]:
    """‖g_s‖_F from N sampled tokens: ‖(⟨g_s, g_t⟩)_t‖₂ / ‖(‖g_t‖)_t‖₂, with g_t the gradient of token t alone.

    With `token_norms` this is the overlap of the public code. The denominator is one number for all sequences,
    about √tr F: it rescales the layer's step, and chapter 5 shows what that costs. Without `token_norms` the
    denominator is √N, and the result estimates √(g_sᵀ F g_s) itself.

    Args:
        overlaps: ⟨g_s, g_t⟩, one row a sequence, one column a sampled token.
        token_norms: ‖g_t‖, or None.

    Raises:
        ValueError: shapes disagree.
    """
    sizes = checks.require_shape("overlaps", overlaps, "S N")
    checks.require_not_empty("overlaps", overlaps)
    numerator = overlaps.square().sum(dim=1).sqrt()
    if token_norms is None:
        return numerator / overlaps.shape[1] ** 0.5
    checks.require_shape("token_norms", token_norms, "N", sizes)
    denominator = token_norms.square().sum().sqrt()
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def regularized(
    norms: Float[Tensor, "S"],
    strength: float,
    mean_square: float | Float[Tensor, ""],
    keep_small: bool = False,
) -> Float[Tensor, "S"]:
    """√(x² + ρm), or √(x²/(ρm) + 1) with `keep_small`.

    The first bounds the norm from below, so that a tiny gradient is not blown up. The second tends to 1 for
    x² ≪ ρm: small gradients are left as they are and only large ones are shrunk. ρ = 0 returns x unchanged.

    Args:
        norms: x ≥ 0.
        strength: ρ ≥ 0, without units.
        mean_square: m, a (moving) average of x².

    Raises:
        ValueError: ρ is negative.
    """
    checks.require_at_least("strength", strength, 0.0)
    if strength == 0:
        return norms
    floor = strength * torch.as_tensor(mean_square, dtype=norms.dtype, device=norms.device)
    if not keep_small:
        return (norms.square() + floor).sqrt()
    # m = 0 means that every norm is zero: small gradients, which are to be left alone.
    return torch.where(floor > 0, (norms.square() / floor + 1.0).sqrt(), torch.ones_like(norms))


def normalized_coefficients(
    norms: Float[Tensor, "S"],
    advantages: Float[Tensor, "S"],
    power: float = 1.0,
    *,
    strength: float = 0.0,
    mean_square: float | Float[Tensor, ""] | None = None,
    keep_small: bool = False,
) -> Float[Tensor, "S"]:
    """c_s = A_s/‖g_s‖ᵖ, with the norm regularised first when `strength` is positive.

    A sequence whose gradient is zero gets the coefficient zero: whatever it is, it multiplies nothing.

    Args:
        norms: ‖g_s‖ ≥ 0, in any of the Fisher norms.
        advantages: A.
        power: p. 1 is ISOPO, 0 is REINFORCE.
        strength: ρ ≥ 0 of `regularized`.
        mean_square: m of `regularized`; the mean of norms² when None.
        keep_small: which of the two regularisers.

    Raises:
        ValueError: shapes disagree, a norm is negative, or an entry is not finite.
    """
    sizes = checks.require_shape("norms", norms, "S")
    checks.require_not_empty("norms", norms)
    checks.require_floating("norms", norms)
    checks.require_finite("norms", norms)
    if (norms < 0).any():
        raise ValueError(f"norms: expected numbers >= 0, got {norms.min().item()}")
    checks.require_shape("advantages", advantages, "S", sizes)
    checks.require_floating("advantages", advantages)
    checks.require_finite("advantages", advantages)
    if mean_square is None:
        mean_square = norms.square().mean()
    return divide(advantages, regularized(norms, strength, mean_square, keep_small), power)


def divide(advantages: Float[Tensor, "S"], norms: Float[Tensor, "S"], power: float) -> Float[Tensor, "S"]:
    """A/xᵖ, and 0 where xᵖ is 0."""
    factors = norms**power
    return torch.where(factors > 0, advantages / factors, torch.zeros_like(advantages)).to(advantages.dtype)


def _check_gram(gram: Tensor) -> None:
    """A Gram matrix is square, not empty, floating and finite."""
    checks.require_shape("gram", gram, "S S")
    checks.require_not_empty("gram", gram)
    checks.require_floating("gram", gram)
    checks.require_finite("gram", gram)
