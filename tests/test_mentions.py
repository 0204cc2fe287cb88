"""What the prose calls "Figure 5" or "chapter 12" becomes a link to it, and a mention of nothing is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import mentions
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("See Figure 5.", [("Figure 5", "figure", 5)]),
        ("Tables 5 and 6 say", [("Tables 5", "table", 5), ("6", "table", 6)]),
        ("chapters 1 to 19;", [("chapters 1", "chapter", 1), ("19", "chapter", 19)]),
        ("By (4), and\nEquation (3)", [("(4)", "equation", 4), ("Equation (3)", "equation", 3)]),
        ("equations (3) and (5)", [("equations (3)", "equation", 3), ("(5)", "equation", 5)]),
        ("f(3), in (2025), a figure 5, Table 100, Figures", []),
        ("Figure 4 and Table 9.", [("Figure 4", "figure", 4), ("Table 9", "table", 9)]),
    ],
)
def test_what_a_text_mentions(text: str, found: list[tuple[str, str, int]]) -> None:
    pieces = [(text[mention.start : mention.end], mention.kind, mention.number) for mention in mentions.mentions(text)]
    assert pieces == found


FIRST = """# One

**Table 1.** The first.

$$ a = b \\tag{1} $$

By (1) and (2) and Table 1, [chapter 2](02_b.md), Table 2, differs from this one's Table 1; so does chapter 2.

It is all in ([chapter 2](02_b.md), Tables 1 and 2).

Sutton and Barto tell more in chapter 2. `Table 1` is code; Figures 1.

**Figure 1 and Table 2.** Two at once.
"""
SECOND = """# Two

**Table 1.** One.

**Table 2.** Two, see Table 1 of [chapter 1](01_a.md).
"""


def build(folder: Path, **pages: str) -> tuple[list[str], list[tuple[str, str]], str]:
    """A book of these chapters: the named places and the links of the first, and the build's warnings."""
    index = "# Start\n\n```{toctree}\n:glob:\n*\n```\n"
    for name, text in ({"index": index} | pages).items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    settings = (
        "extensions = ['myst_parser', 'mentions']\nmyst_enable_extensions = ['dollarmath']\nhtml_theme = 'basic'\n"
    )
    (folder / "conf.py").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-q", str(folder), str(folder / "out")]
    environment = {"PYTHONPATH": str(ROOT / "scripts"), "PATH": ""}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stderr
    html = (folder / "out" / f"{next(iter(pages))}.html").read_text(encoding="utf-8")
    body = html[html.index("<h1>") : html.index("sphinxsidebar")]
    links = re.findall(r'<a class="reference internal" href="([^"]+)">(?:<span[^>]*>)?([^<]+)', body)
    return re.findall(r'id="((?:figure|table|equation)-\d+)"', body), links, said


def test_mentions_lead_to_what_they_name(tmp_path: Path) -> None:
    places, links, warnings = build(tmp_path, **{"01_a": FIRST, "02_b": SECOND})
    assert warnings == ""
    assert sorted(places) == ["equation-1", "figure-1", "table-1", "table-2"]
    assert links == [
        ("#equation-1", "(1)"),
        ("#table-1", "Table 1"),
        ("02_b.html", "chapter 2"),
        ("02_b.html#table-2", "Table 2"),
        ("#table-1", "Table 1"),
        ("02_b.html", "chapter 2"),
        ("02_b.html", "chapter 2"),
        ("02_b.html#table-1", "Tables 1"),
        ("02_b.html#table-2", "2"),
        ("#figure-1", "Figures 1"),
    ]


def test_a_table_of_the_chapter_that_is_linked_behind_it(tmp_path: Path) -> None:
    _, links, warnings = build(tmp_path, **{"02_b": SECOND, "01_a": FIRST})
    assert warnings == ""
    assert links == [("01_a.html#table-1", "Table 1"), ("01_a.html", "chapter 1")]


def test_wrong_numbers_are_warnings(tmp_path: Path) -> None:
    page = "# One\n\n**Table 2.** Is the first.\n\n**Figure 1.** A.\n\n**Figure 1.** B, see Table 7.\n"
    _, _, warnings = build(tmp_path, **{"01_a": page})
    assert "expected tables 1, 2, 3 …, got [2]" in warnings
    assert "figure-1 stands twice on this page" in warnings
    assert "there is no table 7 on 01_a" in warnings


def test_a_draft_looks_for_no_table_of_a_chapter_that_it_does_without(tmp_path: Path) -> None:
    """`make draft` builds one page. What it says of another chapter's Table 7 is not about a table of its own."""
    page = "# Two\n\n**Table 1.** See Table 7 of [chapter 1](01_a.md), and Table 1.\n"
    _, links, warnings = build(tmp_path, **{"02_b": page})
    assert "there is no" not in warnings
    assert ("#table-1", "Table 1") in links
    assert not any("Table 7" in link for link in links)
