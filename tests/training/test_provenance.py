"""Results say where they came from, name no machine's folders, and are written whole or not at all."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import isopo_mini
from isopo_mini.training import provenance as module
from isopo_mini.training.provenance import provenance, write_atomically, write_table


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

    def test_outside_a_checkout_the_commit_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_git(*_: Any) -> str:
            raise subprocess.CalledProcessError(128, "git")

        monkeypatch.setattr(module, "_git", no_git)
        assert provenance()["code"]["commit"] == "unknown"

    @pytest.mark.parametrize(("changes", "commit"), [("", "abc"), (" M isopo_mini/batch.py", "abc+")])
    def test_changed_code_gets_a_plus(self, changes: str, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_git", lambda _, command, *__: "abc" if command == "rev-parse" else changes)
        assert provenance()["code"]["commit"] == commit


class TestTable:
    def test_is_read_back_with_its_record_beside_it(self, tmp_path: Path) -> None:
        table = pd.DataFrame({"method": ["REINFORCE", "ISOPO (NTK)"], "ratio": [1.0, 1.0 / 3.0]})
        record = provenance(seeds=[0])
        path = tmp_path / "results" / "step_cost.csv"  # the folder is made
        write_table(path, table, record)
        pd.testing.assert_frame_equal(pd.read_csv(path), table)
        assert json.loads(path.with_suffix(".json").read_text()) == record
        assert sorted(file.name for file in path.parent.iterdir()) == ["step_cost.csv", "step_cost.json"]

    def test_replaces_an_older_one(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        for value in (1, 2):
            write_table(path, pd.DataFrame({"x": [value]}), {"value": value})
        assert path.read_text() == "x\n2\n"
        assert json.loads((tmp_path / "a.json").read_text()) == {"value": 2}


class TestAtomic:
    def test_others_may_read_the_file(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("fails", ["fsync", "chmod", "replace"])
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_file_and_nothing_else(
        self, fails: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")

        def raises(*_: Any) -> None:
            raise error

        monkeypatch.setattr(os, fails, raises)
        with pytest.raises(type(error)):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]

    def test_the_text_is_complete_before_it_gets_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        replace, seen = os.replace, []

        def look_then_replace(source: str, target: Path) -> None:
            seen.append((Path(source).parent, Path(source).read_text(), target.exists()))
            replace(source, target)

        monkeypatch.setattr(os, "replace", look_then_replace)
        write_atomically(path, "all of it")
        assert seen == [(tmp_path, "all of it", False)]  # same folder: only there a rename is atomic
        assert path.read_text() == "all of it"

    def test_a_killed_process_leaves_the_old_file(self, tmp_path: Path) -> None:
        """The real thing: the process dies in the middle of writing, with no chance to clean up."""
        path = tmp_path / "a.txt"
        path.write_text("old")
        program = f"""
            import importlib.util, os, sys
            from unittest.mock import MagicMock
            sys.modules.update({{name: MagicMock() for name in ("isopo_mini", "pandas", "torch")}})  # slow to import
            spec = importlib.util.spec_from_file_location("provenance", {str(module.__file__)!r})
            provenance = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(provenance)
            os.fsync = lambda _: os._exit(9)
            provenance.write_atomically(provenance.Path({str(path)!r}), "new" * 100_000)
        """
        result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
        assert result.returncode == 9
        assert path.read_text() == "old"
