"""A figure becomes a drawing where that is the smaller file, and else a picture with twice the pixels."""

import re
import struct
from types import SimpleNamespace

import crisp_figures
import numpy as np
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def line(points: int) -> Figure:
    """A figure of 4 × 3 inches at 100 dots an inch."""
    figure = Figure(figsize=(4, 3), dpi=100)
    noise = np.random.default_rng(0).normal(size=(2, points))
    figure.add_subplot().scatter(*noise, s=1)
    return figure


def test_few_points_are_a_drawing_of_the_same_size() -> None:
    mime, drawing = crisp_figures.smaller(line(20))
    assert mime == "image/svg+xml"
    assert isinstance(drawing, str)
    width, height = map(int, re.search(r'<svg[^>]*width="(\d+)" height="(\d+)"', drawing).groups())
    assert abs(width - 400) < 40  # IPython cuts or adds at the margins
    assert abs(height - 300) < 40
    assert crisp_figures.smaller(line(20)) == (mime, drawing)  # nothing in it changes from build to build


def test_many_points_are_a_picture_with_twice_the_pixels() -> None:
    mime, picture = crisp_figures.smaller(line(20_000))
    assert mime == "image/png"
    assert isinstance(picture, bytes)
    assert picture.startswith(SIGNATURE)
    (width,) = struct.unpack(">I", picture[16:20])
    assert abs(width - 800) < 100  # likewise


def test_a_notebook_gets_one_format_of_each_figure() -> None:
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    shell.display_formatter.active_types = ["image/png", "image/svg+xml"]
    crisp_figures.choose(shell)
    for points, mime in ((20, "image/svg+xml"), (20_000, "image/png")):
        data, _ = shell.display_formatter.format(line(points))
        assert data.keys() - {"text/plain"} == {mime}
