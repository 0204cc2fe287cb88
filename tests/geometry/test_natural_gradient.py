"""Four solvers against one another and against plain inversion; and what they do on the two-armed bandit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.geometry import fisher
from isopo_mini.geometry.natural_gradient import Convergence, solve, solve_cg, solve_dual, solve_rank_one
from isopo_mini.policies import MLP, TabularSoftmax
from isopo_mini.tasks import Bandit


def spread_matrix(size: int, smallest: float = 1e-3) -> Tensor:
    """Symmetric, with eigenvalues spread evenly on a log scale from `smallest` to 1."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    matrix = basis * torch.logspace(math.log10(smallest), 0, size, dtype=torch.float64) @ basis.T
    return (matrix + matrix.T) / 2


def inverted(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    """(F + λI)⁻¹ g, literally."""
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)) @ vector


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_solve_is_the_inverse(damping: float) -> None:
    matrix, gradient = spread_matrix(8), torch.randn(8, dtype=torch.float64)
    # The condition number is at most 1e3, so 1e-16 · 1e3 with room to spare.
    assert relative_error(solve(matrix, gradient, damping), inverted(matrix, gradient, damping)) < 1e-12


@settings(max_examples=20, deadline=None)
@given(
    samples=st.integers(1, 9),
    parameters=st.integers(1, 9),
    damping=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_dual_is_the_inverse(samples: int, parameters: int, damping: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, parameters, generator=generator, dtype=torch.float64)
    advantages = torch.randn(samples, generator=generator, dtype=torch.float64)
    expected = inverted(scores.T @ scores / samples, scores.T @ advantages / samples, damping)
    torch.testing.assert_close(solve_dual(scores, advantages, damping), expected, rtol=1e-8, atol=1e-10)


def test_dense_dual_and_cg_agree_on_a_network() -> None:
    """The claim of chapter 3, in both regimes: more parameters than samples, and fewer."""
    policy = MLP(3, 4, hidden=(4,)).double()  # 36 parameters
    for samples in (5, 200):
        observations = torch.randn(samples, 3, dtype=torch.float64)
        actions, _ = policy.sample_actions(observations)
        advantages = torch.randn(samples, dtype=torch.float64)
        scores = fisher.score_matrix(policy, observations, actions)
        gradient = scores.T @ advantages / samples
        dense = solve(fisher.empirical_fisher(scores), gradient, 1e-3)
        dual = solve_dual(scores, advantages, 1e-3)
        cg, convergence = solve_cg(
            lambda v, scores=scores: scores.T @ (scores @ v) / len(scores), gradient, 1e-3, 200, 1e-12
        )
        assert convergence.converged
        assert relative_error(dual, dense) < 1e-8
        assert relative_error(cg, dense) < 1e-8


def test_cg_with_fisher_vector_products_is_the_dense_solve() -> None:
    policy, observations = MLP(3, 4, hidden=(4,)).double(), torch.randn(20, 3, dtype=torch.float64)
    gradient = torch.randn(36, dtype=torch.float64)
    cg, convergence = solve_cg(
        lambda v: fisher.fisher_vector_product(policy, observations, v), gradient, 1e-2, 200, 1e-12
    )
    assert convergence.converged
    assert relative_error(cg, solve(fisher.exact_fisher(policy, observations), gradient, 1e-2)) < 1e-8


def test_cg_needs_one_iteration_per_different_eigenvalue() -> None:
    eigenvalues = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 20.0], dtype=torch.float64)
    _, convergence = solve_cg(lambda v: eigenvalues * v, torch.ones(6, dtype=torch.float64), 0.1, 50, 1e-10)
    assert convergence.iterations == 3
    assert convergence.converged


def test_cg_says_how_it_ended() -> None:
    matrix, gradient = spread_matrix(30, smallest=1e-6), torch.randn(30, dtype=torch.float64)
    x, convergence = solve_cg(lambda v: matrix @ v, gradient, 0.0, 5, 1e-10)
    assert convergence.iterations == 5
    assert not convergence.converged
    true_residual = ((gradient - matrix @ x).norm() / gradient.norm()).item()
    assert convergence.residual_norm == pytest.approx(true_residual, rel=1e-9)
    assert solve_cg(lambda v: matrix @ v, 0 * gradient, 0.0)[1] == Convergence(0, 0.0, True)


def test_cg_without_damping_on_a_singular_fisher_gives_the_shortest_solution() -> None:
    """The gradient of a tabular softmax lies in the range of its Fisher; CG started at 0 stays there."""
    bandit = Bandit(torch.tensor([1.0, 0.3, -0.2], dtype=torch.float64))
    policy = TabularSoftmax.from_probs(torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64))
    matrix, gradient = bandit.logit_fisher(policy), bandit.policy_gradient(policy)
    x, _ = solve_cg(lambda v: matrix @ v, gradient, 0.0, 10, 1e-10)
    torch.testing.assert_close(x, torch.linalg.pinv(matrix) @ gradient, rtol=1e-8, atol=0)
    # In closed form: the advantages, less their plain mean.
    advantages = bandit.advantages(policy)[0]
    torch.testing.assert_close(x, advantages - advantages.mean(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e3])
def test_rank_one_is_the_dense_solve(damping: float) -> None:
    score, vector = torch.randn(2, 7, dtype=torch.float64)
    dense = solve(torch.outer(score, score), vector, damping)
    assert relative_error(solve_rank_one(score, vector, damping), dense) < 1e-10
    # One sample: its own natural gradient, and the dual with N = 1.
    own = solve_rank_one(score, 3 * score, damping)
    torch.testing.assert_close(own, 3 * score / (damping + score @ score), rtol=1e-10, atol=0)
    torch.testing.assert_close(own, solve_dual(score[None], torch.tensor([3.0]).double(), damping), rtol=1e-10, atol=0)


def test_large_damping_is_the_plain_gradient() -> None:
    scores, advantages = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    plain = scores.T @ advantages / 6
    # (F + λI)⁻¹ λ = I − O(‖F‖ / λ).
    assert relative_error(1e8 * solve_dual(scores, advantages, 1e8), plain) < 1e-6
    assert relative_error(1e8 * solve(scores.T @ scores / 6, plain, 1e8), plain) < 1e-6


@pytest.mark.parametrize("p", [1e-1, 1e-2, 1e-4])
def test_speed_of_the_logit_on_the_two_armed_bandit(p: float) -> None:
    """MATH: p(1 − p) for the policy gradient, √(p(1 − p)) under the Fisher norm, ½ for the natural gradient."""
    bandit = Bandit.two_armed()
    policy = TabularSoftmax.from_probs(torch.tensor([[p, 1 - p]], dtype=torch.float64))
    observations, actions, probs = bandit.every_pull(policy)
    scores = fisher.score_matrix(policy, observations, actions)
    advantages = bandit.advantages(policy)[observations, actions]
    matrix = fisher.exact_fisher(policy, observations[:1])
    policy_gradient = scores.T @ (probs * advantages)
    norms = torch.einsum("np,pq,nq->n", scores, matrix, scores).sqrt()
    isometric = scores.T @ (probs * advantages / norms)
    natural, _ = solve_cg(lambda v: matrix @ v, policy_gradient, 0.0, 10, 1e-10)
    variance = p * (1 - p)
    assert policy_gradient[0].item() == pytest.approx(variance, rel=1e-9)
    assert isometric[0].item() == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert natural[0].item() == pytest.approx(0.5, rel=1e-9)
    # Dividing the norm by √(tr F), as sampled tokens do, brings the exponent of the policy gradient back.
    assert (isometric[0] * matrix.trace().sqrt()).item() == pytest.approx(math.sqrt(2) * variance, rel=1e-9)
    # Damped, the natural gradient keeps its speed only while the damping is small against F.
    damped = solve(matrix, policy_gradient, 1e-2 * variance)
    assert damped[0].item() == pytest.approx(1 / (2 + 1e-2), rel=1e-9)


def test_identical_and_empty_scores() -> None:
    """A singular Gram matrix: N copies of one sample count as one; a score of zero gets nothing."""
    score = torch.randn(1, 5, dtype=torch.float64)
    copies = solve_dual(score.repeat(6, 1), torch.full((6,), 2.0, dtype=torch.float64), 0.1)
    torch.testing.assert_close(copies, solve_rank_one(score[0], 2 * score[0], 0.1), rtol=1e-10, atol=0)
    zero = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(solve_rank_one(zero, score[0], 0.5), score[0] / 0.5)
    assert torch.equal(solve_dual(score, torch.zeros(1, dtype=torch.float64), 0.1), zero)


def test_single_precision_stays_single() -> None:
    matrix, gradient = spread_matrix(5, smallest=0.1).float(), torch.randn(5)
    for x in (
        solve(matrix, gradient, 0.1),
        solve_dual(matrix, gradient, 0.1),
        solve_cg(lambda v: matrix @ v, gradient, 0.1)[0],
        solve_rank_one(gradient, gradient, 0.1),
    ):
        assert x.dtype == torch.float32
    assert relative_error(solve(matrix, gradient, 0.1), inverted(matrix, gradient, 0.1)) < 1e-5


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    eye = torch.eye(3)
    ones = torch.ones(3)

    def test_singular_fisher_without_damping(self) -> None:
        probs = torch.tensor([0.2, 0.3, 0.5])
        singular = torch.diag(probs) - torch.outer(probs, probs)
        with pytest.raises(ValueError, match=r"damping: expected a number > 0, since fisher is singular .*, got 0"):
            solve(singular, self.ones, 0)
        with pytest.raises(ValueError, match=r"damping: expected a number > 0, since fisher is singular .*, got 0"):
            solve(torch.zeros(3, 3), self.ones, 0)

    def test_damping(self) -> None:
        with pytest.raises(ValueError, match=r"damping: expected a finite number >= 0, got -1"):
            solve(self.eye, self.ones, -1)
        with pytest.raises(ValueError, match=r"damping: expected a finite number >= 0, got nan"):
            solve_cg(lambda v: v, self.ones, math.nan)
        with pytest.raises(ValueError, match=r"damping: expected a finite number > 0, got 0"):
            solve_dual(self.eye, self.ones, 0)
        with pytest.raises(ValueError, match=r"damping: expected a finite number > 0, got inf"):
            solve_rank_one(self.ones, self.ones, math.inf)
        with pytest.raises(TypeError, match=r"damping: expected a number, got str"):
            solve(self.eye, self.ones, "0.1")

    def test_fisher(self) -> None:
        with pytest.raises(
            ValueError, match=r"fisher: expected shape \(P=3 P\), got \(3, 2\)|fisher: expected shape \(P P"
        ):
            solve(torch.ones(3, 2), self.ones, 1.0)
        with pytest.raises(ValueError, match=r"fisher: expected a symmetric matrix, got entries that differ by 1"):
            solve(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.ones(2), 1.0)
        with pytest.raises(ValueError, match=r"fisher: expected finite numbers, got nan at index \(0, 0\)"):
            solve(self.eye * torch.nan, self.ones, 1.0)
        with pytest.raises(ValueError, match=r"fisher \+ damping · I: .* got smallest eigenvalue -1; try a larger"):
            solve(-2 * self.eye, self.ones, 1.0)
        with pytest.raises(TypeError, match=r"fisher: expected a floating-point tensor, got torch.int64"):
            solve(torch.eye(3, dtype=torch.int64), self.ones, 1.0)

    def test_vectors(self) -> None:
        with pytest.raises(ValueError, match=r"gradient: expected shape \(P=3\), got \(3, 1\)"):
            solve(self.eye, self.ones[:, None], 1.0)
        with pytest.raises(ValueError, match=r"advantages: expected shape \(N=2\), got \(3,\)"):
            solve_dual(torch.ones(2, 3), self.ones, 1.0)
        with pytest.raises(ValueError, match=r"scores: expected at least one entry"):
            solve_dual(torch.ones(0, 3), torch.ones(0), 1.0)
        with pytest.raises(ValueError, match=r"vector: expected shape \(P=3\), got \(2,\)"):
            solve_rank_one(self.ones, torch.ones(2), 1.0)
        with pytest.raises(ValueError, match=r"gradient: expected finite numbers, got inf"):
            solve_cg(lambda v: v, self.ones / 0, 1.0)

    def test_cg(self) -> None:
        with pytest.raises(ValueError, match=r"fvp\(vector\): expected shape \(P=3\), got \(1,\)"):
            solve_cg(lambda v: v[:1], self.ones, 1.0)
        with pytest.raises(ValueError, match=r"fvp: .* got -0.5 in iteration 1; try a larger damping"):
            solve_cg(lambda v: -v, self.ones, 0.5)
        with pytest.raises(ValueError, match=r"fvp: .* got nan in iteration 1"):
            solve_cg(lambda v: v * torch.nan, self.ones, 0.5)
        with pytest.raises(ValueError, match=r"max_iterations: expected a finite number >= 1, got 0"):
            solve_cg(lambda v: v, self.ones, 0.5, max_iterations=0)
        with pytest.raises(ValueError, match=r"tolerance: expected a finite number > 0, got 0"):
            solve_cg(lambda v: v, self.ones, 0.5, tolerance=0)
