"""Group advantages against a loop over groups, and the cases where a naive formula gives NaN or noise."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.objectives import group_advantages, leave_one_out

EPS = 1e-4


def loop(rewards: Tensor, groups: Tensor, advantage: Callable[[float, list[float], list[float]], float]) -> Tensor:
    """One sequence at a time: `advantage(its reward, rewards of its group, rewards of the others in it)`."""
    values = []
    for s, reward in enumerate(rewards.tolist()):
        members = [i for i in range(len(groups)) if groups[i] == groups[s]]
        everyone = [rewards[i].item() for i in members]
        others = [rewards[i].item() for i in members if i != s]
        values.append(advantage(reward, everyone, others))
    return torch.tensor(values, dtype=rewards.dtype)


FORMULAS = {
    "std": lambda r, everyone, others: (
        (r - statistics.mean(everyone)) / (statistics.stdev(everyone) + EPS) if others else 0.0
    ),
    "none": lambda r, everyone, others: r - statistics.mean(everyone) if others else 0.0,
    "leave one out": lambda r, everyone, others: r - statistics.mean(others) if others else 0.0,
}
FUNCTIONS = {
    "std": lambda rewards, groups: group_advantages(rewards, groups, "std", EPS),
    "none": lambda rewards, groups: group_advantages(rewards, groups, scale="none"),
    "leave one out": leave_one_out,
}


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(-2, 2), st.sampled_from([0.0, 0.1, 1.0, -3.0, 1 / 3])), min_size=1, max_size=12
    )
)
def test_agrees_with_a_loop(name: str, pairs: list[tuple[int, float]]) -> None:
    """Groups of any size, labelled by any integers, in any order."""
    groups = torch.tensor([group for group, _ in pairs])
    rewards = torch.tensor([reward for _, reward in pairs], dtype=torch.float64)
    # Equal rewards differ from their mean by 1e-17 in the loop, which it then divides by eps: hence 1e-11.
    torch.testing.assert_close(
        FUNCTIONS[name](rewards, groups), loop(rewards, groups, FORMULAS[name]), rtol=1e-10, atol=1e-11
    )


def test_grpo_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    std = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)  # divisor n − 1: unbiased
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3]) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, groups), expected)


def test_leave_one_out_by_hand() -> None:
    advantages = leave_one_out(torch.tensor([4.0, 1.0, 7.0]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(advantages, torch.tensor([4 - (1 + 7) / 2, 1 - (4 + 7) / 2, 7 - (4 + 1) / 2]))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1, -7.7])
def test_equal_rewards_give_exact_zeros(name: str, reward: float) -> None:
    """In float32 the mean of three 0.1s need not be 0.1; dividing that by eps would be visible."""
    for size in (1, 2, 3, 7, 100):
        rewards, groups = torch.full((size,), reward), torch.full((size,), 3)
        assert torch.equal(FUNCTIONS[name](rewards, groups), torch.zeros(size))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_group_of_one_gets_zero_beside_others(name: str) -> None:
    advantages = FUNCTIONS[name](torch.tensor([5.0, 1.0, 2.0]), torch.tensor([9, 4, 4]))
    assert advantages[0] == 0
    assert (advantages[1:] != 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_groups_do_not_see_each_other_and_order_does_not_matter(name: str) -> None:
    function = FUNCTIONS[name]
    rewards, groups = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    advantages = function(rewards, groups)
    order = torch.randperm(12)
    torch.testing.assert_close(function(rewards[order], groups[order]), advantages[order], rtol=0, atol=1e-12)
    shifted = function(rewards + 10 * (groups == 1), groups)
    torch.testing.assert_close(shifted, advantages, rtol=0, atol=1e-12)
    for group in range(3):
        assert advantages[groups == group].sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    rewards = torch.tensor([1.0, 2.0])
    groups = torch.tensor([0, 0])

    @pytest.mark.parametrize("function", [group_advantages, leave_one_out])
    def test_tensors(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        with pytest.raises(ValueError, match=r"rewards: expected shape \(S\), got \(2, 1\)"):
            function(self.rewards[:, None], self.groups)
        with pytest.raises(ValueError, match=r"groups: expected shape \(S=2\), got \(3,\)"):
            function(self.rewards, torch.tensor([0, 0, 1]))
        with pytest.raises(TypeError, match=r"groups: expected an int64 tensor, got torch.float32"):
            function(self.rewards, self.rewards)
        with pytest.raises(TypeError, match=r"groups: expected a tensor of shape \(S\), got NoneType"):
            function(self.rewards, None)
        with pytest.raises(TypeError, match=r"rewards: expected a floating-point tensor, got torch.int64"):
            function(self.groups, self.groups)
        with pytest.raises(ValueError, match=r"rewards: expected finite numbers, got nan at index \(1,\)"):
            function(torch.tensor([0.0, math.nan]), self.groups)
        with pytest.raises(ValueError, match=r"rewards: expected at least one entry"):
            function(self.rewards[:0], self.groups[:0])

    def test_options(self) -> None:
        with pytest.raises(ValueError, match=r"scale: expected one of std, none, got 'mean'"):
            group_advantages(self.rewards, self.groups, scale="mean")
        with pytest.raises(ValueError, match=r"eps: expected a finite number > 0, got 0"):
            group_advantages(self.rewards, self.groups, eps=0)
