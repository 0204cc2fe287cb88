"""One run and its record: what the numbers are, that they repeat, and what a run that breaks down leaves."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import pytest
import torch

from isopo_mini.experiments import records, runs, setups
from isopo_mini.experiments.runs import Run, run
from isopo_mini.policies import MLP
from isopo_mini.rules import NtkIsopo, batch_advantages
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training.loop import train

SMALL = Run("bandit", "ntk", 0.03, seed=5, sequences=12, steps=10, evaluations=3)
TIMES = ("wall_seconds", "date", "code")  # someone may commit between two runs


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """All of a record that must repeat."""
    kept = {name: value for name, value in record.items() if name not in TIMES}
    return kept | {"curve": {name: values for name, values in kept["curve"].items() if name != "seconds"}}


def test_the_curve_is_the_table_of_train() -> None:
    """Made here by hand, with the policy and the rule that the names stand for."""
    record = run(SMALL)
    torch.manual_seed(5)
    task, policy = setups.bandit(torch.device("cpu"))
    start = task.evaluate(policy)["return"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.03, weight_decay=0.0)
    rule = NtkIsopo(advantages=batch_advantages, seed=5)
    table = train(policy, task, rule, optimizer, 10, 5, sequences_per_step=12, progress=False)
    curve = record["curve"]
    assert curve["step"] == [0, 4, 8, 10]
    assert curve["samples"] == curve["actions"] == [0, 48, 96, 120]
    assert curve["backward_passes"] == curve["step"]
    expected = [start, *table["return"].iloc[[3, 7, 9]]]
    # Five significant digits are kept.
    assert curve["return"] == pytest.approx(expected, rel=6e-5)
    for name in ("kl", "entropy", "reward", "gradient_norm"):
        means = [table[name].iloc[a:b].mean() for a, b in ((0, 4), (4, 8), (8, 10))]
        assert curve[name][0] is None
        assert curve[name][1:] == pytest.approx(means, rel=6e-5)
    assert record["score"] == curve["return"][-1]  # the last quarter of three evaluations, rounded up
    assert record["status"] == "finished"
    assert record["stopped"] is None


def test_says_where_it_came_from_in_a_few_kilobytes() -> None:
    record = run(replace(SMALL, steps=20, evaluations=None))
    assert Run(**record["run"]) == replace(SMALL, steps=20, evaluations=20)
    assert record["libraries"]["torch"] == torch.__version__
    assert record["device"]["type"] == "cpu"
    assert record["device"]["threads"] == 1
    assert {"code", "date", "wall_seconds"} <= set(record)
    assert len(record["curve"]["return"]) == 21
    assert len(json.dumps(record, allow_nan=False)) < 5000


def test_repeats_and_leaves_this_process_as_it_was() -> None:
    torch.set_num_threads(2)
    try:
        torch.manual_seed(99)
        expected = torch.rand(3)
        torch.manual_seed(99)
        first = run(SMALL)
        assert torch.equal(torch.rand(3), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    torch.manual_seed(1)
    assert without_times(run(SMALL)) == without_times(first)
    other = run(replace(SMALL, seed=6))
    assert other["curve"]["return"][0] != first["curve"]["return"][0]  # other first weights, too


def test_the_phase_changes_nothing_but_its_name() -> None:
    chosen, reported = without_times(run(SMALL)), without_times(run(replace(SMALL, phase="report")))
    assert chosen.pop("run") != reported.pop("run")
    assert chosen == reported


def test_missing_numbers_are_the_tasks() -> None:
    setup = setups.SETUPS["bandit"]
    resolved = asdict(Run("bandit", "ntk", 0.03, 0))
    assert {name: resolved[name] for name in ("sequences", "steps", "evaluations")} == {
        "sequences": setup.sequences,
        "steps": setup.steps,
        "evaluations": setup.evaluations,
    }


def test_file_names_differ_and_suit_every_file_system() -> None:
    some = [SMALL, replace(SMALL, seed=6), replace(SMALL, learning_rate=0.1), replace(SMALL, rule="ntk:damping=0.1")]
    names = {one.file_name for one in some}
    assert len(names) == len(some)
    assert "ntk_damping=0.1__adamw__0.03__5.json" in names


class Failing:
    """REINFORCE until step 3; then something goes wrong."""

    def __init__(self, break_down: Callable[[MLP], None]) -> None:
        self.break_down, self.steps = break_down, 0

    def step(self, policy: MLP, batch: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        self.steps += 1
        if self.steps == 3:
            self.break_down(policy)
        optimizer.zero_grad()
        (-policy.log_prob(batch).sum()).backward()
        optimizer.step()
        return {"backward_passes": 1}


def spoil(value: float, error: Exception | None = None) -> Callable[[MLP], None]:
    """Set the last layer's weights, then raise."""

    def break_down(policy: MLP) -> None:
        with torch.no_grad():
            policy.layers[-1].weight.fill_(value)
            policy.layers[-1].weight[0] *= -1
        if error is not None:
            raise error

    return break_down


class TestDiverged:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def use(break_down: Callable[[MLP], None]) -> None:
            monkeypatch.setattr(runs.rule_specs, "make_rule", lambda *_, **__: Failing(break_down))

        return use

    settings = replace(SMALL, steps=8, evaluations=8)

    @pytest.mark.parametrize(
        "break_down",
        [
            spoil(math.nan),  # train says so itself
            spoil(1e6, ValueError("gram: expected finite numbers\nand more")),  # a rule met inf in what it computed
            spoil(math.inf, RuntimeError("probability tensor contains inf")),
        ],
    )
    def test_is_a_record_with_the_lowest_score_and_says_why(
        self, failing: Callable[..., None], break_down: Callable[[MLP], None]
    ) -> None:
        failing(break_down)
        record = run(self.settings)
        assert record["status"] == "diverged"
        assert record["stopped"]
        assert "\n" not in record["stopped"]
        assert record["score"] == record["final"] == 0.0
        assert record["to_target"] is None
        curve = record["curve"]
        assert curve["step"] == list(range(9))
        assert min(curve["return"][:3]) > 0.2  # what it had learned before
        assert curve["return"][3:] == [0.0] * 6
        table = records.as_table([record])
        assert math.isnan(table["backward_passes"].iloc[0])
        assert len(records.curves(table)) == 9

    def test_really_happens_at_an_absurd_step_size(self) -> None:
        record = run(replace(SMALL, learning_rate=3e37))
        assert record["status"] == "diverged"
        json.dumps(record, allow_nan=False)

    def test_a_rule_whose_numbers_do_not_fit_has_broken_down(self) -> None:
        """A policy so sure that a score has norm 0 has modest logits, and nothing to make a step of."""
        record = run(Run("bandit", "exact_fisher", 19.2, 0, optimizer="sgd"))
        assert record["status"] == "diverged"
        assert "expected numbers that fit float32" in record["stopped"]

    def test_a_return_that_is_no_number_counts_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = iter([0.5, 0.6, math.nan])
        monkeypatch.setattr(ContextualBandit, "evaluate", lambda *_: {"return": next(calls)})
        record = run(self.settings)
        assert record["stopped"] == "return: expected a finite number, got nan"
        assert record["curve"]["return"] == [0.5, 0.6, *[0] * 7]

    def test_an_error_of_a_healthy_policy_is_an_error(self, failing: Callable[..., None]) -> None:
        failing(spoil(0.1, ValueError("a mistake")))
        with pytest.raises(ValueError, match="a mistake"):
            run(self.settings)

    def test_so_is_one_before_anything_was_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def sample(*_: Any, **__: Any) -> None:
            raise RuntimeError("no environment")

        monkeypatch.setattr(ContextualBandit, "sample", sample)
        with pytest.raises(RuntimeError, match="no environment"):
            run(self.settings)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "bandits"}, r"task: expected one of bandit.*, got 'bandits'"),
        ({"rule": "isopo"}, r"rule: expected one of reinforce, .*ntk.*grpo.*, got 'isopo'"),
        ({"optimizer": "adam"}, "optimizer: expected one of sgd, momentum, adamw, muon, got 'adam'"),
        ({"phase": "test"}, "phase: expected one of choose, report, got 'test'"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number > 0, got 0"),
        ({"steps": 0}, "steps: expected a finite number >= 1, got 0"),
        ({"sequences": 0}, "sequences: expected a finite number >= 1, got 0"),
        ({"evaluations": 0}, "evaluations: expected a finite number >= 1, got 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_live_run_can_be_put_beside_loaded_ones() -> None:
    table = records.as_table([run(SMALL), run(replace(SMALL, phase="report", seed=6))])
    assert list(table["phase"]) == ["choose", "report"]
    assert records.summary(table)["score"].item() == table["score"].iloc[1]
    assert isinstance(records.curves(table), pd.DataFrame)
