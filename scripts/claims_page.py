"""A Sphinx extension: tables of what this build's chapters claimed, made after all of them have run.

    ```{claims-table}      every assert of every chapter, with both sides and what is left of the limit
    ```{claims-summary}    a line a chapter

The numbers are those of this build (`claims.py` wrote them down); beside them stands the least that was left when
`make portable` last ran the book under other instruction sets and seeds.
"""

import os
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from chapter_records import ROOT, Record, read
from docutils import nodes
from page_tables import link_to, table
from sphinx.util.docutils import SphinxDirective

ELSEWHERE = ROOT / "results" / "portability" / "claims.csv"
SIGNS = {"<": "<", ">": ">", "<=": "≤", ">=": "≥"}
NOTHING = "No claims were recorded: these tables are made by make book."


class claims_table(nodes.General, nodes.Element):
    """Where a table will stand."""


class ClaimsTable(SphinxDirective):
    """`claims-table` and `claims-summary`."""

    def run(self) -> list[nodes.Node]:
        """A place for the table; which one is said by the directive's name."""
        return [claims_table(summary=self.name == "claims-summary")]


@cache
def claims() -> list[Record]:
    """Every claim of this build, with `elsewhere`: the least left under any setting, None when not measured."""
    folder = os.environ.get("CLAIMS_RECORDS")
    found = [record for record in read(Path(folder)) if "claim" in record] if folder else []
    measured = {}
    if ELSEWHERE.exists():
        table = pd.read_csv(ELSEWHERE).dropna(subset=["slack"])
        table = table[table["moves"]]
        measured = {
            (row.chapter, row.claim): row.slack for row in table.sort_values("slack", ascending=False).itertuples()
        }
    return [record | {"elsewhere": measured.get((record["chapter"], record["claim"]))} for record in found]


def share(slack: float | None) -> str:
    """A slack as a percentage, without a digit more than it deserves."""
    return "–" if slack is None else f"{100 * slack:.0f} %" if slack >= 0.1 else f"{100 * slack:.2g} %"


def cells(record: Record) -> list[nodes.Node]:
    """A line of the large table."""
    sides = f"{record['left']:.4g} {SIGNS[record['sign']]} {record['right']:.4g}" if "left" in record else "–"
    claim = nodes.literal(text=record["claim"])
    return [
        nodes.Text(str(record["cell"])),
        claim,
        nodes.Text(sides),
        nodes.Text(share(record.get("slack"))),
        nodes.Text(share(record["elsewhere"])),
    ]


def large(link: Any) -> list[nodes.Node]:
    """A table for every chapter."""
    made: list[nodes.Node] = []
    for chapter, group in groupby(claims(), key=lambda record: record["chapter"]):
        made.append(nodes.rubric("", "", link(chapter)))
        rows = [cells(record) for record in group]
        made.append(table(["cell", "claim", "both sides", "left", "elsewhere"], [6, 50, 22, 10, 12], rows))
    return made or [nodes.paragraph(text=NOTHING)]


def summary(link: Any) -> list[nodes.Node]:
    """A line a chapter: how many asserts, and the least that is left of one whose sides change with the seed."""
    rows = []
    for chapter, group in groupby(claims(), key=lambda record: record["chapter"]):
        records = list(group)
        moving = [record["elsewhere"] for record in records if record["elsewhere"] is not None]
        rows.append([link(chapter), nodes.Text(str(len(records))), nodes.Text(share(min(moving, default=None)))])
    heads = ["chapter", "asserts", "least left elsewhere"]
    return [table(heads, [60, 15, 25], rows)] if rows else [nodes.paragraph(text=NOTHING)]


def fill(app: Any, doctree: nodes.document, page: str) -> None:
    """Called when all chapters have been read, before a page is written."""

    def link(chapter: str) -> nodes.Node:
        return link_to(app, page, chapter.removesuffix(".ipynb"))

    for place in list(doctree.findall(claims_table)):
        place.replace_self((summary if place["summary"] else large)(link))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(claims_table)
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("claims-summary", ClaimsTable)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
