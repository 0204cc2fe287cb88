"""What a cell hands to the page: a place for a moving picture, and the numbers that it starts from."""

import json
from typing import Any


class Explorable:
    """The last value of a cell whose still picture moves on the page of the book.

    On a page, a script finds the place by its `kind` and draws the moving picture there, from `data`. Where no script
    does, as in JupyterLab and Colab, the place says so, and the still picture above it stays.

    Args:
        kind: which picture, as the scripts in `book/_static/explorables` name it.
        says: one sentence on what moves.
        data: what it starts from: numbers, texts, and lists and dictionaries of them.
    """

    def __init__(self, kind: str, says: str, data: dict[str, Any]) -> None:
        self.kind = kind
        self.says = says
        self.data = data

    def _repr_html_(self) -> str:
        """The place, with the data as JSON: floats are written so that they are read back as the same floats."""
        data = json.dumps(self.data, allow_nan=False).replace("<", "\\u003c")  # no text can end the script
        return (
            f'<div class="explorable" data-explorable="{self.kind}">\n'
            f'<script type="application/json">{data}</script>\n'
            f"<p>{self}</p>\n</div>"
        )

    def __repr__(self) -> str:
        return f"On the page of the book this picture moves: {self.says}"
