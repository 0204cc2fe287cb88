"""Gaussian policies: log-probabilities of SciPy, scores by formula, samples by their moments, training, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Independent, Laplace

from isopo_mini import Batch
from isopo_mini.policies import GaussianPolicy
from isopo_mini.rules.old_policy import ClippedSurrogate
from isopo_mini.rules.one_step import Reinforce
from isopo_mini.tasks import Pendulum
from isopo_mini.training.loop import train


def make_policy(num_actions: int = 2, dtype: torch.dtype = torch.float64) -> GaussianPolicy:
    torch.manual_seed(0)
    policy = GaussianPolicy(3, num_actions, hidden=(5,)).to(dtype)
    with torch.no_grad():
        policy.log_std.copy_(torch.linspace(-1, 1, num_actions))
    return policy


def make_batch(policy: GaussianPolicy, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(4, 3, 3, generator=generator, dtype=dtype)
    actions, log_probs = policy.sample_actions(observations, generator=generator)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    return Batch(observations, actions, mask, torch.arange(4.0, dtype=dtype), log_probs)


def test_log_probs_are_scipys() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    means = policy(batch.observations).detach().numpy()
    spread = policy.log_std.exp().detach().numpy()
    expected = scipy.stats.norm.logpdf(batch.actions.numpy(), means, spread).sum(axis=-1) * batch.mask.numpy()
    np.testing.assert_allclose(policy.log_prob(batch).detach().numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(policy.log_prob(batch)[batch.mask], batch.log_probs[batch.mask])


def test_the_score_of_log_sigma_is_its_formula() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    policy.log_prob(batch).sum().backward()
    scaled = (batch.actions - policy(batch.observations)) / policy.log_std.exp()
    assert policy.log_std.grad is not None
    torch.testing.assert_close(policy.log_std.grad, (scaled.square() - 1)[batch.mask].sum(dim=0))


def test_samples_have_the_moments_of_the_policy_and_repeat_with_the_generator() -> None:
    policy = make_policy()
    observations = torch.ones(20_000, 3, dtype=torch.float64)
    actions, _ = policy.sample_actions(observations, generator=torch.Generator().manual_seed(1))
    again, _ = policy.sample_actions(observations, generator=torch.Generator().manual_seed(1))
    assert torch.equal(actions, again)
    spread = policy.log_std.exp().detach()
    # Five standard errors.
    assert ((actions.mean(dim=0) - policy(observations[0]).detach()).abs() < 5 * spread / 20_000**0.5).all()
    torch.testing.assert_close(actions.std(dim=0), spread, rtol=0.03, atol=0)


def test_padding_is_never_looked_at() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    filled = replace(batch, actions=batch.actions.masked_fill(~batch.mask.unsqueeze(-1), torch.nan))
    torch.testing.assert_close(policy.log_prob(filled), policy.log_prob(batch))
    policy.log_prob(filled).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in policy.parameters() if parameter.grad is not None)


def test_half_precision_gives_single_precision_log_probs() -> None:
    policy = make_policy(dtype=torch.bfloat16)
    actions, log_probs = policy.sample_actions(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert actions.dtype == log_probs.dtype == torch.float32


class LaplacePolicy(GaussianPolicy):
    """Another distribution over vectors, as somebody else might bring it."""

    def distribution(self, observations: torch.Tensor) -> Independent:
        gaussian = super().distribution(observations)
        return Independent(Laplace(gaussian.mean, gaussian.stddev), 1)


def test_training_measures_whatever_distribution_a_policy_has() -> None:
    torch.manual_seed(0)
    policy = LaplacePolicy(3, 1, hidden=(4,))
    before = policy.distribution(torch.zeros(1, 3)).entropy().item()
    rule = ClippedSurrogate("ppo", epochs=2)
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    table = train(policy, Pendulum(10, evaluation_episodes=2), rule, optimizer, 1, 0, progress=False)
    assert table["entropy"][0] == pytest.approx(before)
    assert before != pytest.approx(GaussianPolicy(3, 1).distribution(torch.zeros(1, 3)).entropy().item())
    assert table["kl"][0] > 0


@pytest.mark.parametrize("loss", ["ppo", "copg"])
def test_training_measures_entropy_and_kl_of_the_gaussians(loss: str) -> None:
    torch.manual_seed(0)
    policy = GaussianPolicy(3, 1, hidden=(4,))
    task = Pendulum(10, evaluation_episodes=2)
    rule = ClippedSurrogate(loss, epochs=2)
    before = policy.distribution(torch.zeros(1, 3)).entropy().item()
    table = train(policy, task, rule, torch.optim.Adam(policy.parameters(), 0.01), 3, 0, progress=False)
    assert table["entropy"][0] == pytest.approx(before)  # the spread, and so the entropy, is the same everywhere
    assert (table["kl"] > 0).all()
    assert table["entropy"][2] != table["entropy"][0]


def test_the_measured_kl_is_the_closed_form() -> None:
    """With a linear mean and no features that vary, KL is one formula in (μ, σ) before and after."""
    policy = GaussianPolicy(3, 1, hidden=()).double()
    task = Pendulum(1, evaluation_episodes=1)
    observation = task.sample(policy, 1, torch.Generator().manual_seed(5)).observations
    mean, spread = policy(observation).item(), policy.log_std.exp().item()
    optimizer = torch.optim.SGD(policy.parameters(), 0.05)
    rule = Reinforce(lambda batch: torch.ones(len(batch), dtype=torch.float64))
    table = train(policy, task, rule, optimizer, 1, 5, sequences_per_step=1, progress=False)
    new_mean, new_spread = policy(observation).item(), policy.log_std.exp().item()
    ratio = spread / new_spread
    expected = -np.log(ratio) + (ratio**2 + ((mean - new_mean) / new_spread) ** 2 - 1) / 2
    assert expected > 1e-6
    assert table["kl"][0] == pytest.approx(expected, rel=1e-9)


def test_bad_input_names_what_was_expected() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    with pytest.raises(ValueError, match=r"observations: expected shape \(d=3\), got"):
        policy(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="observations"):
        policy(torch.zeros(2, 3, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"batch.actions: expected shape \(S=4 T=3 k=2\), got \(4, 3, 1\)"):
        policy.log_prob(replace(batch, actions=batch.actions[..., :1]))
    whole = replace(batch, actions=torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"batch.actions: expected shape"):
        policy.log_prob(whole)
    with pytest.raises(ValueError, match=r"hidden\[0\]: expected a finite number >= 1, got 0"):
        GaussianPolicy(3, 1, hidden=(0,))
    with pytest.raises(ValueError, match="log_std"):
        GaussianPolicy(3, 1, log_std=float("nan"))
    with pytest.raises(ValueError, match="actions"):
        replace(batch, actions=batch.actions.masked_fill(batch.mask.unsqueeze(-1), torch.inf))
