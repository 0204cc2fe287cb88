"""A lease is given once, comes back, and is void when its holder is gone."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isopo_mini.experiments import leases
from isopo_mini.experiments.leases import lease, left


def leave(folder: Path, host: str, process: int, age: float = 0.0) -> Path:
    """What a holder leaves behind who was killed."""
    path = folder / "running" / "one"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": host, "process": process}), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


def held(folder: Path) -> list[str]:
    """The leases that somebody holds."""
    return sorted({path.name for path in (folder / "running").glob("[!.]*")} - set(left(folder)))


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_at_a_time_and_then_the_next(tmp_path: Path) -> None:
    with lease(tmp_path, "one") as ours:
        assert ours
        assert held(tmp_path) == ["one"]
        with lease(tmp_path, "one") as second, lease(tmp_path, "two") as another:
            assert not second
            assert another
        assert held(tmp_path) == ["one"], "who was refused takes nothing away"
    assert held(tmp_path) == left(tmp_path) == []
    with lease(tmp_path, "one") as ours:
        assert ours


def test_an_error_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lease(tmp_path, "one"):
        raise KeyError
    assert held(tmp_path) == []


def test_only_void_ones_are_swept_away_and_only_those_named(tmp_path: Path) -> None:
    void = leave(tmp_path, leases.socket.gethostname(), ended_process())
    with lease(tmp_path, "two"):
        leases.sweep(tmp_path, ["two", "three"])
        assert (left(tmp_path), held(tmp_path)) == (["one"], ["two"])
        leases.sweep(tmp_path, ["one", "two"])
        assert (left(tmp_path), held(tmp_path)) == ([], ["two"])
    assert not void.exists()


def test_of_many_who_ask_at_once_one_gets_it(tmp_path: Path) -> None:
    def ask(_: int) -> bool:
        with lease(tmp_path, "one") as ours:
            time.sleep(0.2)
            return ours

    for void in (False, True):
        if void:
            leave(tmp_path, leases.socket.gethostname(), ended_process())
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(ask, range(8))) == 1


def test_who_sees_a_void_lease_late_takes_no_new_one_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look of one who asks and the taking, another who asks has taken it: the race that three once won."""
    leave(tmp_path, leases.socket.gethostname(), ended_process())
    replace = leases._replace_void

    def late(*given: object) -> bool:
        monkeypatch.setattr(leases, "_replace_void", replace)
        with lease(tmp_path, "one") as first:
            assert first
            return replace(*given)

    monkeypatch.setattr(leases, "_replace_void", late)
    with lease(tmp_path, "one") as second:
        assert not second


def test_who_was_taken_for_dead_gives_back_nothing_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases.socket, "gethostname", lambda: "another")
    sleeper = lease(tmp_path, "one")
    assert sleeper.__enter__()
    os.utime(tmp_path / "running" / "one", (0, 0))  # its machine slept
    with lease(tmp_path, "one") as ours:
        assert ours
        sleeper.__exit__(None, None, None)
        assert (tmp_path / "running" / "one").exists()
        with lease(tmp_path, "one") as third:
            assert not third


def test_of_a_process_of_this_machine_that_is_gone_it_is_void_at_once(tmp_path: Path) -> None:
    leave(tmp_path, leases.socket.gethostname(), ended_process())
    assert left(tmp_path) == ["one"]
    assert held(tmp_path) == []
    with lease(tmp_path, "one") as ours:
        assert ours
        assert left(tmp_path) == []


def test_of_a_process_that_runs_it_is_not(tmp_path: Path) -> None:
    leave(tmp_path, leases.socket.gethostname(), os.getpid())
    assert held(tmp_path) == ["one"]


def test_of_another_machine_it_is_void_after_a_minute_of_silence(tmp_path: Path) -> None:
    leave(tmp_path, "another", 1, age=0.5 * leases.VOID)
    assert held(tmp_path) == ["one"]
    leave(tmp_path, "another", 1, age=1.5 * leases.VOID)
    assert left(tmp_path) == ["one"]
    with lease(tmp_path, "one") as ours:
        assert ours


def test_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.05)
    with lease(tmp_path, "one"):
        path = tmp_path / "running" / "one"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
