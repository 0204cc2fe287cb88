"""Rules by name: what a text means, that every name works, and which advantages and units a rule gets."""

import dataclasses
from typing import Any

import pytest
import torch

from isopo_mini.batch import Batch
from isopo_mini.experiments.setups import ADVANTAGES
from isopo_mini.policies import MLP
from isopo_mini.rules import ClippedSurrogate, NtkIsopo, Reinforce, TrustRegion, rule_specs
from isopo_mini.rules.kl_steps import KLTargeted
from isopo_mini.rules.rule_specs import RULES, Reuse, make_rule, options_of, parse
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training import diagnostics

SPECS = [
    *RULES,
    "ntk:gram=sketched,sketch_size=8,microbatch_size=16,damping=0.1",
    "ntk:layers=together,unit=token",
    "fisher:norm=token,power=0.5",
    "reinforce:reuse=3,advantages=leave_one_out",
    "npg:solver=dual,fisher=empirical",
    "ppo:epochs=2,minibatches=2,dual_clip=3",
    "cispo:dialect=trl,clip_high=5",
    "gspo:aggregate=token-mean",
    "ntk:scale=natural",
    "fisher:scale=natural,norm=token",
    "layer_scaled:microbatch_size=16",
    "ntk:block_size=16,gram=fast",
    "ntk:scale=natural,step=kl",
    "ppo:step=kl",
]


def bandit() -> ContextualBandit:
    generator = torch.Generator().manual_seed(3)
    return ContextualBandit(torch.rand(4, 3, generator=generator), features=torch.randn(4, 5, generator=generator))


def make_policy() -> MLP:
    torch.manual_seed(1)
    return MLP(5, 3, hidden=(8,))


def build(spec: str, **options: Any) -> Any:
    return make_rule(spec, ADVANTAGES, **({"default": "batch"} | options))


def move(rule: Any, seed: int = 2) -> tuple[torch.Tensor, dict[str, float]]:
    """How one step with SGD changes the parameters of one policy on one batch, and its metrics."""
    policy = make_policy()
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    batch = bandit().sample(policy, 32, torch.Generator().manual_seed(seed))
    metrics = rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=0.1))
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach() - before, metrics


class TestParse:
    def test_values_become_what_they_say(self) -> None:
        assert parse("ntk") == ("ntk", {})
        spec = "fisher:power=.5,strength=1e-3,keep_small=true,microbatch_size=none,norm=token-unscaled"
        options = {"power": 0.5, "strength": 0.001, "keep_small": True, "microbatch_size": None}
        assert parse(spec) == ("fisher", options | {"norm": "token-unscaled"})
        assert isinstance(parse("ntk:microbatch_size=32")[1]["microbatch_size"], int)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("isopo", f"rule: expected one of {', '.join(RULES)}, got 'isopo'"),
            ("", "rule: expected one of reinforce, .*, got ''"),
            ("ntk:dampng=1", r"rule: expected ntk:option=value,… .* of .*damping, entropy, gram.*; got 'dampng=1'"),
            ("ntk:damping", "got 'damping'"),
            ("ntk:damping=1,damping=2", "each option once, .*got 'damping=2'"),
            ("grpo:dialect=trl", "of advantages, aggregate, clip_high.*got 'dialect=trl'"),
            ("grpo:reuse=2", "got 'reuse=2'"),  # epochs is its word for that
            ("trpo:max_kl=0.1", "got 'max_kl=0.1'"),  # that is its step size
            ("trpo:step=kl", "got 'step=kl'"),  # which is a KL anyway
            ("reinforce:scale=natural", "got 'scale=natural'"),
            ("layer_scaled:damping=1", "of advantages, block_size, entropy, gram, layers, .*got 'damping=1'"),
            ("ppo:loss=grpo", "got 'loss=grpo'"),
        ],
    )
    def test_what_is_unknown_lists_what_there_is(self, spec: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse(spec)

    def test_a_value_that_the_rule_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"gram: expected one of auto, dense.*'sparse'"):
            move(build("ntk:gram=sparse"))
        with pytest.raises(ValueError, match="reuse: expected a finite number >= 1, got 0"):
            build("ntk:reuse=0")
        with pytest.raises(ValueError, match="step: expected one of rate, kl, got 'nats'"):
            build("ntk:step=nats")
        with pytest.raises(ValueError, match="kl: expected a finite number > 0, got 0"):
            build("ntk:step=kl", step_size=0)
        with pytest.raises(ValueError, match="scale: expected one of gradient, natural, got 'norm'"):
            build("ntk:scale=norm")
        with pytest.raises(ValueError, match="advantages: expected one of batch, centred, leave_one_out, std, got 'x'"):
            build("ntk:advantages=x")


@pytest.mark.parametrize("spec", SPECS)
def test_every_rule_improves_a_bandit_in_one_step(spec: str) -> None:
    """On the batch itself: Σ A_s log π(a_s) rises with A the advantages that all of these rules agree on in sign."""
    rule = build(spec, step_size=0.01)
    policy = make_policy()
    batch = bandit().sample(policy, 32, torch.Generator().manual_seed(2))
    advantages = ADVANTAGES["centred"](batch)
    before = (advantages * policy.log_prob(batch).sum(dim=1)).sum().item()
    metrics = rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=0.01))
    after = (advantages * policy.log_prob(batch).sum(dim=1)).sum().item()
    assert after > before
    assert metrics["backward_passes"] >= 1
    assert metrics["gradient_norm"] > 0


@pytest.mark.parametrize("name", RULES)
def test_every_option_it_lists_is_one_it_takes(name: str) -> None:
    """An option that is listed and then refused would be found out by the run only, after an hour."""
    for option in options_of(name):
        if option not in ("advantages", "unit", "reuse", "step", "entropy"):
            value = RULES[name].defaults.get(option, _default_of(name, option))
            build(f"{name}:{option}={value}", step_size=0.01)


def _default_of(name: str, option: str) -> Any:
    """The default of an option in the rule's own signature, or in that of what it hands options on to."""
    for function in (RULES[name].make, rule_specs.LayerwiseIsopo, rule_specs.LOSSES.get(name)):
        parameter = rule_specs.inspect.signature(function).parameters.get(option)
        if parameter is not None:
            return parameter.default
    raise AssertionError(option)


class TestDefaults:
    def test_the_clipped_family_takes_four_steps_a_batch(self) -> None:
        for name in ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "copg"):
            rule = build(name)
            assert isinstance(rule, ClippedSurrogate)
            assert move(rule)[1]["backward_passes"] == 4
        assert move(build("grpo:epochs=2"))[1]["backward_passes"] == 2

    def test_advantages_are_the_methods_own_or_else_the_tasks(self) -> None:
        own = {"grpo": "std", "dapo": "std", "gspo": "std", "dr_grpo": "centred"}
        for name in RULES:
            for default in ("batch", "leave_one_out"):
                assert build(name, default=default).advantages is ADVANTAGES[own.get(name, default)], name
        assert build("grpo:advantages=batch").advantages is ADVANTAGES["batch"]

    def test_advantages_by_step_go_to_rules_that_work_by_steps(self) -> None:
        """As on CartPole, where the default is the trajectory's return and `gae` one a step."""
        advantages = ADVANTAGES | {"gae": lambda batch: torch.zeros_like(batch.log_probs)}

        def chosen(spec: str, unit: str = "step") -> tuple[str, str]:
            rule = make_rule(spec, advantages, default="std", by_step="gae", unit=unit)
            return next(name for name, value in advantages.items() if value is rule.advantages), rule.unit

        for name in ("reinforce", "ntk", "fisher", "npg", "trpo", "ppo", "cispo", "copg"):
            assert chosen(name) == ("gae", "step")
        for name in ("reinforce", "ntk", "fisher", "npg"):
            assert chosen(f"{name}:unit=sequence") == ("std", "sequence")
            assert chosen(name, unit="sequence") == ("std", "sequence")
        assert chosen("grpo") == ("std", "sequence")
        assert chosen("dr_grpo") == ("centred", "sequence")
        assert chosen("ntk:advantages=std") == ("std", "step")

    def test_seed_and_step_size_reach_the_rule(self) -> None:
        sketched = "ntk:gram=sketched,sketch_size=2"
        first, again, other = (move(build(sketched, seed=seed))[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert build("ntk:seed=7", seed=1).seed == 7
        trust_region = build("trpo", step_size=0.003)
        assert isinstance(trust_region, TrustRegion)
        assert trust_region.max_kl == 0.003

    def test_options_reach_the_rule(self) -> None:
        rule = build("ntk:damping=0.25,microbatch_size=16,gram=sketched,sketch_size=8")
        assert isinstance(rule, NtkIsopo)
        assert (rule.transform.damping, rule.microbatch_size, rule.gram, rule.sketch_size) == (0.25, 16, "sketched", 8)


class TestStep:
    """`step=kl`: the step size is δ."""

    def test_the_step_size_is_the_target(self) -> None:
        rule = build("ntk:scale=natural,step=kl", step_size=0.003)
        assert isinstance(rule, KLTargeted)
        assert rule.kl == 0.003
        assert isinstance(rule.rule, NtkIsopo)
        assert rule.rule.transform.scale == "natural"
        moved, metrics = move(rule)
        expected, expected_metrics = move(KLTargeted(NtkIsopo(scale="natural"), 0.003))
        assert torch.equal(moved, expected)
        assert metrics == expected_metrics

    def test_without_it_the_step_size_is_the_optimizers(self) -> None:
        for spec in ("ntk:scale=natural", "ntk:scale=natural,step=rate"):
            assert isinstance(build(spec, step_size=0.003), NtkIsopo)
        assert torch.equal(move(build("reinforce:step=rate", step_size=7.0))[0], move(build("reinforce"))[0])

    def test_each_step_of_a_reused_batch_has_the_target(self) -> None:
        rule = build("reinforce:step=kl,reuse=2", step_size=0.003)
        assert isinstance(rule, KLTargeted)
        assert isinstance(rule.rule, Reuse)
        moved, metrics = move(rule)
        assert torch.equal(moved, move(KLTargeted(Reuse(Reinforce(), 2), 0.003))[0])
        assert metrics["backward_passes"] == 2

    def test_every_rule_but_trpo_has_it(self) -> None:
        assert [name for name in RULES if "step" not in options_of(name)] == ["trpo"]


class TestEntropy:
    """`entropy=β`: a bonus in the advantages."""

    @pytest.mark.parametrize("name", RULES)
    def test_a_bonus_makes_every_rule_surer_of_less(self, name: str) -> None:
        """Rewards say nothing here, so without a bonus the policy stays, and with one its entropy rises."""
        policy = make_policy()
        batch = bandit().sample(policy, 512, torch.Generator().manual_seed(2))
        batch = dataclasses.replace(batch, rewards=torch.zeros_like(batch.rewards))
        entropies = [diagnostics.entropy(policy.logits(batch.observations), batch.mask).item()]
        for spec in (name, f"{name}:entropy=0.5"):
            trial = make_policy()
            build(spec, step_size=0.01).step(trial, batch, torch.optim.SGD(trial.parameters(), lr=0.01))
            entropies.append(diagnostics.entropy(trial.logits(batch.observations), batch.mask).item())
        before, plain, encouraged = entropies
        assert plain == pytest.approx(before, abs=1e-12)
        assert encouraged > before + 1e-7

    def test_a_bonus_below_zero_is_none(self) -> None:
        with pytest.raises(ValueError, match="entropy: expected a finite number >= 0, got -1"):
            build("ntk:entropy=-1")


class TestReuse:
    def test_is_the_rule_several_times_on_one_batch(self) -> None:
        moved, metrics = move(build("reinforce:reuse=3"))

        class Thrice:
            def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
                norms = [Reinforce().step(policy, batch, optimizer)["gradient_norm"] for _ in range(3)]
                return {"backward_passes": 3.0, "gradient_norm": sum(norms) / 3}

        expected, expected_metrics = move(Thrice())
        assert torch.equal(moved, expected)
        assert metrics == pytest.approx(expected_metrics, rel=1e-12)
        # Not one step three times as long: the second and third start from where the first has led.
        assert not torch.allclose(moved, 3 * move(build("reinforce"))[0], rtol=1e-4)

    def test_once_is_the_rule_itself(self) -> None:
        assert isinstance(build("ntk:reuse=1"), NtkIsopo)
        assert isinstance(build("ntk:reuse=2"), Reuse)
