"""The exercises of the chapters on neighbours of ISOPO."""

import math
from collections.abc import Callable

import numpy as np
import scipy  # its parts load themselves when they are used: they take half a second
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from isopo_mini.exercises.exercise import Exercise, normal
from isopo_mini.tasks import LinearQuadratic

Array = np.ndarray

# -- Chapter 13: when natural gradients arrive -------------------------------------------------------------------------


def _step_by_step(k: int, error: float, eta: float, gap: float) -> float:
    while error > 1e-40:
        error, k = error * math.exp(-eta * gap), k + 1
    return float(k)


def _arrival(k: int, error: float, rate: float) -> float:
    return k + math.ceil(math.log(error / 1e-40) / rate)


PREDICT = Exercise(
    _step_by_step,
    lambda: [(300, 7e-21, 2.0, 0.07), (60, 3e-21, 8.0, 0.09), (1000, 9.9e-21, 2.0, 0.051)],
    {
        "The step size η is missing: e_k falls by exp(-ηΔ) an iteration.": (
            lambda k, error, eta, gap: _arrival(k, error, gap)
        ),
        "This counts from the given iteration k on. Add k.": lambda k, error, eta, gap: _arrival(0, error, eta * gap),
        "The logarithm is to base 10, the rate is one of base e.": (
            lambda k, error, eta, gap: k + math.ceil(math.log10(error / 1e-40) / (eta * gap))
        ),
        "This is where the error is 10⁻²⁰ times smaller than 1: start from the error that is given.": (
            lambda k, error, eta, gap: _arrival(k, 1.0, eta * gap)
        ),
    },
    atol=1.0,  # one iteration, as for rounding up or not
)

# -- Chapter 15: a bug in GPOMDP, and a bandit on which the rank-one step is wrong -------------------------------------


def _chain() -> tuple[Array, Array, Array]:
    """ν⊤∇P, P and r of a chain of four states, with one parameter."""
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(4), size=4)
    slope = rng.normal(size=(4, 4))
    slope -= slope.mean(axis=1, keepdims=True)  # rows of P sum to 1
    nu = np.linalg.matrix_power(P, 200)[0]
    return nu @ slope, P, rng.normal(size=4)


def _limit(beta: float) -> Array:
    """Equation (2) of the chapter, left."""
    start, P, r = _chain()
    return np.atleast_1d(start @ np.linalg.solve(np.eye(4) - beta * P, r))


def _summed_without_the_first(limit: Callable[[float], Array], beta: float) -> Array:
    """Σ_{k ≥ 1} β^(k-1) ν⊤∇P Pᵏ r: the trace comes one reward late."""
    law, P, r = _chain()
    total = 0.0
    for k in range(2000):
        law = law @ P
        total += beta**k * (law @ r)
    return np.atleast_1d(total)


SWAPPED_LIMIT = Exercise(
    _summed_without_the_first,
    lambda: [(_limit, 0.5), (_limit, 0.9)],
    {
        "This is the right program's limit. The trace of the wrong one lacks the score of the reward's own step.": (
            lambda limit, beta: limit(beta)
        ),
        "The first reward is missed, as it must be. But the others are discounted one time less than here.": (
            lambda limit, beta: limit(beta) - limit(0.0)
        ),
        "The others count 1/β more, as they must. But the first reward is still there.": (
            lambda limit, beta: limit(beta) / beta
        ),
        "All is shifted by a step in the wrong direction.": lambda limit, beta: beta * limit(beta),
    },
)

RIGHT, LONGER, NOT_POSITIVE = "J falls", "not four arms", "a probability is not positive"


def _what_the_rank_one_step_does(found: tuple[ArrayLike, ArrayLike]) -> str:
    """Whether the expected rank-one step, λ = 10⁻³, lowers J on this bandit."""
    pi, r = (np.asarray(values, dtype=float) for values in found)
    if pi.shape != (4,) or r.shape != (4,):
        return LONGER
    if (pi <= 0).any():
        return NOT_POSITIVE
    pi = pi / pi.sum()
    scores, advantages = np.eye(4) - pi, r - pi @ r
    step = (pi * advantages / (1e-3 + (scores**2).sum(axis=1))) @ scores
    along = step @ (pi * advantages)
    return RIGHT if along < 0 else "J does not fall" if along == 0 else "J rises"


def _a_bandit() -> tuple[Array, Array]:
    """Found by a search, not by the argument of the solution."""
    pi = np.array([0.9780, 0.0217, 0.00015, 0.00015])
    return pi, np.array([-0.0076, -1.0, 98.0, 98.0])


DESCENT = Exercise(
    _a_bandit,
    lambda: [()],
    {
        "A bandit on which the step is right. See below Table 10: a frequent arm a little below the mean turns it.": (
            lambda: ([0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0])
        ),
        "Every arm needs a positive probability: an arm that is never pulled takes no part.": (
            lambda: ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0])
        ),
        "Give four probabilities and four rewards.": lambda: ([0.5, 0.5], [1.0, 0.0]),
        "All arms pay the same: there is no step at all.": lambda: ([0.25] * 4, [1.0] * 4),
    },
    measure=_what_the_rank_one_step_does,
)

# -- Chapter 16: a mirror step -----------------------------------------------------------------------------------------


def _roots(theta: Tensor, u: Tensor, lam: float) -> Tensor:
    """Root of λu + ∇ψ(x) − ∇ψ(θ), one coordinate at a time."""
    found = []
    for y in (torch.sinh(theta) - lam * u).tolist():
        found.append(scipy.optimize.root_scalar(lambda x, y=y: np.sinh(x) - y, bracket=(-50, 50)).root)
    return torch.tensor(found, dtype=torch.float64)


COSH_STEP = Exercise(
    _roots,
    lambda: [(*pair, lam) for pair, lam in zip(normal(0)(3, 2, 4), (0.1, 1.0, 10.0), strict=True)],
    {
        "This step goes along u; equation (2) goes against it.": (
            lambda theta, u, lam: torch.arcsinh(torch.sinh(theta) + lam * u)
        ),
        "This is the gradient step: ψ has no effect on it.": lambda theta, u, lam: theta - lam * u,
        "This is the step in the mirror, ∇ψ(θ) - λu. The way back, the inverse of ∇ψ, is missing.": (
            lambda theta, u, lam: torch.sinh(theta) - lam * u
        ),
        "This divides by ψ'' at θ, which agrees for small λ only.": (
            lambda theta, u, lam: theta - lam * u / torch.cosh(theta)
        ),
        "∇ψ is sinh, and its inverse arcsinh. Here ψ itself is inverted.": (
            lambda theta, u, lam: torch.arccosh(torch.cosh(theta) - lam * u)
        ),
    },
)

# -- Chapter 17: the best constant baseline ----------------------------------------------------------------------------


def _least_variance(p: Array, R: Array, scores: Array) -> float:
    """By a search for the least trace of the covariance."""

    def variance(b: float) -> float:
        rows = (R - b)[:, None] * scores
        return p @ (rows**2).sum(1) - ((p @ rows) ** 2).sum()

    return float(scipy.optimize.minimize_scalar(variance, tol=1e-10).x)


def _laws() -> list[tuple[Array, Array, Array]]:
    rng = np.random.default_rng(0)
    cases = []
    for law in (np.array([0.9, 0.05, 0.04, 0.01]), rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(6))):
        cases.append((law, rng.normal(size=len(law)), np.eye(len(law)) - law))
    return cases


BEST_BASELINE = Exercise(
    _least_variance,
    _laws,
    {
        "This is the mean reward. It is best only where all scores are equally long.": lambda p, R, scores: p @ R,
        "The rewards are weighted by squared lengths, but not by their probabilities.": (
            lambda p, R, scores: (scores**2).sum(1) @ R / (scores**2).sum()
        ),
        "The weights have the lengths of the scores. They must have their squares.": (
            lambda p, R, scores: (p * np.linalg.norm(scores, axis=1)) @ R / (p @ np.linalg.norm(scores, axis=1))
        ),
        "The weights are not divided by their sum.": lambda p, R, scores: (p * (scores**2).sum(1)) @ R,
    },
)

# -- Chapter 18: policy iteration --------------------------------------------------------------------------------------


def _half_a_gauss_newton_step(s: LinearQuadratic, K: Tensor) -> Tensor:
    return K - s.gauss_newton(K) / 2


def _systems() -> list[tuple[LinearQuadratic, Tensor]]:
    eye, cases = torch.eye(4, dtype=torch.float64), []
    for seed in range(3):
        draw = normal(seed)
        A, B = draw(4, 4), draw(4, 2)
        A = 0.9 * A / torch.linalg.eigvals(A).abs().max()
        system = LinearQuadratic(A, B, eye, torch.diag(torch.tensor([1.0, 2.0])).double(), eye)
        cases.append((system, torch.full((2, 4), 0.005, dtype=torch.float64)))
    return cases


def _greedy(s: LinearQuadratic, P: Tensor, R: Tensor | None = None, A: Tensor | None = None) -> Tensor:
    R, A = s.R if R is None else R, s.A if A is None else A
    return torch.linalg.solve(R + s.B.T @ P @ s.B, s.B.T @ P @ A)


POLICY_ITERATION = Exercise(
    _half_a_gauss_newton_step,
    _systems,
    {
        "The cost of the control, R, is missing in what is solved.": (
            lambda s, K: _greedy(s, s.value_matrix(K), R=torch.zeros_like(s.R))
        ),
        "The new gain is greedy from A, not from A - BK: what K did is over.": (
            lambda s, K: _greedy(s, s.value_matrix(K), A=s.closed_loop(K))
        ),
        "This is greedy for the next cost alone: Q stands in the place of P.": lambda s, K: _greedy(s, s.Q),
        "The sign: a control is -K x.": lambda s, K: -_greedy(s, s.value_matrix(K)),
    },
)

# -- Chapter 19: how fast the extrapolated recursion falls -------------------------------------------------------------


def _by_eigenvalues(sigma: float) -> float:
    """Of the map of (δ, ε, ε before), with u = σ, v = 1."""
    delta = np.array([1.0, 2 * sigma, -sigma])
    matrix = np.array([delta, [0.0, 1.0, 0.0] - delta, [0.0, 1.0, 0.0]])
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _real_root(sigma: float, sign: int) -> float:
    return sigma - 1 + sign * math.sqrt(abs(sigma**2 - sigma))


MODULUS = Exercise(
    _by_eigenvalues,
    lambda: [(0.1,), (0.7,), (1.2,), (4 / 3,), (1.5,)],
    {
        "This holds for complex roots, σ < 1. Beyond, the roots are real and no longer of one size.": (
            lambda sigma: math.sqrt(abs(1 - sigma))
        ),
        "This is the modulus without extrapolation, which is 1 or more.": (
            lambda sigma: abs(complex(1 - sigma / 2, math.sqrt(abs(sigma - sigma**2 / 4))))
        ),
        "For σ > 1 this is the smaller of the two real roots.": (
            lambda sigma: math.sqrt(1 - sigma) if sigma < 1 else _real_root(sigma, -1)
        ),
        "For σ < 1 this is the real part of the roots, or the square of their modulus.": (
            lambda sigma: 1 - sigma if sigma < 1 else _real_root(sigma, 1)
        ),
        "For σ < 1 the roots are complex: their modulus is not the formula of the real ones.": (
            lambda sigma: abs(_real_root(sigma, 1))
        ),
    },
)

EXERCISES = {
    "predict": PREDICT,
    "swapped_limit": SWAPPED_LIMIT,
    "descent": DESCENT,
    "cosh_step": COSH_STEP,
    "best_baseline": BEST_BASELINE,
    "policy_iteration": POLICY_ITERATION,
    "modulus": MODULUS,
}
