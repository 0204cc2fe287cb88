"""Steps of a given KL: the KL that comes out, the direction that stays the optimizer's, and what is left alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from isopo_mini.batch import Batch
from isopo_mini.geometry import fisher
from isopo_mini.policies import MLP, CausalTransformer
from isopo_mini.rules import (
    ClippedSurrogate,
    FisherNormalizedIsopo,
    LayerScaledReinforce,
    NtkIsopo,
    Reinforce,
    TrustRegion,
)
from isopo_mini.rules.kl_steps import KLTargeted
from isopo_mini.rules.optimizers import OPTIMIZERS, make_optimizer
from isopo_mini.rules.rule_specs import Reuse
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training.diagnostics import cosine, kl_divergence
from isopo_mini.training.loop import train

SMALL = 1e-5  # nats
RULES: dict[str, Callable[[], Any]] = {
    "REINFORCE": Reinforce,
    "NTK, natural": lambda: NtkIsopo(scale="natural"),
    "layer scaled": LayerScaledReinforce,
    "Fisher": FisherNormalizedIsopo,
    "PPO, one epoch": lambda: ClippedSurrogate("ppo", epochs=1),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def make_policy(dtype: torch.dtype = torch.float64) -> MLP:
    torch.manual_seed(1)
    policy = MLP(5, 3, hidden=(8, 6))
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.5)
    return policy.to(dtype)


def make_bandit(dtype: torch.dtype = torch.float64) -> ContextualBandit:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(4, 5, generator=generator).to(dtype)
    return ContextualBandit(torch.rand(4, 3, generator=generator).to(dtype), features=features)


def make_batch(policy: MLP, sequences: int = 32) -> Batch:
    return make_bandit().sample(policy, sequences, torch.Generator().manual_seed(2))


def make_transformer() -> CausalTransformer:
    torch.manual_seed(1)
    policy = CausalTransformer(6, 4, width=8, layers=1, heads=2).double()
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.5)
    return policy


def make_token_batch() -> Batch:
    """Eight sequences of one, two, three and four real tokens, so that a position is not a sequence."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(6, (8, 5), generator=generator)
    lengths = torch.tensor([1, 2, 3, 4, 1, 1, 2, 1])
    mask = torch.arange(4)[None, :] < lengths[:, None]
    rewards = torch.rand(8, generator=generator, dtype=torch.float64)
    log_probs = torch.full((8, 4), -math.log(6.0), dtype=torch.float64)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, rewards, log_probs)


def flat(policy: nn.Module) -> Tensor:
    return parameters_to_vector(policy.parameters()).detach().clone()


def step(rule: Any, policy: Any, batch: Batch, optimizer: str = "sgd", learning_rate: float = 0.1) -> tuple[Any, ...]:
    """d, KL(before ‖ after) as `train` measures it, and the metrics."""
    before, logits = flat(policy), policy.logits(batch.observations).detach()
    metrics = rule.step(policy, batch, make_optimizer(optimizer, policy, learning_rate))
    kl = kl_divergence(logits, policy.logits(batch.observations), batch.mask).item()
    return flat(policy) - before, kl, metrics


def dense_half_length(policy: Any, batch: Batch, direction: Tensor) -> float:
    """½dᵀFd, F a mean over real positions: every position a row of its own."""
    matrix = fisher.exact_fisher(policy, batch.observations, mask=batch.mask) * len(batch) / batch.mask.sum()
    return 0.5 * (direction @ matrix @ direction).item()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rule", RULES)
class TestEveryRuleAndOptimizer:
    def test_the_quadratic_form_is_the_target(self, rule: str, optimizer: str) -> None:
        policy = make_policy()
        batch = make_batch(policy)
        for kl in (1e-6, 0.02, 3.0):  # a definition, for long steps too
            policy = make_policy()
            direction, _, metrics = step(KLTargeted(RULES[rule](), kl), policy, batch, optimizer)
            assert dense_half_length(make_policy(), batch, direction) == pytest.approx(kl, rel=1e-6)
            assert metrics["step_size"] > 0

    def test_a_small_target_is_the_kl_that_comes_out(self, rule: str, optimizer: str) -> None:
        policy = make_policy()
        batch = make_batch(policy)
        _, kl, _ = step(KLTargeted(RULES[rule](), SMALL), policy, batch, optimizer)
        assert kl == pytest.approx(SMALL, rel=0.05)

    def test_the_direction_is_the_optimizers(self, rule: str, optimizer: str) -> None:
        """And its length η times what a learning rate of one would do."""
        policy, plain = make_policy(), make_policy()
        batch = make_batch(policy)
        expected, _, expected_metrics = step(RULES[rule](), plain, batch, optimizer, learning_rate=1.0)
        found, _, metrics = step(KLTargeted(RULES[rule](), 0.01), policy, batch, optimizer)
        assert cosine(found, expected) == pytest.approx(1, abs=1e-12)
        assert metrics.pop("step_size") == pytest.approx((found.norm() / expected.norm()).item(), rel=1e-9)
        assert metrics == expected_metrics
        for one, other in zip(policy.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)

    def test_the_learning_rate_says_nothing_and_is_kept(self, rule: str, optimizer: str) -> None:
        policy, other = make_policy(), make_policy()
        batch = make_batch(policy)
        built = make_optimizer(optimizer, other, 7e-4)
        step(KLTargeted(RULES[rule](), 0.01), policy, batch, optimizer, learning_rate=30.0)
        KLTargeted(RULES[rule](), 0.01).step(other, batch, built)
        assert torch.equal(flat(policy), flat(other))
        assert all(group["lr"] == 7e-4 for group in built.param_groups)


class TestUnequalLengths:
    @EVERY_OPTIMIZER
    def test_the_unit_is_nats_a_position(self, optimizer: str) -> None:
        policy, batch = make_transformer(), make_token_batch()
        direction, kl, _ = step(KLTargeted(Reinforce(), SMALL), policy, batch, optimizer)
        assert kl == pytest.approx(SMALL, rel=0.05)  # the loop's: a mean over real positions
        assert dense_half_length(make_transformer(), batch, direction) == pytest.approx(SMALL, rel=1e-6)

    def test_padding_changes_nothing(self) -> None:
        """The same sequences with other tokens where nothing is real."""
        batch, steps = make_token_batch(), []
        for padding in (0, 3):
            actions = batch.actions.masked_fill(~batch.mask, padding)
            padded = dataclasses.replace(batch, actions=actions)
            steps.append(step(KLTargeted(Reinforce(), 0.01), make_transformer(), padded)[0])
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=1e-14)


class Given:
    """Leaves fixed gradients, so that the states of optimizers can be compared wherever they have led."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, policy: nn.Module, batch: Batch, optimizer: Any) -> dict[str, float]:
        optimizer.zero_grad()
        for parameter in policy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.generator, dtype=parameter.dtype)
        optimizer.step()
        return {"backward_passes": 1.0}


class TestStateOfTheOptimizer:
    @EVERY_OPTIMIZER
    def test_is_what_it_would_be_and_so_are_later_directions(self, optimizer: str) -> None:
        """Momentum is of gradients, and not of steps: how far each of them went does not enter it."""
        policy, plain = make_policy(), make_policy()
        batch = make_batch(policy)
        one, other = make_optimizer(optimizer, policy, 0.1), make_optimizer(optimizer, plain, 0.1)
        rule, plain_rule = KLTargeted(Given(), 0.01), Given()
        for _ in range(3):
            start, plain_start = flat(policy), flat(plain)
            rule.step(policy, batch, one)
            plain_rule.step(plain, batch, other)
            assert cosine(flat(policy) - start, flat(plain) - plain_start) == pytest.approx(1, abs=1e-12)
        found, expected = states(one), states(other)
        assert len(found) == len(expected)
        assert (len(found) > 0) == (optimizer != "sgd")
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    def test_momentum_goes_on_when_the_advantages_are_zero(self) -> None:
        """As far as δ allows: it is the optimizer that wants to move, and the target is a target."""
        policy = make_policy()
        batch = make_batch(policy)
        optimizer = make_optimizer("momentum", policy, 0.1)
        rule = KLTargeted(Reinforce(), SMALL)
        rule.step(policy, batch, optimizer)
        before, start = policy.logits(batch.observations).detach(), flat(policy)
        rule.step(policy, equal_rewards(batch), optimizer)
        assert (flat(policy) - start).norm() > 0
        assert kl_divergence(before, policy.logits(batch.observations)).item() == pytest.approx(SMALL, rel=0.05)


def states(optimizer: Any) -> list[Tensor]:
    """Every tensor an optimizer remembers, in the order of its parameters."""
    parts = getattr(optimizer, "optimizers", [optimizer])
    return [
        value
        for part in parts
        for state in part.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def equal_rewards(batch: Batch) -> Batch:
    return dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, 3.0))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rule", RULES)
def test_zero_advantages_leave_the_policy_as_it_is(rule: str, optimizer: str) -> None:
    policy = make_policy()
    before = flat(policy)
    metrics = KLTargeted(RULES[rule](), 1.0).step(
        policy, equal_rewards(make_batch(policy)), make_optimizer(optimizer, policy, 0.1)
    )
    assert torch.equal(flat(policy), before)
    assert metrics["step_size"] == 0.0


class TestSeveralSteps:
    """Each of the optimizer's steps is scaled, with F of the policy at that step."""

    def by_hand(self, rule: Any, times: int, kl: float) -> Tensor:
        policy = make_policy()
        batch = make_batch(policy)
        for _ in range(times):
            at, before = make_policy(), flat(policy)
            nn.utils.vector_to_parameters(before, at.parameters())
            rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
            direction = flat(policy) - before
            size = math.sqrt(kl / dense_half_length(at, batch, direction))
            nn.utils.vector_to_parameters(before + size * direction, policy.parameters())
        return flat(policy)

    def test_of_a_batch_that_is_used_again(self) -> None:
        policy = make_policy()
        batch = make_batch(policy)
        metrics = KLTargeted(Reuse(Reinforce(), 2), 0.02).step(policy, batch, make_optimizer("sgd", policy, 0.1))
        torch.testing.assert_close(flat(policy), self.by_hand(Reinforce(), 2, 0.02), rtol=1e-9, atol=1e-12)
        assert metrics["backward_passes"] == 2

    def test_of_epochs(self) -> None:
        policy = make_policy()
        batch = make_batch(policy)
        rule = KLTargeted(ClippedSurrogate("ppo", epochs=3), 0.002)
        metrics = rule.step(policy, batch, make_optimizer("sgd", policy, 0.1))
        by_hand = self.by_hand(ClippedSurrogate("ppo", epochs=1), 3, 0.002)
        torch.testing.assert_close(flat(policy), by_hand, rtol=1e-9, atol=1e-12)
        assert metrics["backward_passes"] == 3

    def test_of_minibatches_over_the_whole_batch(self) -> None:
        """A minibatch of its own F would make longer steps where it is small."""
        policy = make_policy()
        batch = make_batch(policy)
        sizes: list[float] = []

        class Watched(ClippedSurrogate):
            def step(self, policy: Any, batch: Batch, optimizer: Any) -> dict[str, float]:
                metrics = super().step(policy, batch, optimizer)
                sizes.extend(optimizer.step_sizes)
                return metrics

        rule = KLTargeted(Watched("ppo", epochs=2, minibatches=4), SMALL)
        metrics = rule.step(policy, batch, make_optimizer("sgd", policy, 0.1))
        assert len(sizes) == 8
        assert metrics["step_size"] == pytest.approx(sum(sizes) / 8)


def test_frozen_parameters_and_those_of_another_optimizer_stay() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    policy.layers[0].weight.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    optimizer = torch.optim.SGD([policy.layers[4].weight, policy.layers[4].bias], lr=0.1)
    logits = policy.logits(batch.observations).detach()
    KLTargeted(Reinforce(), SMALL).step(policy, batch, optimizer)
    moved = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"layers.4.weight", "layers.4.bias"}
    assert kl_divergence(logits, policy.logits(batch.observations)).item() == pytest.approx(SMALL, rel=0.05)


@EVERY_OPTIMIZER
def test_training_reports_the_target_as_its_kl(optimizer: str) -> None:
    """Through the loop, in single precision, for sixteen steps: one δ, whatever the optimizer."""
    policy = make_policy(torch.float32)
    target = 1e-4
    table = train(
        policy,
        make_bandit(torch.float32),
        KLTargeted(NtkIsopo(scale="natural"), target),
        make_optimizer(optimizer, policy, 0.1),
        steps=16,
        seed=0,
        progress=False,
    )
    assert table["kl"].between(0.8 * target, 1.25 * target).all()
    assert table["kl"].mean() == pytest.approx(target, rel=0.05)
    assert (table["step_size"] > 0).all()


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    @pytest.mark.parametrize("kl", [0.0, -0.1, math.inf, math.nan])
    def test_target(self, kl: float) -> None:
        with pytest.raises(ValueError, match=rf"^kl: expected a finite number > 0, got {kl}$"):
            KLTargeted(Reinforce(), kl)

    def test_learning_rates(self) -> None:
        policy = make_policy()
        before = flat(policy)
        groups = [{"params": [parameter], "lr": 0.1 * n + 0.1} for n, parameter in enumerate(policy.parameters())]
        optimizer = torch.optim.SGD(groups[:2])
        message = r"^optimizer: expected one learning rate, since the step is scaled as a whole, got \[0\.1, 0\.2\]$"
        with pytest.raises(ValueError, match=message):
            KLTargeted(Reinforce(), 0.1).step(policy, make_batch(policy), optimizer)
        assert torch.equal(flat(policy), before)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]

    def test_an_optimizer_that_fails_leaves_the_policy_where_it_was(self) -> None:
        policy = make_policy()
        before = flat(policy)

        class Failing(torch.optim.SGD):
            def step(self, closure: None = None) -> None:
                raise RuntimeError("no step")

        optimizer = Failing(policy.parameters(), lr=0.3)
        with pytest.raises(RuntimeError, match=r"^no step$"):
            KLTargeted(Reinforce(), 0.1).step(policy, make_batch(policy), optimizer)
        assert torch.equal(flat(policy), before)
        assert optimizer.param_groups[0]["lr"] == 0.3

    def test_a_rule_that_sets_the_parameters_itself_is_named(self) -> None:
        """TRPO has a δ of its own, so this one would say nothing."""
        policy = make_policy()
        with pytest.raises(TypeError, match="rule: expected one that lets the optimizer step, got TrustRegion"):
            step(KLTargeted(TrustRegion(), 0.1), policy, make_batch(policy))
