"""Tables on the book's pages that its extensions make: of claims, of run times, of the API, of a build's parts."""

import re
from pathlib import PurePosixPath
from typing import Any

from docutils import nodes

CHAPTER = re.compile(r"0*(\d+)_")


def link_to(app: Any, page: str, other: str) -> nodes.Node:
    """A link on `page` to another page, under its number and title; its name alone where it is not built along."""
    if other not in app.env.titles:
        return nodes.Text(other)
    number = CHAPTER.match(PurePosixPath(other).name)
    title = (f"{number[1]}. " if number else "") + app.env.titles[other].astext()
    return nodes.reference("", title, internal=True, refuri=app.builder.get_relative_uri(page, other))


def table(heads: list[str], widths: list[int], rows: list[list[nodes.Node]], look: str = "claims") -> nodes.table:
    """A docutils table; the theme lets it scroll on its own where a screen is narrow."""
    group = nodes.tgroup(cols=len(heads))
    group += [nodes.colspec(colwidth=width) for width in widths]
    group += nodes.thead("", _row([nodes.Text(head) for head in heads]))
    group += nodes.tbody("", *[_row(row) for row in rows])
    return nodes.table("", group, classes=[look])


def _row(entries: list[nodes.Node]) -> nodes.row:
    """One row."""
    return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", entry)) for entry in entries])
