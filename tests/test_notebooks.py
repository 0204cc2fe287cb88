"""The notebooks keep the book's rules, and the checker that says so would notice if they did not."""

import json
import re
from copy import deepcopy
from pathlib import Path

import check_notebooks
import pytest
import sync_address
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sync_address.notebooks(ROOT)
CHAPTER = Path("book/foundations/00_example.ipynb")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_keeps_the_rules(path: Path) -> None:
    assert check_notebooks.complaints(path.read_text(encoding="utf-8"), path) == []


def test_table_of_contents_lists_exactly_the_pages_that_exist() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    pages = [page for part in toc["parts"] for page in part["chapters"]]
    listed = [toc["root"], *(below["file"] for page in pages for below in [page, *page.get("sections", [])])]
    assert len(listed) == len(set(listed))
    pages = [*NOTEBOOKS, *(ROOT / "book").rglob("*.md")]
    existing = {path.relative_to(ROOT).with_suffix("").as_posix() for path in pages}
    existing = {page for page in existing if ".ipynb_checkpoints" not in page}
    assert set(listed) == existing


def code(source: str, name: str, **metadata: object) -> dict:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": name,
        "metadata": metadata,
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def good_chapter() -> dict:
    """The smallest chapter without fault."""
    prose = "# Title\n\n## Where it breaks\n\n## Exercises\n\n## Summary"
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": prose.splitlines(keepends=True)},
        code("import torch", "b", tags=["setup"]),
        code("plt.show()", "c", mystnb={"image": {"alt": "Four words or more."}}),
        code("assert 1 + 1 == 2", "d"),
    ]
    return {"cells": cells, "metadata": check_notebooks.METADATA, "nbformat": 4, "nbformat_minor": 5}


def complaints(notebook: dict) -> list[str]:
    return check_notebooks.complaints(check_notebooks.serialized(notebook), CHAPTER)


def test_checker_accepts_a_good_chapter() -> None:
    assert complaints(good_chapter()) == []


@pytest.mark.parametrize(
    ("cell", "change", "complaint"),
    [
        (1, {"execution_count": 3}, "execution counts must be stripped"),
        (1, {"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}, "must be stripped"),
        (1, {"metadata": {}}, "the first code cell must be the setup cell"),
        (1, {"metadata": {"tags": ["setup", "hide_input"]}}, "unknown tags hide_input"),
        (1, {"metadata": {"tags": ["setup"], "collapsed": True}}, "differ from the standard form"),
        (1, {"id": "a"}, "an id of its own"),
        (2, {"metadata": {}}, "mystnb.image.alt must say what is seen"),
        (2, {"metadata": {"mystnb": {"image": {"alt": "plot"}}}}, "mystnb.image.alt must say what is seen"),
        (3, {"source": ["print(2)"]}, "no cell asserts"),
        (3, {"source": ["assert 1\n"] * 25 + ["assert 1"]}, "26 lines of code"),
        (3, {"source": ["assert 1\n"] * 200 + ["assert 1"]}, "lines of code are shown, at most 200"),
        (3, {"source": ["assert " + "1 + " * 20 + "1"]}, "a line of 88 characters, at most 80 fit"),
        (3, {"source": ["%matplotlib inline"]}, "not plain Python"),
        (0, {"source": ["# Title\n", "## Exercises\n", "## Summary"]}, "no section 'Where it breaks'"),
        (0, {"source": ["## Where it breaks\n", "## Exercises\n", "## Summary"]}, "exactly one title"),
        (0, {"source": ["# Title\n", "\n", "$$\n", r"a \\ b \tag{1}" + "\n", "$$"]}, "several lines cannot have a"),
    ],
)
def test_checker_notices(cell: int, change: dict, complaint: str) -> None:
    notebook = deepcopy(good_chapter())
    notebook["cells"][cell] |= change
    assert any(complaint in said for said in complaints(notebook)), complaints(notebook)


def test_fixing_removes_what_a_run_left_behind_and_keeps_the_rest() -> None:
    notebook = good_chapter()
    used = deepcopy(notebook)
    used["metadata"] = {"language_info": {"name": "python", "version": "3.13.0"}, "widgets": {}}
    used["nbformat_minor"] = 4
    used["cells"][3] |= {"execution_count": 7, "outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}
    used["cells"][3]["metadata"] = {"jupyter": {"outputs_hidden": True}, "tags": []}
    assert check_notebooks.stripped(used, "00_example") == notebook
    assert json.loads(check_notebooks.serialized(notebook)) == notebook


def test_folded_code_may_be_wider_than_the_column() -> None:
    notebook = good_chapter()
    notebook["cells"][3] |= {"source": ["assert " + "1 + " * 20 + "1"], "metadata": {"tags": ["hide-input"]}}
    assert complaints(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_solutions_are_folded_wherever_the_notebook_is_opened(path: Path) -> None:
    """Read as JupyterLab and Colab do, and not as `check_notebooks` writes them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    headings = [index for index, cell in enumerate(cells) if "## Exercises" in "".join(cell["source"])]
    for index, cell in enumerate(cells):
        metadata, source = cell["metadata"], "".join(cell["source"])
        if "_solution(" in source and cell["cell_type"] == "code" and "hide-cell" not in metadata.get("tags", []):
            assert "def " not in source.split("_solution(")[0].split("\n")[-1], "a solution in plain view"
        if "hide-cell" in metadata.get("tags", []):
            assert headings[0] < index, "nothing but solutions is hidden whole"
            assert metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}  # JupyterLab
            assert metadata["cellView"] == "form"  # Colab, with its title:
            assert source.startswith("# @title Solution\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_solutions_in_words_are_folded_too(path: Path) -> None:
    """As HTML that the page, JupyterLab and Colab fold alike: closed, and with the empty line that Markdown needs."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and ("<details" in source or "<summary" in source):
            blocks = re.findall(r"(?ms)^<details>\n<summary>[^<]+</summary>\n\n.*?\n\n</details>$", source)
            counts = {source.count(part) for part in ("<details", "<summary", "</summary>", "</details>")}
            assert counts == {len(blocks)}


def test_a_solution_in_plain_view_is_noticed_and_mended() -> None:
    notebook = good_chapter()
    notebook["cells"].append(code("assert True", "e", tags=["hide-cell"]))
    assert "metadata" in complaints(notebook)[0]
    mended = check_notebooks.stripped(notebook, "00_example")
    assert complaints(mended) == []
    assert check_notebooks.stripped(mended, "00_example") == mended, "once is enough"
    assert "".join(mended["cells"][-1]["source"]) == "# @title Solution\nassert True"
