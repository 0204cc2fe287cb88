"""Text is UTF-8 whatever the machine's own encoding is: on Windows it is another one, and λ would be lost."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for room in ("isopo_mini", "scripts", "benchmarks", "tests") for path in (ROOT / room).rglob("*.py")]
NOTEBOOKS = [path for path in (ROOT / "book").rglob("*.ipynb") if "_build" not in path.parts]


def unspecified(source: str) -> list[str]:
    """Calls that read or write text without saying in which encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        binary = any(isinstance(each, ast.Constant) and "b" in str(each.value) for each in node.args[1:])
        if name in ("read_text", "write_text") or (name in ("open", "fdopen") and _opens_text(node) and not binary):
            found.append(ast.unparse(node))
    return found


def _opens_text(node: ast.Call) -> bool:
    """`open(…)` and `os.fdopen(…)`, not `os.open(…)` nor the `open` of something else."""
    if isinstance(node.func, ast.Name):
        return True
    return node.func.attr == "fdopen"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_says_its_encoding(path: Path) -> None:
    assert unspecified(path.read_text(encoding="utf-8")) == []


def test_so_do_the_chapters() -> None:
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not source.lstrip().startswith("%"):
                assert unspecified(source) == [], (path.name, cell["id"])


def undecoded(source: str) -> list[str]:
    """Calls that read another program's text in the machine's own encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        given = {each.arg: ast.unparse(each.value) for each in node.keywords} if isinstance(node, ast.Call) else {}
        if "True" in (given.get("text"), given.get("universal_newlines")) and "encoding" not in given:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("room", ["isopo_mini", "scripts", "benchmarks"])
def test_what_other_programs_print_is_decoded_as_said(room: str) -> None:
    assert undecoded("subprocess.run(a, text=True)") == ["subprocess.run(a, text=True)"]
    for path in (ROOT / room).rglob("*.py"):
        assert undecoded(path.read_text(encoding="utf-8")) == [], path


def test_a_call_without_is_noticed() -> None:
    assert unspecified("Path('a').read_text()") == ["Path('a').read_text()"]
    assert unspecified("open('a', 'w')") == ["open('a', 'w')"]
    assert unspecified("open('a', 'rb'); os.open('a', 0); Path('a').read_text(encoding='utf-8')") == []


def test_an_experiment_in_another_locale(tmp_path: Path) -> None:
    """As on Windows, the machine's own encoding is not UTF-8."""
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "TQDM_DISABLE": "1"}
    environment |= {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    program = (
        "import locale, pathlib, sys; from isopo_mini.writing import write_atomically\n"
        "assert locale.getencoding().lower() not in ('utf-8', 'utf8'), locale.getencoding()\n"
        "write_atomically(pathlib.Path(sys.argv[1]), '\\u03bb = \\u03c1')\n"
    )
    path = tmp_path / "text"
    subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=True)
    assert path.read_text(encoding="utf-8") == "λ = ρ"
    command = [sys.executable, "-m", "isopo_mini.experiments", "bandit", "--rules", "reinforce"]
    command += [
        "--learning-rates",
        "0.1",
        "--seeds",
        "0",
        "--steps",
        "2",
        "--processes",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "out" / "records.jsonl").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_build_whose_output_goes_to_a_file_of_another_encoding(encoding: str, tmp_path: Path) -> None:
    """As on Windows: λ is no letter there. The failing claim is told with a question mark, and nothing is raised."""
    claim = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    claim["source"] = "λ = 2\nassert λ < 1, 'λ is small'"
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": "# ρ"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = {"cells": [title, claim], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "page.ipynb").write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n", encoding="utf-8")
    (tmp_path / "_config.yml").write_text("execute: {execute_notebooks: force}\n", encoding="utf-8")
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": encoding, "PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"}
    program = "import build_book, pathlib, sys; build_book.say_what_the_screen_can(); "
    program += "sys.exit(build_book.build(pathlib.Path(sys.argv[1]), jobs=1))"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True)
    assert done.returncode == 1, done.stderr.decode(encoding)
    told = done.stdout.decode(encoding)
    assert "> assert ? < 1, '? is small'" in told
    assert "left side:  2" in told
