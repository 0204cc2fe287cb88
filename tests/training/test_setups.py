"""Tasks by name: what each fixes is there, fits together, and starts where it says."""

import pytest
import torch

from isopo_mini.batch import Batch
from isopo_mini.objectives.advantages import leave_one_out
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training import setups
from isopo_mini.training.loop import Task
from isopo_mini.training.rule_parts import UNITS, batch_advantages
from isopo_mini.training.setups import SETUPS, leave_one_out_advantages, setup_of

CPU = torch.device("cpu")
SHIPPED = [name for name in SETUPS if name != "addition-large"]  # its weights are made on the machine that needs them


@pytest.mark.parametrize("name", SETUPS)
def test_names_that_a_setup_uses_exist(name: str) -> None:
    setup = setup_of(name)
    assert {setup.advantages, setup.by_step or setup.advantages} <= set(setup.all_advantages)
    assert setup.unit in UNITS
    assert setup.lowest < setup.target


@pytest.mark.parametrize("name", SHIPPED)
def test_task_and_policy_fit_together_and_the_seed_decides_the_policy(name: str) -> None:
    setup = setup_of(name)
    returns = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        task, policy = setup.make(CPU)
        assert isinstance(task, Task)
        returns.append(task.evaluate(policy)["return"])
    assert returns[0] == returns[1]
    # Weights that are loaded are the same for all seeds.
    assert (returns[0] == returns[2]) == (name == "addition")
    assert setup.lowest < returns[0] < setup.target  # there is something to learn
    batch = task.sample(policy, 16, generator=torch.Generator().manual_seed(0))
    for option, function in setup.all_advantages.items():
        shape = function(batch).shape
        assert shape == (batch.mask.shape if option == setup.by_step else batch.mask.shape[:1])


def test_the_target_of_the_bandit_can_be_reached() -> None:
    task, _ = setups.bandit(CPU)
    assert isinstance(task, ContextualBandit)
    assert setup_of("bandit").target < task.optimum - 0.02


def test_addition_starts_from_one_in_five() -> None:
    task, policy = setup_of("addition").make(CPU)
    assert task.evaluate(policy)["return"] == pytest.approx(0.2, abs=0.02)


def test_leave_one_out_is_within_groups_where_there_are_any() -> None:
    rewards, groups = torch.tensor([1.0, 3.0, 8.0, 2.0]), torch.tensor([0, 0, 1, 1])
    zeros = torch.zeros(4, 1, dtype=torch.int64)
    grouped = Batch(zeros, zeros, zeros == 0, rewards, torch.zeros(4, 1), groups)
    torch.testing.assert_close(leave_one_out_advantages(grouped), leave_one_out(rewards, groups))
    torch.testing.assert_close(leave_one_out_advantages(grouped), torch.tensor([-2.0, 2.0, 6.0, -6.0]))
    alone = Batch(zeros, zeros, zeros == 0, rewards, torch.zeros(4, 1))
    torch.testing.assert_close(leave_one_out_advantages(alone), batch_advantages(alone))


def test_errors() -> None:
    with pytest.raises(ValueError, match=f"task: expected one of {', '.join(SETUPS)}, got 'additions'"):
        setup_of("additions")
    with pytest.raises(ValueError, match=r"weights: expected book/data/no\.safetensors .*warm_start addition --out"):
        setups.tokens(CPU, task="addition", weights="no.safetensors")
