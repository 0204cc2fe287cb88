"""The table of grades, `grades.csv`: written after every submission, and read again by whoever goes on.

A line says what it is the grade of. So a grader that was stopped, or that is started again after some students have
handed in anew, grades what is new and keeps the rest.
"""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from isopo_mini.coursework.isolation import Limits
from isopo_mini.experiments.provenance import source_hash
from isopo_mini.writing import write_atomically

NAME = "grades.csv"
TEXTS = {"assignment", "name", "problems", "graded"}  # columns; all others are numbers
Row = dict[str, Any]


def what_is_graded(path: Path, tests: dict[str, str], limits: Limits) -> str:
    """Twelve digits that change with a submission, the tests, the limits, and the code that grades."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr((sorted(tests.items()), limits, source_hash())).encode())
    return digest.hexdigest()[:12]


def graded_before(out: Path) -> dict[tuple[str, str], Row]:
    """The lines of the table that is there already, by assignment and name; none where it is no such table."""
    if not (out / NAME).exists():
        return {}
    with (out / NAME).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        return {(line["assignment"], line["name"]): _as_row(line) for line in lines if line["graded"]}
    except (KeyError, TypeError, ValueError):  # somebody's spreadsheet has made something else of it
        return {}


def _as_row(line: dict[str, str]) -> Row:
    """A line of the file as it was before it was written; a question of another assignment has no entry."""
    return {name: text if name in TEXTS else float(text) for name, text in line.items() if text or name in TEXTS}


def write(rows: Iterable[Row], out: Path) -> pd.DataFrame:
    """Write the table, whole or not at all; the table."""
    table = pd.DataFrame(list(rows))
    write_atomically(out / NAME, table.to_csv(index=False))
    return table
