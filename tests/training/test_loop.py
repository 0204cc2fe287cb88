"""The training loop: what its table says, that it is repeatable, and what it refuses."""

import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from isopo_mini import Batch
from isopo_mini.policies.softmax import TabularSoftmax
from isopo_mini.training.loop import COLUMNS, Task, UpdateRule, train

MEANS = torch.tensor([0.0, 1.0, 0.5])


class ThreeArms:
    """A bandit with a plain J, as small as a task can be. Keeps the batches it handed out."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def sample(self, policy: nn.Module, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        observations = torch.zeros(num_sequences, 1, dtype=torch.int64)
        actions, log_probs = policy.sample_actions(observations, generator=generator)
        mask = torch.ones_like(actions, dtype=torch.bool)
        self.batches.append(Batch(observations, actions, mask, MEANS[actions[:, 0]], log_probs))
        return self.batches[-1]

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        return {"return": float(probabilities(policy) @ MEANS)}


class Reinforce:
    """−(1/S) Σ (R − mean R) log π, `epochs` times over."""

    def __init__(self, epochs: int = 1) -> None:
        self.epochs = epochs

    def step(self, policy: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        advantages = batch.rewards - batch.rewards.mean()
        for _ in range(self.epochs):
            optimizer.zero_grad()
            loss = -(advantages * policy.log_prob(batch).sum(dim=1)).mean()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach(), "backward_passes": self.epochs}


def probabilities(policy: nn.Module) -> Tensor:
    return policy.logits(torch.zeros(1, dtype=torch.int64))[0].detach().softmax(0)


def run(steps: int = 5, seed: int = 0, learning_rate: float = 0.5, epochs: int = 1, **options: object) -> pd.DataFrame:
    policy = options.pop("policy", None) or TabularSoftmax(1, 3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate)
    task, rule = options.pop("task", None) or ThreeArms(), options.pop("rule", None) or Reinforce(epochs)
    return train(policy, task, rule, optimizer, steps, seed, progress=False, **options)


def test_the_example_classes_satisfy_the_protocols() -> None:
    assert isinstance(ThreeArms(), Task)
    assert isinstance(Reinforce(), UpdateRule)
    assert not isinstance(object(), Task)


def test_every_number_of_a_row_is_what_its_name_says() -> None:
    policy, task = TabularSoftmax(1, 3), ThreeArms()
    before = probabilities(policy)
    table = run(steps=1, policy=policy, task=task, epochs=3, sequences_per_step=20)
    after, batch, row = probabilities(policy), task.batches[0], table.iloc[0]
    assert list(table.columns) == [*COLUMNS, "loss", "return"]
    assert (row["step"], row["samples"], row["actions"], row["backward_passes"]) == (1, 20, 20, 3)
    assert row["reward"] == pytest.approx(batch.rewards.mean().item(), rel=1e-6)
    assert row["entropy"] == pytest.approx(math.log(3), rel=1e-6)  # the policy that acted was uniform
    assert row["kl"] == pytest.approx(float((before * (before / after).log()).sum()), rel=1e-4)
    assert row["kl"] > 1e-4
    assert row["return"] == pytest.approx(float(after @ MEANS), rel=1e-6)  # evaluated after the step


def test_totals_add_up_and_return_rises() -> None:
    table = run(steps=40, sequences_per_step=50, epochs=2, learning_rate=2.0)
    assert list(table["step"]) == list(range(1, 41))
    assert list(table["samples"]) == [50 * step for step in range(1, 41)]
    assert list(table["backward_passes"]) == [2 * step for step in range(1, 41)]
    assert table["seconds"].is_monotonic_increasing
    assert table["return"].iloc[-1] > 0.9
    assert table["entropy"].iloc[-1] < 0.5


def test_same_seed_same_table_whatever_the_global_generator_does() -> None:
    tables = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        tables.append(run(seed=seed).drop(columns="seconds"))
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert not tables[0].equals(tables[2])


def test_evaluation_is_skipped_between_but_never_at_the_end() -> None:
    table = run(steps=8, evaluate_every=3)
    assert list(table.loc[table["return"].notna(), "step"]) == [3, 6, 8]
    assert table["kl"].notna().all()


def test_what_is_not_measured_is_nan_and_changes_nothing_else() -> None:
    measured, not_measured = run(), run(measure=False)
    assert not_measured[["entropy", "kl"]].isna().all(axis=None)
    same = [name for name in measured if name not in ("entropy", "kl", "seconds")]
    pd.testing.assert_frame_equal(measured[same], not_measured[same])


def test_rewards_per_step_are_summed_over_real_positions() -> None:
    class TwoSteps(ThreeArms):
        def sample(self, policy: nn.Module, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
            mask = torch.tensor([[True, True], [True, False]])
            rewards = torch.tensor([[1.0, 2.0], [4.0, 100.0]])  # the 100 is padding
            zeros = torch.zeros(2, 2, dtype=torch.int64)
            return Batch(zeros, zeros, mask, rewards, torch.zeros(2, 2))

    class Nothing:
        def step(self, policy: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
            return {}

    table = run(steps=2, task=TwoSteps(), rule=Nothing())
    assert list(table["reward"]) == [3.5, 3.5]
    assert list(table["actions"]) == [3, 6]
    assert list(table["kl"]) == [0.0, 0.0]
    assert table["backward_passes"].isna().all()  # the rule said nothing of them


def test_time_counts_sampling_and_updating_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("isopo_mini.training.loop._now", lambda device: clock[0])

    class Slow(ThreeArms):
        def sample(self, policy: nn.Module, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
            clock[0] += 1.0
            return super().sample(policy, num_sequences, generator)

        def evaluate(self, policy: nn.Module) -> dict[str, float]:
            clock[0] += 100.0
            return super().evaluate(policy)

    class SlowRule(Reinforce):
        def step(self, policy: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
            clock[0] += 10.0
            return super().step(policy, batch, optimizer)

    assert list(run(steps=3, task=Slow(), rule=SlowRule())["seconds"]) == [11.0, 22.0, 33.0]


PROGRAM = """
import itertools, time
time.time = itertools.count().__next__  # a second passes at every look, so that the bars do not wait for two
import torch
from isopo_mini.policies import TabularSoftmax
from isopo_mini.tasks import Bandit, Sorting, warm_start
from isopo_mini.training.loop import train
from isopo_mini.rules import Reinforce
policy, task = TabularSoftmax(1, 2), Bandit(torch.tensor([0.0, 1.0]))
train(policy, task, Reinforce(), torch.optim.SGD(policy.parameters(), 0.1), 8, 0)
sorting = Sorting(2, evaluation_prompts=8)
small = sorting.make_policy(8, 1, 2, generator=torch.Generator().manual_seed(0))
try:
    warm_start.supervised_warm_start(small, sorting, 1.0, batch_size=4, max_steps=8)
except RuntimeError:
    pass
"""


@pytest.mark.parametrize(("disable", "shown"), [("1", []), (None, ["Reinforce", "warm start"])])
def test_bars_obey_the_environment(disable: str | None, shown: list[str]) -> None:
    """In a process of its own: tqdm reads the variable when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    if disable is not None:
        environment["TQDM_DISABLE"] = disable
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert [name for name in ("Reinforce", "warm start") if f"{name}: " in result.stderr] == shown
    assert bool(result.stderr) == bool(shown)


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def returning(self, value: object) -> UpdateRule:
        class Rule:
            def step(self, policy: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> object:
                return value

        return Rule()

    @pytest.mark.parametrize("name", ["steps", "sequences_per_step", "evaluate_every"])
    def test_counts(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}: expected a finite number >= 1, got 0"):
            run(**{name: 0})

    def test_missing_methods(self) -> None:
        with pytest.raises(
            TypeError, match="task: expected an object with sample and evaluate, got dict without sample"
        ):
            run(task={"not": "a task"})
        with pytest.raises(TypeError, match="rule: expected an object with step, got ThreeArms without step"):
            run(rule=ThreeArms())

    def test_rule_returns_no_numbers(self) -> None:
        with pytest.raises(TypeError, match=r"rule\.step: expected it to return a dict of numbers, got NoneType"):
            run(rule=self.returning(None))
        with pytest.raises(
            TypeError, match=r"rule\.step: expected it to return a dict of numbers, got \{'loss': tensor"
        ):
            run(rule=self.returning({"loss": torch.zeros(2)}))

    def test_names_that_collide(self) -> None:
        with pytest.raises(ValueError, match=r"rule\.step: expected names that no other column has, got entropy, kl"):
            run(rule=self.returning({"kl": 0.0, "entropy": 0.0, "loss": 0.0}))
        with pytest.raises(ValueError, match=r"task\.evaluate: expected names that no other column has, got return"):
            run(rule=self.returning({"return": 0.0}))

    def test_task_returns_no_batch(self) -> None:
        task = ThreeArms()
        task.sample = lambda policy, num_sequences, generator=None: None
        with pytest.raises(TypeError, match=r"task\.sample: expected it to return a Batch, got NoneType"):
            run(task=task)

    def test_optimizer_of_another_policy(self) -> None:
        policy, other = TabularSoftmax(1, 3), TabularSoftmax(1, 3)
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        with pytest.raises(ValueError, match="optimizer: expected parameters of the policy, got none of them"):
            train(policy, ThreeArms(), Reinforce(), optimizer, 1, 0)
        with pytest.raises(ValueError, match="policy: expected at least one trainable parameter"):
            train(policy.requires_grad_(False), ThreeArms(), Reinforce(), optimizer, 1, 0)

    def test_a_broken_step_is_named_where_it_happens(self) -> None:
        class Breaks(Reinforce):
            calls = 0

            def step(self, policy: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
                self.calls += 1
                if self.calls == 3:
                    with torch.no_grad():
                        policy.table.weight[0, 1] = math.nan
                return {}

        with pytest.raises(FloatingPointError, match=r"table\.weight: expected finite numbers, .* after step 3"):
            run(rule=Breaks())
