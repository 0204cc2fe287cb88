"""The written-out bandit is the one that the recorded runs learned."""

import pytest
import torch

from isopo_mini.experiments import setups
from isopo_mini.tasks.bandit_instances import FEATURES, MEAN_REWARDS


def test_its_numbers_are_the_first_that_seed_zero_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    means, features = torch.rand(16, 5, generator=generator), torch.randn(16, 8, generator=generator)
    assert torch.equal(torch.tensor(MEAN_REWARDS), means)  # in single precision, to the last bit
    assert torch.equal(torch.tensor(FEATURES), features)


def test_no_seed_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", None)  # nothing may be drawn for it; the policy's weights are no part of it
    task, _ = setups.bandit(torch.device("cpu"))
    assert torch.equal(task.mean_rewards, torch.tensor(MEAN_REWARDS))
    assert torch.equal(task.observations, torch.tensor(FEATURES))
