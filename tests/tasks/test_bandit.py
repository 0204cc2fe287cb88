"""Bandits: every closed form against brute force, finite differences or autograd; samples against their law."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from isopo_mini.policies import MLP, CategoricalPolicy, LinearSoftmax, TabularSoftmax
from isopo_mini.tasks import Bandit, ContextualBandit

MEANS = torch.tensor([[1.0, 0.2, -0.5], [0.0, 0.7, 0.6]], dtype=torch.float64)
CONTEXT_PROBS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def example(**options: object) -> ContextualBandit:
    return ContextualBandit(MEANS, CONTEXT_PROBS, **options)


def tabular(seed: int = 0) -> TabularSoftmax:
    generator = torch.Generator().manual_seed(seed)
    return TabularSoftmax.from_probs(torch.randn(2, 3, generator=generator, dtype=torch.float64).softmax(dim=1))


def at(table: Tensor) -> TabularSoftmax:
    return TabularSoftmax.from_probs(table.reshape(2, 3).softmax(dim=1))


def test_expected_return_is_the_double_sum() -> None:
    policy = tabular()
    probs = policy.table.weight.softmax(dim=1)
    total = sum(
        CONTEXT_PROBS[c].item() * probs[c, a].item() * MEANS[c, a].item()
        for c, a in itertools.product(range(2), range(3))
    )
    assert example().expected_return(policy).item() == pytest.approx(total, abs=1e-15)


def test_logit_gradient_agrees_with_finite_differences() -> None:
    policy, bandit = tabular(), example()
    table = policy.table.weight.detach().flatten()
    step = 1e-5
    for i, closed_form in enumerate(bandit.logit_gradient(policy).flatten()):
        shift = step * torch.eye(6, dtype=torch.float64)[i]
        high, low = (bandit.expected_return(at(table + sign * shift)).item() for sign in (1, -1))
        # Central differences: truncation ~ step² = 1e-10, rounding ~ 1e-16 / step = 1e-11.
        assert (high - low) / (2 * step) == pytest.approx(closed_form.item(), abs=1e-9)


def test_policy_gradient_of_the_table_is_the_logit_gradient() -> None:
    policy, bandit = tabular(), example()
    torch.testing.assert_close(bandit.policy_gradient(policy), bandit.logit_gradient(policy).flatten())


def test_policy_gradient_of_features_is_the_chain_rule() -> None:
    """∇_W J = Σ_c (∂J/∂θ_c) x_cᵀ for logits θ_c = W x_c."""
    features = torch.randn(2, 4, dtype=torch.float64)
    policy, bandit = LinearSoftmax(4, 3).double(), example(features=features)
    expected = bandit.logit_gradient(policy).T @ features
    torch.testing.assert_close(bandit.policy_gradient(policy).reshape(3, 4), expected)


def test_policy_gradient_skips_frozen_parameters() -> None:
    policy, bandit = MLP(2, 3, hidden=(4,)).double(), example(features=torch.eye(2, dtype=torch.float64))
    whole = bandit.policy_gradient(policy)
    policy.layers[0].weight.requires_grad_(False)
    torch.testing.assert_close(bandit.policy_gradient(policy), whole[8:])
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_fisher_is_the_hessian_of_kl() -> None:
    policy, bandit = tabular(), example()
    log_policy = policy.table.weight.detach().log_softmax(dim=1)

    def kl(table: Tensor) -> Tensor:
        return CONTEXT_PROBS @ (log_policy.exp() * (log_policy - table.reshape(2, 3).log_softmax(dim=1))).sum(dim=1)

    expected = jacrev(jacrev(kl))(log_policy.flatten())
    torch.testing.assert_close(bandit.logit_fisher(policy), expected)


def test_kl_is_the_double_sum_and_half_a_quadratic_form() -> None:
    policy, bandit = tabular(), example()
    assert bandit.kl(policy, policy).item() == 0
    direction = torch.randn(6, dtype=torch.float64)
    fisher = bandit.logit_fisher(policy)
    ratios = []
    for step in (1e-2, 1e-3):
        other = at(policy.table.weight.detach().flatten() + step * direction)
        p, q = (x.table.weight.detach().softmax(dim=1) for x in (policy, other))
        brute = sum(
            CONTEXT_PROBS[c].item() * p[c, a].item() * math.log(p[c, a].item() / q[c, a].item())
            for c, a in itertools.product(range(2), range(3))
        )
        kl = bandit.kl(policy, other).item()
        assert kl == pytest.approx(brute, abs=1e-15)
        ratios.append(kl / (0.5 * step**2 * direction @ fisher @ direction).item())
    # The error of the quadratic form is of third order: its share falls tenfold with the step.
    assert abs(ratios[0] - 1) < 0.05
    assert abs(ratios[1] - 1) < 0.2 * abs(ratios[0] - 1)


class Masked(CategoricalPolicy):
    """Two arms with log-odds `odds`, and a third that is forbidden."""

    def __init__(self, odds: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([odds, 0.0, 0.0]))

    def logits(self, observations: Tensor) -> Tensor:
        return self.table.expand(len(observations), 3).masked_fill(torch.tensor([False, False, True]), -math.inf)


def test_kl_of_policies_that_forbid_an_arm() -> None:
    bandit, p, q = Bandit(torch.tensor([1.0, 0.0, 0.0])), 0.5, math.e / (1 + math.e)
    policy, other = Masked(0.0), Masked(1.0)
    kl = bandit.kl(policy, other)
    assert kl.item() == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-6)
    kl.backward()
    # ∂KL/∂θ = p(log p/q − KL) in the first, and q − p in the second; a forbidden arm gets nothing.
    slope = p * (math.log(p / q) - kl.item())
    torch.testing.assert_close(policy.table.grad, torch.tensor([slope, -slope, 0.0]))
    torch.testing.assert_close(other.table.grad, torch.tensor([q - p, p - q, 0.0]))
    assert bandit.kl(TabularSoftmax(1, 3), policy).item() == math.inf
    assert bandit.kl(policy, TabularSoftmax(1, 3)).item() == pytest.approx(math.log(1.5), rel=1e-6)


def test_kl_of_a_small_step_in_single_precision() -> None:
    """½ dᵀFd = 1e-9, which the difference of two logarithms in single precision would leave nothing of."""
    bandit = Bandit(torch.zeros(3))
    policy, other = (TabularSoftmax.from_probs(probs[None]) for probs in torch.tensor([[0.2, 0.3, 0.5]] * 2))
    with torch.no_grad():
        other.table.weight += 1e-4 * torch.tensor([0.3, -0.5, 0.4])
    moved = (other.table.weight - policy.table.weight).detach().double()[0]  # what single precision made of the step
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expected = 0.5 * ((p * moved**2).sum() - (p @ moved) ** 2)
    assert bandit.kl(policy, other).item() == pytest.approx(expected.item(), rel=1e-3)  # the next term, of size 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    table = torch.randn(3, 4).to(dtype)
    policy, twin = (TabularSoftmax(3, 4).to(kind) for kind in (dtype, torch.float64))
    with torch.no_grad():
        policy.table.weight.copy_(table)
        twin.table.weight.copy_(table)
    rewards, context_probs = torch.rand(3, 4).to(dtype), torch.tensor([0.1, 0.2, 0.7]).to(dtype)
    bandit = ContextualBandit(rewards, context_probs)
    double = ContextualBandit(rewards.double(), context_probs.double() / context_probs.double().sum())
    for name in ("log_policy", "expected_return", "advantages", "logit_gradient", "logit_fisher"):
        given, expected = getattr(bandit, name)(policy), getattr(double, name)(twin)
        assert given.dtype == torch.float32
        torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    # Context probabilities that half precision has rounded are divided by their sum.
    assert bandit.context_probs.sum().item() == pytest.approx(1, abs=1e-7)
    batch = bandit.sample(policy, 10)
    assert (batch.rewards.dtype, batch.log_probs.dtype) == (torch.float32, torch.float32)
    assert torch.equal(policy.log_prob(batch).detach(), batch.log_probs)  # the ratio to the old policy is 1


def test_optimum_is_reached_by_the_greedy_policy_only() -> None:
    bandit = example()
    assert bandit.optimum == pytest.approx(0.3 * 1.0 + 0.7 * 0.7)
    greedy = TabularSoftmax.from_probs(torch.tensor([[1.0, 1e-12, 1e-12], [1e-12, 1.0, 1e-12]], dtype=torch.float64))
    assert bandit.evaluate(greedy)["gap"] == pytest.approx(0, abs=1e-11)
    result = bandit.evaluate(tabular())
    assert result["gap"] == result["optimum"] - result["return"] > 0.01


def test_every_pull_turns_sums_into_expectations() -> None:
    policy, bandit = tabular(), example()
    observations, actions, probs = bandit.every_pull(policy)
    assert probs.sum().item() == pytest.approx(1)
    assert (probs @ MEANS[observations, actions]).item() == pytest.approx(bandit.expected_return(policy).item())
    # REINFORCE with any baseline per context has the same expectation: Σ prob · A · ∇log π = ∇J.
    one_hot = torch.nn.functional.one_hot(observations * 3 + actions, 6).double()
    scores = one_hot.reshape(6, 2, 3) - policy.table.weight.softmax(1) * torch.eye(2)[observations][..., None]
    advantages = bandit.advantages(policy)[observations, actions]
    torch.testing.assert_close(
        torch.einsum("n,n,nca->ca", probs, advantages, scores.detach()), bandit.logit_gradient(policy)
    )


def test_advantages_average_to_zero_under_the_policy() -> None:
    policy, bandit = tabular(), example()
    mean = (policy.table.weight.softmax(dim=1) * bandit.advantages(policy)).sum(dim=1)
    torch.testing.assert_close(mean, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("noise", ["none", "gaussian", "bernoulli"])
def test_samples_follow_their_law(noise: str) -> None:
    means = torch.tensor([[0.9, 0.2, 0.5], [0.0, 0.7, 1.0]], dtype=torch.float64)
    bandit = ContextualBandit(means, CONTEXT_PROBS, noise=noise, noise_scale=0.5)
    policy, count = tabular(), 20_000
    batch = bandit.sample(policy, count, torch.Generator().manual_seed(0))
    assert batch.observations.shape == batch.actions.shape == batch.log_probs.shape == (count, 1)
    assert batch.rewards.shape == (count,)
    assert batch.mask.all()
    assert torch.equal(batch.groups, batch.observations[:, 0])
    torch.testing.assert_close(batch.log_probs, policy.log_prob(batch).detach())
    pairs = batch.groups * 3 + batch.actions[:, 0]
    probs = bandit.every_pull(policy)[2]
    frequencies = torch.bincount(pairs, minlength=6) / count
    assert ((frequencies - probs).abs() < 5 * (probs * (1 - probs) / count).sqrt()).all()  # five sigma
    spread = {
        "none": torch.zeros(6),
        "gaussian": torch.full((6,), 0.5),
        "bernoulli": (means * (1 - means)).sqrt().flatten(),
    }
    for pair in range(6):
        rewards = batch.rewards[pairs == pair]
        sigma = spread[noise][pair].item()
        assert abs(rewards.mean().item() - means.flatten()[pair].item()) <= 5 * sigma / math.sqrt(len(rewards)) + 1e-12
        # The standard deviation of a sample standard deviation is about sigma / sqrt(n), here at most doubled.
        assert abs(rewards.std().item() - sigma) <= 10 * sigma / math.sqrt(len(rewards)) + 1e-7
    if noise == "bernoulli":
        assert set(batch.rewards.unique().tolist()) == {0.0, 1.0}


def test_samples_repeat_with_the_generator() -> None:
    bandit, policy = example(noise="gaussian"), tabular()
    first, second, third = (bandit.sample(policy, 30, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.rewards, second.rewards)
    assert torch.equal(first.actions, second.actions)
    assert not torch.equal(first.rewards, third.rewards)


def test_features_are_observed_in_place_of_the_index() -> None:
    features = torch.randn(2, 4, dtype=torch.float64)
    batch = example(features=features).sample(LinearSoftmax(4, 3).double(), 9)
    assert torch.equal(batch.observations, features[batch.groups].unsqueeze(1))


def test_two_armed() -> None:
    bandit = Bandit.two_armed(gap=2.0)
    policy = TabularSoftmax.from_probs(torch.tensor([[0.01, 0.99]]))
    assert bandit.evaluate(policy)["return"] == pytest.approx(0.02)
    assert bandit.optimum == 2.0
    # dJ/dθ = gap · p (1 − p) for the better arm, and the opposite for the other.
    torch.testing.assert_close(bandit.logit_gradient(policy), 2 * 0.01 * 0.99 * torch.tensor([[1.0, -1.0]]))


def test_a_policy_may_be_more_precise_than_the_bandit() -> None:
    policy = TabularSoftmax.from_probs(torch.tensor([[1e-9, 1 - 1e-9]], dtype=torch.float64))
    result = Bandit.two_armed().evaluate(policy)
    assert result["return"] == pytest.approx(1e-9, rel=1e-12)
    assert Bandit.two_armed().policy_gradient(policy).dtype == torch.float64


def test_bandit_is_a_contextual_bandit_with_one_context() -> None:
    policy = TabularSoftmax(1, 3)
    batch = Bandit(torch.tensor([0.1, 0.2, 0.6])).sample(policy, 5)
    assert torch.equal(batch.groups, torch.zeros(5, dtype=torch.int64))
    assert Bandit(torch.tensor([0.1, 0.2, 0.6])).expected_return(policy).item() == pytest.approx(0.3)


def test_equal_arms_and_a_single_arm_have_no_gradient() -> None:
    for means in (torch.full((2, 3), 0.7), torch.tensor([[0.3]])):
        bandit, policy = ContextualBandit(means), TabularSoftmax(*means.shape)
        torch.testing.assert_close(bandit.policy_gradient(policy), torch.zeros(means.numel()), rtol=0, atol=1e-7)
        assert bandit.evaluate(policy)["gap"] == pytest.approx(0, abs=1e-7)
        assert len(bandit.sample(policy, 1)) == 1


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_mean_rewards(self) -> None:
        with pytest.raises(ValueError, match=r"mean_rewards: expected shape \(C K\), got \(3,\)"):
            ContextualBandit(torch.zeros(3))
        with pytest.raises(ValueError, match=r"mean_rewards: expected shape \(K\), got \(1, 3\)"):
            Bandit(torch.zeros(1, 3))
        with pytest.raises(TypeError, match=r"mean_rewards: expected a floating-point tensor, got torch.int64"):
            ContextualBandit(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"mean_rewards: expected finite numbers, got nan at index \(0, 1\)"):
            ContextualBandit(torch.tensor([[0.0, math.nan]]))
        with pytest.raises(ValueError, match="mean_rewards: expected at least one entry"):
            ContextualBandit(torch.zeros(2, 0))
        with pytest.raises(ValueError, match=r"mean_rewards: expected Bernoulli means in \[0, 1\], got -0.5 to 1"):
            example(noise="bernoulli")

    def test_context_probs_and_features(self) -> None:
        with pytest.raises(ValueError, match=r"context_probs: expected shape \(C=2\), got \(3,\)"):
            ContextualBandit(MEANS, torch.ones(3) / 3)
        with pytest.raises(ValueError, match=r"context_probs: .* got sum 0.9 and smallest 0.3"):
            ContextualBandit(MEANS, torch.tensor([0.3, 0.6]))
        with pytest.raises(ValueError, match=r"context_probs: .* got sum 1 and smallest -0.5"):
            ContextualBandit(MEANS, torch.tensor([-0.5, 1.5]))
        with pytest.raises(ValueError, match=r"features: expected shape \(C=2 d\), got \(3, 4\)"):
            example(features=torch.zeros(3, 4))

    def test_options(self) -> None:
        with pytest.raises(ValueError, match="noise: expected one of none, gaussian, bernoulli, got 'uniform'"):
            example(noise="uniform")
        with pytest.raises(ValueError, match="noise_scale: expected a finite number >= 0, got -1"):
            example(noise="gaussian", noise_scale=-1)
        with pytest.raises(ValueError, match="gap: expected a finite number > 0, got 0"):
            Bandit.two_armed(gap=0)
        with pytest.raises(ValueError, match="num_sequences: expected a finite number >= 1, got 0"):
            example().sample(tabular(), 0)

    def test_a_policy_of_another_size(self) -> None:
        with pytest.raises(
            ValueError, match=r"policy.logits\(observations\): expected shape \(C=2 K=3\), got \(2, 4\)"
        ):
            example().evaluate(TabularSoftmax(2, 4))
