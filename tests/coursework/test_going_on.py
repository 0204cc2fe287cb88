"""A grader that is stopped half-way goes on where it was, and grades again only what has changed."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from masters_here import MASTERS

from isopo_mini.coursework import grade_table, grading
from isopo_mini.coursework.__main__ import main
from isopo_mini.coursework.isolation import ORDINARY

ASSIGNMENT = "fisher_on_bandits"
STUDENTS = ("007", "NA", "zoe")  # the first two are no number and no missing value


class Grader:
    """In place of the real one: notes whom it grades, and is stopped when it comes to somebody."""

    def __init__(self) -> None:
        self.graded: list[str] = []
        self.stopped_at = ""
        self.error: BaseException = KeyboardInterrupt()

    def __call__(self, path: Path, assignment: str, tests: dict, limits: object, hidden: object = ()) -> grading.Grade:
        if path.stem == self.stopped_at:
            raise self.error
        self.graded.append(path.stem)
        points, problems = {"q1": 3.0, "q2": 0.5}, ["cell 1: NameError: 'a', b", "cell 2: two\nlines"]
        return grading.Grade(assignment, path.stem, points, {"q1": 3.0, "q2": 4.0}, problems, 1.25, {"tests": []})


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Grader:
    made = Grader()
    monkeypatch.setattr(grading, "grade_notebook", made)
    monkeypatch.setattr(grading, "assign", lambda master: SimpleNamespace(tests={"q1": f"tests of {master.stem}"}))
    return made


@pytest.fixture
def submissions(tmp_path: Path) -> Path:
    folder = tmp_path / "submissions"
    (folder / ASSIGNMENT).mkdir(parents=True)
    for name in STUDENTS:
        (folder / ASSIGNMENT / f"{name}.ipynb").write_text(f"by {name}", encoding="utf-8")
    return folder


def graded(folder: Path, limits: object = ORDINARY) -> list[dict[str, str]]:
    """Grade the folder; the lines of the file."""
    out = folder.parent / "grades"
    out.mkdir(exist_ok=True)
    grading.grade_folder(folder, out, MASTERS, limits)
    return lines(out)


def lines(out: Path) -> list[dict[str, str]]:
    with (out / grade_table.NAME).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_who_is_stopped_goes_on(grader: Grader, submissions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grader.stopped_at = "zoe"
    with pytest.raises(KeyboardInterrupt):
        graded(submissions)
    kept = lines(submissions.parent / "grades")
    assert [line["name"] for line in kept] == ["007", "NA"]
    grader.stopped_at = ""
    found = graded(submissions)
    assert grader.graded == ["007", "NA", "zoe"], "nobody is graded twice"
    assert found[:2] == kept
    assert [line["name"] for line in found] == list(STUDENTS)
    said = capsys.readouterr().out.splitlines()[-3:]
    ends = [", as before", ", as before", ""]
    assert said == [f"{ASSIGNMENT}/{name}: 3.5 of 7{end}" for name, end in zip(STUDENTS, ends, strict=True)]


def test_the_table_comes_back_as_it_was_written(grader: Grader, submissions: Path) -> None:
    graded(submissions)
    out = submissions.parent / "grades"
    before = grade_table.graded_before(out)
    assert list(before) == [(ASSIGNMENT, name) for name in STUDENTS]
    row = before[ASSIGNMENT, "NA"]
    assert row["problems"] == "cell 1: NameError: 'a', b; cell 2: two\nlines"
    assert (row["points"], row["possible"], row["q2"], row["seconds"]) == (3.5, 7.0, 0.5, 1.2)
    text = (out / grade_table.NAME).read_text(encoding="utf-8")
    graded(submissions)
    assert (out / grade_table.NAME).read_text(encoding="utf-8") == text


def test_what_has_changed_is_graded_again(grader: Grader, submissions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(submissions)
    grader.graded.clear()
    (submissions / ASSIGNMENT / "NA.ipynb").write_text("handed in again", encoding="utf-8")
    graded(submissions)
    assert grader.graded == ["NA"]
    (submissions.parent / "grades" / ASSIGNMENT / "zoe.json").unlink()
    graded(submissions)
    assert grader.graded == ["NA", "zoe"], "a line without its result vouches for nothing"
    grader.graded.clear()
    monkeypatch.setattr(grading, "assign", lambda master: SimpleNamespace(tests={"q1": "other tests"}))
    graded(submissions)
    assert grader.graded == list(STUDENTS), "other tests"
    grader.graded.clear()
    graded(submissions, replace(ORDINARY, call_seconds=1.0))
    assert grader.graded == list(STUDENTS), "other limits"


def test_who_has_left_is_not_in_the_table(grader: Grader, submissions: Path) -> None:
    graded(submissions)
    (submissions / ASSIGNMENT / "NA.ipynb").unlink()
    assert [line["name"] for line in graded(submissions)] == ["007", "zoe"]


@pytest.mark.parametrize("content", ["", "name;points\n007;3\n", "assignment,name,graded,points\na,b,c,no number\n"])
def test_a_table_of_somebody_else_is_written_anew(content: str, grader: Grader, submissions: Path) -> None:
    out = submissions.parent / "grades"
    out.mkdir()
    (out / grade_table.NAME).write_text(content, encoding="utf-8")
    assert [line["name"] for line in graded(submissions)] == list(STUDENTS)


def test_a_machine_that_cannot_start_processes_is_told_apart(
    grader: Grader, submissions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grader.stopped_at, grader.error = "NA", grading.NotStartedError("NA.ipynb: no memory")
    assert main(["grade", str(submissions), str(submissions.parent / "grades")]) == 1
    said = capsys.readouterr().out
    assert "NA.ipynb: no memory" in said
    assert "the same command goes on from there" in said
    assert [line["name"] for line in lines(submissions.parent / "grades")] == ["007"]


def test_two_submissions_of_one_student_are_not_mixed_up(submissions: Path) -> None:
    (submissions / "zoe").mkdir()
    (submissions / "zoe" / f"{ASSIGNMENT}.ipynb").touch()
    with pytest.raises(ValueError, match=rf"expected one {ASSIGNMENT} of zoe, got .*zoe\.ipynb and zoe/{ASSIGNMENT}"):
        grading.found(submissions, [ASSIGNMENT])
