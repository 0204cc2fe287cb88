"""The natural gradient without damping, F⁺g, where F is singular by construction, as every softmax's is.

`natural_gradient.solve_singular` is the same function.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.precision import common_dtype, require_fits


def solve_singular(
    fisher: Float[Tensor, "P P"], gradient: Float[Tensor, "P"], cutoff: float | None = None
) -> Float[Tensor, "P"]:
    """Natural gradient F⁺g without damping: of all solutions of F x = g the shortest.

    A pseudo-inverse has to say which eigenvalues are 0 and which only small. In F itself no number tells them apart:
    a rare action's eigenvalue is as small as its probability. Here F is scaled to a diagonal of ones first,
    D^−½ F D^−½ with D = diag F. A softmax then has eigenvalues of the order of 1 whatever its probabilities are, and
    rounding errors, with nothing in between. The solution is refined once and made orthogonal to the null space of F.

    Args:
        fisher: F, symmetric and positive semi-definite, `(P, P)`. A row whose diagonal entry is 0 must be all zeros.
        gradient: g, in the range of F, `(P,)`. Every policy gradient is.
        cutoff: eigenvalues of the scaled matrix below this share of the largest count as 0, and by this share the
            scaled g may lie outside the range. √ε of the coarser of the two dtypes when None: 1.5e-8 for float64.

    Returns:
        `(P,)`.

    Raises:
        ValueError: shapes disagree, a number is not finite, F is not symmetric or not positive semi-definite, g is
            not in the range of F, so that no x solves F x = g, or x does not fit its dtype.

    Example:
        >>> import torch
        >>> from isopo_mini.policies import softmax_fisher
        >>> probs, advantages = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.1, -0.9]).double()
        >>> solve_singular(softmax_fisher(probs), probs * advantages)  # the advantages less their plain mean
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    sizes = checks.require_shape("fisher", fisher, "P P")
    checks.require_numbers("fisher", fisher)
    checks.require_vector("gradient", gradient, fisher, "fisher", sizes)
    checks.require_symmetric("fisher", fisher)
    if cutoff is None:
        cutoff = max(torch.finfo(fisher.dtype).eps, torch.finfo(gradient.dtype).eps) ** 0.5
    checks.require_positive("cutoff", cutoff)
    live = _rows_that_are_not_zero(fisher)
    matrix, target = fisher.double()[live][:, live], gradient.double()[live, None]
    root = matrix.diagonal().rsqrt()[:, None]  # D^−½
    eigenvalues, vectors = torch.linalg.eigh(root * matrix * root.mT)
    limit = cutoff * eigenvalues.abs().max().item() if len(eigenvalues) else 0.0
    if (eigenvalues < -limit).any():
        raise ValueError(
            "fisher: expected a positive semi-definite matrix, "
            f"got smallest eigenvalue {eigenvalues[0].item():g} when scaled to a diagonal of ones"
        )
    kept = eigenvalues > limit
    basis = vectors[:, kept] / eigenvalues[kept].sqrt()

    def solved(columns: Tensor) -> Tensor:
        """D^−½ (D^−½ F D^−½)⁺ D^−½, applied."""
        return root * (basis @ (basis.mT @ (root * columns)))

    x, null = solved(target), root * vectors[:, ~kept]
    # An eigenvector is right in proportion to its largest entry. What is left over is right entry by entry.
    x, null = x + solved(target - matrix @ x), null - solved(matrix @ null)
    outside = (root * (target - matrix @ x)).norm() / (root * target).norm().clamp_min(torch.finfo(root.dtype).tiny)
    if outside > cutoff or gradient[~live].any():
        raise ValueError(
            "gradient: expected a vector in the range of fisher, so that F x = gradient has a solution, got one of "
            f"which the share {outside.item():.1e} is outside (scaled by diag fisher), "
            f"and {int(gradient[~live].count_nonzero())} entries belong to rows of zeros"
        )
    orthonormal, _ = torch.linalg.qr(null)
    shortest = x - orthonormal @ (orthonormal.mT @ x)
    x = torch.zeros_like(gradient, dtype=torch.float64).masked_scatter(live, shortest[:, 0])
    return require_fits("fisher⁺ gradient", x.to(common_dtype((fisher, gradient))))


def _rows_that_are_not_zero(fisher: Tensor) -> Tensor:
    """Where diag F > 0, `(P,)`; where it is 0, the whole row of a positive semi-definite matrix is."""
    diagonal = fisher.diagonal()
    live = diagonal > 0
    if (diagonal < 0).any() or fisher[~live].any():
        raise ValueError(
            "fisher: expected a positive semi-definite matrix, got a diagonal entry "
            f"{diagonal.min().item():g} in a row that is not zero"
        )
    return live
