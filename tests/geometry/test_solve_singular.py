"""F⁺g where F is singular by construction: the closed form, for probabilities from 1e-1 down to 1e-12.

In the logits of a table the natural gradient is known, F⁺∇J = A − mean over the actions, state by state. The tests ask
for 1e-9 of its largest entry: what is measured is 1e-15, and a formula that loses the digits of p is wrong by 1e-16/p,
or altogether.
"""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from isopo_mini.geometry import fisher
from isopo_mini.geometry.natural_gradient import solve_singular
from isopo_mini.policies import MLP, TabularSoftmax, softmax_fisher
from isopo_mini.tasks import Bandit, ContextualBandit, random_mdp

RARE = [10.0**-exponent for exponent in range(1, 13)]


def double(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def rows_with(p: float) -> dict[str, Tensor]:
    """Distributions in which something has probability p."""
    return {
        "two": double([p, 1 - p]),
        "one of five": double([1 - p, *[p / 4] * 4]),
        "beside a common one": double([0.95 - p / 2, 0.05, p / 2]),
        "beside a rarer one": double([1 - p - p**1.5, p, p**1.5]),
        "three states": double([0.9 - p / 2, p / 2, 0.1], [1 / 3] * 3, [p / 2, p / 2, 1 - p]),
    }


def centred(values: Tensor) -> Tensor:
    return (values - values.mean(dim=-1, keepdim=True)).flatten()


def worst(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("p", RARE)
@pytest.mark.parametrize("kind", list(rows_with(0.1)))
def test_closed_form_of_a_bandit(kind: str, p: float) -> None:
    probs = rows_with(p)[kind]
    rewards = torch.rand(probs.shape, dtype=torch.float64)
    context_probs = double(1 - 1e-3 - 1e-6, 1e-3, 1e-6) if len(probs) == 3 else None  # hardly visited states too
    bandit, policy = ContextualBandit(rewards, context_probs), TabularSoftmax.from_probs(probs)
    right = centred(rewards)
    matrix, gradient = bandit.logit_fisher(policy), bandit.logit_gradient(policy).flatten()
    assert worst(solve_singular(matrix, gradient), right) < 1e-9
    assert worst(solve_singular(matrix, bandit.policy_gradient(policy)), right) < 1e-9
    by_scores = fisher.exact_fisher(policy, torch.arange(len(probs)), bandit.context_probs)
    assert worst(solve_singular(by_scores, gradient), right) < 1e-9


@pytest.mark.parametrize("p", RARE)
@pytest.mark.parametrize("discount", [0.5, 0.99])
def test_closed_form_of_a_decision_process(p: float, discount: float) -> None:
    mdp = random_mdp(4, 3, discount=discount, seed=1)
    probs = double([p, 1 - p - p / 2, p / 2], [0.2, 0.3, 0.5], [1 - 2 * p, p, p], [p, 0.1, 0.9 - p])
    direction = solve_singular(mdp.logit_fisher(probs), mdp.logit_gradient(probs).flatten())
    # The advantages come of a linear system of condition 1/(1−γ): two more digits.
    assert worst(direction, centred(mdp.advantages(probs)) / (1 - discount)) < 1e-9


def test_what_used_to_be_done_is_wrong() -> None:
    """π − π² on the diagonal, and the default cutoff of `pinv`."""

    def error(probs: Tensor, weights: Tensor) -> float:
        rewards = torch.rand(probs.shape, dtype=torch.float64)
        advantages = rewards - (probs * rewards).sum(dim=1, keepdim=True)
        blocks = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
        matrix = torch.block_diag(*(weights[:, None, None] * blocks))
        gradient = (weights[:, None] * probs * advantages).flatten()
        return worst(torch.linalg.pinv(matrix, hermitian=True) @ gradient, centred(rewards))

    weights = double(1 - 1e-3 - 1e-6, 1e-3, 1e-6)
    errors = [[error(probs, weights[: len(probs)]) for probs in rows_with(p).values()] for p in RARE]
    assert max(errors[0]) < 1e-9  # nothing is wrong at 1e-1, which is why it was not seen
    assert max(map(max, errors)) > 1e-2
    # No cutoff would mend it: the digits are not in the matrix any more.
    near = 1 - 1e-9
    assert abs(float(Fraction(near - near * near) / (Fraction(near) * (1 - Fraction(near)))) - 1) > 1e-9


@pytest.mark.parametrize("p", RARE)
@pytest.mark.parametrize("kind", list(rows_with(0.1)))
def test_entries_of_the_fisher_keep_their_digits(kind: str, p: float) -> None:
    """Entry by entry against exact fractions. log and exp of p lose |log p| · 1e-16, hence 1e-13."""
    for row in rows_with(p)[kind]:
        exact = [Fraction(value) / sum(map(Fraction, row.tolist())) for value in row.tolist()]
        actions = range(len(exact))
        right = double(*[[float(exact[a] * ((a == b) - exact[b])) for b in actions] for a in actions])
        for matrix in (
            softmax_fisher(row),
            fisher.exact_fisher(TabularSoftmax.from_probs(row[None]), torch.zeros(1, dtype=torch.int64)),
        ):
            torch.testing.assert_close(matrix, right, rtol=1e-13, atol=0)
            # Singular: the sum of a row is a rounding error of its own entries, not of the largest row's.
            assert (matrix.sum(dim=1).abs() <= 1e-15 * matrix.diagonal()).all()


@pytest.mark.parametrize("p", RARE)
def test_products_with_the_fisher_keep_their_digits(p: float) -> None:
    probs, vector = rows_with(p)["beside a rarer one"][0], double(0.3, -1.0, 2.0)
    policy, state = TabularSoftmax.from_probs(probs[None]), torch.zeros(1, dtype=torch.int64)
    product = fisher.fisher_vector_product(policy, state, vector)
    exact, shifts = [Fraction(value) for value in probs.tolist()], [Fraction(value) for value in vector.tolist()]
    mean = sum(a * v for a, v in zip(exact, shifts, strict=True)) / sum(exact)
    right = double(*[float(a / sum(exact) * (v - mean)) for a, v in zip(exact, shifts, strict=True)])
    torch.testing.assert_close(product, right, rtol=1e-13, atol=0)


@pytest.mark.parametrize("constant", [1.0, 0.1, -1e30])
def test_a_constant_added_to_all_logits_changes_nothing_exactly(constant: float) -> None:
    probs = torch.rand(4, 7, dtype=torch.float64).softmax(dim=1)
    policy = TabularSoftmax.from_probs(probs)
    vector = torch.full((28,), constant, dtype=torch.float64)
    assert torch.equal(fisher.fisher_vector_product(policy, torch.arange(4), vector), torch.zeros(28).double())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_of_all_solutions_the_shortest(rank: int) -> None:
    """A singular matrix of no special form, with rows of zeros, against the pseudo-inverse with its rank given."""
    scores = torch.randn(rank, 8, dtype=torch.float64)
    scores[:, 2] = 0.0
    matrix, gradient = scores.T @ scores, scores.T @ torch.randn(rank, dtype=torch.float64)
    expected = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ gradient
    # The condition number of the nonzero part is below 1e4.
    assert worst(solve_singular(matrix, gradient), expected) < 1e-10
    assert solve_singular(matrix, gradient)[2] == 0


def test_an_invertible_matrix_is_inverted_whatever_its_units() -> None:
    units = torch.logspace(-8, 8, 5, dtype=torch.float64)
    scores = torch.randn(9, 5, dtype=torch.float64)
    matrix, gradient = scores.T @ scores, torch.randn(5, dtype=torch.float64)
    x = solve_singular(units[:, None] * matrix * units, units * gradient)
    torch.testing.assert_close(units * x, torch.linalg.solve(matrix, gradient), rtol=1e-10, atol=0)


def test_nothing_to_solve() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(solve_singular(torch.zeros(3, 3, dtype=torch.float64), zero), zero)
    assert torch.equal(solve_singular(softmax_fisher(double(0.2, 0.3, 0.5)), zero), zero)


def test_dtypes() -> None:
    """Solved in double precision, returned in the gradient's."""
    bandit = Bandit(torch.tensor([0.2, 0.9, 0.5]))
    policy = TabularSoftmax.from_probs(torch.tensor([[0.98, 0.01, 0.01]]))
    x = solve_singular(bandit.logit_fisher(policy), bandit.policy_gradient(policy))
    assert x.dtype == torch.float32
    # Probabilities in single precision: 6e-8 · |log p| on each, and the shares of the natural gradient follow.
    assert worst(x, centred(bandit.mean_rewards)) < 1e-5
    assert softmax_fisher(torch.full((4,), 0.25, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_network_with_more_parameters_than_positions() -> None:
    """F of three observations has rank 3 · (A − 1); the policy gradient lies in its range, and moves the logits."""
    bandit = ContextualBandit(torch.rand(3, 3).double(), features=torch.randn(3, 2, dtype=torch.float64))
    policy = MLP(2, 3, hidden=(6,)).double()
    matrix = fisher.exact_fisher(policy, bandit.observations, bandit.context_probs)
    gradient = bandit.policy_gradient(policy)
    x = solve_singular(matrix, gradient)
    torch.testing.assert_close(matrix @ x, gradient, rtol=0, atol=1e-12)
    expected = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9) @ gradient
    assert worst(x, expected) < 1e-6


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    matrix, gradient = softmax_fisher(double(0.2, 0.3, 0.5)), double(1.0, -1.0, 0.0)
    with pytest.raises(
        ValueError, match=r"gradient: expected a vector in the range of fisher, .* the share 1.1e-02 is outs"
    ):
        solve_singular(matrix, gradient + 0.01)
    with pytest.raises(ValueError, match=r"gradient: .* and 2 entries belong to rows of zeros"):
        solve_singular(torch.zeros(3, 3).double(), gradient)
    with pytest.raises(
        ValueError, match=r"fisher: expected a positive semi-definite matrix, got smallest eigenvalue -"
    ):
        solve_singular(double([1.0, 2.0], [2.0, 1.0]), gradient[:2])
    with pytest.raises(ValueError, match=r"fisher: .* got a diagonal entry -1 in a row that is not zero"):
        solve_singular(-torch.eye(3).double(), gradient)
    with pytest.raises(ValueError, match=r"fisher: .* got a diagonal entry 0 in a row that is not zero"):
        solve_singular(double([0.0, 1.0], [1.0, 0.0]), gradient[:2])
    with pytest.raises(ValueError, match=r"fisher: expected a symmetric matrix, got entries that differ by 1"):
        solve_singular(double([1.0, 1.0], [0.0, 1.0]), gradient[:2])
    with pytest.raises(ValueError, match=r"cutoff: expected a finite number > 0, got 0"):
        solve_singular(matrix, gradient, 0.0)
    with pytest.raises(ValueError, match=r"gradient: expected shape \(P=3\), got \(2,\)"):
        solve_singular(matrix, gradient[:2])
    with pytest.raises(ValueError, match=r"gradient: expected finite numbers, got inf"):
        solve_singular(matrix, gradient * math.inf)
    with pytest.raises(TypeError, match=r"probs: expected a floating-point tensor, got torch.int64"):
        softmax_fisher(torch.ones(3, dtype=torch.int64))
