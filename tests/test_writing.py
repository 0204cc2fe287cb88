"""Files are written whole or not at all, twice is once, and a process that dies leaves the old file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isopo_mini import writing
from isopo_mini.writing import is_unfinished, write_atomically, write_together


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_others_may_read_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("fails", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    fails: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def raises(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, fails, raises)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_the_text_is_complete_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    replace, seen = os.replace, []

    def look_then_replace(source: str, target: Path) -> None:
        seen.append((Path(source).parent, Path(source).read_text(encoding="utf-8"), target.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    write_atomically(path, "all of it")
    assert seen == [(tmp_path, "all of it", False)]  # same folder: only there a rename is atomic
    assert path.read_text(encoding="utf-8") == "all of it"


def test_twice_is_once(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        write_atomically(tmp_path / "a.txt", "ρ = 0.1\n")
        write_atomically(tmp_path / "b", b"\x00\r\n")
        states.append(contents(tmp_path))
    assert states == [{"a.txt": "ρ = 0.1\n".encode(), "b": b"\x00\r\n"}] * 2


def test_files_that_belong_together_wait_for_each_other(tmp_path: Path) -> None:
    """The second cannot be written, so the first stays as it was."""
    first, second = tmp_path / "a.csv", tmp_path / "missing" / "a.json"
    first.write_text("old", encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        write_together({first: "new", second: "new"})
    assert contents(tmp_path) == {"a.csv": b"old"}
    second.parent.mkdir()
    write_together({first: "new", second: "new"})
    assert (first.read_text(encoding="utf-8"), second.read_text(encoding="utf-8")) == ("new", "new")


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    """The real thing: the process dies in the middle of writing, with no chance to clean up."""
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    program = (Path(writing.__file__).read_text(encoding="utf-8")) + (
        f"\nos.fsync = lambda _: os._exit(9)\nwrite_atomically(Path({str(path)!r}), 'new' * 100_000)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False)
    assert result.returncode == 9
    assert path.read_text(encoding="utf-8") == "old"
    (left,) = (found for found in tmp_path.iterdir() if found != path)
    assert is_unfinished(left, path)
    assert not is_unfinished(left, tmp_path / "b.txt")
    assert not is_unfinished(path, path)
    write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
