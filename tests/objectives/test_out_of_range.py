"""Objectives where numbers leave the range of their dtype: half precision, ratios beyond exp, squares of rewards."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isopo_mini.objectives import aggregation, discounted_returns, gae, group_advantages, kl, leave_one_out, losses

# A log-ratio that e^x cannot take in this dtype, if it is computed in it.
BEYOND = {torch.float16: 12.0, torch.bfloat16: 100.0, torch.float32: 100.0, torch.float64: 800.0}
HALF = (torch.float16, torch.bfloat16)
TOKEN_CLIPS = ("ppo", "grpo", "dr_grpo", "dapo")


def two_tokens(dtype: torch.dtype, distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """log π (differentiable), log π_old with log r = (distance, 0), and a mask."""
    new = torch.tensor([[-1.0, -1.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-1.0 - distance, -1.0]], dtype=dtype)
    return new, old, torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize("dtype", BEYOND)
@pytest.mark.parametrize("name", TOKEN_CLIPS)
def test_a_clipped_token_has_gradient_zero_however_far_its_ratio_ran_away(name: str, dtype: torch.dtype) -> None:
    new, old, mask = two_tokens(dtype, BEYOND[dtype])
    loss, metrics = losses.LOSSES[name](new, old, torch.ones(1, dtype=dtype), mask)
    loss.backward()
    # Both tokens weigh ½; the second has r = 1, so the gradient −½, and the first adds −½(1 + ε_h).
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0, -0.5]]
    assert loss.item() == pytest.approx(-0.5 * (1 + (1.28 if name == "dapo" else 1.2)), rel=1e-6)
    assert metrics["clip_fraction"] == 0.5
    if dtype != torch.float64:  # e^800 fits no float; e^100 does
        ratio = math.exp(BEYOND[dtype])
        assert metrics["ratio_mean"] == pytest.approx((ratio + 1) / 2, rel=1e-2)
        assert metrics["kl_old"] == pytest.approx((ratio - 1 - BEYOND[dtype]) / 2, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gspo_clips_a_sequence_whose_mean_ran_away(dtype: torch.dtype) -> None:
    new, old, mask = two_tokens(dtype, 2 * BEYOND[dtype])  # the mean over two tokens is beyond the range too
    loss, metrics = losses.gspo(new, old, torch.ones(1, dtype=dtype), mask)
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0, 0.0]]
    assert loss.item() == pytest.approx(-(1 + 4e-4), rel=1e-6)
    assert metrics["clip_fraction"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*TOKEN_CLIPS, "gspo"])
def test_a_token_that_is_pulled_back_with_infinite_force_is_an_error(name: str, dtype: torch.dtype) -> None:
    """A < 0 and r beyond the range: nothing clips it, so that loss and gradient are rA, which does not fit."""
    new, old, mask = two_tokens(dtype, 2 * BEYOND[dtype])
    with pytest.raises(ValueError, match=r"log_probs: expected log π − log π_old of a token that is not clipped to be"):
        losses.LOSSES[name](new, old, -torch.ones(1, dtype=dtype), mask)
    loss, _ = losses.LOSSES[name](new, old, torch.zeros(1, dtype=dtype), mask)  # nothing pulls: 0 · r = 0
    loss.backward()
    assert new.grad is not None
    assert (loss.item(), new.grad.tolist()) == (0.0, [[0.0, 0.0]])


def test_the_dual_clip_ends_the_pull() -> None:
    new, old, mask = two_tokens(torch.float32, 100.0)
    loss, metrics = losses.ppo(new, old, -torch.ones(1), mask, dual_clip=3.0)
    loss.backward()
    assert new.grad is not None
    assert (loss.item(), new.grad.tolist(), metrics["clip_fraction"]) == (2.0, [[0.0, 0.5]], 0.5)


@pytest.mark.parametrize(("name", "gradient"), [("cispo", [[-0.6, -0.5]]), ("copg", [[0.0, -0.5]])])
@pytest.mark.parametrize("dtype", BEYOND)
def test_losses_that_weigh_by_the_clip_take_any_ratio(name: str, gradient: list[Any], dtype: torch.dtype) -> None:
    new, old, mask = two_tokens(dtype, BEYOND[dtype])
    loss, _ = losses.LOSSES[name](new, old, torch.ones(1, dtype=dtype), mask)
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad.double(), torch.tensor(gradient).double(), rtol=0, atol=2e-3)  # 2⁻⁹ of bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gspo_sees_a_ratio_that_half_precision_would_round_to_one(dtype: torch.dtype) -> None:
    """s = exp(2⁻⁹) = 1.00195 is above 1 + 4e-4, and 1 in bfloat16; both log-probabilities are exact there."""
    new = torch.tensor([[-0.375]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-0.375 - 2**-9]], dtype=dtype)
    loss, metrics = losses.gspo(new, old, torch.ones(1, dtype=dtype), torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert new.grad is not None
    assert (new.grad.item(), metrics["clip_fraction"]) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_half_precision_goes_in_and_single_comes_out(name: str, dtype: torch.dtype) -> None:
    """The value is that of the same numbers in float64: the only rounding is that of what was given."""
    new = (-3 * torch.rand(4, 50)).to(dtype)
    old, advantages, mask = (
        (new + 0.1 * torch.randn(4, 50)).to(dtype),
        torch.randn(4).to(dtype),
        torch.rand(4, 50) < 0.7,
    )
    loss, _ = losses.LOSSES[name](new, old, advantages, mask)
    expected, _ = losses.LOSSES[name](new.double(), old.double(), advantages.double(), mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_a_loss_that_does_not_fit_is_an_error() -> None:
    new, old, mask = two_tokens(torch.float32, 0.0)
    with pytest.raises(ValueError, match=r"loss: expected numbers that fit float32, got -inf at index \(\)"):
        losses.reinforce(100 * new, old, torch.tensor([-3e38]), mask)


def test_long_sums_of_half_precision() -> None:
    """500 ones make 256 in bfloat16, where 256 + 1 = 256."""
    values, mask = torch.ones(1, 500, dtype=torch.bfloat16), torch.ones(1, 500, dtype=torch.bool)
    assert aggregation.aggregate_tokens(values, mask, "sequence-sum").item() == 500


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("discount", "total"), [(1.0, 500.0), (0.99, (1 - 0.99**500) / (1 - 0.99))])
def test_returns_of_a_long_episode(dtype: torch.dtype, discount: float, total: float) -> None:
    rewards, mask = torch.ones(1, 500, dtype=dtype), torch.ones(1, 500, dtype=torch.bool)
    assert discounted_returns(rewards, mask, discount)[0, 0].item() == pytest.approx(total, rel=1e-5)
    # λ = 1: the same less V, whatever the dtype of the values.
    values = torch.full_like(rewards, 3.0)
    assert gae(rewards, values, mask, discount, 1.0)[0, 0].item() == pytest.approx(total - 3, rel=1e-5)
    mixed = gae(rewards, values.double(), mask, discount, 1.0)
    assert mixed.dtype == torch.float64
    assert mixed[0, 0].item() == pytest.approx(total - 3, rel=1e-12)


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([0.0, 500.0, 300.0, 100.0], dtype=torch.float16),  # their squares are above 65,504
        torch.tensor([1e20, -1e20]),
        torch.tensor([1e-30, 3e-30, 8e-30]),
        torch.tensor([1e200, -1e200, 5e199], dtype=torch.float64),
    ],
)
def test_the_spread_of_a_group_is_measured_in_its_own_units(rewards: Tensor) -> None:
    groups, eps = torch.zeros(len(rewards), dtype=torch.int64), 1e-36
    unit = rewards.double().abs().max()
    scaled = rewards.double() / unit
    expected = (scaled - scaled.mean()) / scaled.std()
    given = group_advantages(rewards, groups, eps=eps)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=0)
    assert given.dtype == torch.promote_types(rewards.dtype, torch.float32)
    centred = (expected * scaled.std()).to(given.dtype) * unit.to(given.dtype)
    torch.testing.assert_close(group_advantages(rewards, groups, "none"), centred, rtol=1e-5, atol=0)
    others = len(rewards) / (len(rewards) - 1)
    torch.testing.assert_close(leave_one_out(rewards, groups), centred * others, rtol=1e-5, atol=0)


def literal_third(d: float) -> float:
    """e^{−d} − 1 + d, from its series, which has no cancellation to speak of for |d| ≤ 1."""
    return math.fsum((-d) ** n / math.factorial(n) for n in range(2, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_a_small_step_keeps_its_digits_and_its_sign(dtype: torch.dtype) -> None:
    """As written, float32 has no digit left at d = 1e-4, and comes out negative."""
    sizes = [10.0**-n for n in range(9)] + [0.0999, 0.1001]
    d = torch.tensor([[sign * size for size in sizes for sign in (1, -1)]], dtype=dtype)
    reference = torch.zeros_like(d)
    right = torch.tensor([[literal_third(value) for value in d[0].tolist()]], dtype=torch.float64)
    given = kl.estimate(d, reference)
    assert (given > 0).all()
    # Where it is summed as written, at 0.1, one in 20 of its size is left: 20 ε.
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(given.double(), right, rtol=tolerance, atol=0)
    as_written = torch.expm1(-d) + d
    assert (as_written.double() / right - 1).abs().max() > 1000 * tolerance


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at).sum(), at)
    return gradient


def test_k3_has_the_gradient_of_its_formula_on_both_sides_of_the_seam() -> None:
    d = torch.linspace(-0.3, 0.3, 61, dtype=torch.float64)[None]
    given = gradient_of(lambda x: kl.estimate(x, torch.zeros_like(x)), d)
    torch.testing.assert_close(given, -torch.expm1(-d), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_beyond_the_range_is_infinite_and_leaves_its_neighbours_alone(kind: str) -> None:
    """Padding is masked after the estimate, so what it does there must not reach the gradient as 0 · ∞."""
    log_probs, reference = torch.tensor([[-1.0, -200.0]]), torch.tensor([[-2.0, -1.0]])
    values = kl.estimate(log_probs, reference, kind)
    assert values[0, 1].item() == {"k1": -199.0, "k2": 199.0**2 / 2, "k3": math.inf}[kind]
    mask = torch.tensor([[True, False]])
    gradient = gradient_of(lambda x: kl.estimate(x, reference, kind).masked_fill(~mask, 0.0), log_probs)
    assert gradient[0, 1] == 0
    assert gradient[0, 0] == pytest.approx({"k1": 1.0, "k2": 1.0, "k3": 1 - math.exp(-1)}[kind])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_of_half_precision(kind: str) -> None:
    log_probs, reference = (-torch.rand(2, 3, 4)).bfloat16()
    given = kl.estimate(log_probs, reference, kind)
    assert given.dtype == torch.float32
    expected = kl.estimate(log_probs.double(), reference.double(), kind)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-7)
