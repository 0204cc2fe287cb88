"""What is special to the rules that stay near the policy the batch came from. `test_one_step` has the rest."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from isopo_mini.batch import Batch
from isopo_mini.geometry import fisher, natural_gradient
from isopo_mini.objectives import losses
from isopo_mini.policies import MLP, CategoricalPolicy, TabularSoftmax
from isopo_mini.rules import ClippedSurrogate, Reinforce, TrustRegion
from isopo_mini.rules.rule_parts import batch_advantages, centred_advantages, standardised_advantages
from isopo_mini.tasks.bandit import ContextualBandit
from isopo_mini.training import diagnostics


def make_policy() -> MLP:
    torch.manual_seed(1)
    return MLP(5, 3, hidden=(8,)).double()


def make_batch(policy: MLP, sequences: int = 8, positions: int = 4) -> Batch:
    """Sequences of different length, with the policy's own actions and one reward a time step."""
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(sequences, positions, 5, dtype=torch.float64, generator=generator)
    actions, log_probs = policy.sample_actions(observations, generator=generator)
    mask = torch.arange(positions) < torch.randint(1, positions + 1, (sequences, 1), generator=generator)
    rewards = torch.randn(sequences, positions, dtype=torch.float64, generator=generator)
    return Batch(observations, actions, mask, rewards, log_probs, torch.arange(sequences) // 2)


def flat(policy: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]).clone()


def change(rule: Any, batch: Batch, step_size: float = 0.1) -> tuple[Tensor, dict[str, float]]:
    """What the rule, with plain gradient descent, adds to the parameters of the policy; its metrics."""
    policy = make_policy()
    before = flat(policy)
    metrics = rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=step_size))
    return flat(policy) - before, metrics


class TestClippedSurrogate:
    @pytest.mark.parametrize("loss", losses.LOSSES)
    def test_the_first_step_is_reinforces(self, loss: str) -> None:
        batch = make_batch(make_policy())
        for aggregate, unit in (("sequence-sum", "sequence"), ("token-mean", "step")):
            rule = ClippedSurrogate(loss, advantages=batch_advantages, aggregate=aggregate)
            expected, _ = change(Reinforce(unit=unit), batch)
            actual, metrics = change(rule, batch)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
            assert metrics["clip_fraction"] == metrics["kl_old"] == 0

    def test_epochs_are_steps_by_hand(self) -> None:
        """Three steps on the clipped loss with the batch's own log-probabilities as π_old."""
        batch, policy = make_batch(make_policy()), make_policy()
        before, reports = flat(policy), []
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
        for _ in range(3):
            arguments = policy.log_prob(batch), batch.log_probs, standardised_advantages(batch), batch.mask
            loss, report = losses.grpo(*arguments, clip_high=0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reports.append(report)
        expected = flat(policy) - before
        policy = make_policy()
        rule = ClippedSurrogate("grpo", epochs=3, clip_high=0.3)
        metrics = rule.step(policy, batch, torch.optim.Adam(policy.parameters(), lr=0.05))
        torch.testing.assert_close(flat(policy) - before, expected, rtol=1e-12, atol=1e-14)
        assert metrics["backward_passes"] == 3
        for name in ("ratio_mean", "clip_fraction", "kl_old"):
            assert metrics[name] == pytest.approx(sum(report[name] for report in reports) / 3)
        assert metrics["kl_old"] > 0

    def test_every_epoch_deals_every_sequence_once(self) -> None:
        """A loss that writes down what it is given. Advantages and log-probabilities stay with their sequences."""
        batch = make_batch(make_policy())
        seen: list[list[float]] = []

        def loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> losses.Loss:
            for row, advantage in zip(old, advantages, strict=True):
                original = (batch.log_probs == row).all(dim=1).nonzero().item()
                assert advantage == batch_advantages(batch)[int(original)]
            seen.append(advantages.tolist())
            return losses.reinforce(log_probs, old, advantages, mask)

        metrics = change(ClippedSurrogate(loss, epochs=2, minibatches=3), batch)[1]
        assert [len(advantages) for advantages in seen] == [3, 3, 2, 3, 3, 2]
        everyone = sorted(batch_advantages(batch).tolist())
        first, second = ([advantage for part in epoch for advantage in part] for epoch in (seen[:3], seen[3:]))
        assert sorted(first) == sorted(second) == everyone
        assert first != second  # dealt anew
        assert metrics["backward_passes"] == 2

    def test_the_seed_deals(self) -> None:
        batch = make_batch(make_policy())
        one, same, other = (change(ClippedSurrogate("ppo", 2, 4, seed=seed), batch)[0] for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)

    def test_each_method_has_its_own_advantages(self) -> None:
        expected = dict.fromkeys(("reinforce", "ppo", "copg"), batch_advantages)
        expected |= dict.fromkeys(("grpo", "dapo", "gspo", "cispo"), standardised_advantages)
        expected["dr_grpo"] = centred_advantages
        assert {name: ClippedSurrogate(name).advantages for name in losses.LOSSES} == expected
        assert ClippedSurrogate("grpo", advantages=centred_advantages).advantages is centred_advantages

    def test_advantages_may_be_one_a_step_for_every_unit(self) -> None:
        """Of the whole sequence, cut into steps, or of tokens: with the mean over steps they are one loss."""
        batch = make_batch(make_policy())

        def advantages(batch: Batch) -> Tensor:
            return batch.rewards.masked_fill(~batch.mask, math.nan)

        changes = [
            change(ClippedSurrogate("ppo", 2, advantages=advantages, unit=unit, aggregate="token-mean"), batch)[0]
            for unit in ("sequence", "step", "token")
        ]
        torch.testing.assert_close(changes[1], changes[0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(changes[2], changes[0], rtol=1e-12, atol=1e-15)

    def test_the_token_as_unit_is_the_mean_over_tokens_unless_told_otherwise(self) -> None:
        assert ClippedSurrogate("grpo", unit="token").options == {"aggregate": "token-mean"}
        assert ClippedSurrogate("grpo", unit="token", aggregate="constant").options == {"aggregate": "constant"}
        assert ClippedSurrogate("grpo").options == {}

    def test_the_clip_bounds_what_many_epochs_do(self) -> None:
        """Thirty steps on one batch. Without a clip the policy runs away from the one it sampled."""
        batch = make_batch(make_policy())
        clipped = change(ClippedSurrogate("ppo", 30), batch, 0.5)[1]
        free = change(ClippedSurrogate("ppo", 30, clip_low=1.0, clip_high=1e9), batch, 0.5)[1]
        assert clipped["kl_old"] < 0.5 * free["kl_old"]
        assert clipped["clip_fraction"] > free["clip_fraction"] == 0

    def test_a_policy_that_breaks_between_two_steps_stops_the_run(self) -> None:
        with pytest.raises(FloatingPointError, match=r"log_probs: .* after 1 optimizer steps on this batch"):
            change(ClippedSurrogate("reinforce", 2), make_batch(make_policy()), 1e308)

    @pytest.mark.usefixtures("unchecked")
    def test_errors_say_what_was_expected_and_what_came(self) -> None:
        with pytest.raises(ValueError, match=r"loss: expected one of reinforce, ppo, .*, copg, got 'trpo'"):
            ClippedSurrogate("trpo")
        with pytest.raises(ValueError, match=r"option of reinforce: expected one of aggregate, .*, got 'clip_low'"):
            ClippedSurrogate("reinforce", clip_low=0.1)
        with pytest.raises(ValueError, match=r"option of ppo: expected one of clip_low, .*, got 'dialect'"):
            ClippedSurrogate("ppo", dialect="trl")
        with pytest.raises(ValueError, match=r"epochs: expected a finite number >= 1, got 0"):
            ClippedSurrogate(epochs=0)
        with pytest.raises(ValueError, match=r"minibatches: expected a finite number >= 1, got 0"):
            ClippedSurrogate(minibatches=0)
        with pytest.raises(ValueError, match=r"unit: expected one of sequence, step, token, got 'word'"):
            ClippedSurrogate(unit="word")
        with pytest.raises(ValueError, match=r"number of units in the batch: expected a finite number >= 9, got 8"):
            change(ClippedSurrogate(minibatches=9), make_batch(make_policy()))
        with pytest.raises(ValueError, match=r"advantages\(batch\): expected shape \(S=8 T=4\), got \(8, 1\)"):
            change(ClippedSurrogate(advantages=lambda batch: batch.rewards[:, :1]), make_batch(make_policy()))


class TestTrustRegion:
    @pytest.mark.parametrize("unit", ["sequence", "step", "token"])
    def test_steps_along_the_natural_gradient_to_the_edge_of_the_region(self, unit: str) -> None:
        """√(2δ/xᵀFx) x with the dense F and g of that unit. At δ = 1e-8 the KL is its quadratic form, ½dᵀFd."""
        batch, policy = make_batch(make_policy()), make_policy()
        units = int(batch.mask.sum()) if unit != "sequence" else len(batch)
        scores = fisher.score_matrix(policy, batch.observations, batch.actions, batch.mask)
        matrix = fisher.exact_fisher(policy, batch.observations, mask=batch.mask) * len(batch) / units
        direction = natural_gradient.solve(matrix, scores.T @ batch_advantages(batch) / units, 0.1)
        expected = direction * (2e-8 / (direction @ matrix @ direction)).sqrt()
        options: dict[str, Any] = {"max_iterations": 200, "tolerance": 1e-12, "unit": unit}
        moved, metrics = change(TrustRegion(1e-8, **options), batch)
        # The cubic term of the KL, of relative size √δ = 1e-4, may put the longest step just outside.
        assert metrics["step_fraction"] in (1.0, 0.8)
        torch.testing.assert_close(moved, metrics["step_fraction"] * expected, rtol=1e-6, atol=1e-12)
        assert metrics["kl_step"] == pytest.approx(metrics["step_fraction"] ** 2 * 1e-8, rel=1e-3)

    @pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.3])
    @pytest.mark.parametrize("unit", ["sequence", "token"])
    def test_never_leaves_the_region_and_always_gains(self, max_kl: float, unit: str) -> None:
        policy = make_policy()
        batch = make_batch(policy)
        before, old = policy.logits(batch.observations), policy.log_prob(batch)
        rule = TrustRegion(max_kl, damping=0.01, unit=unit)
        metrics = rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
        units = len(batch) if unit == "sequence" else int(batch.mask.sum())
        mean = diagnostics.kl_divergence(before, policy.logits(batch.observations), batch.mask)
        kl = mean.item() * int(batch.mask.sum()) / units
        assert 0.1 * max_kl < kl <= max_kl
        assert metrics["kl_step"] == pytest.approx(kl, rel=1e-9)
        gain = ((policy.log_prob(batch) - old).exp() - 1).sum(dim=1) @ batch_advantages(batch) / units
        assert metrics["surrogate_gain"] == pytest.approx(gain.item(), rel=1e-9)
        assert gain > 0

    def test_shortens_the_step_until_the_kl_fits(self) -> None:
        """A region so wide that its quadratic picture is wrong: the full step leaves it, some power of 0.8 does not."""
        batch = make_batch(make_policy())
        _, metrics = change(TrustRegion(1.0, damping=0.001, max_iterations=50), batch)
        trials = math.log(metrics["step_fraction"]) / math.log(0.8)
        assert round(trials) >= 1
        assert trials == pytest.approx(round(trials))
        assert metrics["kl_step"] <= 1.0

    def test_the_optimizer_has_no_say_and_the_gradient_is_minus_the_step(self) -> None:
        batch = make_batch(make_policy())
        short, _ = change(TrustRegion(), batch, 0.001)
        long, metrics = change(TrustRegion(), batch, 10.0)
        assert torch.equal(short, long)
        policy = make_policy()
        before = flat(policy)
        TrustRegion().step(policy, batch, torch.optim.SGD(policy.parameters()))
        torch.testing.assert_close(before - flat(policy), diagnostics.flat_gradient(policy), rtol=1e-12, atol=1e-15)
        assert metrics["gradient_norm"] == pytest.approx(long.norm().item())

    def test_does_nothing_when_no_trial_passes(self) -> None:
        """One trial, of a length at which the quadratic picture fails: the parameters are bit for bit what they were.

        π = (0.9, 0.1) and the second arm is better. ½ · 0.09 d² = 2 at d = 6.7, which makes π' = (0.011, 0.989) and the
        KL 3.7.
        """
        policy = TabularSoftmax.from_probs(torch.tensor([[0.9, 0.1]], dtype=torch.float64))
        batch = Batch(
            torch.zeros(2, 1, dtype=torch.int64),
            torch.tensor([[0], [1]]),
            torch.ones(2, 1, dtype=torch.bool),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            torch.tensor([[0.9], [0.1]], dtype=torch.float64).log(),
        )
        before = policy.table.weight.detach().clone()
        rule = TrustRegion(max_kl=2.0, damping=0.0, trials=1)
        metrics = rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
        assert metrics["step_fraction"] == metrics["gradient_norm"] == metrics["kl_step"] == 0
        assert torch.equal(policy.table.weight, before)
        assert metrics["backward_passes"] == 2 + metrics["cg_iterations"]

    def test_shortens_the_step_until_the_surrogate_gains(self) -> None:
        """Logits (sin θ, 0) at θ = 0: F = ¼, so the longest step for δ = 2 is 4, where the sine is negative again.

        The KL is far below 2 everywhere. 0.8 · 4 = 3.2 is still beyond π; 0.64 · 4 = 2.56 is the first that gains.
        """

        class Sine(CategoricalPolicy):
            def __init__(self) -> None:
                super().__init__()
                self.angle = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

            def logits(self, observations: Tensor) -> Tensor:
                return torch.stack([self.angle.sin(), 0 * self.angle], dim=-1).expand(*observations.shape, 2)

        batch = Batch(
            torch.zeros(2, 1, dtype=torch.int64),
            torch.tensor([[0], [1]]),
            torch.ones(2, 1, dtype=torch.bool),
            torch.tensor([1.0, 0.0], dtype=torch.float64),
            torch.full((2, 1), 0.5, dtype=torch.float64).log(),
        )
        policy = Sine()
        metrics = TrustRegion(2.0, damping=0.0).step(policy, batch, torch.optim.SGD(policy.parameters()))
        assert policy.angle.item() == pytest.approx(2.56)
        assert metrics["step_fraction"] == pytest.approx(0.64)
        logit = math.sin(2.56)
        right = 1 / (1 + math.exp(-logit))  # π'(0), 1/2 before; A = ±1
        assert metrics["surrogate_gain"] == pytest.approx((2 * right - 1 - (2 * (1 - right) - 1)) / 2)
        assert metrics["kl_step"] == pytest.approx(-0.5 * math.log(4 * right * (1 - right)))

    def test_does_not_depend_on_the_parameters(self) -> None:
        """Logits θ/3 instead of θ: the policy after one step is the same, as for any natural gradient without damping.

        With gradient ascent it makes a ninth of the change.
        """
        torch.manual_seed(0)
        bandit = ContextualBandit(torch.rand(3, 4, dtype=torch.float64))

        class Scaled(TabularSoftmax):
            def logits(self, observations: Tensor) -> Tensor:
                return super().logits(observations) / 3

        start = torch.rand(3, 4, dtype=torch.float64)
        after = {}
        for rule in (TrustRegion(damping=1e-12, max_iterations=50), Reinforce()):
            for kind, scale in ((TabularSoftmax, 1.0), (Scaled, 3.0)):
                policy = kind(3, 4).double()
                policy.table.weight.data = start * scale
                batch = bandit.sample(policy, 64, generator=torch.Generator().manual_seed(0))
                rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
                after[type(rule), kind] = policy.logits(torch.arange(3)).softmax(-1).detach()
        torch.testing.assert_close(after[TrustRegion, Scaled], after[TrustRegion, TabularSoftmax], rtol=1e-6, atol=1e-8)
        assert (after[Reinforce, Scaled] - after[Reinforce, TabularSoftmax]).abs().max() > 1e-3

    @pytest.mark.usefixtures("unchecked")
    def test_errors_say_what_was_expected_and_what_came(self) -> None:
        for options, message in (
            ({"max_kl": 0.0}, r"max_kl: expected a finite number > 0, got 0.0"),
            ({"damping": -1.0}, r"damping: expected a finite number >= 0, got -1.0"),
            ({"trials": 0}, r"trials: expected a finite number >= 1, got 0"),
            ({"shrink": 1.0}, r"shrink: expected a number between 0 and 1, got 1.0"),
            ({"unit": "word"}, r"unit: expected one of sequence, step, token, got 'word'"),
        ):
            with pytest.raises(ValueError, match=message):
                TrustRegion(**options)  # type: ignore[arg-type]
