"""Formulas that are easily confused with the right ones, kept here and shown to be wrong."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isopo_mini.objectives import group_advantages, losses


def one_token(ratio: float, log_prob: float = -1.0) -> tuple[Tensor, Tensor]:
    """log π, differentiable, and log π_old of a single token with the given ratio."""
    log_probs = torch.tensor([[log_prob]], dtype=torch.float64, requires_grad=True)
    return log_probs, log_probs.detach() - math.log(ratio)


def push(loss: Tensor, log_probs: Tensor) -> float:
    """How hard descending the loss pushes log π of the one token upwards."""
    return -torch.autograd.grad(loss, log_probs)[0].item()


TOKEN = torch.ones(1, 1, dtype=torch.bool)
GOOD, BAD = torch.tensor([1.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)


class TestPpo:
    @pytest.mark.parametrize(("ratio", "advantage"), [(0.5, GOOD), (1.5, BAD)])
    def test_the_clip_alone_abandons_tokens_that_went_the_wrong_way(self, ratio: float, advantage: Tensor) -> None:
        """A good token that has become *less* likely must be pulled back. Without the minimum nothing does."""
        log_probs, old = one_token(ratio)
        clip_alone = -((log_probs - old).exp().clamp(0.8, 1.2) * advantage).sum()
        assert push(clip_alone, log_probs) == 0
        right, _ = losses.ppo(log_probs, old, advantage, TOKEN)
        assert push(right, log_probs) == pytest.approx(ratio * advantage.item())

    def test_the_clip_alone_is_no_lower_bound(self) -> None:
        """PPO's objective never promises more than the importance-weighted one; the clip alone does."""
        for ratio in (0.1, 0.5, 0.9, 1.1, 1.5, 4.0):
            for advantage in (GOOD, BAD):
                log_probs, old = one_token(ratio)
                assert -losses.ppo(log_probs, old, advantage, TOKEN)[0].item() <= ratio * advantage.item() + 1e-12
        assert max(min(0.5, 1.2), 0.8) > 0.5  # the clip alone at ratio 0.5, A = 1

    def test_without_the_dual_clip_a_bad_token_has_no_bound(self) -> None:
        log_probs, old = one_token(50.0)
        assert losses.ppo(log_probs, old, BAD, TOKEN)[0].item() == pytest.approx(50.0)
        bounded, metrics = losses.ppo(log_probs, old, BAD, TOKEN, dual_clip=3.0)
        assert bounded.item() == pytest.approx(3.0)
        assert push(bounded, log_probs) == 0
        assert metrics["clip_fraction"] == 1.0

    def test_the_dual_clip_is_not_for_good_tokens(self) -> None:
        """max(…, 3A) for both signs would pay 3A for a good token that does not deserve it."""
        log_probs, old = one_token(1.1)
        assert losses.ppo(log_probs, old, GOOD, TOKEN, dual_clip=3.0)[0].item() == pytest.approx(-1.1)

    def test_dapo_has_more_room_upwards_only(self) -> None:
        for ratio, advantage, ppo_moves, dapo_moves in ((1.25, GOOD, 0, 1), (0.75, BAD, 0, 0), (1.3, GOOD, 0, 0)):
            log_probs, old = one_token(ratio)
            for loss, moves in ((losses.ppo, ppo_moves), (losses.dapo, dapo_moves)):
                assert (push(loss(log_probs, old, advantage, TOKEN)[0], log_probs) != 0) == moves


class TestLengths:
    """One sequence of one token, one of three: what a token of each weighs at ratio 1 and A = 1."""

    @pytest.mark.parametrize(
        ("loss", "short", "long"),
        [
            (losses.grpo, 1 / 2, 1 / 6),  # mean of means
            (losses.dapo, 1 / 4, 1 / 4),  # mean over tokens, also verl's "grpo"
            (losses.dr_grpo, 1 / 6, 1 / 6),  # 2 sequences of at most 3
            (losses.reinforce, 1 / 2, 1 / 2),  # sum over tokens, mean over sequences
        ],
    )
    def test_weight_of_a_token(self, loss: Callable[..., losses.Loss], short: float, long: float) -> None:
        log_probs = torch.full((2, 3), -1.0, requires_grad=True)
        mask = torch.tensor([[True, False, False], [True, True, True]])
        value, _ = loss(log_probs, log_probs.detach(), torch.ones(2), mask)
        expected = -torch.tensor([[short, 0, 0], [long, long, long]])
        torch.testing.assert_close(torch.autograd.grad(value, log_probs)[0], expected)

    def test_dr_grpo_divided_by_its_own_length_is_grpo_again(self) -> None:
        """The constant must not depend on the answers: with the batch's longest answer it is the caller's to fix."""
        log_probs, mask = torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.bool)
        arguments = (log_probs, log_probs, torch.ones(1), mask)
        own_length = losses.dr_grpo(*arguments)[0]  # T = 4 is the length of the only answer
        assert own_length == losses.grpo(*arguments)[0]
        assert losses.dr_grpo(*arguments, max_length=8)[0] == own_length / 2

    def test_biased_and_unbiased_spread_differ_most_for_pairs(self) -> None:
        """GRPO's std has divisor n − 1. With n, two different rewards would get ±1 instead of ±1/√2."""
        advantages = group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), eps=1e-9)
        torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]) / math.sqrt(2))
        biased = torch.tensor([-0.5, 0.5]) / torch.tensor([0.0, 1.0]).std(correction=0)
        torch.testing.assert_close(biased, torch.tensor([-1.0, 1.0]))


class TestGspo:
    log_ratios = torch.tensor([[0.5, -0.3, -0.2]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)

    def value(self, log_ratios: Tensor) -> Tensor:
        log_probs = (log_ratios - 2.0).requires_grad_()
        wide = {"clip_low": 1.0, "clip_high": 100.0}
        return -losses.gspo(log_probs, torch.full_like(log_ratios, -2.0), GOOD, self.mask, **wide)[0]

    def test_the_ratio_is_the_geometric_mean(self) -> None:
        assert self.value(self.log_ratios).item() == pytest.approx(1.0)  # the logarithms sum to 0
        assert self.log_ratios.exp().mean().item() > 1.06  # the arithmetic mean, PPO's value
        shifted = self.log_ratios + 0.1
        assert self.value(shifted).item() == pytest.approx(math.exp(0.1))
        assert shifted.sum().exp().item() == pytest.approx(math.exp(0.3))  # the product, the ratio of whole sequences

    def test_a_sequence_is_clipped_as_one(self) -> None:
        """Two of its tokens are outside ±0.2 and PPO drops one of them; the sequence is not, and GSPO keeps all."""
        log_probs, old = (self.log_ratios - 2.0).requires_grad_(), torch.full((1, 3), -2.0, dtype=torch.float64)
        ranges = {"clip_low": 0.2, "clip_high": 0.2}
        by_token = torch.autograd.grad(losses.ppo(log_probs, old, GOOD, self.mask, **ranges)[0], log_probs)[0]
        as_one = torch.autograd.grad(losses.gspo(log_probs, old, GOOD, self.mask, **ranges)[0], log_probs)[0]
        assert (by_token != 0).tolist() == [[False, True, True]]
        torch.testing.assert_close(as_one, torch.full((1, 3), -1 / 3, dtype=torch.float64))


class TestCispo:
    def test_differentiating_the_weight_pushes_good_tokens_down(self) -> None:
        """d/dθ[r log π] = r (1 + log π) ∇log π: below probability 1/e the sign is wrong."""
        log_probs, old = one_token(1.1, log_prob=-2.0)
        wrong = -((log_probs - old).exp().clamp(0.8, 1.2) * log_probs * GOOD).sum()
        assert push(wrong, log_probs) == pytest.approx(1.1 * (1 - 2.0))
        right, _ = losses.cispo(log_probs, old, GOOD, TOKEN)
        assert push(right, log_probs) == pytest.approx(1.1)

    @pytest.mark.parametrize(
        ("ratio", "verl", "trl"), [(0.5, 0.8, 0.5), (1.0, 1.0, 1.0), (3.0, 1.2, 3.0), (9.0, 1.2, 5.0)]
    )
    def test_the_two_dialects(self, ratio: float, verl: float, trl: float) -> None:
        """verl clamps on both sides of 1; trl on the upper side only, at a weight and not at a distance from 1."""
        for dialect, weight in (("verl", verl), ("trl", trl)):
            log_probs, old = one_token(ratio)
            loss, metrics = losses.cispo(log_probs, old, GOOD, TOKEN, dialect=dialect)
            assert push(loss, log_probs) == pytest.approx(weight)
            assert metrics["clip_fraction"] == (weight != ratio)

    def test_one_dialects_number_in_the_other(self) -> None:
        """verl's 0.2 taken for trl's largest weight shrinks every token; trl's 5.0 for verl's distance allows 6."""
        for ratio, dialect, clip_high, weight in ((1.0, "trl", 0.2, 0.2), (9.0, "verl", 5.0, 6.0)):
            log_probs, old = one_token(ratio)
            loss, _ = losses.cispo(log_probs, old, GOOD, TOKEN, dialect=dialect, clip_high=clip_high)
            assert push(loss, log_probs) == pytest.approx(weight)

    def test_no_token_loses_its_gradient(self) -> None:
        log_probs, old = one_token(1.5)
        assert push(losses.ppo(log_probs, old, GOOD, TOKEN)[0], log_probs) == 0
        assert push(losses.cispo(log_probs, old, GOOD, TOKEN)[0], log_probs) == pytest.approx(1.2)


class TestCopg:
    def test_a_token_weighs_its_advantage_and_not_its_ratio(self) -> None:
        log_probs, old = one_token(0.5)
        assert push(losses.copg(log_probs, old, GOOD, TOKEN)[0], log_probs) == pytest.approx(1.0)
        assert push(losses.ppo(log_probs, old, GOOD, TOKEN)[0], log_probs) == pytest.approx(0.5)

    @pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 4.0])
    @pytest.mark.parametrize("advantage", [GOOD, BAD])
    def test_it_keeps_the_tokens_that_ppo_keeps(self, ratio: float, advantage: Tensor) -> None:
        log_probs, old = one_token(ratio)
        copg, ppo = (loss(log_probs, old, advantage, TOKEN)[0] for loss in (losses.copg, losses.ppo))
        assert (push(copg, log_probs) == 0) == (push(ppo, log_probs) == 0)

    def test_the_range_is_of_the_ratio_and_not_of_its_logarithm(self) -> None:
        """|log r| ≤ ε is another range: e^0.2 = 1.221 and e^−0.2 = 0.819."""
        log_probs, old = one_token(1.21)
        wrong = -torch.minimum(log_probs, old + (log_probs - old).clamp(-0.2, 0.2)).sum()
        assert push(wrong, log_probs) == pytest.approx(1.0)
        assert push(losses.copg(log_probs, old, GOOD, TOKEN)[0], log_probs) == 0

    def test_a_ratio_that_underflows_is_no_nan(self) -> None:
        """log(clip(r)) through r would be log 0 at r = e^−200 in single precision, with an infinite derivative."""
        log_probs = torch.tensor([[-201.0]], requires_grad=True)
        loss, _ = losses.copg(log_probs, torch.tensor([[-1.0]]), torch.tensor([-1.0]), TOKEN, clip_low=1.0)
        assert push(loss, log_probs) == -1.0
