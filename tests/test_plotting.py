"""One look for the book: colours that can be told apart, and pictures of policies in the right place."""

import itertools
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.figure import Figure

from isopo_mini import plotting
from isopo_mini.objectives.losses import LOSSES
from isopo_mini.plotting import METHODS
from isopo_mini.rules import optimizers, rule_specs

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {name: color for name, (color, _) in METHODS.items()}

# Colour vision deficiencies as matrices on linear RGB, severity 1: Machado, Oliveira & Fernandes (2009), table 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear_rgb(color: str) -> np.ndarray:
    """Undo the gamma of sRGB, as WCAG 2 defines relative luminance."""
    srgb = np.array(to_rgb(color))
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(linear: np.ndarray) -> np.ndarray:
    """Ottosson's OKLab: Euclidean distance is close to perceived difference; black to white is 1."""
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ linear.clip(0, 1))


def distance(a: str, b: str, vision: str) -> float:
    matrix = np.array(VISION[vision])
    return float(np.linalg.norm(oklab(matrix @ linear_rgb(a)) - oklab(matrix @ linear_rgb(b))))


DARK_PAGE = "#121212"
# hue-rotate(180deg) of CSS, which keeps a colour's luma: W3C, Filter Effects Module Level 1, section 8.4.
HALF_TURN = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])


def on_dark(color: str) -> str:
    """What book.css makes of a figure's colour on a dark page: inverted, hue turned back, and the page let through."""
    turned = (HALF_TURN @ (1 - np.array(to_rgb(color)))).clip(0, 1)
    return to_hex(1 - (1 - turned) * (1 - np.array(to_rgb(DARK_PAGE))))


def contrast(a: str, b: str) -> float:
    """WCAG 2.1's ratio (L1 + .05)/(L2 + .05) of relative luminances."""
    one, two = sorted(linear_rgb(color) @ [0.2126, 0.7152, 0.0722] for color in (a, b))
    return float((two + 0.05) / (one + 0.05))


@pytest.mark.parametrize("name", METHODS)
def test_contrast_on_a_light_and_on_a_dark_page(name: str) -> None:
    """WCAG 2.1, 1.4.11: graphics need a ratio of 3 against their background."""
    assert contrast(COLOURS[name], "white") >= 3.0
    assert contrast(on_dark(COLOURS[name]), DARK_PAGE) >= 3.0


def test_the_dark_page_is_met_by_the_figures_background() -> None:
    assert on_dark("white") == DARK_PAGE
    assert on_dark("black") == "#ffffff"
    style = (ROOT / "book" / "_static" / "book.css").read_text(encoding="utf-8")
    assert "filter: invert(1) hue-rotate(180deg);\n  mix-blend-mode: screen;" in style


def test_letters_are_readable_on_both_pages() -> None:
    """WCAG 2.1, 1.4.3: text needs a ratio of 4.5."""
    with mpl.rc_context():
        plotting.use_style()
        for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
            assert contrast(to_hex(mpl.rcParams[key]), "white") >= 4.5
            assert contrast(on_dark(to_hex(mpl.rcParams[key])), DARK_PAGE) >= 4.5


def test_the_measures_of_colour_know_black_and_white() -> None:
    assert linear_rgb("white") @ [0.2126, 0.7152, 0.0722] == pytest.approx(1.0)
    assert distance("black", "white", "normal") == pytest.approx(1.0, abs=1e-3)
    red_green = {vision: distance("#CC3311", "#5A7A00", vision) for vision in VISION}
    assert red_green["deuteranopia"] < 0.5 * red_green["normal"]  # what the simulation is there to catch


def test_every_method_has_its_own_colour_and_style() -> None:
    assert len(set(COLOURS.values())) == len(METHODS)
    assert len({(color, str(style)) for color, style in METHODS.values()}) == len(METHODS)
    for a, b in itertools.combinations(METHODS, 2):
        assert distance(COLOURS[a], COLOURS[b], "normal") > 0.07, (a, b)


@pytest.mark.parametrize("vision", VISION)
def test_methods_with_one_line_style_differ_in_colour_for_every_eye(vision: str) -> None:
    for (a, (color_a, style_a)), (b, (color_b, style_b)) in itertools.combinations(METHODS.items(), 2):
        if style_a == style_b:
            assert distance(color_a, color_b, vision) > 0.08, (a, b)
            assert distance(on_dark(color_a), on_dark(color_b), vision) > 0.075, (a, b)


def test_the_style_is_white_and_large() -> None:
    with mpl.rc_context():
        matplotlib.style.use("dark_background")
        plotting.use_style()
        for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor"):
            assert to_hex(mpl.rcParams[key]) == "#ffffff"
        for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
            assert np.max(to_rgb(mpl.rcParams[key])) < 0.3, key  # dark letters on that white
        for key in ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"):
            assert mpl.rcParams[key] >= 11
        assert not mpl.rcParams["savefig.transparent"]


def test_a_line_and_its_band_show_the_numbers() -> None:
    ax = Figure().add_subplot()
    x = np.arange(4)
    line = plotting.line_with_interval(ax, x, x - 1.0, 2.0 * x, 3.0 * x + 1, "GRPO", linewidth=1.0)
    assert np.array_equal(line.get_ydata(), 2.0 * x)
    assert (line.get_color(), line.get_label(), line.get_linewidth()) == (COLOURS["GRPO"], "GRPO", 1.0)
    band = ax.collections[0].get_paths()[0].vertices
    for t in x:
        heights = band[band[:, 0] == t, 1]
        assert (heights.min(), heights.max()) == (t - 1.0, 3.0 * t + 1)
    assert to_rgb(ax.collections[0].get_facecolor()[0][:3]) == to_rgba(COLOURS["GRPO"])[:3]


def test_simplex_coordinates() -> None:
    corners = plotting.simplex_xy(torch.eye(3, dtype=torch.float64))
    assert [np.linalg.norm(corners[i] - corners[j]) for i, j in ((0, 1), (1, 2), (2, 0))] == pytest.approx([1, 1, 1])
    centre = plotting.simplex_xy([1 / 3, 1 / 3, 1 / 3])
    assert [np.linalg.norm(centre - corner) for corner in corners] == pytest.approx([1 / np.sqrt(3)] * 3)
    # A direction is mapped as the difference of the two policies it connects.
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])
    assert plotting.simplex_xy(q - p) == pytest.approx(plotting.simplex_xy(q) - plotting.simplex_xy(p))


def test_arrows_start_at_the_policy_and_keep_their_ratios() -> None:
    ax = plotting.simplex_axes(Figure().add_subplot())
    policies = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]])
    directions = torch.tensor([[0.01, -0.01, 0.0], [0.0, 0.02, -0.02]])
    arrows = plotting.simplex_arrows(ax, policies, directions, longest=0.2)
    assert np.asarray(arrows.XY) == pytest.approx(plotting.simplex_xy(policies))
    # Drawn length = length / scale: .02 sides becomes .2 of a side, .01 becomes .1.
    assert np.hypot(arrows.U, arrows.V) / arrows.scale == pytest.approx([0.1, 0.2], rel=1e-5)
    assert [text.get_text() for text in ax.texts] == ["arm 1", "arm 2", "arm 3"]
    still = plotting.simplex_arrows(ax, policies, torch.zeros(2, 3))  # a policy at rest is legal
    assert np.isfinite(still.scale)


@pytest.mark.parametrize("rule", rule_specs.RULES)
def test_every_rule_has_a_name_and_a_look(rule: str) -> None:
    method = plotting.method_of(rule)
    assert plotting.method_style(method)["label"] == method
    with_shape = plotting.method_of(rule, shape=True)
    assert with_shape == method + " 4 × 1" * (rule in LOSSES and rule != "reinforce")
    assert plotting.method_style(with_shape) == plotting.method_style(method) | {"label": with_shape}


def test_optimizers_have_names() -> None:
    assert set(plotting.OPTIMIZERS) == set(optimizers.OPTIMIZERS)


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def test_unknown_method(self) -> None:
        with pytest.raises(ValueError, match=r"name: expected one of REINFORCE, .*, got 'ppo'"):
            plotting.method_style("ppo")
        with pytest.raises(ValueError, match=r"rule: expected one of reinforce, .*, got 'PPO'"):
            plotting.method_of("PPO")

    def test_lengths(self) -> None:
        ax = Figure().add_subplot()
        with pytest.raises(ValueError, match=r"high: expected shape \(3,\) as x has, got \(2,\)"):
            plotting.line_with_interval(ax, [1, 2, 3], [0, 0, 0], [1, 1, 1], [2, 2], "PPO")

    def test_simplex(self) -> None:
        ax = plotting.simplex_axes(Figure().add_subplot())
        with pytest.raises(ValueError, match=r"probabilities: expected shape \(\.\.\. 3\), got \(2,\)"):
            plotting.simplex_xy([0.5, 0.5])
        with pytest.raises(ValueError, match=r"directions: expected shape \(N 3\)"):
            plotting.simplex_arrows(ax, torch.eye(3), torch.zeros(2, 3))
        with pytest.raises(ValueError, match="directions: expected rows that sum to zero, got a sum of 1"):
            plotting.simplex_arrows(ax, torch.eye(3), torch.eye(3))
