"""A Sphinx extension: how long every chapter took to run while these pages were made, in the book's order.

```{run-times}
"""

from typing import Any

from chapter_records import reading_order
from docutils import nodes
from myst_nb.core.execute.base import ExecutionResult
from myst_nb.sphinx_ import NbMetadataCollector
from page_tables import link_to, table
from sphinx.util.docutils import SphinxDirective

NOTHING = "No chapter was run: this table is made by make book."


class run_times(nodes.General, nodes.Element):
    """Where the table will stand."""


class RunTimes(SphinxDirective):
    """`run-times`."""

    def run(self) -> list[nodes.Node]:
        """A place for the table; what the chapters took is known when all of them have run."""
        return [run_times()]


def seconds(env: Any) -> dict[str, float]:
    """Of every page that was run, in the book's order."""
    run: dict[str, ExecutionResult | None] = {
        page: data.get("exec_data") for page, data in NbMetadataCollector.get_doc_data(env).items()
    }
    took = {page: result["runtime"] for page, result in run.items() if result and result["runtime"] is not None}
    return {page: took[page] for page in sorted(took, key=lambda page: reading_order(f"{page}.ipynb"))}


def fill(app: Any, document: nodes.document, page: str) -> None:
    """Called when all chapters have been read, before a page is written."""
    for place in list(document.findall(run_times)):
        took = seconds(app.env)
        rows: list[list[nodes.Node]] = [
            [link_to(app, page, chapter), nodes.Text(f"{duration:.0f}")] for chapter, duration in took.items()
        ]
        rows.append([nodes.Text("all, one after the other"), nodes.Text(f"{sum(took.values()):.0f}")])
        made = table(["chapter", "seconds"], [80, 20], rows, look="chapter-times")
        place.replace_self(made if took else nodes.paragraph(text=NOTHING))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(run_times)
    app.add_directive("run-times", RunTimes)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
