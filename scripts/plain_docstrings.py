"""A Sphinx extension that lets docstrings be written as they read best in the source.

Sphinx takes docstrings for reStructuredText, where a lone `|` or a trailing underscore is markup, a single backquote
is not code, and an indented line is a quotation. Ours are plain text with Markdown's backquotes. What Google's style
gives a meaning to (`Args:`, `Returns:`, …) is left to `sphinx.ext.napoleon`, which runs after this.
"""

import re
from typing import Any

CODE = re.compile(r"(`+[^`]+`+)")


def to_restructured(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText: `code` as ``code``, specials escaped, indented blocks literal."""
    result: list[str] = []
    block: int | None = None  # the indentation of the literal block or example we are in, which is copied as it is
    text = ""  # the last line that was not empty
    for line, previous in zip(lines, ["", *lines], strict=False):
        indent = len(line) - len(line.lstrip())
        if line.strip():
            if block is not None and indent < block:
                block = None
            if block is None and line.lstrip().startswith(">>>"):
                block = indent
            if block is None and indent and not previous.strip() and text and not text.startswith(" "):
                block = indent
                result += ["::", ""]
            text = line
        result.append(line if block is not None else escaped(line))
    return result


def escaped(line: str) -> str:
    """One line of text with its code in double backquotes and what is no markup kept from being taken for it."""
    pieces = CODE.split(line)
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = f"``{piece.strip('`')}``"
        else:
            piece = re.sub(r"\||(?<=\w)_(?!\w)", r"\\\g<0>", piece)
            pieces[index] = re.sub(r"(_\w+)'", r"\1\\'", piece)  # the prime of s' is no closing quote
    return "".join(pieces)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx hands every docstring to this, as lines to be changed in place."""
    lines[:] = to_restructured(lines)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx. Napoleon has priority 500; a lower number goes first."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
