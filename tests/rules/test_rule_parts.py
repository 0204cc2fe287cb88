"""The unit of a rule: what gets one advantage and one coefficient."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from isopo_mini.batch import Batch
from isopo_mini.policies import MLP, CausalTransformer
from isopo_mini.rules import (
    ClippedSurrogate,
    ExactFisherIsopo,
    FisherNormalizedIsopo,
    NaturalGradient,
    NtkIsopo,
    Reinforce,
    TrustRegion,
)
from isopo_mini.rules.rule_parts import (
    advantages_of,
    at_positions,
    batch_advantages,
    centred_advantages,
    cut,
    standardised_advantages,
    weigh,
    with_entropy,
)
from isopo_mini.training import diagnostics

RULES: dict[str, Callable[..., Any]] = {
    "REINFORCE": Reinforce,
    "natural gradient": lambda **options: NaturalGradient(0.1, **options),
    "natural gradient, CG": lambda **options: NaturalGradient(0.1, solver="cg", tolerance=1e-12, **options),
    "natural gradient, dual": lambda **options: NaturalGradient(0.1, fisher="empirical", solver="dual", **options),
    "ISOPO (NTK)": NtkIsopo,
    "ISOPO (Fisher)": FisherNormalizedIsopo,
    "ISOPO (Fisher), exact": ExactFisherIsopo,
    "GRPO": lambda **options: ClippedSurrogate("grpo", 3, **options),
    "TRPO": lambda **options: TrustRegion(tolerance=1e-12, max_iterations=100, **options),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def make_policy() -> MLP:
    torch.manual_seed(1)
    return MLP(5, 3, hidden=(6,)).double()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def make_batch(positions: int = 4, rewards_by_step: bool = True) -> Batch:
    """Six sequences of different length, of actions that the policy took."""
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(6, positions, 5, dtype=torch.float64, generator=generator)
    actions, log_probs = make_policy().sample_actions(observations, generator=generator)
    mask = torch.arange(positions) < torch.tensor([[4], [1], [3], [2], [4], [1]])
    rewards = torch.randn(6, positions, dtype=torch.float64, generator=generator)
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    return Batch(observations, actions, mask, rewards if rewards_by_step else rewards[:, 0], log_probs, groups)


def by_step(batch: Batch) -> Tensor:
    """One advantage a position; padding is not to be looked at."""
    return batch.rewards.masked_fill(~batch.mask, math.nan)


def change(rule: Any, batch: Batch) -> Tensor:
    """What the rule, with plain gradient descent, adds to the parameters."""
    policy = make_policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=0.1))
    pairs = zip(policy.parameters(), before, strict=True)
    return torch.cat([(parameter.detach() - start).flatten() for parameter, start in pairs])


@every_rule
class TestEveryRule:
    @pytest.mark.parametrize("advantages", [by_step, centred_advantages])
    def test_steps_as_units_are_sequences_of_one_step(
        self, rule: Callable[..., Any], advantages: Callable[[Batch], Tensor]
    ) -> None:
        """The same batch cut by hand, and its advantages with it, for a rule that knows of sequences only."""
        batch = make_batch()
        given = advantages(batch)
        of_steps = torch.stack([given[s] if given.ndim == 1 else given[s, t] for s, t in batch.mask.nonzero()])
        expected = change(rule(advantages=lambda _: of_steps), batch.as_steps())
        actual = change(rule(advantages=advantages, unit="step"), batch)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        assert actual.norm() > 0

    @pytest.mark.parametrize("advantages", [by_step, centred_advantages])
    def test_tokens_are_steps_where_the_policy_reads_nothing_before_them(
        self, rule: Callable[..., Any], advantages: Callable[[Batch], Tensor]
    ) -> None:
        steps, tokens = (change(rule(advantages=advantages, unit=unit), make_batch()) for unit in ("step", "token"))
        torch.testing.assert_close(tokens, steps, rtol=1e-8, atol=1e-11)

    def test_with_one_action_a_sequence_all_units_are_one(self, rule: Callable[..., Any]) -> None:
        batch = make_batch(positions=1)
        one, *others = (change(rule(unit=unit), batch) for unit in ("sequence", "step", "token"))
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-11)

    def test_with_longer_sequences_they_are_not(self, rule: Callable[..., Any]) -> None:
        sequence, step = (
            change(rule(unit=unit, advantages=batch_advantages), make_batch()) for unit in ("sequence", "step")
        )
        cosine = diagnostics.cosine(sequence, step)
        if rule is RULES["REINFORCE"]:  # the same sum, divided by another number
            torch.testing.assert_close(step * int(make_batch().mask.sum()), sequence * 6, rtol=1e-12, atol=1e-15)
        else:
            assert (sequence - step).norm() > 0.01 * sequence.norm()
            assert cosine > 0

    @pytest.mark.usefixtures("unchecked")
    def test_unknown_unit(self, rule: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"unit: expected one of sequence, step, token, got 'word'"):
            rule(unit="word")

    @pytest.mark.usefixtures("unchecked")
    def test_rewards_of_whole_sequences_cannot_be_cut_into_steps(self, rule: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"rewards: expected one a time step \(S T\)"):
            change(rule(unit="step"), make_batch(rewards_by_step=False))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_tokens_of_a_transformer_against_tokens_cut_apart(microbatch_size: int | None) -> None:
    """REINFORCE does not cut; each token repeated with its context has the same gradient."""
    torch.manual_seed(0)
    policy = CausalTransformer(7, 5, width=8, layers=1, heads=2).double()
    tokens = torch.randint(0, 7, (6, 6))
    mask = torch.arange(5) >= torch.tensor([[1], [4], [2], [3], [0], [2]])  # prompts of different length
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.rand(6).double(), torch.zeros(6, 5).double())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    Reinforce(unit="token", microbatch_size=microbatch_size).step(policy, batch, optimizer)
    actual = diagnostics.flat_gradient(policy)
    units, advantages = cut(batch_advantages, batch, "token")
    assert len(units) == len(advantages) == int(mask.sum())
    Reinforce(lambda _: advantages).step(policy, units, optimizer)
    torch.testing.assert_close(actual, diagnostics.flat_gradient(policy), rtol=1e-10, atol=1e-13)


def test_every_layerwise_rule_takes_tokens_of_a_transformer() -> None:
    """A token's context is in its row: the gradient of position t reaches what was read before it."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (4, 5))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(4, 4, dtype=torch.bool), torch.rand(4), torch.zeros(4, 4))
    for rule in (NtkIsopo(unit="token"), FisherNormalizedIsopo(unit="token", microbatch_size=5)):
        policy = CausalTransformer(7, 4, width=8, layers=1, heads=2)
        before = diagnostics.snapshot(policy)
        rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1e-2))
        assert min(diagnostics.update_norms(before, policy).values()) > 0


def test_advantages_are_computed_before_the_batch_is_cut() -> None:
    """A baseline over the steps would be another one."""
    seen: list[int] = []

    def advantages(batch: Batch) -> Tensor:
        seen.append(len(batch))
        return batch_advantages(batch)

    for unit in ("step", "token"):
        units, values = cut(advantages, make_batch(), unit)
        assert len(units) == len(values) == 15
        torch.testing.assert_close(values[:4], batch_advantages(make_batch())[:1].expand(4))
    assert seen == [6, 6]


def test_weights_sum_to_the_mean_over_units() -> None:
    batch = make_batch()
    for unit, rows, units in (("sequence", 6, 6), ("step", 15, 15), ("token", 6, 15)):
        part, weights, count = weigh(batch_advantages, batch, unit)
        assert (len(part), count) == (rows, units)
        assert weights.shape == part.mask.shape
        expected = (batch_advantages(batch) * batch.mask.sum(dim=1)).sum() / units
        torch.testing.assert_close(weights.sum(), expected, rtol=1e-12, atol=1e-15)
        assert (weights[~part.mask] == 0).all()


def test_standardised_advantages_are_grpos() -> None:
    batch = make_batch()
    returns, advantages = batch.total_rewards(), standardised_advantages(batch)
    group = returns[2:5]
    torch.testing.assert_close(advantages[2:5], (group - group.mean()) / (group.std() + 1e-4), rtol=1e-12, atol=1e-14)
    assert advantages[5] == 0  # alone in its group
    whole = Batch(batch.observations, batch.actions, batch.mask, batch.rewards, batch.log_probs)
    torch.testing.assert_close(
        standardised_advantages(whole), (returns - returns.mean()) / (returns.std() + 1e-4), rtol=1e-12, atol=1e-14
    )


@pytest.mark.usefixtures("unchecked")
def test_advantages_are_checked() -> None:
    batch = make_batch()
    for function, by_position, error, message in (
        (by_step, False, ValueError, r"advantages\(batch\): expected shape \(S=6\), got \(6, 4\)"),
        (lambda _: torch.zeros(6, 1), True, ValueError, r"expected shape \(S=6 T=4\), got \(6, 1\)"),
        (lambda _: torch.zeros(5), True, ValueError, r"expected shape \(S=6\), got \(5,\)"),
        (lambda _: None, True, TypeError, r"expected a tensor of shape \(S\), got NoneType"),
        (lambda _: torch.zeros(6, dtype=torch.int64), False, TypeError, r"expected a floating-point tensor"),
        (lambda _: torch.full((6,), math.inf), False, ValueError, r"expected finite numbers, got inf at index \(0,\)"),
        (lambda _: torch.full((6, 4), math.nan), True, ValueError, r"expected finite numbers, got nan"),
    ):
        with pytest.raises(error, match=message):
            advantages_of(function, batch, by_position=by_position)  # type: ignore[arg-type]
    assert torch.equal(
        at_positions(torch.ones(6), batch), batch.mask.float()
    )  # one a sequence goes to each of its actions, and to no padding


class TestEntropy:
    def test_the_bonus_climbs_the_entropy(self) -> None:
        """Every action once, weighed by its probability: the expectation, and so autograd's ∇H."""
        policy = make_policy()
        observation = torch.randn(1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        log_probs = policy.logits(observation).log_softmax(-1)[0].T  # (3 actions, 1)
        expected = flat(torch.autograd.grad(-(log_probs.exp() * log_probs).sum(), list(policy.parameters())))
        every = torch.arange(3)[:, None]
        rows = observation.expand(3, 1, 5)
        batch = Batch(rows, every, torch.ones(3, 1).bool(), torch.zeros(3).double(), log_probs.detach())
        bonus = with_entropy(lambda of: torch.zeros(len(of)).double(), 0.7)(batch)
        assert bonus.mean().abs() < 1e-12
        objective = (log_probs.detach()[:, 0].exp() * bonus * policy.log_prob(batch)[:, 0]).sum()
        torch.testing.assert_close(flat(torch.autograd.grad(objective, list(policy.parameters()))), 0.7 * expected)

    def test_advantages_of_another_shape_do_not_hide_behind_a_bonus(self) -> None:
        batch = make_batch()
        with pytest.raises(ValueError, match=r"advantages\(batch\): expected shape \(S=6\), got \(1,\)"):
            with_entropy(lambda of: torch.zeros(1), 1.0)(batch)

    def test_one_advantage_a_sequence_or_a_position(self) -> None:
        batch = make_batch()
        surprise = -batch.log_probs * batch.mask
        whole = with_entropy(batch_advantages, 2.0)(batch) - batch_advantages(batch)
        torch.testing.assert_close(whole, 2 * (surprise.sum(1) - surprise.sum(1).mean()))
        by_position = with_entropy(lambda of: of.rewards, 2.0)(batch) - batch.rewards
        real = surprise[batch.mask]
        torch.testing.assert_close(by_position[batch.mask], 2 * (real - real.mean()))
