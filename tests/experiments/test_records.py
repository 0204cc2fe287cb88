"""What is read from records: by hand where the numbers are few, against the statistics module where they are many."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from isopo_mini.experiments import records
from isopo_mini.experiments.record_files import file_name
from isopo_mini.experiments.statistics import t_interval


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
        "code": {"source": "0123456789ab"},
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

    def test_a_return_that_is_no_number_is_no_score(self) -> None:
        for bad in (math.nan, math.inf, None):
            with pytest.raises(ValueError, match=rf"curve: expected finite returns, got {bad} at step 5"):
                records.scores({"step": [0, 5, 9], "return": [0.0, bad, 0.3]})
        for steps, returns in [([0], [0.5]), ([0, 5], [0.5])]:
            with pytest.raises(ValueError, match=r"curve: expected two or more returns, one a step, got 1 for"):
                records.scores({"step": steps, "return": returns})


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
            assert found == pytest.approx(t_interval(scores, confidence=confidence), rel=1e-12)
            halves = t_interval([score / 2 for score in scores], confidence=confidence)
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

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("scores", [[None, None], [0.9, None], [None, 0.9]])
    def test_a_score_that_is_no_number_is_never_chosen_nor_left_out(self, bad: float, scores: list) -> None:
        """`argmax` takes a NaN for the largest, and a mean without it would choose what breaks down half the time."""
        worse = [bad if score is None else score for score in scores]
        table = records.as_table(grid({0.01: worse, 0.1: [0.7, 0.7]}))
        for function in (records.best_learning_rates, records.summary):
            with pytest.raises(ValueError, match=rf"got score {bad} of ntk, step size 0\.01, seed \d \(choose\); that"):
                function(table)

    def test_nor_reported_without(self) -> None:
        choose = grid({0.1: [0.7]})
        report = grid({0.1: [0.7, math.nan, 0.6]}, phase="report", first=100)
        with pytest.raises(ValueError, match=r"got score nan of ntk, step size 0\.1, seed 101 \(report\)"):
            records.summary(records.as_table([*choose, *report]))
        report = grid({0.1: [0.7, 0.6]}, phase="report", first=100)
        report[0]["area"] = math.inf
        with pytest.raises(ValueError, match=r"got area inf of ntk, step size 0\.1, seed 100 \(report\)"):
            records.summary(records.as_table([*choose, *report]))

    def test_a_run_counts_once(self) -> None:
        choose, report = grid({0.1: [0.7]}), grid({0.1: [0.7, 0.6]}, phase="report", first=100)
        for runs, named in [([*choose, *choose, *report], "0 .choose"), ([*choose, *report, report[1]], "101 .report")]:
            with pytest.raises(ValueError, match=rf"expected every run once, got ntk, step size 0\.1, seed {named}"):
                records.summary(records.as_table(runs))

    def test_without_reporting_seeds_nothing_is_reported(self) -> None:
        row = records.summary(records.as_table(grid({0.1: [0.5, 0.7]}))).iloc[0]
        assert (row["choose_score"], row["seeds"]) == (0.6, 0)
        assert math.isnan(row["score"])
        assert math.isnan(row["score_low"])


class TestBestMembers:
    """Two methods; of ntk two dampings were reported, of which the choosing seeds prefer the one that did worse."""

    runs = records.as_table(
        [
            *grid({0.1: [0.4, 0.6], 0.2: [0.1, 0.1]}, "ntk:damping=1"),
            *grid({0.1: [0.6, 0.6], 0.2: [0.1, 0.1]}, "ntk:damping=3"),
            *grid({0.1: [0.9, 0.9]}, "ntk:damping=9"),  # best of all, and not reported
            *grid({0.3: [0.2, 0.2]}, "ppo"),
            *grid({0.1: [0.8, 0.7]}, "ntk:damping=1", "report", 100),
            *grid({0.1: [0.5, 0.3]}, "ntk:damping=3", "report", 100),
            *grid({0.3: [0.6, 0.7]}, "ppo", "report", 100),
        ]
    )

    def test_the_choosing_seeds_decide_and_the_reporting_seeds_order(self) -> None:
        best = records.best_members(self.runs, lambda rule: rule.split(":")[0])
        assert best.index.to_list() == ["ppo", "ntk"]
        assert best.loc["ntk", "rule"] == "ntk:damping=3"
        assert best.loc["ntk", "score"] == pytest.approx(0.4)

    def test_a_rule_of_no_method_is_left_out(self) -> None:
        best = records.best_members(self.runs, {"ntk:damping=1": "ISOPO"}.get)
        assert best["rule"].to_dict() == {"ISOPO": "ntk:damping=1"}
        with pytest.raises(ValueError, match="records: expected runs of the phase 'report' of at least one method"):
            records.best_members(self.runs, lambda rule: None)

    def test_the_runs_of_a_member_are_its_reporting_ones_by_seed(self) -> None:
        member = records.best_members(self.runs, {"ntk:damping=1": "ISOPO"}.get).loc["ISOPO"]
        found = records.reports_of(self.runs.iloc[::-1], member)
        assert found[["seed", "score"]].to_numpy().tolist() == [[100, 0.8], [101, 0.7]]


def test_curves_have_one_row_an_evaluation() -> None:
    first = record("ntk", 0.1, 0, 0.5)
    first["curve"] |= {"kl": [None, 0.02]}
    long = records.curves(records.as_table([first, record("grpo", 0.2, 1, 0.7)]))
    assert list(long["rule"]) == ["grpo", "grpo", "ntk", "ntk"]
    assert list(long["return"]) == [0.0, 0.7, 0.0, 0.5]
    assert list(long["samples"]) == [0, 80, 0, 80]
    assert long["kl"].tolist()[3] == 0.02
    assert long["kl"].isna().tolist() == [True, True, True, False]


def write(folder: Path, one: dict[str, Any]) -> Path:
    """Put a record where it belongs."""
    run = one["run"]
    path = folder / "records" / file_name(run["rule"], run["optimizer"], run["learning_rate"], run["seed"])
    path.parent.mkdir(exist_ok=True)
    records.write_record(path, one)
    return path


CONFIGURATION = {
    "task": "bandit",
    "optimizer": "adamw",
    "step_sizes": {"ntk": [0.1, 0.2], "grpo": [0.1]},
    "seeds": [0, 1],
    "report_seeds": [100],
}


class TestFiles:
    def test_come_back_as_they_were_whatever_their_order(self, tmp_path: Path) -> None:
        runs = grid({0.1: [0.5, 0.25], 0.02: [0.125, 1.0]})
        for one in reversed(runs):
            assert records.read_record(write(tmp_path, one)) == one
        loaded = records.load_records(tmp_path)
        pd.testing.assert_frame_equal(loaded, records.as_table(runs))
        assert list(loaded["score"]) == [0.125, 1.0, 0.5, 0.25]  # by step size, then seed

    def test_what_is_no_record_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"folder: expected records in .*records, got none"):
            records.load_records(tmp_path)
        (tmp_path / "records").mkdir()
        broken = tmp_path / "records" / "half.json"
        for text, complaint in [('{"run": ', "got no JSON"), ("[]", "with run, score and curve")]:
            broken.write_text(text, encoding="utf-8")
            with pytest.raises(ValueError, match=rf"half\.json: expected the record of a run, {complaint}"):
                records.load_records(tmp_path)
        broken.write_bytes(b"\x00\x05\x16\x07\xff")  # what some systems leave beside every file
        with pytest.raises(ValueError, match=r"half\.json: expected the record of a run, got no JSON"):
            records.load_records(tmp_path)

    @pytest.mark.parametrize("part", ["area", "to_target", "wall_seconds"])
    def test_a_part_that_is_missing_is_named(self, tmp_path: Path, part: str) -> None:
        one = record("ntk", 0.1, 0, 0.5)
        del one[part]
        path = write(tmp_path, one)
        with pytest.raises(
            ValueError, match=rf"ntk__adamw__0\.1__0\.json: expected the record of a run, got .* {part}"
        ):
            records.read_record(path)

    def test_a_run_that_is_none_is_named(self, tmp_path: Path) -> None:
        path = write(tmp_path, record("ntk", 0.1, 0, 0.5))
        for run, missing in [("ntk", "task, rule, learning_rate"), ({"rule": "ntk"}, "task, learning_rate")]:
            records.write_record(path, record("ntk", 0.1, 0, 0.5) | {"run": run})
            with pytest.raises(ValueError, match=rf"expected the record of a run, got one without {missing}"):
                records.read_record(path)

    @pytest.mark.parametrize("value", [None, math.nan, "0.5"])
    @pytest.mark.parametrize("part", ["score", "final", "area"])
    def test_a_score_that_is_no_number_is_refused(self, tmp_path: Path, part: str, value: Any) -> None:
        path = write(tmp_path, record("ntk", 0.1, 0, 0.5))
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {part: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"ntk__adamw__0\.1__0\.json: expected a finite {part}, got {value}"):
            records.load_records(tmp_path)

    def test_a_copy_would_make_one_seed_weigh_double(self, tmp_path: Path) -> None:
        path = write(tmp_path, record("ntk", 0.1, 0, 0.5))
        (path.parent / "ntk__adamw__0.1__0 copy.json").write_bytes(path.read_bytes())
        with pytest.raises(
            ValueError, match=r"ntk__adamw__0\.1__0 copy\.json: expected ntk__adamw__0\.1__0\.json, the name of"
        ):
            records.load_records(tmp_path)

    def test_what_the_configuration_does_not_name_is_refused(self, tmp_path: Path) -> None:
        """A record of another task, or of a step size that was never part of this, would be summarised along."""
        (tmp_path / "config.json").write_text(json.dumps(CONFIGURATION), encoding="utf-8")
        own = record("ntk", 0.1, 0, 0.5), record("ntk", 0.2, 1, 0.5), record("grpo", 0.1, 100, 0.5, "report")
        for one in own:
            write(tmp_path, one)
        assert len(records.load_records(tmp_path)) == len(own)
        elsewhere = record("ntk", 0.2, 0, 0.5)
        elsewhere["run"]["task"] = "cartpole"
        for one, message in [
            (elsewhere, "with task bandit, got cartpole"),
            (record("ppo", 0.1, 0, 0.5), "with rule ntk, grpo, got ppo"),
            (record("grpo", 0.2, 0, 0.5), r"with learning_rate 0\.1, got 0\.2"),
            (record("ntk", 0.2, 100, 0.5), "with seed 0, 1, got 100"),
            (record("ntk", 0.2, 0, 0.5, "report"), "with seed 100, got 0"),
            (record("ntk", 0.2, 0, 0.5, "test"), "with phase choose, report, got test"),
        ]:
            path = write(tmp_path, one)
            with pytest.raises(
                ValueError, match=rf"{path.name}: expected a run of this folder's experiment, {message}"
            ):
                records.load_records(tmp_path)
            path.unlink()
        assert len(records.load_records(tmp_path)) == len(own)

    def test_a_configuration_that_is_none_is_named(self, tmp_path: Path) -> None:
        write(tmp_path, record("ntk", 0.1, 0, 0.5))
        for text in ("{", "[]", '{"seeds": [0]}'):
            (tmp_path / "config.json").write_text(text, encoding="utf-8")
            with pytest.raises(ValueError, match=r"config\.json: expected the configuration of an experiment, "):
                records.load_records(tmp_path)

    def test_twice_is_once_and_an_interruption_leaves_the_old_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path, record("ntk", 0.1, 0, 0.5))
        before = path.read_bytes()
        assert write(tmp_path, record("ntk", 0.1, 0, 0.5)).read_bytes() == before

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, record("ntk", 0.1, 0, 0.7))
        assert {found.name: found.read_bytes() for found in path.parent.iterdir()} == {path.name: before}
