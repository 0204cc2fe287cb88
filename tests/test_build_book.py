"""The book's build runs chapters side by side, fails when one fails, and ends with what went wrong."""

from pathlib import Path

import build_book
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def make_book(folder: Path, **chapters: list[str]) -> None:
    """A book of six empty pages (Sphinx reads fewer one by one) and of chapters with a title and these cells."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["local_extensions"] = {name: str(ROOT / "scripts") for name in ("parallel_reading",)}
    config["sphinx"]["config"] = {"nb_ipywidgets_js": {}}
    del config["bibtex_bibfiles"]
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    pages = [f"page{number}" for number in range(6)]
    for page in pages:
        (folder / f"{page}.md").write_text("# Nothing\n", encoding="utf-8")
    for name, cells in chapters.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter")])
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in cells]
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    root, *others = chapters
    toc = {"format": "jb-book", "root": root, "chapters": [{"file": page} for page in [*others, *pages]]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")


def build(folder: Path, capsys: pytest.CaptureFixture[str], status: int) -> str:
    """Build the book, expecting the exit status; what was printed, without colours."""
    assert build_book.build(folder, jobs=2) == status
    printed = build_book.COLOUR.sub("", capsys.readouterr().out)
    assert "doing serial read" not in printed
    assert "IPKernelApp" not in printed
    assert "running over TCP" not in printed
    return printed


def test_a_good_book(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_book(tmp_path, chapter=["print('fine')"])
    assert "build succeeded" in build(tmp_path, capsys, 0)
    assert (tmp_path / "_build" / "html" / "chapter.html").exists()


def test_what_a_cell_says_to_stderr_fails_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_book(tmp_path, chapter=["import sys; print('hm', file=sys.stderr)"])
    _, end = build(tmp_path, capsys, 1).split("What went wrong:")
    assert "stderr was found in the cell outputs of cell 2" in end


def test_a_book_with_two_failing_chapters_says_of_each_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both, and the good one beside them, are executed; the end of the output is the whole story."""
    rate = "rate = 1.25  # measured\nassert rate > 0\n\nassert (\n    rate < 1\n), 'the claim'"
    loop = "def share(x):\n    return 1 / x\n\n\nshare(0)"
    make_book(tmp_path, first=["import math", rate, "print('not reached')"], good=["assert 2 > 1"], second=[loop])
    _, end = build(tmp_path, capsys, 1).split("The book was not built. What went wrong:\n\n")
    assert end.strip() == (
        "first.ipynb, cell 2 (counted from 0), which begins\n"
        "    | rate = 1.25  # measured\n"
        "    | assert rate > 0\n"
        "    |\n"
        "  fails at\n"
        "    > assert (\n"
        "    >     rate < 1\n"
        "    > ), 'the claim'\n"
        "  with AssertionError\n"
        "      the claim\n"
        "      rate < 1\n"
        "        left side:  1.25\n"
        "        right side: 1\n"
        "  To see this one chapter again: make draft CHAPTER=first.ipynb\n"
        "\n"
        "second.ipynb, cell 1 (counted from 0), which begins\n"
        "    | def share(x):\n"
        "    |     return 1 / x\n"
        "    |\n"
        "  fails at\n"
        "    > return 1 / x\n"
        "  with ZeroDivisionError\n"
        "      division by zero\n"
        "  To see this one chapter again: make draft CHAPTER=second.ipynb"
    )
    ran = [file.read_text(encoding="utf-8") for file in (tmp_path / "_build" / "claims").iterdir()]
    assert len(ran) == 3
    assert any("assert 2 > 1" in text for text in ran)


def test_what_a_kernel_says_of_its_sockets_is_no_trouble() -> None:
    lines = ["[IPKernelApp] WARNING | Kernel is running over TCP", "\x1b[91ma.md:3: WARNING: no such page\x1b[39m"]
    assert build_book.trouble(lines * 2) == ["a.md:3: WARNING: no such page"]


def test_chapters_side_by_side_have_a_thread_each_unless_told_otherwise() -> None:
    assert build_book.with_threads({"A": "b"}, jobs=2) == {"A": "b", "OMP_NUM_THREADS": "1"}
    assert build_book.with_threads({"OMP_NUM_THREADS": "3"}, jobs=2) == {"OMP_NUM_THREADS": "3"}
    assert build_book.with_threads({}, jobs=1) == {}
