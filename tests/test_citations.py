"""A citation reads as text in JupyterLab and Colab, and leads to the source's entry on the page."""

import re
from pathlib import Path

import check_notebooks
import citations
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_source_has_its_names_and_its_target() -> None:
    known = citations.sources()
    assert known["kakade2001natural"] == ("Kakade", "2001")
    assert known["baxter2000direct"] == ("Baxter and Bartlett", "2000")
    assert known["jacot2018neural"] == ("Jacot et al.", "2018")
    assert known["jordan2024muon"] == ("Jordan et al.", "2024"), "and others"
    assert known["minimax2025m1"] == ("MiniMax", "2025")
    assert all(re.fullmatch(r"[\w\- .]+", authors) for authors, _ in known.values()), "no LaTeX is left"
    page = (ROOT / "book" / "appendix" / "references.md").read_text(encoding="utf-8")
    targets = re.findall(r"(?m)^- \(ref-(\w+)\)=\n  \{cite:t\}`(\w+)`", page)
    assert {key for key, _ in targets} == set(known)
    assert all(target == cited for target, cited in targets)


@pytest.mark.parametrize(
    ("role", "link"),
    [
        ("{cite:t}`kakade2001natural`: why", "[Kakade (2001)](#ref-kakade2001natural): why"),
        ("rest {cite:p}`baxter2000direct`.", "rest ([Baxter and Bartlett, 2000](#ref-baxter2000direct))."),
        ("no source `kakade2001natural`", "no source `kakade2001natural`"),
    ],
)
def test_roles_become_links(role: str, link: str) -> None:
    assert citations.as_links(role) == link
    assert citations.complaints(link) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{cite:t}`kakade2001natural`", "a role"),
        ("[Kakade (2002)](#ref-kakade2001natural)", r"expected Kakade \(2001\) or Kakade, 2001"),
        ("[Kakade (2001)](#ref-kakade)", r"no such source in references\.bib"),
    ],
)
def test_what_is_wrong_is_said(text: str, complaint: str) -> None:
    (said,) = citations.complaints(text)
    assert re.search(complaint, said)


def test_the_notebooks_are_held_to_it() -> None:
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["{cite:t}`kakade2001natural`"]}
    notebook = {"cells": [cell], "metadata": check_notebooks.METADATA, "nbformat": 4, "nbformat_minor": 5}
    path = Path("book/appendix/page.ipynb")
    assert any("a role" in said for said in check_notebooks.complaints(check_notebooks.serialized(notebook), path))
    fixed = check_notebooks.stripped(notebook, "page")
    assert check_notebooks.complaints(check_notebooks.serialized(fixed), path) == []
