"""What kernels wrote down while chapters ran: how to have it written, where it belongs, and how a failure is told.

Kernels learn from the environment what to load (`claims.py`), so this works for Sphinx's as for our own. A kernel does
not know which chapter it runs: that is found from the text of its cells.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
# IPython reads this in every kernel. The folder is appended: a chapter's own imports come first.
CONFIGURATION = """
import sys
sys.path.append({scripts!r})
c = get_config()
c.InteractiveShellApp.extensions = ["claims", "crisp_figures"]
c.HistoryManager.enabled = False
"""
SETUP_CELL = "setup"
# For programs that read notebooks, before they do: jsonschema checks web addresses with a grammar that is compiled for
# two seconds in every process, and does without where it cannot have it.
NO_GRAMMAR = "import sys; sys.modules['rfc3987_syntax'] = None"

Record = dict[str, Any]


@contextmanager
def listening(records: Path, **settings: str) -> Iterator[dict[str, str]]:
    """The environment for kernels that write what they claim into `records`, and `settings` of the same kind."""
    records.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile_default"
        profile.mkdir()
        (profile / "ipython_kernel_config.py").write_text(CONFIGURATION.format(scripts=str(SCRIPTS)), encoding="utf-8")
        told = {"IPYTHONDIR": folder, "CLAIMS_RECORDS": str(records), "PYTHONIOENCODING": "utf-8"}
        yield os.environ | told | settings


def chapters(root: Path = ROOT) -> list[Path]:
    """Every notebook under `root` that has cells to run; built pages, environments and editors' copies aside."""

    def aside(part: str) -> bool:
        return part == "_build" or part.startswith(".")

    return sorted(path for path in root.rglob("*.ipynb") if not any(map(aside, path.relative_to(root).parts)))


def code_cells(chapter: Path) -> dict[str, int]:
    """The source of every code cell and its number in the notebook, counted from 0."""
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    return {"".join(cell["source"]): number for number, cell in enumerate(cells) if cell["cell_type"] == "code"}


def read(records: Path, root: Path = ROOT) -> list[Record]:
    """All records of a folder, each with its `chapter` (relative to `root`) and `cell`, in reading order."""
    cells = {path.relative_to(root).as_posix(): code_cells(path) for path in chapters(root)}
    found = []
    for file in sorted(records.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        sources = {line["source"] for line in lines}
        holding = [name for name, numbers in cells.items() if sources <= numbers.keys()]
        if holding:  # else a chapter that has been edited since
            numbers = cells[holding[0]]
            found += [line | {"chapter": holding[0], "cell": numbers[line["source"]]} for line in lines]

    def place(record: Record) -> tuple[Any, ...]:
        return *reading_order(record["chapter"]), record["cell"], record.get("line") or 0

    return sorted(found, key=place)


def reading_order(chapter: str) -> tuple[bool, str, str]:
    """Sorts chapters as the book has them: the index, then by the number that a file's name begins with."""
    name = Path(chapter).name
    return name != "index.ipynb", name, chapter


def quoted(text: str, mark: str, count: int | None = None) -> str:
    """The text, or its first lines, indented behind a mark."""
    return "\n".join(f"    {mark} {line}".rstrip() for line in text.splitlines()[:count])


def failure_report(records: list[Record], command: str = "make draft CHAPTER={chapter}") -> str:
    """For each failure: chapter, cell, its first lines, the failing line, both sides, and how to see it again."""
    told = [
        f"{record['chapter']}, cell {record['cell']} (counted from 0), which begins\n"
        f"{quoted(record['source'], '|', 3)}\n"
        f"  fails at\n"
        f"{quoted(record['failing'], '>')}\n"
        f"  with {record['error']}\n"
        f"{quoted(record['message'], ' ')}\n"
        f"  To see this one chapter again: {command.format(chapter=record['chapter'])}"
        for record in records
        if "error" in record
    ]
    return "\n\n".join(told)
