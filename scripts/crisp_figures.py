"""Figures that are sharp on every screen: an IPython extension, loaded where the book is built.

A figure goes into the page as a drawing (SVG) where that is the smaller file, and else as a picture with twice the
pixels that it is shown with. In a notebook that somebody opens, figures stay what matplotlib makes of them.
"""

import re
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from IPython.core.pylabtools import print_figure

if TYPE_CHECKING:  # a kernel that draws nothing starts without matplotlib
    from matplotlib.figure import Figure

PNG, SVG = "image/png", "image/svg+xml"
SIZE = re.compile(r'width="([\d.]+)pt" height="([\d.]+)pt"')
POINTS = 72  # in an inch

_made: WeakKeyDictionary["Figure", tuple[str, str | bytes]] = WeakKeyDictionary()


def smaller(figure: "Figure") -> tuple[str, str | bytes]:
    """The figure's MIME type, and the figure as text of an SVG or as a PNG."""
    if figure not in _made:
        with sys.modules["matplotlib"].rc_context(
            {"svg.hashsalt": "isopo-mini"}
        ):  # the same drawing makes the same file
            drawing = print_figure(figure, fmt="svg", metadata={"Date": None})
        picture = print_figure(figure, fmt="png", dpi=2 * figure.dpi)
        shown = drawing is not None and (picture is None or len(drawing.encode()) < len(picture))
        _made[figure] = (SVG, with_pixels(drawing, figure.dpi)) if shown else (PNG, picture)
    return _made[figure]


def with_pixels(drawing: str, dpi: float) -> str:
    """An SVG that is shown as large as a picture of `dpi` dots an inch would be."""

    def size(match: re.Match[str]) -> str:
        width, height = (float(side) * dpi / POINTS for side in match.groups())
        return f'width="{width:.0f}" height="{height:.0f}"'

    return SIZE.sub(size, drawing, count=1)


def choose(shell: Any) -> None:
    """Let both formats ask for the smaller one; the other then leaves nothing. pyplot sets its own when imported."""
    if "matplotlib.figure" not in sys.modules:
        return
    from matplotlib.figure import Figure

    for mime in (PNG, SVG):
        formatter = shell.display_formatter.formatters[mime]
        formatter.for_type(Figure, lambda figure, mime=mime: dict([smaller(figure)]).get(mime))


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython when a kernel starts."""
    shell.events.register("pre_run_cell", lambda _: choose(shell))
