"""Grade a folder of submissions with otter's tests: Gradescope's JSON for each, and one table of all (`grade_table`).

The tests run here, in the grader's own process. Only what they call runs in that of the submission (`submission`). So
no submission can see a test, an oracle or a result, and none can take the grader down. This is why `otter run` is not
used for it: there, tests and submission share a process, and the grader unpickles what that process leaves behind.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from isopo_mini.coursework.grade_table import Row, graded_before, what_is_graded, write
from isopo_mini.coursework.handing_out import assign, masters
from isopo_mini.coursework.isolation import ORDINARY, Limits
from isopo_mini.coursework.submission import Submission, quietly
from isopo_mini.writing import write_atomically

LARGEST_NOTEBOOK = 20 * 2**20  # bytes: outputs with many pictures


class NotStartedError(RuntimeError):
    """The process for a submission did not start, so that no mark is fair."""


@dataclass
class Grade:
    """What one submission got.

    Args:
        assignment: its name.
        name: whose it is.
        points: of each question.
        possible: of each question.
        problems: what went wrong, in words.
        seconds: it took, all included.
        gradescope: the JSON that Gradescope reads.
        noted: what tests left for the grader.
    """

    assignment: str
    name: str
    points: dict[str, float]
    possible: dict[str, float]
    problems: list[str]
    seconds: float
    gradescope: dict[str, Any]
    noted: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All points."""
        return sum(self.points.values())

    def row(self, graded: str) -> Row:
        """A line of the table, with what it is the grade of; see `grade_table.what_is_graded`."""
        first = {"assignment": self.assignment, "name": self.name, "points": self.total}
        first |= {"possible": sum(self.possible.values()), "seconds": round(self.seconds, 1)}
        return first | {"problems": "; ".join(self.problems), "graded": graded} | self.points


def grade_notebook(
    path: Path,
    assignment: str,
    tests: dict[str, str],
    limits: Limits = ORDINARY,
    hidden: Sequence[Path] = (),
) -> Grade:
    """Grade one notebook.

    Args:
        path: of the notebook. A file that is none gets no points, as does one that defines nothing.
        assignment: its name.
        tests: the source of each of otter's test files, by name, as `handing_out.assign` gives them.
        limits: of its process.
        hidden: folders that its process shall not see.

    Raises:
        NotStartedError: its process did not start, which is not the submission's fault.
    """
    from otter.run import AutograderConfig
    from otter.test_files import GradingResults
    from otter.test_files.exception_test import ExceptionTestFile

    began = time.monotonic()
    try:
        cells, unreadable = code_cells(path), []
    except ValueError as error:
        cells, unreadable = [], [str(error)]
    files = [ExceptionTestFile.from_string(source, path=name) for name, source in tests.items()]
    with Submission(cells, limits, hidden) as submission:
        problems = unreadable or quietly(submission)
        for file in files:
            file.run(submission)  # type: ignore[arg-type]  # a mapping with `get` is all that it needs
    if submission.broken:
        raise NotStartedError(f"{path.name}: {submission.broken}")
    results, seconds = GradingResults(files), time.monotonic() - began
    if problems:
        results.set_output("While the notebook ran:\n" + "\n".join(problems))
    return Grade(
        assignment=assignment,
        name=whose(path, assignment),
        points={file.name: float(file.score) for file in files},
        possible={file.name: float(file.possible) for file in files},
        problems=problems,
        seconds=seconds,
        gradescope=results.to_gradescope_dict(AutograderConfig()) | _as_a_whole(files, seconds),
        noted=submission.noted,
    )


def _as_a_whole(files: Sequence[Any], seconds: float) -> dict[str, float]:
    """What Gradescope wants beside the tests: the points, since the summary of the public tests has none of its own."""
    return {"score": round(sum(float(file.score) for file in files), 5), "execution_time": round(seconds, 1)}


def whose(path: Path, assignment: str) -> str:
    """The name of a submission: that of its file, or of its folder where the file is named after the assignment."""
    return path.stem if path.stem != assignment else path.resolve().parent.name


def code_cells(path: Path) -> list[str]:
    """The sources of a notebook's code cells.

    Raises:
        ValueError: it is no notebook; says what it is instead.
    """
    size = path.stat().st_size
    if size > LARGEST_NOTEBOOK:
        raise ValueError(f"expected a notebook of at most {LARGEST_NOTEBOOK // 2**20} MiB, got {size // 2**20} MiB")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        return ["".join(cell["source"]) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a notebook, got a file that is none ({type(error).__name__})") from error


def found(folder: Path, assignments: Iterable[str]) -> list[tuple[Path, str]]:
    """The notebooks of a folder of submissions, each with its assignment.

    That is said by the name of the file, `alice/fisher_on_bandits.ipynb`, or by that of a folder above,
    `fisher_on_bandits/alice.ipynb`.

    Raises:
        ValueError: there is none, the assignment of one is not said, or two are the same student's.
    """
    known = set(assignments)
    notebooks = []
    for path in sorted(folder.rglob("*.ipynb")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        said = [part for part in (path.stem, *reversed(path.relative_to(folder).parts[:-1])) if part in known]
        if not said:
            raise ValueError(
                f"DIR: expected names such as alice/{min(known)}.ipynb or {min(known)}/alice.ipynb, "
                f"got {path.relative_to(folder).as_posix()}"
            )
        notebooks.append((path, said[0]))
    if not notebooks:
        raise ValueError(f"DIR: expected notebooks in {folder}, got none")
    first: dict[tuple[str, str], Path] = {}
    for path, assignment in notebooks:
        if (other := first.setdefault((assignment, whose(path, assignment)), path)) != path:
            two = " and ".join(one.relative_to(folder).as_posix() for one in (other, path))
            raise ValueError(f"DIR: expected one {assignment} of {whose(path, assignment)}, got {two}")
    return notebooks


def grade_folder(folder: Path, out: Path, from_masters: Path, limits: Limits = ORDINARY) -> pd.DataFrame:
    """Grade all submissions of a folder, one after the other; what has been graded before is not graded again.

    Args:
        folder: of the submissions; see `found`.
        out: gets `grades.csv`, and `ASSIGNMENT/NAME.json` for Gradescope. The table is written after every submission.
            So whoever is stopped goes on from there; a submission, a test or a limit that has changed is graded anew.
        from_masters: the folder of the masters.
        limits: of each submission's process.

    Returns:
        The table: assignment, name, points, possible, seconds, problems, what was graded, and the points of each
        question.

    Raises:
        NotStartedError: the process for a submission did not start.
    """
    assigned = {master.stem: master for master in masters(from_masters)}
    notebooks = found(folder, assigned)
    tests = {name: assign(assigned[name]).tests for name in sorted({name for _, name in notebooks})}
    before = graded_before(out)
    now = [(name, whose(path, name)) for path, name in notebooks]
    rows = {key: before[key] for key in now if key in before}
    for key, (path, name) in zip(now, notebooks, strict=True):
        graded = what_is_graded(path, tests[name], limits)
        known = key in rows and rows[key]["graded"] == graded and _result(out, *key).exists()
        if not known:
            grade = grade_notebook(path, name, tests[name], limits, hidden=(folder, out, from_masters))
            _write_result(grade, out)
            rows[key] = grade.row(graded)
            write(rows.values(), out)
        points = f"{rows[key]['points']:g} of {rows[key]['possible']:g}"
        print(f"{name}/{key[1]}: {points}{', as before' if known else ''}", flush=True)
    return write([rows[key] for key in now], out)


def _result(out: Path, assignment: str, name: str) -> Path:
    """Where the result of one submission is, in Gradescope's form."""
    return out / assignment / f"{name}.json"


def _write_result(grade: Grade, out: Path) -> None:
    """Write what there is of a submission beside its line in the table, which comes last and vouches for it."""
    if record := grade.noted.get("noted_contest"):
        from isopo_mini.coursework.contest import add_to_leaderboard

        add_to_leaderboard(out / "leaderboard", grade.name, record)
    place = _result(out, grade.assignment, grade.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, json.dumps(grade.gradescope, indent=2) + "\n")
