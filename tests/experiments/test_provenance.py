"""Results say where they came from, name no machine's folders, and are written whole or not at all."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import isopo_mini
from isopo_mini.experiments.provenance import provenance, write_table


def strings(value: Any) -> list[str]:
    """Every string in nested dicts and lists, keys included."""
    if isinstance(value, dict):
        return [text for item in value.items() for text in strings(list(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


class TestRecord:
    def test_says_what_ran_with_which_code_libraries_and_device(self) -> None:
        record = provenance(seeds=[0, 1], width=64)
        assert set(record) == {"command", "settings", "code", "libraries", "device", "date"}
        assert record["settings"] == {"seeds": [0, 1], "width": 64}
        assert record["code"]["isopo_mini"] == isopo_mini.__version__
        assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", record["code"]["commit"])
        assert record["libraries"]["torch"] == torch.__version__
        assert record["libraries"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert record["device"]["type"] == "cpu"
        assert record["device"]["name"]
        assert record["device"]["threads"] == torch.get_num_threads()
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])

    def test_survives_json(self) -> None:
        record = provenance(torch.device("cpu"), seeds=[0], lr=1e-3, note="ρ = 0.1")
        assert json.loads(json.dumps(record)) == record

    def test_names_no_folder_of_the_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script, out = tmp_path / "measure.py", tmp_path / "out.csv"
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, str(script), "--out", str(out), "--seeds", "3"])
        record = provenance(seeds=3)
        assert record["command"] == "python measure.py --out out.csv --seeds 3"
        folders = {str(tmp_path), str(Path(isopo_mini.__file__).parent.parent), str(Path.home()), sys.prefix}
        for text in strings(record):
            assert not any(folder in text for folder in folders if folder != "/"), text
            assert not any(os.path.isabs(word) for word in text.split()), text

    def test_a_path_given_with_an_equals_sign(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.step_cost", "--out=results/a.csv"])
        assert provenance()["command"] == "python -m benchmarks.step_cost --out=results/a.csv"

    def test_a_path_of_the_machine_after_an_equals_sign_is_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        argument = f"--out={tmp_path / 'a.csv'}"
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.step_cost", argument, "ntk:damping=0.1"])
        assert provenance()["command"] == "python -m benchmarks.step_cost --out=a.csv ntk:damping=0.1"


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody who has configured nothing."""
    who = ["-c", "user.email=a@b", "-c", "user.name=x", "-c", "init.defaultBranch=main"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def make_repository(folder: Path, package: str, *, ignored: str = "", project: str = "isopo_mini") -> Path:
    """A repository with one commit, and the package somewhere in it; where the package is."""
    place = folder / package
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("", encoding="utf-8")
    (folder / ".gitignore").write_text(ignored, encoding="utf-8")
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n', encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "thesis")
    return place


class TestCommit:
    @pytest.fixture
    def commit_of(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
        """What is said of a package that lies in this folder."""

        def ask(place: Path) -> str:
            monkeypatch.setattr(isopo_mini, "__file__", str(place / "__init__.py"))
            return provenance()["code"]["commit"]

        return ask

    def test_of_a_checkout_is_its_own_and_changed_code_gets_a_plus(
        self, tmp_path: Path, commit_of: Callable[[Path], str]
    ) -> None:
        place = make_repository(tmp_path, "isopo_mini")
        commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
        (tmp_path / "notes.txt").write_text("not code", encoding="utf-8")
        assert commit_of(place) == commit
        (place / "__init__.py").write_text("changed", encoding="utf-8")
        assert commit_of(place) == commit + "+"

    @pytest.mark.parametrize(
        ("package", "options"),
        [
            (".venv/lib/site-packages/isopo_mini", {"ignored": ".venv", "project": "thesis"}),  # installed
            ("isopo_mini", {"ignored": "isopo_mini"}),  # put beside somebody's own files
            ("isopo_mini", {"project": "thesis"}),  # copied into somebody's repository
            ("third_party/isopo_mini", {}),
        ],
    )
    def test_of_the_repository_around_it_is_nobodys(
        self, package: str, options: dict[str, str], tmp_path: Path, commit_of: Callable[[Path], str]
    ) -> None:
        assert commit_of(make_repository(tmp_path, package, **options)) == "unknown"

    def test_outside_of_any_repository_it_is_unknown(
        self, tmp_path: Path, commit_of: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "isopo_mini"
        place.mkdir()
        assert commit_of(place) == "unknown"
        monkeypatch.setenv("PATH", "")  # no git
        assert commit_of(place) == "unknown"

    def test_a_hook_of_another_repository_does_not_lend_it_its_own(
        self, tmp_path: Path, commit_of: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Git names the repository of a hook by GIT_DIR."""
        place = make_repository(tmp_path / "ours", "isopo_mini")
        make_repository(tmp_path / "theirs", "isopo_mini")
        git(tmp_path / "theirs", "commit", "--allow-empty", "-qm", "another")
        commit = git(tmp_path / "ours", "rev-parse", "--short=12", "HEAD")
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))
        assert commit_of(place) == commit


class TestTable:
    def test_is_read_back_with_its_record_beside_it(self, tmp_path: Path) -> None:
        table = pd.DataFrame({"method": ["REINFORCE", "ISOPO (NTK)"], "ratio": [1.0, 1.0 / 3.0]})
        record = provenance(seeds=[0])
        path = tmp_path / "results" / "step_cost.csv"  # the folder is made
        write_table(path, table, record)
        pd.testing.assert_frame_equal(pd.read_csv(path), table)
        assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == record
        assert sorted(file.name for file in path.parent.iterdir()) == ["step_cost.csv", "step_cost.json"]

    def test_replaces_an_older_one(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        for value in (1, 2):
            write_table(path, pd.DataFrame({"x": [value]}), {"value": value})
        assert path.read_text(encoding="utf-8") == "x\n2\n"
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"value": 2}

    def test_twice_is_once(self, tmp_path: Path) -> None:
        states = []
        for _ in range(2):
            write_table(tmp_path / "a.csv", pd.DataFrame({"x": [0.1]}), provenance(seeds=[0]))
            states.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        assert states[0] == states[1]

    @pytest.mark.parametrize("call", [1, 2])
    def test_interrupted_it_leaves_the_old_table_with_its_old_record(
        self, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also while the second of the two files is written: a table never stands beside the record of another."""
        write_table(tmp_path / "a.csv", pd.DataFrame({"x": [1]}), {"value": 1})
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        fsync, calls = os.fsync, []

        def interrupt(handle: int) -> None:
            calls.append(handle)
            if len(calls) == call:
                raise KeyboardInterrupt
            fsync(handle)

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_table(tmp_path / "a.csv", pd.DataFrame({"x": [2]}), {"value": 2})
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_name_that_the_record_needs_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"path: expected a table's name, such as a\.csv, got a\.json"):
            write_table(tmp_path / "a.json", pd.DataFrame({"x": [1]}), {})
        assert list(tmp_path.iterdir()) == []
