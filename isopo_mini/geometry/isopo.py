"""ISOPO's transforms of the advantages, as pure functions.

A policy-gradient step is Σ_s A_s g_s, with g_s = ∇ log π(y_s | x_s) the score of sequence s. Both variants of
ISOPO keep the scores and replace the advantages A by coefficients c, so the step becomes Σ_s c_s g_s:

- *NTK* ("interacting"): c = (K + λI)⁻¹A with the Gram matrix K_ss' = ⟨g_s, g_s'⟩, or λ times that. The step is the
  damped natural gradient, or λ times it, since Sᵀ(SSᵀ + λI)⁻¹ = (SᵀS + λI)⁻¹Sᵀ. See `ntk_coefficients` on the scale.
- *Fisher-normalised* ("non-interacting"): c_s = A_s/‖g_s‖_F, so that every sequence moves the policy equally far.

Source: N. Abrahamsen, *ISOPO: Proximal policy gradients without pi-old*, arXiv 2512.23353, and the public
demonstration code that goes with it, for the token-sampled norm, the powers and the regularisers.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.geometry.ntk_solvers import in_precision_of
from isopo_mini.geometry.ntk_solvers import is_above_rounding as is_above_rounding
from isopo_mini.geometry.ntk_solvers import over_scale as over_scale
from isopo_mini.geometry.ntk_solvers import single_precision_suffices as single_precision_suffices
from isopo_mini.geometry.ntk_solvers import solve_ntk as solve_ntk
from isopo_mini.geometry.ntk_solvers import solve_ntk_by_columns as solve_ntk_by_columns
from isopo_mini.geometry.ntk_solvers import solve_ntk_by_eigenvalues as solve_ntk_by_eigenvalues
from isopo_mini.geometry.ntk_solvers import solver_for as solver_for
from isopo_mini.precision import at_least_float32, common_dtype, euclidean_norm, require_fits

NTK_SCALES = ("gradient", "natural")


def ntk_coefficients(
    gram: Float[Tensor, "S S"],
    advantages: Float[Tensor, "S"],
    damping: float | Float[Tensor, ""],
    scale: str = "gradient",
) -> Float[Tensor, "S"]:
    """c = λ(K + λI)⁻¹A, in the scale of the gradient; or c = (K + λI)⁻¹A, in its natural scale.

    The two differ by λ, one number a layer, and λ = ρ·tr K/S differs between layers by orders of magnitude. So the
    scale is a part of the method, and so is the optimizer that it belongs under:

    - `"gradient"` is the public code's. As λ → ∞, c → A, which is REINFORCE. An optimizer with a scale of its own for
      every parameter, such as AdamW, has to undo the factor λ.
    - `"natural"` is the damped natural gradient itself. As λ → ∞, c → A/λ. It belongs under plain SGD: where a
      layer's parameters are written as a·W, K is a² times as large, and the step changes the policy as before.

    As λ → 0, c → K⁻¹A in the natural scale, which is the undamped natural gradient.

    Args:
        gram: K, symmetric and positive semi-definite. It may be singular: identical sequences share their coefficient.
        advantages: A.
        damping: λ > 0, in the units of K (squared gradient).
        scale: `"gradient"` or `"natural"`.

    Returns:
        c, in at least single precision. In the units of A and never longer than A, or in those of A/K and never
        longer than A/λ.

    Raises:
        ValueError: a shape differs, an entry is not finite, λ is not positive, the scale is unknown, or a coefficient
            does not fit.

    Example:
        >>> import torch
        >>> ntk_coefficients(torch.ones(2, 2), torch.tensor([1.0, -1.0]), 1e-12)  # A is in the null space of K
        tensor([ 1., -1.])
        >>> ntk_coefficients(torch.eye(2), torch.tensor([1.0, -1.0]), 1.0, scale="natural")
        tensor([ 0.5000, -0.5000])
    """
    _check_gram(gram)
    checks.require_shape("advantages", advantages, "S", {"S": gram.shape[0]})
    checks.require_floating("advantages", advantages)
    checks.require_finite("advantages", advantages)
    checks.require_positive("damping", float(damping))
    checks.require_choice("scale", scale, NTK_SCALES)
    ratio = float(damping) / max(float(mean_eigenvalue(gram.double())), torch.finfo(torch.float64).tiny)
    solver = solve_ntk if is_above_rounding(ratio, gram) else solve_ntk_by_eigenvalues
    damping = torch.as_tensor(damping, dtype=torch.float64, device=gram.device)
    coefficients = solver(gram, advantages, damping)
    return coefficients if scale == "gradient" else require_fits("c/λ", over_scale(coefficients, damping))


def fisher_norms_by_columns(columns: Float[Tensor, "S P"]) -> Float[Tensor, "S"]:
    """`fisher_norms` of K = GGᵀ of few columns: √(g_sᵀ F̂ g_s) with F̂ = GᵀG/S, which is `(P, P)`."""
    unit = columns.abs().amax().double().clamp_min(torch.finfo(torch.float64).tiny)
    precise = columns.double() / unit
    fisher = precise.mT @ precise / len(precise)
    squares = ((precise @ fisher) * precise).sum(dim=1).clamp_min(0.0)  # rounding can leave -1e-17
    return in_precision_of(columns, unit.square() * squares.sqrt())


def mean_eigenvalue(gram: Float[Tensor, "S S"]) -> Float[Tensor, ""]:
    """tr K / S, the mean squared norm of the gradients. λ = ρ times (a moving average of) this."""
    return at_least_float32(gram).trace() / len(gram)


def participation_ratio(gram: Float[Tensor, "S S"]) -> Float[Tensor, ""]:
    """(tr K)²/‖K‖_F² = (Σ_i μ_i)²/Σ_i μ_i²: how many directions share the gradients, from the eigenvalues μ_i of K.

    The participation ratio of the eigenvalues, without finding them: r if r of them are equal and the others 0. It says
    what a damping ρ is worth: λ = ρ·tr K/S is small beside the few eigenvalues that hold the trace, however many
    sequences there are.

    Args:
        gram: K, symmetric and positive semi-definite.

    Returns:
        A number without units from 1 to the rank of K, in at least single precision; 0 for K = 0.

    Raises:
        ValueError: `gram` is not square or not finite.

    Example:
        >>> import torch
        >>> participation_ratio(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
        tensor(2.)
    """
    _check_gram(gram)
    largest = gram.double().abs().amax()
    shares = gram.double() / largest.clamp_min(torch.finfo(torch.float64).tiny)  # in these units no square underflows
    ratio = shares.trace().square() / shares.square().sum()
    return torch.where(largest == 0, 0.0, ratio).to(at_least_float32(gram).dtype)


def damping_share(gram: Float[Tensor, "S S"], damping: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    """λ/μ_max, with μ_max the largest eigenvalue of K: of the top direction share/(1 + share) is left by the damping.

    The same ρ has another share in every layer and task: it is ρ/S for a K of one direction, and ρ where all S are
    equal. A number without units, in at least single precision; infinite for K = 0.

    Raises:
        ValueError: `gram` is not square or not finite, or the damping λ is negative or not finite.

    Example:
        >>> import torch
        >>> damping_share(torch.diag(torch.tensor([4.0, 1.0])), 1.0)
        tensor(0.2500)
    """
    _check_gram(gram)
    checks.require_at_least("damping", float(damping), 0.0)
    largest = torch.linalg.eigvalsh(gram.double())[-1].clamp_min(0.0)  # rounding can leave -1e-17
    share = torch.as_tensor(damping, dtype=torch.float64, device=gram.device) / largest
    return torch.where(largest == 0, torch.inf, share).to(at_least_float32(gram).dtype)


def fisher_norms(gram: Float[Tensor, "S S"]) -> Float[Tensor, "S"]:
    """‖g_s‖_F = √((1/S) Σ_s' K_ss'²) = √(g_sᵀ F̂ g_s), with the sequence-level empirical Fisher F̂ = SᵀS/S.

    Raises:
        ValueError: `gram` is not square or not finite.
    """
    _check_gram(gram)
    return root_mean_square(gram)


def root_mean_square(gram: Float[Tensor, "S S"]) -> Float[Tensor, "S"]:
    """`fisher_norms` without the checks, which would make a GPU wait.

    No entry is squared as it is: K is a square of gradients already, and a fourth power leaves single precision for
    gradients below 1e-11 or above 1e9.
    """
    return euclidean_norm(gram, dim=1, mean=True)


def mean_of_squares(norms: Float[Tensor, "S"]) -> Float[Tensor, ""]:
    """m = mean of x², in double precision, since x = ‖g‖_F is itself a square of gradients."""
    return norms.double().square().mean()


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
    dtype = common_dtype((scores, fisher))
    smallest = torch.finfo(dtype).tiny
    longest = scores.abs().amax(dim=1).to(dtype)  # in these units no product leaves its range
    largest = fisher.abs().amax().to(dtype)
    directions = scores.to(dtype) / longest.clamp_min(smallest)[:, None]
    squares = ((directions @ (fisher.to(dtype) / largest.clamp_min(smallest))) * directions).sum(dim=1)
    return longest * largest.sqrt() * squares.clamp_min(0.0).sqrt()  # rounding can leave -1e-17 where the norm is zero


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
    if token_norms is None:
        return euclidean_norm(overlaps, dim=1, mean=True)
    checks.require_shape("token_norms", token_norms, "N", sizes)
    numerator, denominator = euclidean_norm(overlaps, dim=1), euclidean_norm(token_norms, dim=0)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


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
    norms = at_least_float32(norms)
    # √(ρm), and √(x² + ρm) as a hypotenuse: neither x² nor m has to fit the precision of x.
    floor = (strength * torch.as_tensor(mean_square, dtype=torch.float64, device=norms.device)).sqrt().to(norms.dtype)
    if not keep_small:
        return torch.hypot(norms, floor)
    # m = 0 means that every norm is zero: small gradients, which are to be left alone.
    return torch.where(floor == 0, torch.ones_like(norms), torch.hypot(norms / floor, torch.ones_like(norms)))


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

    Returns:
        c, in at least single precision.

    Raises:
        ValueError: shapes disagree, a norm is negative, an entry is not finite, or a coefficient does not fit.
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
        mean_square = norms.double().square().mean()
    coefficients = divide(advantages, regularized(norms, strength, mean_square, keep_small), power)
    return require_fits("advantages / norms ** power", coefficients)


def divide(advantages: Float[Tensor, "S"], norms: Float[Tensor, "S"], power: float) -> Float[Tensor, "S"]:
    """A/xᵖ, and 0 where x is 0. In double precision, where a power of a small norm is not 0."""
    factors = norms.double() ** power
    return in_precision_of(advantages, torch.where(factors == 0, 0.0, advantages.double() / factors))


def _check_gram(gram: Tensor) -> None:
    """A Gram matrix is square, not empty, floating and finite."""
    checks.require_shape("gram", gram, "S S")
    checks.require_not_empty("gram", gram)
    checks.require_floating("gram", gram)
    checks.require_finite("gram", gram)
