"""c = λ(K + λI)⁻¹A, solved five ways, without the checks of `isopo.ntk_coefficients`, which would make a GPU wait.

The three that take K take several at once, each with its own λ: the blocks of a block-diagonal K.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini.precision import at_least_float32

# From how many sequences on a factor in single precision is faster than one in double, and how far it may be off.
MANY, SINGLE_ERROR = 128, 1e-4
# Iterations of `solve_ntk_by_products` for every (S/ρ)^⅓: they leave c off by less than 1 % of its length (sketches of
# three tasks, S = 256 and 1,024, ρ from 0.1 to 10), and 1.25 by up to 6 %. What c has in the null space of K makes it
# long and moves nothing, so that of a layer's step several times that share may be off.
ITERATIONS = 2.0
MOST_TRACE = 1e15  # any more asks for more iterations than ever pay


def solver_for(ratio: float, gram: Float[Tensor, "S S"]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Which of `solve_ntk`, `solve_ntk_in_single` and `solve_ntk_by_eigenvalues` to take for λ = ratio · tr K/S."""
    if not is_above_rounding(ratio, gram):
        return solve_ntk_by_eigenvalues
    return solve_ntk_in_single if single_precision_suffices(ratio, gram) else solve_ntk


def single_precision_suffices(ratio: float, gram: Float[Tensor, "S _"]) -> bool:
    """Whether single precision saves time for λ = ratio · tr K/S and loses no more than `SINGLE_ERROR` of c.

    I + K/λ has eigenvalues from 1 to at most 1 + S/ratio, since none of K is above its trace.
    """
    condition = 1.0 + len(gram) / ratio
    accurate = gram.dtype == torch.float32 and condition * torch.finfo(torch.float32).eps < SINGLE_ERROR
    return accurate and len(gram) >= MANY


def is_above_rounding(ratio: float, gram: Float[Tensor, "S _"]) -> bool:
    """Whether `solve_ntk` can be trusted with λ = ratio · tr K/S, for a K, or columns of gradients, of this precision.

    λ has to be larger than the rounding errors of K, S·ε·tr K/S, or K + λI need not be invertible; and larger than √ε
    of double precision, or the solve loses more than half of its digits. It is asked of the ratio, which a transform
    knows, and not of λ, for which a GPU would have to be waited for.
    """
    return ratio > max(len(gram) * torch.finfo(gram.dtype).eps, torch.finfo(torch.float64).eps ** 0.5)


def solve_ntk(
    gram: Float[Tensor, "*B S S"], advantages: Float[Tensor, "*B S"], damping: Float[Tensor, "*B"]
) -> Float[Tensor, "*B S"]:
    """`ntk_coefficients` without the checks, which would make a GPU wait; λ = 0 stands for a layer without gradient.

    For a λ that `is_above_rounding`. Solved as (K/λ + I) c = A: the smallest eigenvalue is then 1 whatever the scale of
    K, and a layer whose gradients all vanish (K = 0, λ = 0) keeps c = A. In double precision, which costs next to
    nothing for few sequences: what is left is the rounding of K itself. A Cholesky factor would need half the
    multiplications, but one call is faster than three.
    """
    smallest = torch.finfo(torch.float64).tiny
    identity = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    system = torch.addcdiv(identity, gram.double(), damping.double().clamp_min(smallest)[..., None, None])
    return in_precision_of(advantages, torch.linalg.solve_ex(system, advantages.double())[0])


def solve_ntk_in_single(
    gram: Float[Tensor, "*B S S"], advantages: Float[Tensor, "*B S"], damping: Float[Tensor, "*B"]
) -> Float[Tensor, "*B S"]:
    """`solve_ntk` by a Cholesky factor in single precision, for many sequences and a K that is no more precise itself.

    Where `single_precision_suffices`: c is off by no more than the rounding of K makes it anyway. It takes half of the
    time at S = 256.
    """
    dtype = torch.promote_types(gram.dtype, torch.float32)
    system = gram.to(dtype) / damping.to(dtype).clamp_min(torch.finfo(dtype).tiny)[..., None, None]
    system.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = torch.linalg.cholesky_ex(system)[0]
    return in_precision_of(advantages, torch.cholesky_solve(advantages.to(dtype)[..., None], factor)[..., 0])


def solve_ntk_by_eigenvalues(
    gram: Float[Tensor, "*B S S"], advantages: Float[Tensor, "*B S"], damping: Float[Tensor, "*B"]
) -> Float[Tensor, "*B S"]:
    """`solve_ntk` for a λ that is not above rounding, where K + λI may be singular or indefinite.

    c = Σ_i λ/(μ_i + λ) v_i v_iᵀA with the eigenvalues μ_i ≥ 0 of K: those below 0, or a rounding error above, are 0.
    So no part of A grows, and what lies in the null space of K stays as it is. Some ten times slower, and a GPU waits.
    """
    precise = gram.double()
    unit = precise.abs().amax(dim=(-2, -1)).clamp_min(torch.finfo(torch.float64).tiny)
    eigenvalues, vectors = torch.linalg.eigh(precise / unit[..., None, None])
    rounding = gram.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[..., -1:]
    eigenvalues = torch.where(eigenvalues > rounding, eigenvalues, 0.0)
    damping = (damping.double() / unit).clamp_min(torch.finfo(torch.float64).tiny)
    shares = damping[..., None] / (eigenvalues + damping[..., None])
    along = vectors.mT @ advantages.double()[..., None]
    return in_precision_of(advantages, (vectors @ (shares[..., None] * along))[..., 0])


def solve_ntk_by_columns(
    columns: Float[Tensor, "S P"], advantages: Float[Tensor, "S"], damping: Float[Tensor, ""], single: bool = False
) -> Float[Tensor, "S"]:
    """`solve_ntk` for K = GGᵀ of few columns: with Z = G/√λ, c = A − Z(I + ZᵀZ)⁻¹ZᵀA, a system of P equations.

    For a λ that `is_above_rounding`; λ = 0 stands for a layer without gradient. In double precision, or in that of the
    columns if `single`.
    """
    precise = columns if single else columns.double()
    scaled = precise * damping.to(precise.dtype).clamp_min(torch.finfo(precise.dtype).tiny).rsqrt()
    target = advantages.to(precise.dtype)
    system = scaled.mT @ scaled
    system.diagonal().add_(1.0)
    weights = torch.linalg.solve_ex(system, scaled.mT @ target)[0]
    return in_precision_of(advantages, target - scaled @ weights)


def iterations_for(ratio: float, sequences: int) -> int:
    """How many iterations `solve_ntk_by_products` takes for λ = ratio · tr K/S: some (S/ratio)^⅓.

    K/λ has trace T = S/ratio, so at most T/t of its eigenvalues are larger than t. Conjugate gradients need an
    iteration for each of these, and about √t for all others together; t = T^⅔ makes both T^⅓. A number that is known
    before the first product makes no GPU wait. Where λ comes from a history of smaller gradients, T is larger than that
    and c less close.
    """
    return math.ceil(ITERATIONS * min(sequences / ratio, MOST_TRACE) ** (1 / 3))


def solve_ntk_by_products(
    rows: Float[Tensor, "S P"], advantages: Float[Tensor, "S"], damping: Float[Tensor, ""], iterations: int
) -> Float[Tensor, "S"]:
    """About `solve_ntk` for K = GGᵀ, which is not formed: conjugate gradients, each by a product with G and with Gᵀ.

    They start from c = 0, for the matrix I + GGᵀ/λ. λ = 0 stands for a layer without gradient, and c = A. In the
    precision of the rows, or in single if that is half. (`natural_gradient.solve_cg` takes as many iterations as a
    tolerance asks for, and a GPU is waited for in each.)

    Args:
        iterations: see `iterations_for`.
    """
    rows = at_least_float32(rows)
    tiny = torch.finfo(rows.dtype).tiny
    target = advantages.to(rows.dtype)
    unit = target.abs().amax().clamp_min(tiny)  # so that no square leaves the range of numbers
    residual = target / unit
    unscaled = torch.where(damping == 0, 0.0, damping.double().rsqrt()).to(rows.dtype)  # 1/√λ
    coefficients, direction, square = torch.zeros_like(residual), residual, residual @ residual
    for _ in range(iterations):
        product = torch.addmv(direction, rows, torch.mv(rows.mT, direction) * unscaled * unscaled)
        length = square / (direction @ product).clamp_min(tiny)  # once the residual is 0, so is all that follows
        coefficients = torch.addcmul(coefficients, direction, length)
        residual = torch.addcmul(residual, product, length, value=-1.0)
        before, square = square, residual @ residual
        direction = torch.addcmul(residual, direction, square / before.clamp_min(tiny))
    return in_precision_of(advantages, coefficients * unit)


def over_scale(coefficients: Float[Tensor, "*S"], scale: Float[Tensor, "..."]) -> Float[Tensor, "*S"]:
    """c divided by one number of the layer, or of each block; 0 where that is 0: the layer has no gradient then."""
    quotients = coefficients.double() / scale.double()
    return torch.where(scale == 0, 0.0, quotients).to(coefficients.dtype)


def in_precision_of(given: Tensor, computed: Tensor) -> Tensor:
    """What was computed, in the dtype of what was given, or in single precision if that is half."""
    return computed.to(torch.promote_types(given.dtype, torch.float32))
