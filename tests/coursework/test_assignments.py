"""The assignments as an instructor meets them: handed out, solved, handed in, graded; the solution gets everything."""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("otter")

from masters_here import MASTERS, NAMES

from isopo_mini.coursework import contest, handing_out
from isopo_mini.coursework.__main__ import main
from isopo_mini.coursework.grading import found
from isopo_mini.experiments import records

pytestmark = pytest.mark.filterwarnings("ignore")  # of otter's own dependencies


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory, assigned: dict) -> Path:
    """`student`, then `grade` of three students: who solved all, who did nothing, and who did one badly."""
    place = tmp_path_factory.mktemp("course")
    assert main(["student", str(place / "students")]) == 0
    for name in NAMES:
        folder = place / "submissions" / name
        folder.mkdir(parents=True)
        handed_out = (place / "students" / name / f"{name}.ipynb").read_text(encoding="utf-8")
        (folder / "nothing.ipynb").write_text(handed_out, encoding="utf-8")
        filled = filled_in(json.loads(handed_out), assigned[name].solution)
        (folder / "all.ipynb").write_text(json.dumps(filled), encoding="utf-8")
    patient = ["--call-seconds", "280"]  # where many other programs run
    assert main(["grade", str(place / "submissions"), str(place / "grades"), *patient]) == 0
    return place


def filled_in(handed_out: dict, solution: dict) -> dict:
    """The students' notebook with the solutions' code in its cells, by their ids."""
    right = {cell["id"]: cell["source"] for cell in solution["cells"]}
    cells = [
        cell | {"source": right[cell["id"]]} if is_a_gap("".join(cell["source"])) else cell
        for cell in handed_out["cells"]
    ]
    return handed_out | {"cells": cells}


def is_a_gap(source: str) -> bool:
    return any(line.strip() in ("...", "my_record = ...") for line in source.splitlines())


def table(place: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (place / "grades" / "grades.csv").open(encoding="utf-8") as file:
        return {(row["assignment"], row["name"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_gets_all_points_and_the_stub_none(name: str, graded: Path) -> None:
    rows = table(graded)
    solved, untouched = rows[name, "all"], rows[name, "nothing"]
    assert solved["problems"] == ""
    assert float(solved["points"]) == float(solved["possible"]) == 20
    assert float(untouched["points"]) == 0
    assert float(untouched["possible"]) == 20


@pytest.mark.parametrize("name", NAMES)
def test_gradescope_gets_what_it_reads(name: str, graded: Path) -> None:
    said = json.loads((graded / "grades" / name / "all.json").read_text(encoding="utf-8"))
    questions = [test for test in said["tests"] if "score" in test]
    assert sum(test["score"] for test in questions) == sum(test["max_score"] for test in questions) == 20
    assert {test["visibility"] for test in questions} == {"hidden"}, "the public summary is for the student"
    assert said["tests"][0]["visibility"] == "visible"


def test_the_leaderboard_is_a_folder_of_records(graded: Path) -> None:
    folder = graded / "grades" / "leaderboard"
    runs = records.load_records(folder)
    seeds = sorted(runs["seed"].unique())
    assert runs["seed"].tolist() == [*seeds, *seeds], "everybody plays the same contests"
    assert len(seeds) == 2
    assert records.curves(runs)["samples"].max() == contest.BATCHES * contest.RESPONSES
    places = contest.leaderboard(folder)
    assert places["name"].tolist() == ["all", "nothing"]
    assert places["mean"][0] >= contest.GRPO + 0.05
    assert places["mean"][1] == pytest.approx(contest.START, abs=0.02)  # who plays and does not learn


@pytest.mark.parametrize("name", NAMES)
def test_students_see_no_solution_and_no_hidden_test(name: str, graded: Path, assigned: dict) -> None:
    folder = graded / "students" / name
    handed_out = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file())
    assert "SOLUTION" not in handed_out
    assert "hidden=True" not in handed_out
    hidden = [text.count("hidden=True") for text in assigned[name].tests.values()]
    assert min(hidden) >= 1, "every question has a hidden test"
    for source in assigned[name].public.values():
        assert source.count("@test_case") >= 1, "and a public one"


def test_students_do_not_know_the_seeds_of_the_contest(graded: Path) -> None:
    handed_out = "".join(path.read_text(encoding="utf-8") for path in (graded / "students").rglob("*.*"))
    library = "".join(path.read_text(encoding="utf-8") for path in Path(contest.__file__).parent.glob("*.py"))
    for seed in records.load_records(graded / "grades" / "leaderboard")["seed"]:
        assert not re.search(rf"\b{seed}\b", handed_out + library)


def test_who_hands_in_grpo_gets_the_points_for_as_much_as_grpo(graded: Path) -> None:
    seeds = sorted(records.load_records(graded / "grades" / "leaderboard")["seed"].unique())
    finals = [contest.play(contest.GrpoLearner, int(seed))["final"] for seed in seeds]
    reached = sum(finals) / len(finals)
    assert contest.GRPO + 0.005 < reached < contest.GRPO + 0.03


@pytest.mark.parametrize("name", NAMES)
def test_oracles_do_not_ask_the_library(name: str, assigned: dict) -> None:
    """A hidden test that called what a student may call would agree with the same mistake, and with a patch of it."""
    allowed = {"isopo_mini.coursework", "isopo_mini.coursework.agreement"}
    for source in assigned[name].tests.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module != "otter.test_files":
                assert node.module in allowed


def test_the_students_setup_cell_stands_alone(graded: Path, tmp_path: Path) -> None:
    """As in Colab: only the notebook is there. Its first cell writes the public tests and starts otter."""
    name = "fisher_on_bandits"
    notebook = json.loads((graded / "students" / name / f"{name}.ipynb").read_text(encoding="utf-8"))
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert cell["metadata"]["cellView"] == "form"
    program = "".join(cell["source"]) + "\nprint(grader.check('q1'))"
    told = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "At theta = 0" in told.stdout, "the hint of the public test that fails"
    assert {path.name for path in (tmp_path / "tests").iterdir()} == {f"q{number}.py" for number in range(1, 6)}


def test_the_students_command_runs_the_public_tests(graded: Path) -> None:
    import shutil

    place = graded / "solved"
    shutil.copytree(graded / "students" / "fisher_on_bandits", place / "fisher_on_bandits")
    shutil.copy(graded / "students" / "check.py", place)
    command = [sys.executable, "check.py"]
    before = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert before.returncode != 0
    shutil.copy(
        graded / "submissions" / "fisher_on_bandits" / "all.ipynb", place / "fisher_on_bandits/fisher_on_bandits.ipynb"
    )
    after = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert (after.returncode, "All tests passed!" in after.stdout) == (0, True), after.stderr[-2000:]
    assert "IPKernelApp" not in after.stderr
    assert "is not there" not in after.stdout
    path = place / "fisher_on_bandits/fisher_on_bandits.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("def fisher(", "def fisher)"), encoding="utf-8")
    broken = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert broken.returncode != 0
    assert "what the test calls is not there. Did its cell end with an error?" in broken.stdout


def test_gradescopes_zip_grades_the_solution(graded: Path, assigned: dict, tmp_path: Path) -> None:
    """With `otter run`, which does what Gradescope does: tests and submission in one process."""
    assert main(["autograder", str(tmp_path / "zips")]) == 0
    assert sorted(path.stem for path in (tmp_path / "zips").iterdir()) == NAMES
    command = [sys.executable, "-m", "otter", "run", "--no-logo", "-o", str(tmp_path)]
    command += ["-a", str(tmp_path / "zips" / "fisher_on_bandits.zip")]
    submission = graded / "submissions" / "fisher_on_bandits" / "all.ipynb"
    subprocess.run([*command, str(submission)], check=True, capture_output=True)
    said = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert sum(test.get("score", 0) for test in said["tests"]) == 20


def test_a_folder_of_students_says_which_assignment_a_file_is(tmp_path: Path) -> None:
    for name in ("alice/beat_grpo.ipynb", "one_backward_pass/bob.ipynb", "carol/.ipynb_checkpoints/x.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert [(path.name, assignment) for path, assignment in found(tmp_path, NAMES)] == [
        ("beat_grpo.ipynb", "beat_grpo"),
        ("bob.ipynb", "one_backward_pass"),
    ]
    (tmp_path / "mine.ipynb").touch()
    with pytest.raises(ValueError, match=r"expected names such as .*, got mine\.ipynb"):
        found(tmp_path, NAMES)


def test_students_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "work").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        handing_out.write_student_repository(tmp_path, MASTERS)
