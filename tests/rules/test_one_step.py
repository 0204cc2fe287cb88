"""One suite over all rules, then what is special to those of one step without an old policy."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch

from isopo_mini.batch import Batch
from isopo_mini.engine import gram_matrices
from isopo_mini.geometry import fisher, isopo, natural_gradient
from isopo_mini.policies import MLP, CausalTransformer, TabularSoftmax
from isopo_mini.rules import (
    ClippedSurrogate,
    ExactFisherIsopo,
    FisherNormalizedIsopo,
    LayerScaledReinforce,
    NaturalGradient,
    NtkIsopo,
    RankOneNaturalGradient,
    Reinforce,
    TrustRegion,
    batch_advantages,
    centred_advantages,
)
from isopo_mini.rules.rule_parts import assign_gradient, spread_order
from isopo_mini.tasks.bandit import ContextualBandit
from isopo_mini.training import diagnostics
from isopo_mini.training.loop import train

RULES: dict[str, Callable[[], Any]] = {
    "REINFORCE": Reinforce,
    "REINFORCE, microbatches": lambda: Reinforce(microbatch_size=5),
    "natural gradient, dense": lambda: NaturalGradient(damping=0.1),
    "natural gradient, CG": lambda: NaturalGradient(damping=0.1, solver="cg"),
    "natural gradient, dual": lambda: NaturalGradient(damping=0.1, fisher="empirical", solver="dual"),
    "natural gradient, empirical": lambda: NaturalGradient(damping=0.1, fisher="empirical"),
    "ISOPO (NTK)": NtkIsopo,
    "ISOPO (NTK), microbatches": lambda: NtkIsopo(microbatch_size=5),
    "ISOPO (NTK), blocks": lambda: NtkIsopo(block_size=5),
    "ISOPO (NTK), sketched": lambda: NtkIsopo(gram="sketched", sketch_size=2),
    "ISOPO (NTK), all layers together": lambda: NtkIsopo(layers="together"),
    "ISOPO (Fisher)": FisherNormalizedIsopo,
    "ISOPO (Fisher), tokens": lambda: FisherNormalizedIsopo("token"),
    "ISOPO (Fisher), exact": ExactFisherIsopo,
    "ISOPO (NTK), natural": lambda: NtkIsopo(scale="natural"),
    "ISOPO (NTK), with its spectra": lambda: NtkIsopo(spectra=True),
    "ISOPO (Fisher), in the scale of the gradient": lambda: FisherNormalizedIsopo(scale="gradient"),
    "ISOPO (Fisher), natural": lambda: FisherNormalizedIsopo(scale="natural"),
    "rank one": RankOneNaturalGradient,
    "rank one, minibatches": lambda: RankOneNaturalGradient(minibatches=3),
    "layer scaled": LayerScaledReinforce,
    "layer scaled, microbatches": lambda: LayerScaledReinforce(microbatch_size=5),
    "PPO": ClippedSurrogate,
    "PPO, epochs and minibatches": lambda: ClippedSurrogate("ppo", epochs=2, minibatches=3),
    "GRPO": lambda: ClippedSurrogate("grpo", epochs=4),
    "Dr. GRPO": lambda: ClippedSurrogate("dr_grpo", epochs=4),
    "DAPO": lambda: ClippedSurrogate("dapo", epochs=4),
    "GSPO": lambda: ClippedSurrogate("gspo", epochs=4, clip_low=0.2, clip_high=0.2),
    "CISPO": lambda: ClippedSurrogate("cispo", epochs=4),
    "CISPO, upper side only": lambda: ClippedSurrogate("cispo", epochs=4, dialect="trl"),
    "COPG": lambda: ClippedSurrogate("copg", epochs=4),
    "REINFORCE, batch reused": lambda: ClippedSurrogate("reinforce", epochs=2),
    "TRPO": lambda: TrustRegion(damping=0.01),
}


# Every name that a rule may report. One thing has one name.
METRICS = {"backward_passes", "gradient_norm", "cg_iterations"}
METRICS |= {"ratio_mean", "clip_fraction", "kl_old"}  # of the clipped surrogates
METRICS |= {"step_fraction", "kl_step", "surrogate_gain"}  # of the trust region
METRICS |= {"participation", "damping_share"}  # of the NTK, if its spectra are asked for


def make_bandit(seed: int = 0) -> ContextualBandit:
    generator = torch.Generator().manual_seed(seed)
    return ContextualBandit(
        torch.rand(4, 3, generator=generator).double(),
        noise="gaussian",
        noise_scale=0.1,
        features=torch.randn(4, 5, generator=generator).double(),
    )


def make_policy() -> MLP:
    torch.manual_seed(1)
    return MLP(5, 3, hidden=(8,)).double()


def make_batch(policy: MLP, sequences: int = 16) -> Batch:
    return make_bandit().sample(policy, sequences, generator=torch.Generator().manual_seed(2))


def expected_passes(rule: Any, metrics: dict[str, float]) -> float:
    """One for the gradient, or one an epoch; and one for every product with F."""
    products = metrics.get("cg_iterations", 0.0)
    return getattr(rule, "epochs", 1) + products + isinstance(rule, TrustRegion)  # which measures xᵀFx as well


def direction(rule: Any, policy: Any, batch: Batch) -> torch.Tensor:
    """The ascent direction: what plain gradient descent with step size 1 adds to the parameters."""
    before = torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()
    rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
    return torch.cat([p.detach().flatten() for p in policy.parameters()]) - before


@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    def test_reports_the_common_metrics(self, name: str) -> None:
        policy, rule = make_policy(), RULES[name]()
        metrics = rule.step(policy, make_batch(policy), torch.optim.SGD(policy.parameters(), lr=0.1))
        assert metrics.keys() <= METRICS
        assert all(type(value) is float for value in metrics.values())
        assert metrics["backward_passes"] == expected_passes(rule, metrics)
        assert metrics["gradient_norm"] == pytest.approx(diagnostics.flat_gradient(policy).norm().item())
        assert metrics["gradient_norm"] > 0

    def test_every_gradient_has_the_shape_of_its_parameter(self, name: str) -> None:
        policy = make_policy()
        RULES[name]().step(policy, make_batch(policy), torch.optim.SGD(policy.parameters(), lr=0.1))
        for parameter in policy.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.dtype == parameter.dtype
            assert torch.isfinite(parameter.grad).all()

    def test_does_not_change_the_batch(self, name: str) -> None:
        policy = make_policy()
        batch, same = make_batch(policy), make_batch(policy)
        direction(RULES[name](), policy, batch)
        for field in ("observations", "actions", "mask", "rewards", "log_probs", "groups"):
            assert torch.equal(getattr(batch, field), getattr(same, field))

    def test_is_deterministic(self, name: str) -> None:
        policy, other = make_policy(), make_policy()
        batch = make_batch(policy)
        assert torch.equal(direction(RULES[name](), policy, batch), direction(RULES[name](), other, batch))

    def test_equal_rewards_change_nothing(self, name: str) -> None:
        policy = make_policy()
        batch = make_batch(policy)
        equal = Batch(
            batch.observations, batch.actions, batch.mask, torch.full_like(batch.rewards, 3.0), batch.log_probs
        )
        assert torch.equal(direction(RULES[name](), policy, equal), torch.zeros(75, dtype=torch.float64))

    def test_improves_a_bandit(self, name: str, unchecked: None) -> None:
        policy, bandit = make_policy(), make_bandit()
        before = bandit.evaluate(policy)["gap"]
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)  # the rules differ in scale, Adam does not mind
        rule = RULES[name]()
        table = train(policy, bandit, rule, optimizer, steps=20, seed=0, evaluate_every=20, progress=False)
        assert table["gap"].iloc[-1] < 0.5 * before
        passes = [expected_passes(rule, row) for row in table.to_dict("records")]
        assert table["backward_passes"].iloc[-1] == sum(passes) >= 20

    def test_what_was_left_in_a_gradient_is_forgotten(self, name: str) -> None:
        """A placeholder of an optimizer, or one of a part of the policy, holds few parameters; `.grad` is of all."""
        fresh, used = make_policy(), make_policy()
        batch, rule, other = make_batch(fresh), RULES[name](), RULES[name]()
        for parameter in used.parameters():
            parameter.grad = torch.ones_like(parameter)
        last = list(used.parameters())[-1:]
        expected = other.step(fresh, batch, torch.optim.SGD(list(fresh.parameters())[-1:], lr=1e-9))
        assert rule.step(used, batch, torch.optim.SGD(last, lr=1e-9)) == expected
        assert torch.equal(diagnostics.flat_gradient(used), diagnostics.flat_gradient(fresh))

    def test_the_optimizer_decides_what_moves_and_nothing_else(self, name: str) -> None:
        """With a step size of next to nothing, four steps report the same whatever the optimizer holds."""
        tables = []
        for part in (slice(None), slice(-2, None)):
            policy, rule = make_policy(), RULES[name]()
            optimizer = torch.optim.SGD(list(policy.parameters())[part], lr=1e-12)
            table = train(policy, make_bandit(), rule, optimizer, 4, 0, sequences_per_step=16, progress=False)
            tables.append(table.drop(columns="seconds"))
        pd.testing.assert_frame_equal(*tables, rtol=1e-6, atol=1e-9)

    def test_only_the_trainable_part_of_a_policy_moves(self, name: str) -> None:
        policy = make_policy()
        frozen = next(policy.parameters())
        frozen.requires_grad_(False)
        before = frozen.clone()
        assert direction(RULES[name](), policy, make_batch(policy)).norm() > 0
        assert torch.equal(frozen, before)


def test_the_natural_gradients_agree_with_each_other() -> None:
    policy = make_policy()
    batch = make_batch(policy)

    def of(**options: Any) -> torch.Tensor:
        return direction(NaturalGradient(damping=0.1, **options), make_policy(), batch)

    torch.testing.assert_close(of(solver="cg", tolerance=1e-12), of(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(of(fisher="empirical", solver="dual"), of(fisher="empirical"), rtol=1e-8, atol=1e-10)
    assert diagnostics.cosine(of(), of(fisher="empirical")) < 0.999  # but the two Fisher matrices differ


def test_ntk_on_all_layers_together_is_the_damped_natural_gradient() -> None:
    """λ(K+λI)⁻¹A over the whole policy = λ·S times the dual natural gradient with damping λ/S, divided by S."""
    policy = make_policy()
    batch = make_batch(policy)
    scores = fisher.score_matrix(policy, batch.observations, batch.actions, batch.mask)
    damping = 0.3 * float((scores @ scores.T).trace()) / len(batch)  # λ = ρ tr K/S
    ntk = direction(NtkIsopo(0.3, layers="together"), make_policy(), batch)
    natural = direction(NaturalGradient(damping / len(batch), fisher="empirical", solver="dual"), make_policy(), batch)
    torch.testing.assert_close(ntk, damping / len(batch) * natural, rtol=1e-9, atol=1e-12)


def test_ntk_in_the_natural_scale_on_all_layers_together_is_the_damped_natural_gradient() -> None:
    """Itself, with λ = ρ·tr K/S² of the mean over sequences, and not λ times it."""
    policy = make_policy()
    batch = make_batch(policy)
    found = direction(NtkIsopo(0.5, "natural", layers="together"), policy, batch)
    scores = fisher.score_matrix(make_policy(), batch.observations, batch.actions, batch.mask)
    damping = 0.5 * scores.square().sum().item() / 16**2
    expected = natural_gradient.solve(scores.T @ scores / 16, scores.T @ batch_advantages(batch) / 16, damping) / 16
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_layer_scaled_is_ntk_with_large_damping_times_the_damping() -> None:
    batch, ntk, layer_scaled = make_batch(make_policy()), make_policy(), make_policy()
    direction(NtkIsopo(1e9, "natural"), ntk, batch)
    direction(LayerScaledReinforce(), layer_scaled, batch)
    found, expected = diagnostics.flat_gradient(ntk), diagnostics.flat_gradient(layer_scaled)
    assert (1e9 * found - expected).norm() < 1e-7 * expected.norm()  # (K/λ + I)⁻¹ is I up to S/ρ


def test_layer_scaled_is_reinforce_with_one_factor_a_layer() -> None:
    batch, policy, reinforce = make_batch(make_policy()), make_policy(), make_policy()
    direction(LayerScaledReinforce(), policy, batch)
    direction(Reinforce(), reinforce, batch)
    factors = []
    for scaled, plain in zip(policy.parameters(), reinforce.parameters(), strict=True):
        ratios = scaled.grad / plain.grad
        factors.append(ratios.mean().item())
        torch.testing.assert_close(ratios, torch.full_like(ratios, factors[-1]), rtol=1e-9, atol=0)
    assert factors[0] == pytest.approx(factors[1], rel=1e-9), "a weight and its bias are one layer"
    assert factors[2] == pytest.approx(factors[3], rel=1e-9)
    assert abs(factors[0] / factors[2] - 1) > 0.1


def test_ntk_with_large_damping_is_reinforce() -> None:
    batch = make_batch(make_policy())
    reinforce = direction(Reinforce(), make_policy(), batch)
    ntk = direction(NtkIsopo(1e9), make_policy(), batch)
    assert (ntk - reinforce).norm() < 1e-6 * reinforce.norm()


def test_microbatches_leave_reinforce_and_change_isopo() -> None:
    """REINFORCE is a sum over sequences. ISOPO sees which sequences share a microbatch."""
    batch = make_batch(make_policy())
    whole, parts = (direction(Reinforce(microbatch_size=size), make_policy(), batch) for size in (None, 3))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)
    whole, parts = (direction(NtkIsopo(0.1, microbatch_size=size), make_policy(), batch) for size in (None, 4))
    assert diagnostics.cosine(whole, parts) < 0.999
    blocks = direction(NtkIsopo(0.1, block_size=4), make_policy(), batch)
    torch.testing.assert_close(blocks, parts, rtol=1e-9, atol=1e-12)


def test_exact_fisher_isopo_on_a_tabular_policy_in_closed_form() -> None:
    """One context: every sampled pull moves the policy by A_s/√(gᵀFg) along its score g = e_a − π."""
    policy = TabularSoftmax.from_probs(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))
    actions = torch.tensor([[0], [1], [2], [2]])
    batch = Batch(
        torch.zeros(4, 1, dtype=torch.int64),
        actions,
        torch.ones(4, 1, dtype=torch.bool),
        torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64),
        torch.zeros(4, 1, dtype=torch.float64),
    )
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    metric = torch.diag(probs) - torch.outer(probs, probs)
    expected = torch.zeros(3, dtype=torch.float64)
    for action, advantage in zip(actions[:, 0], batch_advantages(batch), strict=True):
        score = torch.eye(3, dtype=torch.float64)[action] - probs
        expected += advantage * score / (score @ metric @ score).sqrt() / 4
    torch.testing.assert_close(direction(ExactFisherIsopo(), policy, batch), expected, rtol=1e-10, atol=1e-12)


def test_a_transformer_takes_every_layerwise_rule() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (6, 5))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(6, 4, dtype=torch.bool), torch.rand(6), torch.zeros(6, 4))
    for rule in (NtkIsopo(gram="sketched", sketch_size=4), FisherNormalizedIsopo("token"), NtkIsopo(microbatch_size=2)):
        policy = CausalTransformer(7, 4, width=8, layers=1, heads=2)
        before = diagnostics.snapshot(policy)
        rule.step(policy, batch, torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0))
        assert min(diagnostics.update_norms(before, policy).values()) > 0  # every parameter has moved


def test_the_spectra_of_a_step_are_those_of_its_gram_matrices() -> None:
    policy = make_policy()  # layers of 48 and 27 parameters: with 60 sequences one of them goes by its columns
    batch = make_batch(policy, 120)
    sizes: dict[str, list[tuple[str, torch.Tensor]]] = {"participation": [], "damping_share": []}
    for part in batch.microbatches(60):
        for name, K in gram_matrices(policy, partial(policy.log_prob, part)).items():
            eigenvalues = torch.linalg.eigvalsh(K)
            sizes["participation"].append((name, eigenvalues.sum().square() / eigenvalues.square().sum()))
            sizes["damping_share"].append((name, 0.3 * eigenvalues.mean() / eigenvalues[-1]))
    metrics = NtkIsopo(0.3, spectra=True, microbatch_size=60).step(
        policy, batch, torch.optim.SGD(policy.parameters(), lr=0.1)
    )
    for name, found in sizes.items():
        layers = sorted({layer for layer, _ in found})
        means = [torch.stack([value for layer, value in found if layer == one]).mean() for one in layers]
        assert metrics[name] == pytest.approx(torch.stack(means).median().item(), rel=1e-8)


def test_spectra_change_nothing_but_the_metrics() -> None:
    batch = make_batch(make_policy())
    plain, watched = (direction(NtkIsopo(0.3, spectra=spectra), make_policy(), batch) for spectra in (False, True))
    assert torch.equal(plain, watched)


def test_another_policy_starts_with_its_own_averages() -> None:
    rule = NtkIsopo(0.1)
    batch = make_batch(make_policy())
    first = direction(rule, make_policy(), batch)
    assert torch.equal(direction(rule, make_policy(), batch), first)


def test_centred_advantages_respect_groups() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    advantages = centred_advantages(batch)
    assert batch.groups is not None
    for group in batch.groups.unique():
        assert advantages[batch.groups == group].sum().abs() < 1e-12
    total = isopo.normalized_coefficients(torch.ones(16).double(), batch_advantages(batch)).sum()
    assert abs(total) < 1e-12


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"damping: expected a finite number >= 0, got -1"):
        NaturalGradient(damping=-1.0)
    with pytest.raises(ValueError, match=r"solver: expected one of dense, cg, got 'dual'"):
        NaturalGradient(solver="dual")
    with pytest.raises(ValueError, match=r"damping: expected a finite number > 0, got 0"):
        NtkIsopo(damping=0.0)
    with pytest.raises(ValueError, match=r"norm: expected one of sequence, token, token-unscaled, got 'exact'"):
        FisherNormalizedIsopo(norm="exact")
    with pytest.raises(ValueError, match=r"scale: expected one of norm, gradient, natural, got 'layer'"):
        FisherNormalizedIsopo(scale="layer")
    with pytest.raises(ValueError, match=r"scale: expected one of gradient, natural, got 'norm'"):
        NtkIsopo(scale="norm")
    policy = make_policy()
    batch = make_batch(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"advantages\(batch\): expected shape \(S=16\), got \(16, 1\)"):
        Reinforce(advantages=lambda batch: batch.rewards[:, None]).step(policy, batch, optimizer)
    with pytest.raises(ValueError, match=r"gradient: expected shape \(P=75\), got \(3,\)"):
        assign_gradient(policy, torch.zeros(3))
    with pytest.raises(ValueError, match=r"size: expected at least 1, got 0"):
        Reinforce(microbatch_size=0).step(policy, batch, optimizer)


class TestSpread:
    """Which sequences share a microbatch decides their coefficients."""

    def batch(self, policy: MLP) -> Batch:
        batch = make_batch(policy, 8)
        return dataclasses.replace(batch, groups=torch.tensor([3, 3, 3, 5, 5, 9, 9, 9]))

    def direction(self, batch: Batch, damping: float = 0.1, **options: Any) -> torch.Tensor:
        rule = NtkIsopo(damping, advantages=centred_advantages, microbatch_size=3, **options)
        return direction(rule, make_policy(), batch)

    def test_groups_take_turns(self) -> None:
        assert spread_order(self.batch(make_policy())).tolist() == [0, 3, 5, 1, 4, 6, 2, 7]

    def test_it_is_the_batch_in_that_order(self) -> None:
        batch = self.batch(make_policy())
        by_hand = self.direction(batch.select(torch.tensor([0, 3, 5, 1, 4, 6, 2, 7])))
        torch.testing.assert_close(self.direction(batch, spread=True), by_hand)
        assert not torch.allclose(self.direction(batch), by_hand, rtol=1e-2)

    def test_reinforce_is_the_same_in_any_order(self) -> None:
        batch = self.batch(make_policy())
        spread, together = (self.direction(batch, damping=1e9, spread=choice) for choice in (True, False))
        torch.testing.assert_close(spread, together, rtol=1e-5, atol=1e-6)
