"""Submissions that break things, on purpose or not: each gets the mark of what is right in it, and the grader lives."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("otter")

from isopo_mini.coursework.grading import Grade, grade_notebook
from isopo_mini.coursework.isolation import MEBIBYTE, Limits, counts_forks, has_namespaces

pytestmark = pytest.mark.filterwarnings("ignore")  # of otter's own dependencies

# Three right answers, then what the submission is about. Without the latter it gets 3 + 4 + 4 points.
RIGHT = """
import torch
torch.set_default_dtype(torch.float64)
def scores(theta, features):
    return features - (features @ theta).softmax(0) @ features
def fisher(theta, features):
    rows = scores(theta, features)
    return rows.T @ ((features @ theta).softmax(0)[:, None] * rows)
def dual_solve(S, A, damping):
    return S.T @ torch.linalg.solve(S @ S.T / len(S) + damping * torch.eye(len(S)), A) / len(S)
"""
RIGHT_POINTS = {"q1": 3, "q2": 4, "q3": 0, "q4": 4, "q5": 0}
NOTHING = dict.fromkeys(RIGHT_POINTS, 0)
LIMITS = Limits(call_seconds=20, memory=1536 * MEBIBYTE, disk=16 * MEBIBYTE)

# Cells after RIGHT, and a part of what the table says of them; None where nothing went wrong in a cell.
KEEPS_THE_REST = {
    "prints a million lines": (["for _ in range(1_000_000): print('x' * 80)"], None),
    "exits": (["import sys; sys.exit()"], "SystemExit"),
    "exits at once": (["import os; os._exit(0)"], "its process ended"),
    "crashes": (["import ctypes; ctypes.string_at(0)"], "its process ended"),
    "raises": (["1 / 0"], "ZeroDivisionError"),
    "fills memory": (["hoard = []\nwhile True: hoard.append(bytearray(10**8))"], "MemoryError"),
    "fills memory of many": (
        [
            "import os, time\nfor _ in range(6):\n    if not os.fork():\n"
            "        x = b'xx' * 4 * 10**8\n        time.sleep(60)\ntime.sleep(60)"
        ],
        "of memory",
    ),
    "fills the disk": (
        ["n = 0\nwhile True:\n    n += 1\n    open(f'file{n}', 'wb').write(bytes(2**20))"],
        "16 MiB of files",
    ),
    "fills one file": (["with open('file', 'wb') as file:\n    while True: file.write(bytes(2**20))"], ""),
    "forks and goes on": (["import os\nos.fork(); os.fork()"], None),
    "is no Python": (["def f(:"], "SyntaxError"),
    "edits the public tests": (
        ["import pathlib\nfor p in pathlib.Path('.').rglob('q*.py'): p.write_text('points = 1000')"],
        None,
    ),
    "patches the library": (
        [
            "import isopo_mini.coursework.agreement as a\na.assert_agrees = lambda *_, **__: None\n"
            "import torch\ntorch.equal = torch.allclose = lambda *_, **__: True\n"
            "def natural_gradient(*_): return torch.zeros(1)"
        ],
        None,
    ),
    "returns no numbers": (["def natural_gradient(t, *_): return t * float('nan')"], None),
    "returns the wrong type": (["def natural_gradient(*_): return 'a string'\nkl_step = 3"], None),
    "returns an object": (["class N:\n    shape = (1,)\ndef natural_gradient(*_): return N()"], None),
    "returns too much": (["def natural_gradient(*_): return torch.zeros(10**8)"], None),
    "never returns": (["def natural_gradient(*_):\n    while True: pass"], None),
    "speaks to the grader itself": (
        ["import os\nfor number in range(3, 20):\n    try: os.write(number, b'x' * 99)\n    except OSError: pass"],
        "",
    ),
}


def grade(tmp_path: Path, assigned: dict, cells: list[str], limits: Limits = LIMITS, hidden: tuple = ()) -> Grade:
    path = tmp_path / "alice" / "fisher_on_bandits.ipynb"
    path.parent.mkdir()
    notebook = {"cells": [{"cell_type": "code", "source": source} for source in cells]}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return grade_notebook(path, path.stem, assigned[path.stem].tests, limits, hidden)


@pytest.mark.parametrize("name", KEEPS_THE_REST)
def test_what_is_right_counts(name: str, tmp_path: Path, assigned: dict) -> None:
    cells, said = KEEPS_THE_REST[name]
    graded = grade(tmp_path, assigned, [RIGHT, *cells])
    assert graded.points == RIGHT_POINTS
    assert graded.name == "alice"
    if said is None:
        assert graded.problems == []
    else:
        assert said in "\n".join(graded.problems)
        assert len(graded.problems) == 1


@pytest.mark.parametrize("name", ["exits at once", "fills the disk"])
def test_without_namespaces_too(name: str, tmp_path: Path, assigned: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isopo_mini.coursework.isolation.has_namespaces", lambda: False)
    test_what_is_right_counts(name, tmp_path, assigned)


@pytest.mark.skipif(not counts_forks(), reason="root without a process table of its own: nothing would stop it in time")
def test_forks_without_end(tmp_path: Path, assigned: dict) -> None:
    graded = grade(tmp_path, assigned, [RIGHT, "import os\nwhile True: os.fork()"])
    assert graded.points == RIGHT_POINTS
    assert graded.problems == ["cell 2: it started more than 32 processes"]


def test_an_endless_loop_costs_its_cell(tmp_path: Path, assigned: dict) -> None:
    began = time.monotonic()
    graded = grade(tmp_path, assigned, [RIGHT, "while True: pass"], Limits(call_seconds=5))
    assert graded.points == RIGHT_POINTS
    assert graded.problems == ["cell 2: it took more than 5 s"]
    assert time.monotonic() - began < 120


def test_who_waits_for_the_processor_loses_nothing_and_who_sleeps_is_ended(tmp_path: Path, assigned: dict) -> None:
    """A sleep stands for a busy machine: time passes on the clock, and none of the processor's is used."""
    sleeps = "import time\ntime.sleep(3)"
    graded = grade(tmp_path, assigned, [RIGHT, sleeps, "time.sleep(3600)"], Limits(call_seconds=2))
    assert graded.points == RIGHT_POINTS
    assert graded.problems == ["cell 3: it took more than 2 s"]


def test_the_time_of_everything_is_limited(tmp_path: Path, assigned: dict) -> None:
    graded = grade(tmp_path, assigned, [RIGHT, "while True: pass"], Limits(call_seconds=60, seconds=5))
    assert graded.points == NOTHING
    assert "the time of the whole submission is spent" in graded.problems[0]


@pytest.mark.parametrize("content", ["", "no notebook", "[]", '{"cells": 3}', "[" * 100_000])
def test_a_file_that_is_no_notebook_gets_nothing(content: str, tmp_path: Path, assigned: dict) -> None:
    path = tmp_path / "bob.ipynb"
    path.write_text(content, encoding="utf-8")
    graded = grade_notebook(path, "fisher_on_bandits", assigned["fisher_on_bandits"].tests, LIMITS)
    assert graded.points == NOTHING
    assert "expected a notebook" in graded.problems[0]
    assert graded.gradescope["tests"]


def test_a_process_that_does_not_start_is_no_mark(
    tmp_path: Path, assigned: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isopo_mini.coursework.isolation.sys.executable", "false")
    with pytest.raises(RuntimeError, match=r"fisher_on_bandits.ipynb: the process for submissions did not start"):
        grade(tmp_path, assigned, [RIGHT])


STEAL = """
import os, pathlib, re
def stolen():
    for root in ROOTS:
        for path in pathlib.Path(root).rglob("*"):
            if path.suffix in (".py", ".ipynb") and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                if "def dual_solve" in text or "test_dual_solve_of_many" in text: return str(path)
def environment(): return [name for name in os.environ if "TOKEN" in name or "SECRET" in name]
"""


@pytest.mark.skipif(not has_namespaces(), reason="without namespaces a submission sees what its user sees")
def test_solutions_and_hidden_tests_are_out_of_sight(
    tmp_path: Path, assigned: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from masters_here import MASTERS

    from isopo_mini.coursework.remote import SubmissionError
    from isopo_mini.coursework.submission import Submission

    monkeypatch.setenv("SECRET", "of the grader")
    (tmp_path / "bob.ipynb").write_text("def dual_solve", encoding="utf-8")
    cell = f"ROOTS = {[str(MASTERS), str(tmp_path)]!r}\n{STEAL}"
    with Submission([cell], LIMITS, hidden=[MASTERS, tmp_path]) as submission:
        assert submission.get("stolen")() is None
        assert submission.get("environment")() == []
    with Submission([cell], LIMITS) as submission:
        assert submission.get("stolen")() is not None, "the thief finds what is not hidden"
    cell = "import urllib.request\ndef call(): return urllib.request.urlopen('http://192.0.2.1', timeout=5).read()"
    with Submission([cell], LIMITS) as submission, pytest.raises(SubmissionError, match="unreachable"):
        submission.get("call")()


def test_a_grader_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    cell = f"open({str(tmp_path / 'started')!r}, 'w').close()\nwhile True: pass"
    program = f"from isopo_mini.coursework.submission import Submission\nSubmission([{cell!r}]).get('x')"
    with subprocess.Popen([sys.executable, "-c", program]) as grader:
        while not (tmp_path / "started").exists():
            assert grader.poll() is None
            time.sleep(0.1)
        family = psutil.Process(grader.pid).children(recursive=True)
        grader.kill()
    assert len(family) >= 1
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_nothing_is_left_behind(tmp_path: Path, assigned: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cell = "import subprocess\nsubprocess.Popen(['sleep', '4321'], start_new_session=True)"
    graded = grade(tmp_path, assigned, [RIGHT, cell])
    assert graded.points == RIGHT_POINTS
    assert list((tmp_path / "temporary").iterdir()) == []
    assert [p for p in psutil.process_iter(["cmdline"]) if "4321" in (p.info["cmdline"] or [])] == []
