"""Tables on the book's pages that its extensions make: of claims, of the API, of what a build was made with."""

from docutils import nodes


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
