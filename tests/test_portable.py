"""Chapters run under other seeds and instruction sets; what does not hold, or holds by luck, is told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chapter_records
import claims_page
import execute_chapters
import nbformat
import numpy as np
import pandas as pd
import portable
import pytest
import torch
from docutils import nodes

SEEDED = """
import numpy as np, torch
from torch import Generator, manual_seed
seeds = [torch.manual_seed(1).initial_seed(), manual_seed(2).initial_seed(), torch.initial_seed()]
seeds += [torch.Generator().manual_seed(3).initial_seed(), Generator("cpu").manual_seed(4).initial_seed()]
draws = [np.random.default_rng(5).random(), np.random.default_rng([6, 1]).random(), np.random.default_rng().random()]
"""
SHIFTING = f"import seed_shift; seed_shift.install(100)\n{SEEDED}\nprint(seeds, *draws)"


def test_every_seed_is_shifted() -> None:
    scripts = str(Path(portable.__file__).parent)
    finished = subprocess.run([sys.executable, "-c", SHIFTING], cwd=scripts, capture_output=True, text=True, check=True)
    seeds, draws = finished.stdout.split("] ")
    assert seeds == "[101, 102, 102, 103, 104"
    expected = np.random.default_rng(105).random(), np.random.default_rng([106, 1]).random()
    assert [float(draw) for draw in draws.split()[:2]] == list(expected)


def chapter(folder: Path, name: str, *cells: str) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter")])
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in cells]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def found(tmp_path: Path) -> list[dict[str, Any]]:
    """Two chapters under the ordinary setting and two shifts."""
    draw = "import os, torch\nx = torch.rand(1000, generator=torch.Generator().manual_seed(7))"
    checks = [
        "assert x.mean() < 0.6",  # 0.5 with a standard error of 0.01: nine of them left
        "assert x[0] < 0.99",  # one number: luck
        "assert x.mean() ** 2 <= x.square().mean() + 1e-9, 'always: Jensen'",
        "assert abs(x.mean() - 0.5) < 1e-9, 'never'",
        "assert 1.0 < 1.01",  # exact: the same everywhere
        "assert 'OMP_NUM_THREADS' in os.environ or True",
    ]
    paths = [chapter(tmp_path, "one", draw, "\n".join(checks)), chapter(tmp_path, "two", "assert 1 > 0", "1 / 0", "2")]
    settings = [execute_chapters.ORDINARY, *execute_chapters.SEEDS[:2]]
    records: list[dict[str, Any]] = []
    for setting in settings:
        more, seconds = execute_chapters.execute_all(paths, setting, jobs=2, root=tmp_path)
        records += more
        assert set(seconds) == {"one.ipynb", "two.ipynb"}
    return records


def test_what_does_not_hold_and_what_holds_by_luck_is_told(
    found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    table = portable.margins(found).set_index("claim")
    assert table["settings"].eq(3).all()
    assert set(table.index[~table["held"]]) == {"abs(x.mean() - 0.5) < 1e-09"}
    assert set(table.index[table["thin"] & table["held"]]) <= {"x[0] < 0.99"}
    assert not table.loc["1.0 < 1.01", "moves"]
    assert table.loc["x.mean() < 0.6", "standard_errors"] > 3
    assert (table.loc["x.mean() < 0.6", "slack"] < 0.2) & table.loc["x.mean() < 0.6", "moves"]
    assert not portable.report(found, portable.margins(found), [execute_chapters.ORDINARY])
    said = capsys.readouterr().out
    assert "two.ipynb, cell 2 (counted from 0), which begins\n    | 1 / 0\n  fails at\n    > 1 / 0\n" in said
    assert "one.ipynb [2]  abs(x.mean() - 0.5) < 1e-09\n" in said
    assert said.count("ZeroDivisionError") == 3
    assert "scripts/portable.py --chapters two.ipynb --settings ordinary" in said


def test_the_rows_of_a_chapter_that_has_changed_are_replaced() -> None:
    old = pd.DataFrame({"chapter": ["a", "b", "b", "c"], "claim": ["1", "2", "3", "4"]})
    new = pd.DataFrame({"chapter": ["d", "b"], "claim": ["6", "5"]})
    expected = pd.DataFrame({"chapter": ["a", "b", "c", "d"], "claim": ["1", "5", "4", "6"]})
    pd.testing.assert_frame_equal(portable.updated(new, old), expected)


def test_a_claim_that_was_not_measured_is_named(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    claims = [
        "assert (a < b).all(), 'so it is'",
        "def f():\n    np.testing.assert_allclose(x,  y)",
        "assert later\nif x:\n    assert here",
    ]
    chapter(tmp_path / "book", "one", *claims)
    chapter(tmp_path / "book", "two", "x = 1")
    table = tmp_path / "results" / "portability" / "claims.csv"
    table.parent.mkdir(parents=True)
    known = ["(a < b).all()", "np.testing.assert_allclose(x, y)", "gone"]
    pd.DataFrame({"chapter": "book/one.ipynb", "claim": known}).to_csv(table, index=False)
    assert portable.not_measured(tmp_path) == {"book/one.ipynb": {"later"}}
    table.unlink()
    assert len(portable.not_measured(tmp_path)["book/one.ipynb"]) == 3


def measured(distances: list[float], settings: list[str], **more: Any) -> list[dict[str, Any]]:
    """Records of one claim `left < 1` that keeps these distances."""
    base = {"chapter": "c", "cell": 1, "line": 1, "claim": "x < 1", "compared": "x < 1", "held": True, "certain": False}
    return [
        base | {"left": 1 - d, "sign": "<", "right": 1.0, "distance": d, "slack": d, "setting": s} | more
        for d, s in zip(distances, settings, strict=True)
    ]


SEEDS = ["ordinary", "seeds+1000", "seeds+2000", "seeds+3000"]


@pytest.mark.parametrize(
    ("distances", "more", "thin"),
    [
        ([0.1, 0.1, 0.1, 0.1], {}, False),  # exact
        ([0.10, 0.101, 0.102, 0.099], {}, False),  # 10 % left, and a hundred standard errors
        ([0.10, 0.15, 0.05, 0.20], {}, True),
        ([0.10, 0.15, 0.05, 0.20], {"certain": True}, False),
        ([0.20, 0.25, 0.16, 0.30], {}, False),  # 16 % left
        ([0.50, 0.95, 0.20, 0.90], {"right": 0.0, "left": -1.0}, True),  # against 0 only standard errors count
    ],
)
def test_luck_is_less_than_a_share_and_less_than_three_standard_errors(
    distances: list[float], more: dict[str, Any], thin: bool
) -> None:
    row = portable.margin(measured(distances, SEEDS, **more))
    assert row["thin"] == thin
    assert row["slack"] == min(distances)
    if np.ptp(distances):
        assert row["standard_errors"] == pytest.approx(np.mean(distances) / np.std(distances, ddof=1))


def test_processors_that_repeat_a_seed_do_not_shrink_the_standard_error() -> None:
    """Four runs of the same seed are one sample, not four."""
    processors = [setting.name for setting in execute_chapters.PROCESSORS]
    few = measured([0.10, 0.15, 0.05, 0.20], SEEDS)
    many = few + measured([0.10] * 4, processors)
    assert portable.standard_error(many) == pytest.approx(portable.standard_error(few))
    assert portable.standard_error(measured([0.1, 0.3], processors[:2])) == pytest.approx(0.2 / 2**0.5)


def test_a_commit_is_tried_with_what_changed_since_the_last_tag_or_with_one_chapter(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "book").mkdir()
    every = [chapter(tmp_path / "book", name, "1") for name in ("a", "b", "c")]
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    perturbed = [*execute_chapters.PROCESSORS, *execute_chapters.SEEDS]
    assert portable.changed(tmp_path) == (every, perturbed[1])  # never released: all of them
    git("tag", "v1")
    assert portable.changed(tmp_path) == ([every[1]], perturbed[1])
    chapter(tmp_path / "book", "c", "2")
    git("commit", "--quiet", "--all", "--message", "two")
    assert portable.changed(tmp_path) == ([every[2]], perturbed[2])


def test_instruction_sets_are_at_least_four_combinations() -> None:
    combinations = {tuple(sorted(setting.environment.items())) for setting in execute_chapters.PROCESSORS}
    assert len(combinations) == len(execute_chapters.PROCESSORS) >= 4
    assert {setting.shift for setting in execute_chapters.SEEDS} == {1000, 2000, 3000}


def test_an_instruction_set_reaches_the_kernel(tmp_path: Path) -> None:
    path = chapter(tmp_path, "one", "import torch\nassert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'")
    old = execute_chapters.PROCESSORS[0]
    if "ATEN_CPU_CAPABILITY" not in old.environment:
        pytest.skip("this processor has one instruction set only")
    assert [record["held"] for record in execute_chapters.execute(path, old, tmp_path)] == [True]


def test_a_kernel_that_dies_is_a_failure(tmp_path: Path) -> None:
    path = chapter(tmp_path, "one", "assert 1 < 2", "import os; os._exit(1)")
    first, second = execute_chapters.execute(path, execute_chapters.ORDINARY, tmp_path)
    assert first["held"]
    assert (second["chapter"], second["error"]) == ("one.ipynb", "no answer")
    assert "Kernel died" in second["message"]


def test_a_chapter_edited_since_is_not_mistaken_for_another(tmp_path: Path) -> None:
    path, records = chapter(tmp_path, "one", "assert 1 < 2"), tmp_path / "records"
    records.mkdir()
    line = {"source": "assert 1 < 2", "claim": "1 < 2", "line": 1}
    (records / "kernel.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (record,) = chapter_records.read(records, tmp_path)
    assert (record["chapter"], record["cell"]) == (path.name, 1)
    chapter(tmp_path, "one", "assert 1 < 3")
    assert chapter_records.read(records, tmp_path) == []


def test_the_page_of_claims_says_both_sides_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = measured([0.04], ["ordinary"])
    rows = [record | {"elsewhere": 0.01}, {"chapter": "c", "cell": 2, "claim": "a is None", "elsewhere": None}]
    monkeypatch.setattr(claims_page, "claims", lambda: rows)

    def link(name: str) -> nodes.Node:
        return nodes.Text(name)

    title, table = claims_page.large(link)
    assert title.astext() == "c"
    text = [[entry.astext() for entry in row.findall(nodes.entry)] for row in table.findall(nodes.row)]
    assert text[1:] == [["1", "x < 1", "0.96 < 1", "4 %", "1 %"], ["2", "a is None", "–", "–", "–"]]
    (short,) = claims_page.summary(link)
    assert [entry.astext() for entry in list(short.findall(nodes.row))[1].findall(nodes.entry)] == ["c", "2", "1 %"]
    monkeypatch.setattr(claims_page, "claims", list)
    assert "make book" in claims_page.large(link)[0].astext() == claims_page.summary(link)[0].astext()


def test_torch_is_left_alone_in_this_process() -> None:
    assert torch.Generator().manual_seed(3).initial_seed() == 3


def test_notebooks_of_environments_and_of_editors_are_no_chapters(tmp_path: Path) -> None:
    root = tmp_path / ".hidden" / "clone"  # where somebody may keep a clone
    for place in ("book", ".venv/lib", ".venv-course/lib", "_build/html", "book/.ipynb_checkpoints"):
        (root / place).mkdir(parents=True)
        (root / place / "01_a.ipynb").touch()
    assert chapter_records.chapters(root) == [root / "book" / "01_a.ipynb"]


def test_chapters_are_listed_as_the_book_has_them() -> None:
    """By folder, `experiments` would come before `foundations`."""
    names = ["book/experiments/09_bandits.ipynb", "book/foundations/01_policies.ipynb", "book/index.ipynb"]
    assert sorted(names, key=chapter_records.reading_order) == names[::-1]
