"""What is read from records: by hand where the numbers are few, against the statistics module where they are many."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from isopo_mini.training import records
from isopo_mini.training.statistics import bootstrap_interval


def record(
    rule: str, learning_rate: float, seed: int, score: float, phase: str = "choose", **changes: Any
) -> dict[str, Any]:
    """A record with one number that matters."""
    run = {"task": "bandit", "rule": rule, "learning_rate": learning_rate, "seed": seed, "phase": phase}
    curve = {"step": [0, 10], "samples": [0, 80], "backward_passes": [0, 10], "return": [0.0, score]}
    made = {
        "run": run | {"optimizer": "adamw"},
        "status": "finished",
        "score": score,
        "final": score,
        "area": score / 2,
        "target": 0.9,
        "to_target": None,
        "wall_seconds": 1.0,
        "curve": curve,
    }
    return made | changes


def grid(scores: dict[float, list[float]], rule: str = "ntk", phase: str = "choose", first: int = 0) -> list[dict]:
    return [
        record(rule, learning_rate, seed, score, phase)
        for learning_rate, row in scores.items()
        for seed, score in enumerate(row, start=first)
    ]


class TestScores:
    def test_of_a_curve_that_can_be_integrated_by_hand(self) -> None:
        # Nine points: one before the first step and eight evaluations, whose last quarter is two. Uneven at the end.
        curve = {
            "step": [0, 1, 2, 3, 4, 5, 6, 7, 10],
            "samples": [0, 8, 16, 24, 32, 40, 48, 56, 80],
            "seconds": [0, 1, 2, 3, 4, 5, 6, 7, 8],
            "return": [0, 0, 0, 0, 0.5, 0.9, 0.8, 0.6, 1.0],
        }
        found = records.scores(curve, target=0.9)
        assert found["score"] == pytest.approx((0.6 + 1.0) / 2)
        assert found["final"] == 1.0
        between = [0, 0, 0, 0.25, 0.7, 0.85, 0.7, 3 * 0.8]
        assert found["area"] == pytest.approx(sum(between) / 10)
        assert found["to_target"] == {"step": 5, "samples": 40, "seconds": 5}  # the first time, though it fell again

    def test_the_start_never_counts_and_at_least_one_evaluation_does(self) -> None:
        assert records.scores({"step": [0, 5], "return": [1.0, 0.2]})["score"] == 0.2
        five = {"step": [0, 1, 2, 3, 4, 5], "return": [9.0, 0.0, 0.0, 0.0, 1.0, 3.0]}
        assert records.scores(five)["score"] == 2.0  # a quarter of five, rounded up

    def test_a_target_that_was_not_reached(self) -> None:
        assert records.scores({"step": [0, 5], "return": [0.0, 0.2]}, target=0.3)["to_target"] is None
        assert records.scores({"step": [0, 5], "return": [0.4, 0.2]}, target=0.3)["to_target"] == {"step": 0}


def test_rounding_keeps_five_digits_and_what_json_cannot_say_becomes_none() -> None:
    value = {"a": [0.123456789, 1234567.8, -3.0], "b": (math.nan, math.inf), "c": 123456789, "d": "x", "e": None}
    expected = {"a": [0.12346, 1234600.0, -3], "b": [None, None], "c": 123456789, "d": "x", "e": None}
    assert records.rounded(value) == expected
    json.dumps(records.rounded(value), allow_nan=False)


class TestSummary:
    def test_chooses_on_choosing_seeds_and_reports_others_only(self) -> None:
        """On the reporting seeds 0.1 is far better. Looking at them would choose it, or report its scores."""
        choose = grid({0.01: [0.5, 0.6], 0.1: [0.4, 0.5]})
        report = grid({0.01: [0.2, 0.3, 0.1], 0.1: [0.9, 0.9, 0.9]}, phase="report", first=100)
        (row,) = records.summary(records.as_table([*choose, *report])).to_dict("records")
        assert (row["learning_rate"], row["choose_score"], row["choose_seeds"]) == (0.01, 0.55, 2)
        assert row["seeds"] == 3
        assert row["score"] == pytest.approx(0.2)
        assert row["area"] == pytest.approx(0.1)

    def test_intervals_are_those_of_the_statistics_module(self) -> None:
        scores = [0.31, 0.44, 0.27, 0.52, 0.40]
        table = records.as_table(grid({0.1: [0.0]}) + grid({0.1: scores}, phase="report", first=100))
        for confidence in (0.95, 0.5):
            row = records.summary(table, confidence=confidence).iloc[0]
            found = (row["score_low"], row["score"], row["score_high"])
            assert found == pytest.approx(bootstrap_interval(scores, confidence=confidence), rel=1e-12)
            halves = bootstrap_interval([score / 2 for score in scores], confidence=confidence)
            assert (row["area_low"], row["area"], row["area_high"]) == pytest.approx(halves, rel=1e-12)

    @pytest.mark.parametrize(
        ("scores", "best", "edge"),
        [
            ({0.1: [0.5], 0.2: [0.9], 0.3: [0.5]}, 0.2, ""),
            ({0.1: [0.9], 0.2: [0.8], 0.3: [0.5]}, 0.1, "lowest"),
            ({0.1: [0.5], 0.2: [0.8], 0.3: [0.9]}, 0.3, "highest"),
            ({0.1: [0.5], 0.2: [0.7], 0.3: [0.7], 0.4: [0.1]}, 0.2, ""),  # of equals the smaller
            ({0.2: [0.5]}, 0.2, ""),  # a grid of one has no inside
        ],
    )
    def test_best_step_size_and_whether_it_is_at_the_edge(self, scores: dict, best: float, edge: str) -> None:
        (row,) = records.best_learning_rates(records.as_table(reversed(grid(scores)))).to_dict("records")
        assert (row["learning_rate"], row["at_edge"]) == (best, edge)

    def test_a_grid_that_is_not_finished_is_refused(self) -> None:
        table = records.as_table(grid({0.1: [0.5, 0.6], 0.2: [0.9]}))
        with pytest.raises(ValueError, match=r"every step size of ntk with the same seeds.*the grid is not finished"):
            records.summary(table)

    def test_rules_and_optimizers_are_kept_apart(self) -> None:
        runs = grid({0.1: [0.5], 0.2: [0.6]}) + grid({0.1: [0.3], 0.2: [0.2]}, rule="grpo")
        other = grid({0.1: [0.8], 0.2: [0.7]})
        for one in other:
            one["run"]["optimizer"] = "sgd"
        found = records.summary(records.as_table(runs + other))
        chosen = found.set_index(["optimizer", "rule"])["learning_rate"].to_dict()
        assert chosen == {("adamw", "grpo"): 0.1, ("adamw", "ntk"): 0.2, ("sgd", "ntk"): 0.1}

    def test_a_seed_that_never_arrives_is_infinitely_late(self) -> None:
        def reached(*steps: int | None) -> pd.Series:
            runs = [
                record("ntk", 0.1, 100 + i, 0.5, "report", to_target=step and {"step": step, "samples": 8 * step})
                for i, step in enumerate(steps)
            ]
            return records.summary(records.as_table([record("ntk", 0.1, 0, 0.5), *runs])).iloc[0]

        row = reached(10, None, 30)
        assert (row["reached"], row["to_target_step"], row["to_target_samples"]) == (2, 30, 240)
        assert math.isnan(row["to_target_seconds"])  # nobody said
        assert reached(10, None, 30, 50)["to_target_step"] == 40
        assert math.isnan(reached(10, None, None)["to_target_step"])

    def test_diverged_runs_are_counted_and_cost_what_is_known(self) -> None:
        lost = record("ntk", 0.1, 100, 0.0, "report", status="diverged", curve={"step": [0, 10], "return": [0.3, 0.0]})
        table = records.as_table([record("ntk", 0.1, 0, 0.5), lost, record("ntk", 0.1, 101, 0.4, "report")])
        row = records.summary(table).iloc[0]
        assert (row["diverged"], row["seeds"], row["score"], row["backward_passes"]) == (1, 2, 0.2, 10)

    def test_without_reporting_seeds_nothing_is_reported(self) -> None:
        row = records.summary(records.as_table(grid({0.1: [0.5, 0.7]}))).iloc[0]
        assert (row["choose_score"], row["seeds"]) == (0.6, 0)
        assert math.isnan(row["score"])
        assert math.isnan(row["score_low"])


def test_curves_have_one_row_an_evaluation() -> None:
    first = record("ntk", 0.1, 0, 0.5)
    first["curve"] |= {"kl": [None, 0.02]}
    long = records.curves(records.as_table([first, record("grpo", 0.2, 1, 0.7)]))
    assert list(long["rule"]) == ["grpo", "grpo", "ntk", "ntk"]
    assert list(long["return"]) == [0.0, 0.7, 0.0, 0.5]
    assert list(long["samples"]) == [0, 80, 0, 80]
    assert long["kl"].tolist()[3] == 0.02
    assert long["kl"].isna().tolist() == [True, True, True, False]


class TestFiles:
    def test_come_back_as_they_were_whatever_their_order(self, tmp_path: Path) -> None:
        runs = grid({0.1: [0.5, 0.25], 0.02: [0.125, 1.0]})
        (tmp_path / "records").mkdir()
        for name, one in zip("dbca", runs, strict=True):
            records.write_record(tmp_path / "records" / f"{name}.json", one)
            assert records.read_record(tmp_path / "records" / f"{name}.json") == one
        loaded = records.load_records(tmp_path)
        pd.testing.assert_frame_equal(loaded, records.as_table(runs))
        assert list(loaded["score"]) == [0.125, 1.0, 0.5, 0.25]  # by step size, then seed

    def test_what_is_no_record_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"folder: expected records in .*/records, got none"):
            records.load_records(tmp_path)
        (tmp_path / "records").mkdir()
        broken = tmp_path / "records" / "half.json"
        for text, complaint in [('{"run": ', "got no JSON"), ("[]", "with run, score and curve")]:
            broken.write_text(text)
            with pytest.raises(ValueError, match=rf"half\.json: expected the record of a run, {complaint}"):
                records.load_records(tmp_path)
