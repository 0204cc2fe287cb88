"""The grid: any order gives one table, a killed command loses nothing, another configuration is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import isopo_mini
from isopo_mini.experiments import pool, records
from isopo_mini.experiments.command import compare, grid, main, parse_rules, run_all
from isopo_mini.experiments.record_files import name_of, read_records
from isopo_mini.experiments.runs import Run

STEP_SIZES = {"reinforce": [0.01, 0.1], "ntk:damping=0.1": [0.01, 0.1]}
NUMBERS = {"sequences": 8, "steps": 4, "evaluations": 2}
SECONDS = ["seconds", "to_target_seconds"]
CLOCKS = ("wall_seconds", "date", "code")  # and the commit, which is not this test's to hold


def small(folder: Path, **changes: Any) -> pd.DataFrame:
    """Two rules, two step sizes, two seeds to choose, two to report, four batches of eight."""
    settings = {"task": "bandit", "step_sizes": STEP_SIZES, "seeds": [0, 1], "report_seeds": [10, 11], **NUMBERS}
    return compare(folder, **(settings | changes))


def kept(folder: Path) -> dict[str, Any]:
    """Every record by file name, without what a clock said."""
    found = {}
    for record in read_records(folder):
        record["curve"].pop("seconds")
        (record["to_target"] or {}).pop("seconds", None)
        found[name_of(record["run"])] = {name: record[name] for name in record if name not in CLOCKS}
    return found


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.drop(columns=SECONDS), other.drop(columns=SECONDS), check_exact=True)


class TestOrder:
    def test_of_rules_step_sizes_and_seeds_is_irrelevant(self, tmp_path: Path) -> None:
        turned = {rule: sizes[::-1] for rule, sizes in reversed(STEP_SIZES.items())}
        first = small(tmp_path / "a")
        second = small(tmp_path / "b", step_sizes=turned, seeds=[1, 0], report_seeds=[11, 10])
        assert_same(first, second)
        assert kept(tmp_path / "a") == kept(tmp_path / "b")
        assert json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8")) == json.loads(
            (tmp_path / "b" / "config.json").read_text(encoding="utf-8")
        )

    def test_a_run_knows_nothing_of_the_others(self, tmp_path: Path) -> None:
        small(tmp_path)
        alone = pool.run(Run("bandit", "ntk:damping=0.1", 0.1, 1, **NUMBERS))
        assert kept(tmp_path)["ntk_damping=0.1__adamw__0.1__1.json"]["curve"]["return"] == alone["curve"]["return"]


class TestFolder:
    def test_holds_two_phases_and_a_table_with_its_origin(self, tmp_path: Path) -> None:
        table = small(tmp_path / "out")
        best = table.set_index("rule")["learning_rate"]
        expected = {
            *(one.file_name for one in grid("bandit", STEP_SIZES, [0, 1])),
            *(one.file_name for rule in STEP_SIZES for one in grid("bandit", {rule: [best[rule]]}, [10, 11], "report")),
        }
        assert set(kept(tmp_path / "out")) == expected
        assert len(expected) == 2 * 2 * 2 + 2 * 2
        loaded = records.load_records(tmp_path / "out")
        assert loaded["phase"].value_counts().to_dict() == {"choose": 8, "report": 4}
        scores = loaded[loaded["phase"] == "choose"].groupby(["rule", "learning_rate"])["score"].mean()
        assert all(scores[rule].idxmax() == best[rule] for rule in STEP_SIZES)
        written = pd.read_csv(tmp_path / "out" / "summary.csv", keep_default_na=False, na_values=[""])
        assert list(written["score"]) == pytest.approx(list(records.summary(loaded)["score"]), rel=6e-5)
        origin = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
        assert origin["settings"]["configuration"]["report_seeds"] == [10, 11]
        assert origin["libraries"]["torch"] == torch.__version__

    def test_is_continued_and_nothing_runs_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = small(tmp_path)
        lost = "ntk_damping=0.1__adamw__0.1__1.json"
        packed = tmp_path / "records.jsonl"
        lines = packed.read_text(encoding="utf-8").splitlines(keepends=True)
        packed.write_text("".join(line for line in lines if name_of(json.loads(line)["run"]) != lost), encoding="utf-8")
        ran = []
        actual = pool.run
        monkeypatch.setattr(pool, "run", lambda one: ran.append(one.file_name) or actual(one))
        assert_same(small(tmp_path), first)
        assert ran == [lost]
        kept_lines = [line for line in lines if name_of(json.loads(line)["run"]) != lost]
        assert packed.read_text(encoding="utf-8").splitlines(keepends=True)[:-1] == kept_lines, (
            "a line is added, none is changed"
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 5}, r"another steps \(steps: 4 there, 5 here\); choose another folder"),
            ({"optimizer": "sgd"}, r"another optimizer \(optimizer: adamw there, sgd here\)"),
            ({"seeds": [0, 1, 2]}, r"another seeds \(seeds: \[0, 1\] there, \[0, 1, 2\] here\).*--extend"),
            ({"step_sizes": {"reinforce": [0.01]}}, "another step_sizes"),
            ({"steps": 5, "extend": True}, "another steps"),
            ({"seeds": [0], "extend": True}, "another seeds"),
            ({"step_sizes": {"reinforce": [0.01, 0.1, 1.0]}, "extend": True}, "another step_sizes"),
        ],
    )
    def test_of_another_configuration_is_refused_and_stays(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        shared = {"task": "bandit", "optimizer": "adamw", "device": "cpu", **NUMBERS}
        config = shared | {"step_sizes": STEP_SIZES, "seeds": [0, 1], "report_seeds": [10, 11]}
        before = json.dumps(config)
        (tmp_path / "config.json").write_text(before, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"out: expected a folder with this configuration, .* with {message}"):
            small(tmp_path, **changes)
        assert (tmp_path / "config.json").read_text(encoding="utf-8") == before
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_twice_is_once(self, tmp_path: Path) -> None:
        states = []
        for _ in range(2):
            small(tmp_path, report_seeds=[10])
            states.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
            origin = json.loads(states[-1].pop(tmp_path / "summary.json"))
            states[-1] |= {name: origin[name] for name in origin if name not in CLOCKS}
        assert states[0] == states[1]

    def test_a_record_from_elsewhere_is_named(self, tmp_path: Path) -> None:
        """It would have a say in which step size is best."""
        small(tmp_path)
        record = read_records(tmp_path)[-1]
        record["run"] |= {"rule": "reinforce", "learning_rate": 0.2, "seed": 0, "phase": "choose"}
        stray = tmp_path / "records" / "reinforce__adamw__0.2__0.json"
        stray.write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{stray.name}: expected a run of this folder's experiment, .* got 0\.2"):
            small(tmp_path)

    def test_killed_while_its_configuration_was_written_it_can_start_again(self, tmp_path: Path) -> None:
        (tmp_path / ".config.json.k3x9").write_text('{"task": ', encoding="utf-8")
        assert len(small(tmp_path, report_seeds=[])) == 2

    def test_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(ValueError, match=r"out: expected a new folder .* without config\.json"):
            small(tmp_path)

    def test_is_extended_on_request(self, tmp_path: Path) -> None:
        small(tmp_path)
        before = kept(tmp_path)
        more = {"reinforce": [0.01, 0.1, 1.0], "ntk:damping=0.1": [0.01, 0.1], "fisher": [0.1]}
        table = small(tmp_path, step_sizes=more, seeds=[0, 1, 2], report_seeds=[10, 11, 12], extend=True)
        assert set(table["rule"]) == set(more)
        assert list(table["choose_seeds"]) == list(table["seeds"]) == [3, 3, 3]
        after = kept(tmp_path)
        assert all(after[name] == record for name, record in before.items())
        assert_same(table, small(tmp_path, step_sizes=more, seeds=[0, 1, 2], report_seeds=[10, 11, 12]))

    def test_with_a_record_of_other_settings_is_refused(self, tmp_path: Path) -> None:
        """Someone copied a record from elsewhere."""
        (tmp_path / "records").mkdir()
        run_all([Run("bandit", "reinforce", 0.1, 0, **NUMBERS)], tmp_path)
        with pytest.raises(
            ValueError, match=r"reinforce__adamw__0\.1__0\.json: expected the record of .*'steps': 5.*, got"
        ):
            run_all([Run("bandit", "reinforce", 0.1, 0, **(NUMBERS | {"steps": 5}))], tmp_path)


def arguments(folder: Path) -> list[str]:
    """Eight runs to choose and two to report, each long enough to be killed in the middle."""
    options = "--learning-rates 0.01 0.03 0.1 0.3 --seeds 0 1 --report-seeds 10 11 --sequences 8 --steps 100"
    return f"bandit --rules reinforce {options} --out {folder}".split()


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text(encoding="utf-8").split()] if listed.exists() else []


def is_alive(process: int) -> bool:
    """Whether it still runs; one that ended and was not waited for does not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_killed_in_the_middle_and_started_again_it_gives_the_same_table(tmp_path: Path) -> None:
    """SIGKILL to a command with two processes; then the same command with one, against one that nobody disturbed."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-W", "error", "-m", "isopo_mini.experiments", *arguments(folder)]
    environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--processes", "2"], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600  # for what hangs
    try:
        while len(list((folder / "records").glob("*.json"))) < 2:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    while any(is_alive(worker) for worker in workers):  # they notice that their parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    left = {path.name: records.read_record(path) for path in (folder / "records").glob("*.json")}
    assert 2 <= len(left) < 10
    assert not (folder / "summary.csv").exists()
    main([*arguments(folder), "--processes", "1"])
    main([*arguments(tmp_path / "whole"), "--processes", "1"])
    after = {name_of(record["run"]): record for record in read_records(folder)}
    assert all(after[name] == record for name, record in left.items()), "made once, clocks and all"
    assert [path.name for path in folder.rglob("*.json") if path.parent != folder] == [], "all in one file"
    assert kept(folder) == kept(tmp_path / "whole")
    assert_same(pd.read_csv(folder / "summary.csv"), pd.read_csv(tmp_path / "whole" / "summary.csv"))


class TestFailures:
    def test_a_diverged_run_is_a_record_and_the_others_go_on(self, tmp_path: Path) -> None:
        (row,) = small(tmp_path, step_sizes={"reinforce": [0.1, 3e37]}).to_dict("records")
        assert (row["learning_rate"], row["diverged"]) == (0.1, 0)
        status = records.load_records(tmp_path).groupby("learning_rate")["status"].unique().map(list).to_dict()
        assert status == {0.1: ["finished"], 3e37: ["diverged"]}

    def test_a_run_with_an_error_does_not_stop_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        actual = pool.run

        def fails_once(one: Run) -> dict[str, Any]:
            if one.rule == "reinforce" and one.seed == 0:
                raise ValueError("a mistake")
            return actual(one)

        monkeypatch.setattr(pool, "run", fails_once)
        with pytest.raises(
            RuntimeError, match=r"2 of 8 runs failed, first reinforce__adamw__0\.01__0\.json: a mistake"
        ):
            small(tmp_path)
        assert len(kept(tmp_path)) == 6
        monkeypatch.setattr(pool, "run", actual)
        assert len(small(tmp_path)) == 2

    def test_an_error_in_another_process_is_reported_alike(self, tmp_path: Path) -> None:
        """The Fisher-vector products of `npg` want max_iterations ≥ 1; only the run finds out."""
        with pytest.raises(
            RuntimeError, match=r"1 of 2 runs failed, first npg_max_iterations=0__adamw__0\.1__0\.json: "
        ):
            run_all(
                [
                    Run("bandit", "npg:max_iterations=0", 0.1, 0, **NUMBERS),
                    Run("bandit", "reinforce", 0.1, 0, **NUMBERS),
                ],
                tmp_path,
                processes=2,
            )
        assert list(kept(tmp_path)) == ["reinforce__adamw__0.1__0.json"]


SCRIPT = """
from pathlib import Path
from isopo_mini.experiments.command import compare
compare(Path("out"), "bandit", {"reinforce": [0.1]}, [0, 1], processes=2, steps=2)
"""


@pytest.mark.parametrize("way", ["script", "standard input"])
def test_a_script_without_a_guard_is_told_so(way: str, tmp_path: Path) -> None:
    """'Start the same command again' would be said for ever."""
    (tmp_path / "mine.py").write_text(SCRIPT, encoding="utf-8")
    root = Path(isopo_mini.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command, text = ([sys.executable, "mine.py"], None) if way == "script" else ([sys.executable, "-"], SCRIPT)
    result = subprocess.run(
        command, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    last = result.stderr.rstrip().splitlines()[-1]
    assert 'a script must call this under `if __name__ == "__main__":`' in last
    assert "from standard input cannot have processes" in last
    assert "start the same command again" not in last


class TestCommandLine:
    def test_prints_the_summary_and_warns_at_the_edge(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # With exact returns that grow with the step size, the largest is best.
        monkeypatch.setattr(pool, "run", lambda one, actual=pool.run: actual(one) | {"score": one.learning_rate})
        main(f"bandit --rules reinforce --learning-rates 0.1 0.01 --steps 2 --processes 1 --out {tmp_path}".split())
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[:5] == ["rule", "optimizer", "learning_rate", "at_edge", "choose_score"]
        assert lines[1].split()[:5] == ["reinforce", "adamw", "0.1", "highest", "0.1"]
        assert lines[2].startswith("at_edge: the best step size is the end of its grid")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("bandits --rules ntk --learning-rates 0.1", r"task: expected one of bandit.*, got 'bandits'"),
            ("bandit --rules isopo --learning-rates 0.1", r"rule: expected one of .*reinforce.*ntk.*, got 'isopo'"),
            ("bandit --rules ntk:dampng=1@0.1", r"rule: expected ntk:option=value.*damping.*'dampng=1'"),
            ("bandit --rules ntk", "rules: expected step sizes for ntk"),
            ("bandit --rules ntk@a,b", "rules: expected numbers after the @ of ntk, got 'a,b'"),
            ("bandit --rules ntk ntk@1 --learning-rates 0.1", "rules: expected every rule once, got ntk twice"),
            (
                "bandit --rules ntk@0.1,0.1",
                "grid: expected every rule, step size and seed once, got ntk__adamw__0.1__0.json",
            ),
            ("bandit --rules ntk@-1", "learning_rate: expected a finite number > 0, got -1"),
            ("bandit --rules ntk@1 --report-seeds 2 3", r"report_seeds: expected none of the seeds .*, got \[2\]"),
            ("bandit --rules ntk@1 --processes 0", "processes: expected a finite number >= 1, got 0"),
        ],
    )
    def test_bad_input_is_one_line_and_leaves_no_folder(self, line: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=rf"^error: {message}"):
            main([*line.split(), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()

    def test_help_lists_tasks_and_rules(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        shown = capsys.readouterr().out
        for text in ("contextual bandit", "ntk ", "damping, entropy, gram", "grpo ", "clip_high"):
            assert text in shown

    def test_rules_with_step_sizes_of_their_own(self) -> None:
        assert parse_rules(["ntk", "trpo@1e-3,0.01"], [0.1, 0.2])[0] == {"ntk": [0.1, 0.2], "trpo": [0.001, 0.01]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("task", ["bandit", "cartpole", "addition"])
def test_a_gpu_runs_the_same_commands(task: str, tmp_path: Path) -> None:
    numbers = {"sequences": 16, "steps": 4, "evaluations": 2, "device": "cuda"}
    table = compare(tmp_path, task, {"reinforce": [0.01], "ntk": [0.01], "grpo": [0.01]}, [0], [1, 2], **numbers)
    assert list(table["seeds"]) == [2, 2, 2]
    assert {path["device"]["type"] for path in kept(tmp_path).values()} == {"cuda"}
