"""One look for the whole book: a method has one colour and one line style in every chapter.

Only the book imports this file. Figures are drawn on white, so that they are right wherever a notebook is opened; on
the book's dark pages a style sheet turns light into dark and keeps the hues. Letters stay readable when a phone shows a
figure at half size.
"""

import re
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.quiver import Quiver
from numpy.typing import ArrayLike
from torch import Tensor

from isopo_mini.rules import ClippedSurrogate, rule_specs

SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2))

# Colours from Okabe & Ito and from Paul Tol's schemes, those with a contrast of 3:1 to white or more. Two methods
# with one line style differ in colour for readers with protanopia, deuteranopia and tritanopia as well.
METHODS: dict[str, tuple[str, Any]] = {
    "REINFORCE": ("#000000", SOLID),
    "Natural gradient": ("#0072B2", SOLID),
    "ISOPO (Fisher)": ("#D55E00", SOLID),
    "ISOPO (NTK)": ("#009E73", SOLID),
    "ISOPO (NTK, sketched)": ("#225555", DOTTED),
    "ISOPO (NTK, natural)": ("#905184", SOLID),
    "Layer scale": ("#5566DD", DOTTED),
    "TRPO": ("#997700", DOTTED),
    "PPO": ("#EE3377", DASHED),
    "GRPO": ("#6699CC", DASHED),
    "Dr. GRPO": ("#663333", DASHED),
    "CISPO": ("#332288", DASHED),
    "RLOO": ("#777777", DASH_DOT),
    "DAPO": ("#999933", DASH_DOT),
    "GSPO": ("#222255", DASH_DOT),
    "COPG": ("#7A4A21", DASH_DOT),
    "Rank one": ("#464CB3", DASH_DOT),
}
# What the experiments call by another word than the book: rules, and optimizers.
RULES = {"reinforce": "REINFORCE", "npg": "Natural gradient", "layer_scaled": "Layer scale", "trpo": "TRPO"}
RULES |= {"fisher": "ISOPO (Fisher)", "exact_fisher": "ISOPO (Fisher)", "ntk": "ISOPO (NTK)", "dr_grpo": "Dr. GRPO"}
RULES |= {"rank_one": "Rank one"}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adamw": "AdamW", "muon": "Muon"}

# The corners of the simplex of three actions: an equilateral triangle with side 1.
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])


def use_style() -> None:
    """Set matplotlib's defaults for a chapter. Called once, in its setup cell."""
    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 4.0),
            "figure.dpi": 150,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.dpi": 150,
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "axes.facecolor": "white",
            "axes.edgecolor": "#333333",
            "axes.labelcolor": "#111111",
            "text.color": "#111111",
            "xtick.color": "#333333",
            "ytick.color": "#333333",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=["#000000", "#0072B2", "#D55E00", "#009E73", "#EE3377", "#997700"]),
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.8,
            "lines.linewidth": 2.0,
            "font.size": 13,
            "axes.titlesize": 13,
            "axes.labelsize": 13,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
            "legend.fontsize": 12,
            "legend.frameon": False,
            "legend.handlelength": 2.6,  # long enough to tell the line styles apart
        }
    )


def method_of(rule: str, *, shape: bool = False) -> str:
    """The name in `METHODS` of the method that a rule is a member of.

    Args:
        rule: a specification, see `rule_specs`.
        shape: with its epochs × minibatches after the name of a clipped loss.

    Raises:
        ValueError: the rule is none; see `rule_specs.parse`.

    Example:
        >>> method_of("ntk:damping=3,scale=natural")
        'ISOPO (NTK, natural)'
        >>> method_of("ppo:epochs=1,minibatches=4", shape=True)
        'PPO 1 × 4'
    """
    name, options = rule_specs.parse(rule)
    if name == "ntk" and options.get("scale") == "natural":
        return "ISOPO (NTK, natural)"
    method = RULES.get(name, name.upper())
    named = rule_specs.RULES[name]
    if not shape or named.make is not ClippedSurrogate:
        return method
    options = {"minibatches": 1} | dict(named.defaults) | options
    return f"{method} {options['epochs']} × {options['minibatches']}"


def method_style(name: str) -> dict[str, Any]:
    """Keywords that draw a method as everywhere else: color, linestyle and label.

    Args:
        name: of `METHODS`; with a shape after it, such as "PPO 1 × 4", the method is drawn alike.

    Raises:
        ValueError: the method is not in `METHODS`.

    Example:
        >>> method_style("REINFORCE")
        {'color': '#000000', 'linestyle': '-', 'label': 'REINFORCE'}
    """
    method = re.sub(r" \d+ × \d+$", "", name)
    if method not in METHODS:
        raise ValueError(f"name: expected one of {', '.join(METHODS)}, got {name!r}")
    color, linestyle = METHODS[method]
    return {"color": color, "linestyle": linestyle, "label": name}


def line_with_interval(
    ax: Axes, x: ArrayLike, low: ArrayLike, middle: ArrayLike, high: ArrayLike, name: str, **options: Any
) -> Line2D:
    """Draw a method's curve with the band from `low` to `high` around it, all of length n.

    Args:
        ax: where to draw.
        x: n positions.
        low: n lower ends, for example of `bootstrap_interval`, which returns the three in this order.
        middle: the curve.
        high: n upper ends.
        name: the method, see `METHODS`.
        **options: for `ax.plot`; they win over the method's style.

    Returns:
        The line.

    Raises:
        ValueError: the method is unknown, or lengths differ.
    """
    arrays = [np.asarray(values, dtype=float) for values in (x, low, middle, high)]
    for label, values in zip(("low", "middle", "high"), arrays[1:], strict=True):
        if values.ndim != 1 or values.shape != arrays[0].shape:
            raise ValueError(f"{label}: expected shape {arrays[0].shape} as x has, got {values.shape}")
    (line,) = ax.plot(arrays[0], arrays[2], **(method_style(name) | options))
    ax.fill_between(arrays[0], arrays[1], arrays[3], color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def simplex_xy(probabilities: Tensor | ArrayLike) -> np.ndarray:
    """Where a policy over three actions lies in the triangle: xy = Σ_a π(a) corner_a.

    The map is linear, so it also takes directions (three numbers that sum to zero) to arrows.

    Args:
        probabilities: `(..., 3)`, tensor or array.

    Returns:
        `(..., 2)`: action 1 at the lower left, 2 at the lower right, 3 on top.

    Raises:
        ValueError: the last axis does not have three entries.
    """
    array = _array(probabilities)
    if array.ndim == 0 or array.shape[-1] != 3:
        raise ValueError(f"probabilities: expected shape (... 3), got {array.shape}")
    return array @ CORNERS


def simplex_axes(ax: Axes, labels: tuple[str, str, str] = ("arm 1", "arm 2", "arm 3")) -> Axes:
    """Turn axes into the empty triangle of all policies over three actions, its corners named."""
    outline = np.vstack([CORNERS, CORNERS[:1]])
    ax.plot(outline[:, 0], outline[:, 1], color="#333333", linewidth=1.2, zorder=1)
    for (x, y), label in zip(CORNERS, labels, strict=True):
        on_top = y > 0
        ax.text(x, y + (0.03 if on_top else -0.03), label, ha="center", va="bottom" if on_top else "top")
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_xlim(-0.12, 1.12)
    ax.set_ylim(-0.14, CORNERS[2, 1] + 0.12)
    return ax


def simplex_arrows(
    ax: Axes, probabilities: Tensor | ArrayLike, directions: Tensor | ArrayLike, *, longest: float = 0.1, **options: Any
) -> Quiver:
    """Draw how N policies over three actions move, as arrows in the triangle.

    Args:
        ax: from `simplex_axes`.
        probabilities: the policies, `(N, 3)`.
        directions: how each moves, `(N, 3)`; every row sums to zero, as changes of probabilities do.
        longest: length of the longest arrow, in sides of the triangle. Arrows keep their ratios.
        **options: for `ax.quiver`, for example `color`.

    Returns:
        The arrows.

    Raises:
        ValueError: shapes differ, or a direction leaves the simplex's plane.
    """
    start, arrow = simplex_xy(probabilities), simplex_xy(directions)
    if start.shape != arrow.shape or start.ndim != 2 or start.size == 0:
        raise ValueError(
            f"directions: expected shape (N 3) as probabilities has, N at least 1, got {_array(directions).shape} "
            f"and probabilities of shape {_array(probabilities).shape}"
        )
    sums = np.abs(_array(directions).sum(axis=1))
    lengths = np.linalg.norm(arrow, axis=1)
    if sums.max() > 1e-4 * max(1.0, lengths.max()):
        raise ValueError(f"directions: expected rows that sum to zero, got a sum of {sums.max():g}")
    scale = lengths.max() / longest if lengths.max() > 0 else 1.0
    style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": scale, "width": 0.006, "zorder": 2}
    return ax.quiver(start[:, 0], start[:, 1], arrow[:, 0], arrow[:, 1], **(style | options))


def _array(values: Tensor | ArrayLike) -> np.ndarray:
    """A numpy array of a tensor on any device, or of anything numpy takes."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
