"""The exercises of the chapters on real models, many machines and what came next."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from isopo_mini.exercises.exercise import Exercise, normal, solve_damped

# -- Chapter 20: gradients of packed sequences -------------------------------------------------------------------------


def _by_membership(x: Tensor, y: Tensor, segments: Tensor, num_sequences: int) -> Tensor:
    members = one_hot(segments, num_sequences).to(x)
    return torch.einsum("ns,no,ni->soi", members, y, x)


def _rows() -> list[tuple[Tensor, Tensor, Tensor, int]]:
    draw = normal(0)
    inputs, outputs = draw(6, 2), draw(6, 3)
    in_order, mixed = torch.tensor([0, 0, 1, 1, 1, 3]), torch.tensor([1, 0, 1, 0, 1, 1])
    return [(inputs, outputs, in_order, 4), (inputs, outputs, mixed, 2)]  # sequence 2 is empty


def _mean_of_positions(x: Tensor, y: Tensor, segments: Tensor, num_sequences: int) -> Tensor:
    lengths = segments.bincount(minlength=num_sequences).clamp(min=1)
    return _by_membership(x, y, segments, num_sequences) / lengths[:, None, None]


def _outer_product_of_sums(x: Tensor, y: Tensor, segments: Tensor, num_sequences: int) -> Tensor:
    members = one_hot(segments, num_sequences).to(x)
    return torch.einsum("so,si->soi", members.T @ y, members.T @ x)


PACKED_GRADIENTS = Exercise(
    _by_membership,
    _rows,
    {
        "Each gradient is transposed: x stands where the output gradient belongs. A weight is (o, i).": (
            lambda x, y, segments, S: _by_membership(y, x, segments, S)
        ),
        "This is the mean over a sequence's positions. Its gradient is their sum.": _mean_of_positions,
        "This is the outer product of two sums. It must be the sum of outer products.": _outer_product_of_sums,
        "The positions of a sequence are taken to stand together. Read `segments` position by position.": (
            lambda x, y, segments, S: _by_membership(x, y, segments.sort().values, S)
        ),
        "Every sequence gets the gradient of all of them.": (lambda x, y, segments, S: (y.T @ x).expand(S, -1, -1)),
    },
)

# -- Chapter 21: what a rank adds to the step --------------------------------------------------------------------------


def _by_woodbury(
    x: Tensor, y: Tensor, rows: Tensor, advantages: Tensor, sizes: list[int], rank: int, rho: float
) -> Tensor:
    """c = (A - Ĝ (ĜᵀĜ + λI)⁻¹ ĜᵀA) / λ, in the space of the sketches, and a loop over the rank's own sequences."""
    damping = rho * rows.square().sum().item() / len(rows)
    c = (advantages - rows @ solve_damped(rows.T @ rows, rows.T @ advantages, damping)) / damping
    own = c.split(sizes)[rank].tolist()
    return len(sizes) * sum((c_s * y_s.T @ x_s for c_s, x_s, y_s in zip(own, x, y, strict=True)), torch.tensor(0.0))


def _shares() -> list[tuple[Tensor, Tensor, Tensor, Tensor, list[int], int, float]]:
    draw, cases = normal(0), []
    for sizes, rank in (([3, 3, 3], 0), ([2, 4], 1), ([1, 3, 2, 2], 2)):
        S, own = sum(sizes), sizes[rank]
        cases.append((draw(own, 3, 4), draw(own, 3, 2), draw(S, 5), draw(S), sizes, rank, 0.5))
    return cases


def _solved(rows: Tensor, advantages: Tensor, rho: float) -> Tensor:
    K = rows @ rows.T
    return solve_damped(K, advantages, rho * K.trace().item() / len(K))


def _with(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rank's part of the step, from coefficients that are made of the gathered ones, the sizes and the rank."""

    def step(x: Tensor, y: Tensor, rows: Tensor, advantages: Tensor, sizes: list[int], rank: int, rho: float) -> Tensor:
        c = own(_solved(rows, advantages, rho), sizes, rank)
        return len(sizes) * torch.einsum("s,sto,sti->oi", c, y, x)

    return step


def _alone(x: Tensor, y: Tensor, rows: Tensor, advantages: Tensor, sizes: list[int], rank: int, rho: float) -> Tensor:
    """With a Gram matrix of the rank's own sequences."""
    c = _solved(rows.split(sizes)[rank], advantages.split(sizes)[rank], rho)
    return len(sizes) * torch.einsum("s,sto,sti->oi", c, y, x)


RANK_STEP = Exercise(
    _by_woodbury,
    _shares,
    {
        "The coefficients are those that stand first. Take those of this rank's own sequences.": (
            _with(lambda c, sizes, rank: c[: sizes[rank]])
        ),
        "This takes all ranks to have as many sequences as this one. Add up the sizes of those before it.": (
            _with(lambda c, sizes, rank: c.roll(-rank * sizes[rank])[: sizes[rank]])
        ),
        "DDP takes the mean over the ranks: a sum needs a factor R, the number of ranks.": (
            _with(lambda c, sizes, rank: c.split(sizes)[rank] / len(sizes))
        ),
        "This is the step with a Gram matrix for each rank. The solve is over the gathered sketches of all.": _alone,
        "The advantages weigh the gradients: c, the solution of (2), is not used.": (
            lambda x, y, rows, A, sizes, rank, rho: (
                len(sizes) * torch.einsum("s,sto,sti->oi", A.split(sizes)[rank], y, x)
            )
        ),
    },
)

# -- Chapter 22: what the next microbatch cannot notice ----------------------------------------------------------------


def _by_least_squares(v: Tensor, G: Tensor) -> Tensor:
    """The residual of v after the rows of G have explained what they can."""
    return v - G.T @ torch.linalg.lstsq(G.T, v[:, None], driver="gelsd").solution[:, 0]


def _scores() -> list[tuple[Tensor, Tensor]]:
    draw = normal(0)
    vector, rows = draw(6), draw(3, 6)
    return [(vector, rows), (vector, torch.cat([rows, rows[:1]])), (rows[0] + vector, rows[:1])]


PROJECTED_OFF = Exercise(
    _by_least_squares,
    _scores,
    {
        "This is the part in the span. What is asked for is the rest.": (lambda v, G: v - _by_least_squares(v, G)),
        "The rows are taken to be orthogonal. Their Gram matrix has to be inverted.": (
            lambda v, G: v - G.T @ ((G @ v) / G.square().sum(dim=1))
        ),
        "The rows are projected off one after the other, once: what the first leaves, the second brings back.": (
            lambda v, G: _one_after_the_other(v, G)
        ),
        "A damping is left in: the part in the span is shortened, not removed.": (
            lambda v, G: v - G.T @ solve_damped(G @ G.T, G @ v, 1.0)
        ),
    },
)


def _one_after_the_other(v: Tensor, G: Tensor) -> Tensor:
    for row in G:
        v = v - row * (row @ v) / (row @ row)
    return v


EXERCISES = {"packed_gradients": PACKED_GRADIENTS, "rank_step": RANK_STEP, "projected_off": PROJECTED_OFF}
