"""Pictures one can move: their still version, and the data from which the page's scripts draw the moving one.

Each function draws a still picture, for print and for Colab, and returns an `Explorable`, which a built page turns into
a picture that answers to mouse, finger and keyboard. The scripts are in `book/_static/explorables`. They compute again
what `simplex_steps` and `damping_numbers` compute here; a test holds the two together.
"""

from isopo_mini.explorables.damping import damping, damping_numbers
from isopo_mini.explorables.page import Explorable
from isopo_mini.explorables.simplex import simplex, simplex_paths, simplex_steps

__all__ = ["Explorable", "damping", "damping_numbers", "simplex", "simplex_paths", "simplex_steps"]
