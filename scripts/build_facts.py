"""A Sphinx extension: what these pages were made with, as a table.

```{build-facts}
"""

import os
from importlib.metadata import version
from typing import Any

from claims_page import table
from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from sync_address import read_address

from isopo_mini.experiments.provenance import provenance

PAGES = ("matplotlib", "jupyter-book", "sphinx")


def facts() -> list[tuple[str, str]]:
    """What decides the numbers and the times of a build."""
    made = provenance()
    commit = made["code"]["commit"]  # forty digits, and a plus where something has changed since
    device, libraries = made["device"], made["libraries"] | {name: version(name) for name in PAGES}
    cores, threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS", "one a core")
    return [
        ("isopo_mini", f"{read_address().version}, commit {commit[:10]}{commit[40:]}"),
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
