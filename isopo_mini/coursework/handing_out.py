"""From the masters to what students get, and to the tests that grade it: `otter assign`, and what it leaves to do.

A student's notebook stands alone: its first cell installs what is missing and writes the public tests beside it, so
that it works in Colab, where nothing but the notebook is opened.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import isopo_mini

SETUP = "# Setup"
SETUP_CELL = """\
# @title Setup: installs what is missing, and writes the public tests beside this notebook
import importlib.util
import subprocess
import sys
from pathlib import Path

TESTS = {tests}
WANTED = {wanted}

for module, sources in WANTED.items():
    if importlib.util.find_spec(module) is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        if not any(subprocess.run([*pip, source]).returncode == 0 for source in sources):
            raise RuntimeError(f"expected to install {{module}}: see what pip said above")
Path("tests").mkdir(exist_ok=True)
for name, text in TESTS.items():
    if not (Path("tests") / name).exists():
        (Path("tests") / name).write_text(text, encoding="utf-8")
import otter

grader = otter.Notebook(tests_dir="tests")"""
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}

CHECK = '''\
"""Run the public tests of every notebook here, or of those that are named: python check.py [NOTEBOOK ...]"""

import os
import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
missing = "NoneType' object is not callable"
failed = False
for notebook in map(Path, sys.argv[1:] or sorted(here.glob("*/*.ipynb"))):
    command = [sys.executable, "-m", "otter", "check", notebook.name, "--tests-path", "tests"]
    where, utf8 = notebook.resolve().parent, os.environ | {"PYTHONUTF8": "1"}  # on Windows too
    told = subprocess.run(command, cwd=where, env=utf8, capture_output=True, encoding="utf-8")
    print(f"{notebook.name}\\n{told.stdout}", flush=True)
    if missing in told.stdout:
        print(f"{missing}: what the test calls is not there. Did its cell end with an error? Run the notebook.\\n")
    said = [line for line in told.stderr.splitlines() if "[IPKernelApp]" not in line]  # of its own sockets
    sys.stderr.write("".join(f"{line}\\n" for line in said))
    failed |= told.returncode != 0 or "All tests passed!" not in told.stdout  # otter's status is 0 either way
sys.exit(failed)
'''


@dataclass(frozen=True)
class Assigned:
    """What otter makes of a master.

    Args:
        name: of the assignment, which is that of the master's file.
        student: the notebook without solutions.
        solution: the notebook with them.
        public: the source of each file of public tests, by its name.
        tests: the same with the hidden ones.
        autograder: Gradescope's zip, as bytes.
    """

    name: str
    student: dict[str, Any]
    solution: dict[str, Any]
    public: dict[str, str]
    tests: dict[str, str]
    autograder: bytes


def masters(folder: Path) -> list[Path]:
    """The master notebooks of a folder.

    Raises:
        ValueError: there are none.
    """
    found = sorted(folder.glob("*.ipynb"))
    if not found:
        raise ValueError(f"masters: expected notebooks in {folder.name}, got none")
    return found


@lru_cache
def assign(master: Path) -> Assigned:
    """Run `otter assign` on a master, in a folder that is gone afterwards: no test stays on disk. Once a process."""
    from otter.assign import main

    with tempfile.TemporaryDirectory(prefix="assign-") as place:
        copy = Path(place) / master.name
        shutil.copyfile(master, copy)
        main(str(copy), str(Path(place) / "made"), no_run_tests=True, no_pdfs=True)
        student, autograder = Path(place) / "made" / "student", Path(place) / "made" / "autograder"
        return Assigned(
            name=master.stem,
            student=_read(student / master.name),
            solution=_read(autograder / master.name),
            public=_texts(student / "tests"),
            tests=_texts(autograder / "tests"),
            autograder=next(autograder.glob("*.zip")).read_bytes(),
        )


def write_student_repository(folder: Path, from_masters: Path) -> list[Path]:
    """Write what students get.

    Args:
        folder: new or empty.
        from_masters: the folder of the masters, with `student.md`, which becomes the README.

    Returns:
        The notebooks.

    Raises:
        ValueError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"DIR: expected a new or empty folder, got {folder} with something in it")
    written = []
    for master in masters(from_masters):
        assigned = assign(master)
        place = folder / assigned.name
        (place / "tests").mkdir(parents=True)
        for name, text in assigned.public.items():
            (place / "tests" / name).write_text(text, encoding="utf-8")
        notebook = with_setup(assigned.student, assigned.public)
        written.append(place / f"{assigned.name}.ipynb")
        written[-1].write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text((from_masters / "student.md").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "check.py").write_text(CHECK, encoding="utf-8")
    environment = [sources[0] for sources in wanted().values()] + ["ipykernel", "jupyterlab"]
    (folder / "requirements.txt").write_text("\n".join(environment) + "\n", encoding="utf-8")
    return written


def write_autograders(folder: Path, from_masters: Path) -> list[Path]:
    """Write the zip of each assignment that Gradescope takes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for master in masters(from_masters):
        written.append(folder / f"{master.stem}.zip")
        written[-1].write_bytes(assign(master).autograder)
    return written


def with_setup(notebook: dict[str, Any], tests: dict[str, str]) -> dict[str, Any]:
    """The notebook with the first cell that students need."""
    cells = [dict(cell) for cell in notebook["cells"]]
    for cell in cells:
        if cell["cell_type"] == "code" and "".join(cell["source"]).startswith(SETUP):
            cell["source"] = SETUP_CELL.format(tests=repr(tests), wanted=repr(wanted()))
            cell["metadata"] = cell["metadata"] | FOLDED
            return notebook | {"cells": cells}
    raise ValueError(f"master: expected a code cell that begins with {SETUP!r}, got none")


def wanted() -> dict[str, list[str]]:
    """What a student's machine needs, by module, each with places to try in order: the release, then the repository."""
    links = (entry.partition(", ") for entry in metadata.metadata("isopo_mini").get_all("Project-URL") or ())
    address = next(url for label, _, url in links if label == "Repository")
    here = f"isopo_mini @ git+{address}"
    otter = f"otter-grader=={metadata.version('otter-grader')}"
    return {"isopo_mini": [f"{here}@v{isopo_mini.__version__}", here], "otter": [otter]}


def _read(path: Path) -> dict[str, Any]:
    """A notebook."""
    return json.loads(path.read_text(encoding="utf-8"))


def _texts(folder: Path) -> dict[str, str]:
    """The files of a folder of tests."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
