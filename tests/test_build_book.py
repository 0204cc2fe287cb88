"""The book's build runs chapters side by side, fails when one fails, and ends with what went wrong."""

from pathlib import Path

import build_book
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def make_book(folder: Path, code: str) -> None:
    """A book of six empty pages (Sphinx reads fewer one by one) and a chapter with one cell."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["sphinx"]["local_extensions"] = {name: str(ROOT / "scripts") for name in ("parallel_reading",)}
    config["sphinx"]["config"] = {"nb_ipywidgets_js": {}}
    del config["bibtex_bibfiles"]
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    pages = [f"page{number}" for number in range(6)]
    for page in pages:
        (folder / f"{page}.md").write_text("# Nothing\n")
    toc = {"format": "jb-book", "root": "chapter", "chapters": [{"file": page} for page in pages]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter")])
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "chapter.ipynb")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('fine')", 0, "build succeeded"),
        ("assert 1 > 2, 'the claim'", 1, "AssertionError: the claim"),
        ("import sys; print('hm', file=sys.stderr)", 1, "stderr was found in the cell outputs of cell 2"),
    ],
)
def test_the_build_fails_when_a_cell_does_and_says_so_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, status: int, said: str
) -> None:
    make_book(tmp_path, code)
    assert build_book.build(tmp_path, jobs=2) == status
    printed = build_book.COLOUR.sub("", capsys.readouterr().out)
    assert "doing serial read" not in printed
    end = printed if status == 0 else printed[printed.index("What went wrong:") :]
    assert said in end
    assert (tmp_path / "_build" / "html" / "chapter.html").exists() or status


def test_what_a_kernel_says_of_its_sockets_is_no_trouble() -> None:
    lines = ["[IPKernelApp] WARNING | Kernel is running over TCP", "\x1b[91ma.md:3: WARNING: no such page\x1b[39m"]
    assert build_book.trouble(lines * 2) == ["a.md:3: WARNING: no such page"]
