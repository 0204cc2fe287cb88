"""A Sphinx extension: a table of everything that a page of the API describes, with the first line of each docstring.

```{api-summary} book/appendix/api/tasks
"""

import importlib
import inspect
from typing import Any

from docutils import nodes
from page_tables import table
from sphinx.util.docutils import SphinxDirective

KINDS = ("class", "function", "exception", "data")  # not the methods: they stand with their class


class api_summary(nodes.General, nodes.Element):
    """Where a table will stand."""


class ApiSummary(SphinxDirective):
    """`api-summary`, with the page that it sums up."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A place for the table; what is described is known when all pages have been read."""
        return [api_summary(page=self.arguments[0])]


def first_line(name: str) -> str:
    """The first line of the docstring of what is called `package.module.name`; nothing for what has none of its own."""
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    text = inspect.getdoc(thing) if callable(thing) else None
    return text.strip().splitlines()[0].replace("`", "") if text else ""


def fill(app: Any, document: nodes.document, page: str) -> None:
    """Called before a page is written."""
    for place in list(document.findall(api_summary)):
        objects = app.env.domaindata["py"]["objects"]
        described = {name: entry for name, entry in objects.items() if entry.docname == place["page"]}
        rows = []
        for name, entry in described.items():
            if entry.objtype in KINDS and not entry.aliased:
                address = f"{app.builder.get_relative_uri(page, entry.docname)}#{entry.node_id}"
                short = nodes.literal(text=name.rpartition(".")[2])
                link = nodes.reference("", "", short, internal=True, refuri=address)
                rows.append([link, nodes.Text(first_line(name))])
        place.replace_self(table(["name", "what it does"], [30, 70], rows, look="api-summary"))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(api_summary)
    app.add_directive("api-summary", ApiSummary)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
