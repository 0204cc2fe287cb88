"""Hold the notebooks to the book's rules, so that they read well as text, in git and in Colab.

    python scripts/check_notebooks.py [NOTEBOOK ...]          # print what is wrong; exits 1 when something is
    python scripts/check_notebooks.py --fix [NOTEBOOK ...]    # strip outputs and metadata, then check

A notebook is stored as nbformat 4.5 writes it: no outputs, no execution counts, no metadata of the machine that
ran it, and cell ids that stay. A chapter moreover has the parts that its reader relies on.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import citations
from sync_address import ROOT, notebooks
from whole_files import write_whole

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = {"mystnb", "tags"}
# A solution is folded wherever the notebook is opened: on the page, in JupyterLab, and in Colab, as a form.
SOLUTION, TITLE = "hide-cell", "# @title Solution"
FOLDED = {
    "cellView": "form",
    "jupyter": {"outputs_hidden": True, "source_hidden": True},
    "mystnb": {"code_prompt_hide": "Hide solution", "code_prompt_show": "Show solution"},
}
TAGS = {"setup", "hide-input", "hide-output", "hide-cell", "remove-input", "remove-output", "remove-cell"}
CHAPTER_FOLDERS = {"foundations", "isopo", "experiments", "neighbours", "beyond"}
CHAPTER_SECTIONS = ("Where it breaks", "Exercises", "Summary")
CODE_LINES, CODE_WIDTH = 25, 80  # book.css sets the type so that this width fits the column
SHOWN_LINES = 200  # of a whole chapter, empty ones aside
HIDE_CODE = {"setup", "hide-input", "hide-cell", "remove-input", "remove-cell"}
DRAWS = re.compile(r"\bplt\.(show|subplots|figure|subplot_mosaic)\(")

Notebook = dict[str, Any]


def serialized(notebook: Notebook) -> str:
    """A notebook's text as nbformat and JupyterLab write it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def stripped(notebook: Notebook, stem: str) -> Notebook:
    """The notebook without what belongs to one run on one machine; a cell without an id gets one."""
    ids = {cell.get("id") for cell in notebook["cells"]}
    free = (name for number in range(1, 1000) if (name := f"{stem}-{number:02d}") not in ids)
    cells = []
    for cell in notebook["cells"]:
        metadata = {key: value for key, value in cell["metadata"].items() if key in CELL_METADATA and value}
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            source = citations.as_links(source)
        if SOLUTION in metadata.get("tags", []):
            metadata |= FOLDED | {"mystnb": metadata.get("mystnb", {}) | FOLDED["mystnb"]}
            source = f"{TITLE}\n{source.removeprefix(TITLE).lstrip()}"
        kept = {"cell_type": cell["cell_type"], "id": cell.get("id") or next(free), "metadata": metadata}
        kept["source"] = source.splitlines(keepends=True)
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(kept)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def form_complaints(text: str, stem: str) -> list[str]:
    """What is wrong with how the notebook is stored."""
    notebook = json.loads(text)
    wrong = []
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        wrong.append("every cell needs an id of its own")
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]):
        wrong.append("outputs and execution counts must be stripped")
    if not wrong and text != serialized(stripped(notebook, stem)):
        wrong.append("metadata, empty lines around a cell or the JSON layout differ from the standard form")
    return [f"{complaint}: make format" for complaint in wrong]


def code_complaints(cells: list[Notebook]) -> list[str]:
    """What is wrong with single code cells."""
    wrong = []
    for cell in cells:
        source, tags = "".join(cell["source"]), set(cell["metadata"].get("tags", []))
        where = f"cell {cell.get('id')}"
        lines = len(source.removeprefix(f"{TITLE}\n").splitlines())
        if lines > CODE_LINES:
            wrong.append(f"{where}: {lines} lines of code, at most {CODE_LINES}")
        if not tags & HIDE_CODE:
            wide = max((len(line) for line in source.splitlines()), default=0)
            wrong += [f"{where}: a line of {wide} characters, at most {CODE_WIDTH} fit"] if wide > CODE_WIDTH else []
        try:
            ast.parse(source)
        except SyntaxError as error:
            wrong.append(f"{where}: not plain Python ({error.msg}, line {error.lineno})")
        if tags - TAGS:
            wrong.append(f"{where}: unknown tags {', '.join(sorted(tags - TAGS))}")
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if DRAWS.search(source) and len(alt.split()) < 4:
            wrong.append(f"{where}: draws a figure, so its metadata mystnb.image.alt must say what is seen")
    return wrong


def formula_complaints(cells: list[Notebook]) -> list[str]:
    """Formulas that the page cannot typeset: in one of several lines, MathJax refuses the number."""
    displays = [
        (cell["id"], text) for cell in cells for text in re.findall(r"(?s)\$\$(.*?)\$\$", "".join(cell["source"]))
    ]
    numbered = [(where, text) for where, text in displays if r"\tag" in text and "\\\\" in text]
    return [
        f"{where}: a formula of several lines cannot have a \\tag; write it on one, or as two" for where, _ in numbered
    ]


def chapter_complaints(notebook: Notebook) -> list[str]:
    """What a chapter lacks: one title, the setup cell, the promised sections, an assertion of its claim."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    prose = re.sub(r"(?ms)^(```+|~~~+).*?^\1\s*$", "", prose)  # a `#` in a listing is no heading
    wrong = [f"no section '{section}'" for section in CHAPTER_SECTIONS if not re.search(rf"(?m)^## {section}\b", prose)]
    if len(re.findall(r"(?m)^# ", prose)) != 1:
        wrong.append("exactly one title (# …) is expected")
    if not code or "setup" not in code[0]["metadata"].get("tags", []):
        wrong.append("the first code cell must be the setup cell, tagged setup")
    shown = [cell for cell in code if not HIDE_CODE & set(cell["metadata"].get("tags", []))]
    lines = sum(bool(line.strip()) for cell in shown for line in "".join(cell["source"]).splitlines())
    if lines > SHOWN_LINES:
        wrong.append(
            f"{lines} lines of code are shown, at most {SHOWN_LINES} read as a lesson; fold what teaches nothing"
        )
    asserts = (node for cell in code for node in ast.walk(parsed(cell)) if isinstance(node, ast.Assert))
    if next(asserts, None) is None:
        wrong.append("no cell asserts the chapter's claim")
    return wrong


def parsed(cell: Notebook) -> ast.AST:
    """A cell's syntax tree; an empty one when it does not parse, which is complained of elsewhere."""
    try:
        return ast.parse("".join(cell["source"]))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def complaints(text: str, path: Path) -> list[str]:
    """Everything that is wrong with the notebook at `path`, whose text is given."""
    notebook = json.loads(text)
    wrong = form_complaints(text, path.stem)
    wrong += code_complaints([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    wrong += formula_complaints([cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"])
    for cell in notebook["cells"]:
        wrong += [f"cell {cell.get('id')}: {said}" for said in citations.complaints("".join(cell["source"]))]
    if path.parent.name in CHAPTER_FOLDERS:
        wrong += chapter_complaints(notebook)
    return wrong


def main() -> int:
    """Fix if asked, then check; the exit status says whether anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="first strip outputs, counts and machine metadata")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of the book")
    arguments = parser.parse_args()
    wrong = []
    for path in arguments.notebooks or notebooks(ROOT):
        text = path.read_text(encoding="utf-8")
        if arguments.fix:
            fixed = serialized(stripped(json.loads(text), path.stem))
            if fixed != text:
                write_whole(path, fixed)
                text = fixed
                print(f"{path}: put into standard form")
        wrong += [f"{path}: {complaint}" for complaint in complaints(text, path)]
    if wrong:
        print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
