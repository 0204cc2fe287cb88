"""Every exercise with a checker, as the book prints it: the solution passes, and what is wrong is told apart."""

import ast
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sync_address
import torch
from exercise_slips import SLIPS
from mentions import TAG, mentions

from isopo_mini.exercises import check
from isopo_mini.exercises.checker import every_exercise

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = every_exercise()
FINE, STUB = "passed, ", "not filled in yet."


class Printed:
    """An exercise as its chapter prints it: the text of the stub and of the solution, with the imports they need."""

    def __init__(self, cells: list[ast.Module], sources: list[str]) -> None:
        self.cells, self.sources = cells, sources
        self.imports = [node for cell in cells for node in cell.body if isinstance(node, ast.Import | ast.ImportFrom)]
        self.double = any("set_default_dtype(torch.float64)" in source for source in sources)

    def text(self, name: str) -> str:
        """The definition of this function."""
        found = [
            ast.get_source_segment(source, node)
            for cell, source in zip(self.cells, self.sources, strict=True)
            for node in cell.body
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        (text,) = found
        assert text is not None
        return text

    def function(self, name: str, text: str) -> Callable[..., Any]:
        """The function that the text defines, where the chapter's imports that it needs are there."""
        used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        needed = [
            node for node in self.imports if used & {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        ]
        names: dict[str, Any] = {}
        exec("\n".join([*map(ast.unparse, needed), text]), names)
        return names[name]


@cache
def checks() -> dict[str, tuple[Path, Printed]]:
    """Where each name is checked, from all notebooks; every call of a checker must be one that we understand."""
    found: dict[str, tuple[Path, Printed]] = {}
    for path in sync_address.notebooks(ROOT):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        printed = Printed([ast.parse(source) for source in sources], sources)
        for name in {name for source in sources for _, name in checked(source, checkers_of(sources))}:
            assert name not in found, f"{name} is checked in two chapters"
            found[name] = path, printed
    return found


def checkers_of(sources: list[str]) -> set[str]:
    """How a chapter calls the checker: some have a `check` of their own, for something else."""
    imported = any("from isopo_mini.exercises import check" in source for source in sources)
    return {"check", "exercises.check"} if imported else {"exercises.check"}


def checked(source: str, checkers: set[str]) -> list[tuple[str, str]]:
    """(function, exercise) of every call of the checker; the exercise is empty when it is not given by its name."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in checkers:
            function, *rest = node.args
            named = len(rest) == 1 and isinstance(rest[0], ast.Constant)
            calls.append((ast.unparse(function), ast.literal_eval(rest[0]) if named else ""))
    return calls


@pytest.fixture(autouse=True)
def _default_dtype() -> Any:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def said(name: str, function: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What the checker prints."""
    torch.set_default_dtype(torch.float64 if checks()[name][1].double else torch.float32)  # as in the chapter
    passes = check(function, name)
    out = capsys.readouterr().out
    assert (passes is True) == (FINE in out)
    return out


def hint_in(out: str) -> str:
    """The hint, or nothing."""
    match = re.search(r"(?m)^  hint:     (.*)$", out)
    return match.group(1) if match else ""


def test_the_book_and_the_library_have_the_same_exercises() -> None:
    assert set(checks()) == set(EXERCISES)
    assert set(SLIPS) == set(EXERCISES), "each with slips of its own solution"


@pytest.mark.parametrize("path", sync_address.notebooks(ROOT), ids=lambda path: path.stem)
def test_a_stub_is_checked_where_it_stands_and_shows_nothing_else(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    checkers, stubs = checkers_of(sources), set()
    for source in sources:
        assert "" not in {name for _, name in checked(source, checkers)}, "the reference stands beside the exercise"
        if "your turn" in source:
            stub, call = ast.parse(source).body  # and no reference, no cases
            assert isinstance(stub, ast.FunctionDef)
            assert checked(ast.unparse(call), checkers) == [(stub.name, stub.name)]
            stubs.add(stub.name)
    assert stubs == {name for source in sources for _, name in checked(source, checkers)}, "each begins as a stub"


@pytest.mark.parametrize("name", EXERCISES)
def test_the_printed_solution_passes_and_the_stub_is_not_filled_in(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = checks()[name][1]
    solution = printed.function(f"{name}_solution", printed.text(f"{name}_solution"))
    assert FINE in said(name, solution, capsys)
    assert said(name, printed.function(name, printed.text(name)), capsys) == f"{name}: {STUB}\n"


def zeros(value: Any) -> Any:
    """As many zeros."""
    if isinstance(value, tuple):
        return tuple(zeros(item) for item in value)
    if isinstance(value, bool):
        return False
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else np.zeros_like(value)


@pytest.mark.parametrize("name", EXERCISES)
def test_zeros_do_not_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(name, lambda *case: zeros(EXERCISES[name].reference(*case)), capsys)
    assert FINE not in out
    assert STUB not in out
    assert hint_in(out) != "" or name == "chosen"  # a step size of zero is no slip that we know


@pytest.mark.parametrize("name", EXERCISES)
def test_every_known_mistake_gets_the_hint_that_is_about_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = EXERCISES[name].mistakes
    assert len(mistakes) >= 2
    for hint, wrong in mistakes.items():
        assert hint_in(said(name, wrong, capsys)) == hint


@pytest.mark.parametrize("name", EXERCISES)
def test_the_figures_tables_and_equations_that_a_hint_names_are_in_its_chapter(name: str) -> None:
    cells = json.loads(checks()[name][0].read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    captions = re.findall(r"(?m)^\*\*((?:Figure|Table)s? \d.*?)\*\*", text)
    there = {mention.anchor for caption in captions for mention in mentions(caption)}
    there |= {f"equation-{number}" for number in TAG.findall(text)}
    named = {mention.anchor for hint in EXERCISES[name].mistakes for mention in mentions(hint)}
    assert named <= there


@pytest.mark.parametrize(("name", "slip"), [(name, slip) for name, slips in SLIPS.items() for slip in slips])
def test_a_slip_in_the_printed_solution_is_named(
    name: str, slip: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong, hint = slip
    printed = checks()[name][1]
    text = printed.text(f"{name}_solution")
    assert text.count(right) == 1
    out = said(name, printed.function(f"{name}_solution", text.replace(right, wrong)), capsys)
    assert FINE not in out
    assert hint_in(out).startswith(hint)
    assert (hint == "") == (hint_in(out) == "")


@pytest.mark.parametrize("name", EXERCISES)
def test_at_least_two_slips_of_the_printed_solution_are_told_apart(name: str) -> None:
    assert len({hint for _, _, hint in SLIPS[name] if hint}) >= 2
