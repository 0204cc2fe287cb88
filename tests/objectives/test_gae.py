"""Discounted returns and GAE against sums over the future, and what truncation taken for termination does."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.objectives import discounted_returns, gae


def example(seed: int, sequences: int, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, a mask that may have gaps, bootstraps."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sequences, positions, dtype=torch.float64, generator=generator)
    mask = torch.rand(sequences, positions, generator=generator) < 0.7
    return rewards, values, mask, torch.randn(sequences, dtype=torch.float64, generator=generator)


def literal_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, trace_decay: float, bootstrap: Tensor
) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the real steps of each row, by the definition."""
    advantages = torch.zeros_like(rewards)
    for s in range(len(rewards)):
        steps = mask[s].nonzero()[:, 0].tolist()
        next_values = [values[s, t].item() for t in steps[1:]] + [bootstrap[s].item()]
        errors = [
            rewards[s, t].item() + discount * after - values[s, t].item()
            for t, after in zip(steps, next_values, strict=bool(steps))
        ]
        for i, t in enumerate(steps):
            advantages[s, t] = sum((discount * trace_decay) ** k * error for k, error in enumerate(errors[i:]))
    return advantages


shapes = {"seed": st.integers(0, 10**6), "sequences": st.integers(1, 4), "positions": st.integers(1, 7)}
factors = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@settings(max_examples=60, deadline=None)
@given(**shapes, discount=factors, trace_decay=factors)
def test_gae_is_its_definition(seed: int, sequences: int, positions: int, discount: float, trace_decay: float) -> None:
    rewards, values, mask, bootstrap = example(seed, sequences, positions)
    torch.testing.assert_close(
        gae(rewards, values, mask, discount, trace_decay, bootstrap),
        literal_gae(rewards, values, mask, discount, trace_decay, bootstrap),
        rtol=1e-12,
        atol=1e-13,
    )


@settings(max_examples=40, deadline=None)
@given(**shapes, discount=factors)
def test_returns_are_their_definition(seed: int, sequences: int, positions: int, discount: float) -> None:
    rewards, _, mask, bootstrap = example(seed, sequences, positions)
    returns = discounted_returns(rewards, mask, discount, bootstrap)
    for s in range(sequences):
        steps = mask[s].nonzero()[:, 0].tolist()
        for i, t in enumerate(steps):
            future = [rewards[s, later].item() for later in steps[i:]] + [bootstrap[s].item()]
            expected = sum(discount**k * reward for k, reward in enumerate(future))
            assert returns[s, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert (returns[~mask] == 0).all()


def test_the_two_ends_of_lambda() -> None:
    rewards, values, mask, bootstrap = example(0, 4, 6)
    everything = gae(rewards, values, mask, 0.9, 1.0, bootstrap)
    returns = discounted_returns(rewards, mask, 0.9, bootstrap)
    torch.testing.assert_close(everything, (returns - values).masked_fill(~mask, 0.0), rtol=1e-12, atol=1e-13)
    one_step = gae(rewards, values, torch.ones_like(mask), 0.9, 0.0, bootstrap)
    after = torch.cat([values[:, 1:], bootstrap[:, None]], dim=1)
    torch.testing.assert_close(one_step, rewards + 0.9 * after - values, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("trace_decay", [0.0, 0.9, 1.0])
def test_truncation_taken_for_termination_blames_the_last_actions(trace_decay: float) -> None:
    """Reward 1 for ever is worth V = 1/(1−γ) in every state, and no action is better than another: A = 0.

    With the value of the state it was cut off in, a truncated episode gives that exactly. Without it, as if the
    episode had ended, its last actions seem to have cost all that was still to come: A = −γ^k λ^{k−1} V, k steps
    before the cut.
    """
    discount, length = 0.9, 5
    rewards = torch.ones(1, length, dtype=torch.float64)
    value = torch.tensor([1 / (1 - discount)], dtype=torch.float64)
    arguments = rewards, value.expand(1, length), torch.ones(1, length, dtype=torch.bool), discount, trace_decay
    torch.testing.assert_close(gae(*arguments, value), torch.zeros_like(rewards), rtol=0, atol=1e-13)
    wrong = gae(*arguments)
    expected = [-(discount**k) * trace_decay ** (k - 1) * value.item() for k in range(length, 0, -1)]
    torch.testing.assert_close(wrong, torch.tensor([expected], dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert wrong[0, -1] == pytest.approx(-9.0)


def test_one_batch_holds_episodes_that_ended_and_episodes_that_were_cut_off() -> None:
    """Each row is as it is alone, whatever length the others have."""
    rewards = torch.tensor([[1.0, 1.0, math.nan], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    returns = discounted_returns(rewards, mask, 0.5, torch.tensor([0.0, 8.0]))
    torch.testing.assert_close(returns, torch.tensor([[1.5, 1.0, 0.0], [2.75, 3.5, 5.0]]))


def test_padding_is_never_looked_at() -> None:
    rewards, values, mask, bootstrap = example(3, 4, 6)
    expected = gae(rewards, values, mask, 0.9, 0.8, bootstrap)
    for garbage in (math.nan, math.inf, 1e300):
        dirty = [value.masked_fill(~mask, garbage) for value in (rewards, values)]
        assert torch.equal(gae(*dirty, mask, 0.9, 0.8, bootstrap), expected)
    longer = [torch.nn.functional.pad(value, (0, 3)) for value in (rewards, values, mask)]
    assert torch.equal(gae(*longer, 0.9, 0.8, bootstrap)[:, :6], expected)


def test_single_precision_stays_single() -> None:
    rewards, values, mask, bootstrap = example(3, 4, 6)
    single = gae(rewards.float(), values.float(), mask, 0.9, 0.8, bootstrap.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), gae(rewards, values, mask, 0.9, 0.8, bootstrap), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards: expected shape \(S T\), got \(3,\)"),
        ({"rewards": torch.zeros(0, 3)}, ValueError, r"rewards: expected at least one entry"),
        ({"rewards": torch.full((2, 3), math.nan)}, ValueError, r"rewards: expected finite numbers, got nan"),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"rewards: expected a floating-point tensor"),
        ({"values": torch.zeros(2, 1)}, ValueError, r"values: expected shape \(S=2 T=3\), got \(2, 1\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, r"mask: expected a bool tensor, got torch.float32"),
        ({"bootstrap": torch.zeros(2, 1)}, ValueError, r"bootstrap: expected shape \(S=2\), got \(2, 1\)"),
        ({"discount": 1.01}, ValueError, r"discount: expected a number in \[0, 1\], got 1.01"),
        ({"trace_decay": -0.1}, ValueError, r"trace_decay: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "rewards": torch.zeros(2, 3),
        "values": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "discount": 0.9,
        "trace_decay": 0.9,
        "bootstrap": torch.zeros(2),
    }
    with pytest.raises(error, match=message):
        gae(**(arguments | changed))
