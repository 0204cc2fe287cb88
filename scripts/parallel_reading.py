"""A Sphinx extension: the chapters may be read, and so executed, several at a time.

Sphinx reads in parallel only when every extension says that this is safe. Three of the book's say nothing, and are:
one adds a folder of static files, one acts for LaTeX only, one gives numbers when everything has been read.
"""

from typing import Any

SILENT = ("sphinx-mathjax-offline", "sphinx_jupyterbook_latex", "sphinx_multitoc_numbering")


def declare(app: Any) -> None:
    """Say it for them."""
    for name in SILENT:
        app.extensions[name].parallel_read_safe = True


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", declare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
