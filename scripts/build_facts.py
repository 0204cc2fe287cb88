"""A Sphinx extension: what these pages were made with, as a table.

```{build-facts}
"""

import os
from importlib.metadata import version
from typing import Any

from docutils import nodes
from page_tables import table
from sphinx.util.docutils import SphinxDirective
from sync_address import read_address

from isopo_mini.experiments.provenance import provenance

PAGES = ("matplotlib", "jupyter-book", "sphinx")


def version_and_commit() -> str:
    """Of the library that these pages were made with; a plus behind the commit says that it has changed since."""
    return f"{read_address().version}, commit {provenance()['code']['commit']}"


def facts() -> list[tuple[str, str]]:
    """What decides the numbers and the times of a build."""
    made = provenance()
    device, libraries = made["device"], made["libraries"] | {name: version(name) for name in PAGES}
    cores, threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS", "one a core")
    return [
        ("isopo_mini", version_and_commit()),
        ("device", f"{device['type']}: {device['name']}, {cores} cores; threads of PyTorch: {threads}"),
        *libraries.items(),
    ]


class BuildFacts(SphinxDirective):
    """`build-facts`."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows: list[list[nodes.Node]] = [[nodes.Text(name), nodes.Text(value)] for name, value in facts()]
        return [table(["part", "what these pages were made with"], [25, 75], rows, look="build-facts")]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("build-facts", BuildFacts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
