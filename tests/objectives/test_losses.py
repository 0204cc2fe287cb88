"""One suite over all losses, against their formulas written out token by token in Python's own floats."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.objectives import losses
from isopo_mini.objectives.aggregation import AGGREGATES

Row = list[float]


def clip(r: float, low: float, high: float) -> float:
    return min(max(r, low), high)


def ppo_token(lp: Row, old: Row, now: Row, t: int, a: float, low: float = 0.8, high: float = 1.2) -> float:
    r = math.exp(lp[t] - old[t])
    return -min(r * a, clip(r, low, high) * a)


def dual_clip_token(lp: Row, old: Row, now: Row, t: int, a: float) -> float:
    value = ppo_token(lp, old, now, t, a)
    return min(value, -3.0 * a) if a < 0 else value


def gspo_token(lp: Row, old: Row, now: Row, t: int, a: float) -> float:
    s = math.exp(sum(lp[i] - old[i] for i in range(len(lp))) / len(lp))
    return -min(s * a, clip(s, 0.95, 1.1) * a)


def cispo_token(lp: Row, old: Row, now: Row, t: int, a: float, low: float = 0.7, high: float = 1.2) -> float:
    weight = clip(math.exp(now[t] - old[t]), low, high)  # of the policy as it is, which is not differentiated
    return -weight * a * lp[t]


def copg_token(lp: Row, old: Row, now: Row, t: int, a: float) -> float:
    r = math.exp(lp[t] - old[t])
    return -min(lp[t] * a, (old[t] + math.log(clip(r, 0.7, 1.2))) * a)


@dataclass(frozen=True)
class Case:
    """A loss with options, and the same without its clip.

    `token(lp, old, now, t, a)` is the formula of one token, from log π, log π_old, and log π held fixed, of the real
    tokens of its sequence.
    """

    loss: Callable[..., losses.Loss]
    options: dict[str, Any]
    token: Callable[..., float]
    unclipped: dict[str, Any]
    aggregate: str


WIDE = {"clip_low": 1.0, "clip_high": 1e9}
CASES = {
    "reinforce": Case(losses.reinforce, {}, lambda lp, old, now, t, a: -a * lp[t], {}, "sequence-sum"),
    "ppo": Case(losses.ppo, {}, ppo_token, WIDE, "token-mean"),
    "ppo, two sides": Case(
        losses.ppo,
        {"clip_low": 0.1, "clip_high": 0.4},
        lambda *arguments: ppo_token(*arguments, low=0.9, high=1.4),
        WIDE,
        "token-mean",
    ),
    "ppo, dual clip": Case(losses.ppo, {"dual_clip": 3.0}, dual_clip_token, WIDE | {"dual_clip": None}, "token-mean"),
    "grpo": Case(losses.grpo, {}, ppo_token, WIDE, "sequence-mean"),
    "dr_grpo": Case(losses.dr_grpo, {}, ppo_token, WIDE, "constant"),
    "dapo": Case(losses.dapo, {}, lambda *arguments: ppo_token(*arguments, high=1.28), WIDE, "token-mean"),
    "gspo": Case(losses.gspo, {"clip_low": 0.05, "clip_high": 0.1}, gspo_token, WIDE, "sequence-mean"),
    "cispo, verl": Case(losses.cispo, {"clip_low": 0.3, "clip_high": 0.2}, cispo_token, WIDE, "token-mean"),
    "cispo, trl": Case(
        losses.cispo,
        {"dialect": "trl", "clip_high": 1.3},
        lambda *arguments: cispo_token(*arguments, low=0.0, high=1.3),
        {"dialect": "trl", "clip_high": 1e9},
        "token-mean",
    ),
    "copg": Case(losses.copg, {"clip_low": 0.3, "clip_high": 0.2}, copg_token, WIDE, "token-mean"),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_aggregate = pytest.mark.parametrize("aggregate", AGGREGATES)


@dataclass
class Example:
    """Arguments of a loss, float64."""

    log_probs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    def loss(self, case: Case, **options: Any) -> losses.Loss:
        return case.loss(self.log_probs, self.old, self.advantages, self.mask, **(case.options | options))

    def gradient(self, case: Case, **options: Any) -> Tensor:
        loss, _ = self.loss(case, **options)
        return torch.autograd.grad(loss, self.log_probs)[0]


def example(seed: int = 0, sequences: int = 5, positions: int = 4, by_token: bool = False) -> Example:
    """Ratios between about 0.3 and 3, so that clips of both kinds are met; masks with gaps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old = -normal(sequences, positions).abs() - 0.1
    log_probs = (old + 0.5 * normal(sequences, positions)).requires_grad_()
    mask = torch.rand(sequences, positions, generator=generator) < 0.6
    mask[torch.arange(sequences), torch.randint(positions, (sequences,), generator=generator)] = True
    return Example(log_probs, old, normal(sequences, positions) if by_token else normal(sequences), mask)


def literal(case: Case, given: Example, aggregate: str, log_probs: Tensor | None = None, length: int = 0) -> float:
    """The loss as MATH has it, in loops. `log_probs` replaces log π, but not where the formula holds it fixed."""
    values = []
    for s in range(len(given.mask)):
        real = given.mask[s].nonzero()[:, 0]
        rows = [(given.log_probs if log_probs is None else log_probs)[s, real], given.old[s, real]]
        lp, old, now = (row.tolist() for row in [*rows, given.log_probs[s, real]])
        a = (given.advantages[s].expand(len(given.mask[s])) if given.advantages.ndim == 1 else given.advantages[s])[
            real
        ]
        values.append([case.token(lp, old, now, t, a[t].item()) for t in range(len(lp))])
    tokens = [value for row in values for value in row]
    return {
        "token-mean": sum(tokens) / len(tokens),
        "sequence-mean": sum(sum(row) / len(row) for row in values) / len(values),
        "sequence-sum": sum(tokens) / len(values),
        "constant": sum(tokens) / (len(values) * (length or given.mask.shape[1])),
    }[aggregate]


def finite_differences(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences; their error is about step² plus rounding 1e-16/step, both below 1e-9 here."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        change = torch.zeros_like(at).flatten()
        change[index] = step
        change = change.view_as(at)
        gradient.view(-1)[index] = (function(at.detach() + change) - function(at.detach() - change)) / (2 * step)
    return gradient


@every_loss
class TestEveryLoss:
    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        sequences=st.integers(1, 6),
        positions=st.integers(1, 6),
        by_token=st.booleans(),
        aggregate=st.sampled_from(AGGREGATES),
    )
    def test_is_its_formula(
        self, case: Case, seed: int, sequences: int, positions: int, by_token: bool, aggregate: str
    ) -> None:
        given = example(seed, sequences, positions, by_token)
        value = given.loss(case, aggregate=aggregate)[0].item()
        assert value == pytest.approx(literal(case, given, aggregate), rel=1e-12, abs=1e-14)

    def test_has_its_own_aggregate(self, case: Case) -> None:
        given = example()
        assert given.loss(case)[0].item() == pytest.approx(literal(case, given, case.aggregate), rel=1e-12)
        others = [name for name in AGGREGATES if name != case.aggregate]
        assert all(given.loss(case)[0].item() != pytest.approx(literal(case, given, name)) for name in others)

    def test_a_longest_answer_may_be_given(self, case: Case) -> None:
        given = example()
        value = given.loss(case, aggregate="constant", max_length=11)[0].item()
        assert value == pytest.approx(literal(case, given, "constant", length=11), rel=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    def test_gradient_is_that_of_its_formula(self, case: Case, seed: int) -> None:
        """One advantage a sequence and the loss's own aggregate: what the paper of each writes."""
        given = example(seed)
        expected = finite_differences(lambda lp: literal(case, given, case.aggregate, lp), given.log_probs)
        torch.testing.assert_close(given.gradient(case), expected, rtol=1e-7, atol=1e-9)
        assert given.gradient(case).norm() > 0

    @every_aggregate
    @pytest.mark.parametrize("by_token", [False, True])
    def test_at_ratio_one_the_gradient_is_reinforces(self, case: Case, aggregate: str, by_token: bool) -> None:
        given = example(by_token=by_token)
        given.old = given.log_probs.detach().clone()
        expected = given.gradient(CASES["reinforce"], aggregate=aggregate)
        torch.testing.assert_close(given.gradient(case, aggregate=aggregate), expected, rtol=1e-14, atol=1e-16)
        assert given.loss(case)[1] == {"ratio_mean": 1.0, "clip_fraction": 0.0, "kl_old": 0.0}

    @every_aggregate
    @pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
    def test_padding_is_never_looked_at(self, case: Case, aggregate: str, garbage: float) -> None:
        clean, dirty = example(by_token=True), example(by_token=True)
        padding = ~dirty.mask
        for value in (dirty.log_probs.data, dirty.old, dirty.advantages):
            value[padding] = garbage
        assert clean.loss(case, aggregate=aggregate) == dirty.loss(case, aggregate=aggregate)
        gradient = dirty.gradient(case, aggregate=aggregate)
        assert torch.equal(gradient, clean.gradient(case, aggregate=aggregate))
        assert (gradient[padding] == 0).all()

    @every_aggregate
    def test_more_padding_changes_nothing(self, case: Case, aggregate: str) -> None:
        short, long = example(positions=3), example(positions=3)
        pad = torch.nn.functional.pad
        long.log_probs = pad(long.log_probs.detach(), (0, 2)).requires_grad_()
        long.old, long.mask = pad(long.old, (0, 2), value=-7.0), pad(long.mask, (0, 2), value=False)
        options = {"aggregate": aggregate, "max_length": 3}
        torch.testing.assert_close(long.loss(case, **options)[0], short.loss(case, **options)[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(long.gradient(case, **options)[:, :3], short.gradient(case, **options))

    def test_order_of_sequences_does_not_matter(self, case: Case) -> None:
        given = example()
        order = torch.tensor([3, 1, 4, 0, 2])
        turned = Example(
            given.log_probs[order].detach().requires_grad_(),
            given.old[order],
            given.advantages[order],
            given.mask[order],
        )
        torch.testing.assert_close(turned.loss(case)[0], given.loss(case)[0], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(turned.gradient(case), given.gradient(case)[order], rtol=1e-14, atol=1e-15)

    def test_one_advantage_a_sequence_goes_to_each_of_its_tokens(self, case: Case) -> None:
        given = example()
        spread = Example(given.log_probs, given.old, given.advantages[:, None].expand(5, 4), given.mask)
        assert spread.loss(case) == given.loss(case)

    def test_zero_advantages_give_a_zero_gradient(self, case: Case) -> None:
        given = example()
        given.advantages = torch.zeros(5, dtype=torch.float64)
        assert given.loss(case)[0].item() == 0
        assert torch.equal(given.gradient(case), torch.zeros_like(given.log_probs))

    def test_only_the_policy_is_differentiated(self, case: Case) -> None:
        given = example()
        given.old.requires_grad_()
        given.advantages.requires_grad_()
        given.loss(case)[0].backward()
        assert given.old.grad is None
        assert given.advantages.grad is None
        assert given.log_probs.grad is not None

    def test_metrics(self, case: Case) -> None:
        """The clip fraction is counted another way: real tokens whose gradient is not that of the unclipped loss."""
        given = example(sequences=40)
        loss, metrics = given.loss(case)
        assert loss.shape == ()
        assert metrics.keys() == {"ratio_mean", "clip_fraction", "kl_old"}
        differences = (given.log_probs - given.old).detach()[given.mask]
        ratios = differences.exp()
        assert metrics["ratio_mean"] == pytest.approx(ratios.mean().item())
        assert metrics["kl_old"] == pytest.approx((ratios - 1 - differences).mean().item())
        changed = ~torch.isclose(given.gradient(case), given.gradient(case, **case.unclipped), rtol=1e-9, atol=0)
        assert metrics["clip_fraction"] == pytest.approx(changed[given.mask].double().mean().item(), abs=1e-12)
        assert (metrics["clip_fraction"] > 0) == bool(case.unclipped)

    def test_single_precision_stays_single(self, case: Case) -> None:
        given = example()
        single = Example(
            given.log_probs.detach().float().requires_grad_(), given.old.float(), given.advantages.float(), given.mask
        )
        assert single.loss(case)[0].dtype == torch.float32
        torch.testing.assert_close(single.gradient(case).double(), given.gradient(case), rtol=1e-5, atol=1e-6)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input_is_named(self, case: Case) -> None:
        for name, value, error, message in bad_arguments():
            given = example()
            setattr(given, name, value)
            with pytest.raises(error, match=message):
                given.loss(case)
        with pytest.raises(ValueError, match=r"aggregate: expected one of token-mean, .*, got 'mean'"):
            example().loss(case, aggregate="mean")
        with pytest.raises(ValueError, match=r"max_length: expected a finite number >= 1, got 0"):
            example().loss(case, aggregate="constant", max_length=0)
        for option in case.options.keys() & {"clip_low", "clip_high"}:
            with pytest.raises(ValueError, match=rf"{option}: expected a finite number >= 0, got -0.1"):
                example().loss(case, **{option: -0.1})


def bad_arguments() -> Iterator[tuple[str, Any, type[Exception], str]]:
    given = example()
    broken = given.log_probs.detach().clone()
    broken[given.mask] = math.nan
    empty = given.mask.clone()
    empty[2] = False
    yield "advantages", given.advantages[:, None], ValueError, r"advantages: expected shape \(S=5 T=4\), got \(5, 1\)"
    yield "advantages", given.advantages[:3], ValueError, r"advantages: expected shape \(S=5\), got \(3,\)"
    yield "advantages", 1.0, ValueError, r"advantages: expected shape \(S\) or \(S T\), got float"
    yield "advantages", given.advantages * math.inf, ValueError, r"advantages: expected finite numbers, got -?inf"
    yield "advantages", given.advantages.long(), TypeError, r"advantages: expected a floating-point tensor"
    yield "old", given.old[:, 0], ValueError, r"old_log_probs: expected shape \(S=5 T=4\), got \(5,\)"
    yield "log_probs", broken, ValueError, r"log_probs: expected finite numbers, got nan"
    yield "log_probs", given.log_probs[:0], ValueError, r"log_probs: expected at least one entry"
    yield "mask", given.mask.float(), TypeError, r"mask: expected a bool tensor, got torch.float32"
    yield "mask", given.mask.T, ValueError, r"mask: expected shape \(S=5 T=4\), got \(4, 5\)"
    yield "mask", empty, ValueError, r"mask: expected at least one True a sequence, got none in sequence 2"


def test_the_registry_holds_every_loss_by_its_name() -> None:
    assert {case.loss.__name__: case.loss for case in CASES.values()} == losses.LOSSES


@pytest.mark.usefixtures("unchecked")
def test_other_bad_options() -> None:
    given = example()
    with pytest.raises(ValueError, match=r"dialect: expected one of verl, trl, got 'both'"):
        given.loss(CASES["cispo, verl"], dialect="both")
    with pytest.raises(ValueError, match=r"dual_clip: expected a number > 1, got 1.0"):
        given.loss(CASES["ppo"], dual_clip=1.0)
