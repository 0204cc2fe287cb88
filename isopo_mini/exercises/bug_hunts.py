"""Bug hunts in which the reader writes the test: it must pass what is right, and nothing that is broken."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from isopo_mini.exercises.exercise import Exercise, Function, normal, solve_damped
from isopo_mini.tasks import LinearQuadratic

NOTHING = "Nothing is refused, although {broken} of the {all} programs are broken. "
EVERYTHING = "Everything is refused, although {right} of the {all} programs are right. "


def hunt(
    right: Sequence[Function],
    broken: Sequence[Function],
    blind: str,
    strict: str,
    mistakes: Mapping[str, Function] | None = None,
) -> Exercise:
    """An exercise whose cases are programs, and whose answer is whether each is right.

    Args:
        right: programs that are.
        broken: programs that are not.
        blind: what to say of a test that refuses nothing.
        strict: what to say of a test that refuses everything.
        mistakes: from more hints to the tests that they are about.
    """
    programs = [*broken[:1], *right[:1], *broken[1:], *right[1:]]
    counts = {"broken": len(broken), "right": len(right), "all": len(programs)}
    known = {
        NOTHING.format(**counts) + blind: lambda program: True,
        EVERYTHING.format(**counts) + strict: lambda program: False,
        **(mistakes or {}),
    }
    return Exercise(lambda program: program in right, lambda: [(program,) for program in programs], known)


# -- Chapter 3: the dual solve -----------------------------------------------------------------------------------------


def _dual(inside: bool, outside: bool) -> Function:
    """The solve through the Gram matrix, with its two factors 1/N or without."""

    def program(S: Tensor, A: Tensor, damping: float) -> Tensor:
        N = len(S)
        K = S @ S.T / N if inside else S @ S.T
        return S.T @ solve_damped(K, A / N if outside else A, damping)

    return program


def _primal(S: Tensor, A: Tensor, damping: float) -> Tensor:
    return solve_damped(S.T @ S / len(S), S.T @ A / len(S), damping)


def _passes_with(damping: float) -> Function:
    def test(program: Function) -> bool:
        draw = normal(0)
        case = draw(6, 9), draw(6), damping
        return torch.allclose(program(*case), _primal(*case), rtol=1e-4)

    return test


def _only_the_direction(program: Function) -> bool:
    draw = normal(0)
    case = draw(6, 9), draw(6), 0.1
    return torch.cosine_similarity(program(*case), _primal(*case), dim=0).item() > 1 - 1e-6


DUAL_IS_RIGHT = hunt(
    [_dual(True, True), _primal],
    [_dual(False, False), _dual(True, False), _dual(False, True)],
    "With a single sample there is no 1/N to forget.",
    "Compare with the solve in the parameters, at the same damping, up to rounding.",
    mistakes={
        "One broken program passes: with a tiny damping, a 1/N that is missing twice cancels.": _passes_with(1e-9),
        "One broken program passes: it is N times too long, and only the direction is compared.": _only_the_direction,
    },
)

# -- Chapter 6: the damping of the coefficients ------------------------------------------------------------------------


def _damped_by(scale: Callable[[Tensor], Tensor]) -> Function:
    def program(gram: Tensor, advantages: Tensor, rho: float) -> Tensor:
        damping = rho * scale(gram).item()
        return damping * solve_damped(gram, advantages, damping)

    return program


def _by_eigenvalues(gram: Tensor, advantages: Tensor, rho: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    damping = rho * values.mean()
    return vectors @ (damping / (values + damping) * (vectors.T @ advantages))


def _passes_on(gram: Tensor) -> Function:
    return lambda program: torch.allclose(
        program(gram, normal(0)(4), 1.0), _by_eigenvalues(gram, normal(0)(4), 1.0), atol=1e-6
    )


COEFFICIENTS_ARE_RIGHT = hunt(
    [_damped_by(lambda K: K.trace() / len(K)), _by_eigenvalues],
    [_damped_by(torch.mean), _damped_by(lambda K: torch.linalg.matrix_norm(K, 2)), _damped_by(torch.trace)],
    "For a large ρ each is REINFORCE, and none minds a scaling of K.",
    "With λ = ρ tr K / S, (K + λI) c must be λA, up to rounding.",
    mistakes={
        "The mean of all entries passes: with equal gradients it is the mean eigenvalue.": (
            _passes_on(torch.ones(4, 4, dtype=torch.float64))
        ),
        "The largest eigenvalue passes: with K = I all of them are equal.": (
            _passes_on(torch.eye(4, dtype=torch.float64))
        ),
    },
)

# -- Chapter 11: advantages of groups ----------------------------------------------------------------------------------


def _standardised(groups: Tensor, dim: int) -> Tensor:
    return (groups - groups.mean(dim, keepdim=True)) / (groups.std(dim, keepdim=True) + 1e-4)


def _one_group_at_a_time(rewards: Tensor, group_size: int) -> Tensor:
    return torch.cat([_standardised(group, 0) for group in rewards.split(group_size)])


def _only_the_means(program: Function) -> bool:
    advantages = program(normal(0)(12).abs(), 4).view(3, 4)
    return bool((advantages.mean(1).abs() < 1e-6).all())


ADVANTAGES_ARE_RIGHT = hunt(
    [lambda rewards, size: _standardised(rewards.view(-1, size), 1).flatten(), _one_group_at_a_time],
    [
        lambda rewards, size: _standardised(rewards.view(size, -1), 0).flatten(),
        lambda rewards, size: _standardised(rewards, 0),
        lambda rewards, size: (rewards.view(-1, size) - rewards.view(-1, size).mean(1, keepdim=True)).flatten(),
    ],
    "A batch of one group cannot tell, nor can the mean over the batch.",
    "The standard deviation of a group has 1e-4 added, so leave that much room.",
    mistakes={
        "The program that does not divide passes: look at more than the mean of each group.": _only_the_means,
    },
)

# -- Chapter 18: the cost of a gain ------------------------------------------------------------------------------------


def _summed(transposed: bool, paid: bool) -> Function:
    """tr(P Σ), P = Σ_k (A_Kᵀ)ᵏ (Q + KᵀRK) A_Kᵏ, term by term."""

    def program(s: LinearQuadratic, K: Tensor) -> Tensor:
        M, KC = s.closed_loop(K), K.double() @ s.C
        M = M.T if transposed else M
        term = s.Q + KC.T @ s.R @ KC if paid else s.Q
        total = torch.zeros_like(s.Sigma)
        for _ in range(500):
            total, term = total + term, M.T @ term @ M
        return torch.trace(total @ s.Sigma)

    return program


def _cost(s: LinearQuadratic, K: Tensor) -> Tensor:
    return s.cost(K)


def _one_state(program: Function) -> bool:
    one = torch.ones(1, 1, dtype=torch.float64)
    system = LinearQuadratic(one, one, one, one, one)
    return torch.allclose(program(system, 0.5 * one), system.cost(0.5 * one))


def _no_control(program: Function) -> bool:
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    A = torch.tensor([[0.5, 0.4], [0.0, 0.6]], dtype=torch.float64)
    system = LinearQuadratic(A, eye[:, :1], torch.diag(torch.tensor([1.0, 2.0])).to(A), eye[:1, :1], eye)
    return torch.allclose(program(system, zero), system.cost(zero))


COST_IS_RIGHT = hunt(
    [_summed(False, True), _cost],
    [_summed(True, True), _summed(False, False)],
    "At K = 0, and with Q = Σ = I, neither the transpose nor the cost of the controls shows.",
    "A walk must pay for its controls too, and be long enough.",
    mistakes={
        "The transposed program passes: a single state is its own transpose.": _one_state,
        "The program whose controls are free passes: at K = 0 there are none.": _no_control,
    },
)

# -- Chapter 21: one Gram matrix for all ranks -------------------------------------------------------------------------


def _sketched(seed_of: Callable[[int], int], apart: bool = False) -> Function:
    """Gradients of each rank, (S_r, o, i), to the sketched Gram matrix of all."""

    def program(parts: list[Tensor]) -> Tensor:
        rows = []
        for rank, part in enumerate(parts):
            draw = normal(seed_of(rank))
            P, Q = draw(8, part.shape[1]) / 8**0.5, draw(8, part.shape[2]) / 8**0.5
            rows.append((P @ part.double() @ Q.T).flatten(1))
        if apart:
            return torch.block_diag(*(own @ own.T for own in rows))
        return torch.cat(rows) @ torch.cat(rows).T

    return program


def _of_equal_ranks(program: Function) -> Tensor:
    """K̂, (2, S, 2, S), when two ranks hold the same gradients."""
    part = normal(0)(3, 12, 10)
    return program([part, part]).view(2, 3, 2, 3)


def _only_within(program: Function) -> bool:
    K = _of_equal_ranks(program)
    return torch.allclose(K[0, :, 0], K[1, :, 1])


def _anything_between(program: Function) -> bool:
    return bool((_of_equal_ranks(program)[0, :, 1] != 0).all())


GRAM_IS_RIGHT = hunt(
    [_sketched(lambda rank: 0), _sketched(lambda rank: 7)],
    [_sketched(lambda rank: rank), _sketched(lambda rank: 0, apart=True)],
    "A sensible diagonal is not enough. What must stand between two ranks with equal gradients?",
    "A sketch is K in the mean, and not to the last digit.",
    mistakes={
        "The program without products between ranks passes: look beyond the blocks of each rank.": _only_within,
        "The program whose ranks draw apart passes: what stands between two ranks is there, but is it right?": (
            _anything_between
        ),
    },
)

EXERCISES = {
    "dual_is_right": DUAL_IS_RIGHT,
    "coefficients_are_right": COEFFICIENTS_ARE_RIGHT,
    "advantages_are_right": ADVANTAGES_ARE_RIGHT,
    "cost_is_right": COST_IS_RIGHT,
    "gram_is_right": GRAM_IS_RIGHT,
}
