"""Executors, and what becomes of the runs when a process dies, a run fails, or two programs share a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isopo_mini.experiments import pool, records
from isopo_mini.experiments.command import grid, main
from isopo_mini.experiments.pool import run_all
from isopo_mini.experiments.record_files import read_records
from isopo_mini.experiments.runs import Run

PATIENCE = 600  # seconds: what takes longer on a busy machine hangs
SMALL = {"sequences": 8, "steps": 4, "evaluations": 2}
# Spawned processes import the script again, so that what it does to `pool.run` holds in them too.
SCRIPT = """
import os, time
from pathlib import Path
from isopo_mini.experiments import pool
from isopo_mini.experiments.command import grid

actual = pool.run

def run(one):
    with open("log.txt", "a") as log:
        log.write(f"{one.file_name}\\n")
    if one.seed == DEADLY:
        os._exit(9)
    time.sleep(PAUSE)
    return actual(one)

pool.run = run

if __name__ == "__main__":
    runs = grid("bandit", {"reinforce": [0.1]}, range(RUNS), sequences=8, steps=4, evaluations=2)
    pool.run_all(runs, Path("out"), processes=PROCESSES)
"""


def start(folder: Path, runs: int, processes: int, deadly: int = -1, pause: float = 0.0) -> subprocess.Popen:
    """The script, in a folder."""
    script = SCRIPT
    for name, value in {"RUNS": runs, "PROCESSES": processes, "DEADLY": deadly, "PAUSE": pause}.items():
        script = script.replace(name, str(value))
    (folder / "mine.py").write_text(script, encoding="utf-8")
    root = Path(pool.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen([sys.executable, "mine.py"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def complaints(*processes: subprocess.Popen) -> list[str]:
    """What each wrote to stderr, once all have ended. Of those that hang none is left behind."""
    try:
        return [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seeds(folder: Path) -> list[int]:
    return sorted(record["run"]["seed"] for record in read_records(folder / "out"))


def test_a_run_that_kills_its_process_costs_itself_alone(tmp_path: Path) -> None:
    process = start(tmp_path, runs=3, processes=2, deadly=1)
    (complaint,) = complaints(process)
    assert process.returncode == 1
    last = complaint.rstrip().splitlines()[-1]
    assert "1 of 3 runs failed, first reinforce__adamw__0.1__1.json: its process died" in last
    assert seeds(tmp_path) == [0, 2]
    note = tmp_path / "out" / "failed" / "reinforce__adamw__0.1__1.json.txt"
    assert "its process died" in note.read_text(encoding="utf-8")


def test_two_programs_share_a_folder_and_no_run_is_made_twice(tmp_path: Path) -> None:
    both = [start(tmp_path, runs=6, processes=1, pause=0.3) for _ in range(2)]
    said = complaints(*both)
    assert [process.returncode for process in both] == [0, 0], said
    assert seeds(tmp_path) == list(range(6))
    made = Counter((tmp_path / "log.txt").read_text(encoding="utf-8").split())
    assert set(made.values()) == {1}
    assert not list((tmp_path / "out" / "records").iterdir())


def test_any_executor_will_do(tmp_path: Path) -> None:
    runs = grid("bandit", {"reinforce": [0.1, 0.2]}, [0, 1], **SMALL)
    with ThreadPoolExecutor(1) as executor:
        run_all(runs, tmp_path, executor=executor)
    assert len(read_records(tmp_path)) == len(runs)


def test_a_traceback_is_kept_until_the_run_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid("bandit", {"reinforce": [0.1]}, [0, 1], **SMALL)
    actual = pool.run

    def fail(one: Run) -> dict:
        if one.seed == 0:
            raise ValueError("a mistake")
        return actual(one)

    monkeypatch.setattr(pool, "run", fail)
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed, .*: a mistake; see .*/failed"):
        run_all(runs, tmp_path)
    (note,) = (tmp_path / "failed").iterdir()
    assert "in fail" in note.read_text(encoding="utf-8")
    assert note.read_text(encoding="utf-8").rstrip().endswith("ValueError: a mistake")
    monkeypatch.setattr(pool, "run", actual)
    run_all(runs, tmp_path)
    assert not list((tmp_path / "failed").iterdir())


def test_what_is_packed_and_loose_is_there_once(tmp_path: Path) -> None:
    """Killed between writing the file and removing what is in it."""
    run_all(grid("bandit", {"reinforce": [0.1]}, [0, 1], **SMALL), tmp_path)
    first = read_records(tmp_path)
    path = tmp_path / "records" / "reinforce__adamw__0.1__0.json"
    records.write_record(path, first[0])
    assert read_records(tmp_path) == first
    records.write_record(path, first[0] | {"score": 0.123})
    with pytest.raises(ValueError, match=rf"{path.name}: expected what records\.jsonl has of this run, got another"):
        read_records(tmp_path)


def test_whoever_was_killed_after_the_record_leaves_no_lease(tmp_path: Path) -> None:
    runs = grid("bandit", {"reinforce": [0.1]}, [0, 1], **SMALL)
    run_all(runs, tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lease = tmp_path / "running" / runs[0].file_name
    lease.write_text(json.dumps({"host": socket.gethostname(), "process": ended.pid}), encoding="utf-8")
    run_all(runs, tmp_path)
    assert not lease.exists()


def test_records_of_other_code_are_refused_unless_asked(tmp_path: Path) -> None:
    line = ["bandit", "--rules", "reinforce", "--learning-rates", "0.1", "--steps", "2", "--processes", "1", "--out"]
    main([*line, str(tmp_path / "out")])
    packed = tmp_path / "out" / "records.jsonl"
    record = json.loads(packed.read_text(encoding="utf-8").splitlines()[0])
    packed.write_text(packed.read_text(encoding="utf-8").replace(record["code"]["source"], "0" * 12), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"expected a record of this code .*, got one of 000000000000.*--mixed-code"):
        main([*line, str(tmp_path / "out")])
    main([*line, str(tmp_path / "out"), "--mixed-code"])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_on_a_cluster_with_a_worker_killed_in_the_middle(tmp_path: Path) -> None:
    """A real scheduler and two workers; the one that dies with a run in its hands leaves it to the other."""
    pytest.importorskip("distributed")
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "cwd": tmp_path}
    port = address.rsplit(":", 1)[1]
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", port, "--host", "127.0.0.1"]
    started = [subprocess.Popen([*dask, "--no-dashboard"], **quiet)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
    started += [subprocess.Popen([*worker, "--no-dashboard"], **quiet) for _ in range(2)]
    out = tmp_path / "out"
    line = f"bandit --rules reinforce ntk --learning-rates 0.05 0.1 0.2 --seeds 0 1 --steps 60 --out {out}"
    command = [sys.executable, "-m", "isopo_mini.experiments", *line.split()]
    process = subprocess.Popen(
        [*command, "--cluster", address], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + PATIENCE
        victim = None
        while victim is None:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            for path in (out / "running").glob("*.json"):
                try:
                    victim = json.loads(path.read_text(encoding="utf-8"))["process"]
                except (OSError, ValueError):
                    continue
            time.sleep(0.005)
        assert victim in {one.pid for one in started[1:]}, "the runs are made by the workers"
        os.kill(victim, signal.SIGKILL)
        next(one for one in started if one.pid == victim).wait()  # until then it has a number, and its lease counts
        _, complaint = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, complaint
    finally:
        for one in (process, *started):
            one.kill()
            one.wait()
    assert len(records.load_records(out)) == 12
    assert not list((out / "failed").glob("*"))
