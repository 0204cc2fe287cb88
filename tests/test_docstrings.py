"""Docstrings: their examples run, their modules are on the API page, and the page reads them as they were meant."""

import doctest
import importlib
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path

import docutils.core
import pytest
from plain_docstrings import to_restructured
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "isopo_mini").rglob("*.py")
    if path.name != "__init__.py"
)

# On the page as a whole, with the names that they export.
PACKAGES = {"isopo_mini.engine", "isopo_mini.exercises", "isopo_mini.integrations", "isopo_mini.rules"}

# On the page in words, since they cannot be imported without what they integrate, and what that is.
OPTIONAL = {"isopo_mini.integrations.trl": "trl"}

# What other modules are made of: of use to whoever changes them, not to whoever calls them.
INTERNAL = {
    "isopo_mini.checks",
    "isopo_mini.coursework.__main__",
    "isopo_mini.coursework.grade_table",
    "isopo_mini.coursework.grading",
    "isopo_mini.coursework.handing_out",
    "isopo_mini.coursework.isolation",
    "isopo_mini.coursework.messages",
    "isopo_mini.coursework.probes",
    "isopo_mini.coursework.remote",
    "isopo_mini.coursework.stopwatch",
    "isopo_mini.coursework.submission",
    "isopo_mini.coursework.worker",
    "isopo_mini.engine.across_ranks",
    "isopo_mini.engine.attention_handler",
    "isopo_mini.engine.blocks",
    "isopo_mini.engine.convolution_handlers",
    "isopo_mini.engine.copies",
    "isopo_mini.engine.fallback",
    "isopo_mini.engine.graph",
    "isopo_mini.engine.handlers",
    "isopo_mini.engine.in_place",
    "isopo_mini.engine.grams_alone",
    "isopo_mini.engine.isopo",
    "isopo_mini.engine.layer_functions",
    "isopo_mini.engine.layer_gradients",
    "isopo_mini.engine.loss_scale",
    "isopo_mini.engine.microbatch",
    "isopo_mini.engine.moving_averages",
    "isopo_mini.engine.parameter_gradients",
    "isopo_mini.engine.path_costs",
    "isopo_mini.engine.resources",
    "isopo_mini.engine.places",
    "isopo_mini.engine.product_handlers",
    "isopo_mini.engine.recurrent_handlers",
    "isopo_mini.engine.recurrent_modules",
    "isopo_mini.engine.reports",
    "isopo_mini.engine.segments",
    "isopo_mini.engine.sequence_axis",
    "isopo_mini.engine.sharded",
    "isopo_mini.engine.stand_in",
    "isopo_mini.engine.transforms",
    "isopo_mini.engine.verification",
    "isopo_mini.engine.workspace",
    "isopo_mini.experiments.__main__",
    "isopo_mini.exercises.beyond",
    "isopo_mini.exercises.bug_hunts",
    "isopo_mini.exercises.checker",
    "isopo_mini.exercises.comparing",
    "isopo_mini.exercises.exercise",
    "isopo_mini.exercises.experiments",
    "isopo_mini.exercises.foundations",
    "isopo_mini.exercises.hints",
    "isopo_mini.exercises.isopo",
    "isopo_mini.exercises.neighbours",
    "isopo_mini.experiments.families",
    "isopo_mini.experiments.leases",
    "isopo_mini.experiments.record_files",
    "isopo_mini.explorables.damping",
    "isopo_mini.explorables.page",
    "isopo_mini.explorables.simplex",
    "isopo_mini.geometry.fisher_products",
    "isopo_mini.geometry.functional",
    "isopo_mini.geometry.ntk_solvers",
    "isopo_mini.geometry.positions",
    "isopo_mini.integrations.lm_head",
    "isopo_mini.objectives.bookkeeping",
    "isopo_mini.objectives.ratios",
    "isopo_mini.old_names",
    "isopo_mini.precision",
    "isopo_mini.rules.kl_steps",
    "isopo_mini.rules.old_policy",
    "isopo_mini.rules.protocol",
    "isopo_mini.rules.one_step",
    "isopo_mini.tasks.bandit_instances",
    "isopo_mini.tasks.lyapunov",
    "isopo_mini.writing",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    if name in {*OPTIONAL, "isopo_mini.integrations.lm_head"}:
        pytest.importorskip("trl")
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0


def test_every_public_module_is_on_one_of_the_api_pages() -> None:
    pages = sorted((ROOT / "book" / "appendix" / "api").glob("*.md"))
    page = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    listed = re.findall(r"automodule:: (\S+)", page)
    assert len(listed) == len(set(listed))  # none on two pages
    assert set(listed) == (set(MODULES) - INTERNAL - set(OPTIONAL)) | PACKAGES
    assert set(MODULES) >= INTERNAL | set(OPTIONAL)
    assert [name for name in OPTIONAL if f"## {name}" not in page] == []


@pytest.mark.parametrize(
    ("plain", "restructured"),
    [
        (["The `mask` of π(a|o)."], ["The ``mask`` of π(a\\|o)."]),
        (["Already ``code``, and `a|b`."], ["Already ``code``, and ``a|b``."]),
        (["*Stays* what it is, and so does log_probs."], ["*Stays* what it is, and so does log_probs."]),
        (["K_ss' is the policy's"], ["K_ss\\' is the policy's"]),
        (["A name_ alone."], ["A name\\_ alone."]),
        (["Use:", "", "    a = `b`|c", "", "After `d`."], ["Use:", "", "::", "", "    a = `b`|c", "", "After ``d``."]),
        (["Args:", "    a: the `b`."], ["Args:", "    a: the ``b``."]),
        (["Example:", "    >>> f('|')", "    '|'"], ["Example:", "    >>> f('|')", "    '|'"]),
        (["Args:", "    a: one.", "", "Then `b`."], ["Args:", "    a: one.", "", "Then ``b``."]),
    ],
)
def test_plain_docstring_becomes_restructured_text(plain: list[str], restructured: list[str]) -> None:
    assert to_restructured(plain) == restructured


def documented(name: str) -> Iterator[tuple[str, str]]:
    """The name and the docstring of a module, of what it defines, and of its classes' methods and properties."""
    module = importlib.import_module(name)
    pending = [(name, module)]
    while pending:
        path, thing = pending.pop()
        if text := inspect.getdoc(thing):
            yield path, text
        if inspect.ismodule(thing) or inspect.isclass(thing):
            members = {key: value for key, value in vars(thing).items() if not key.startswith("__")}
            mine = {key: getattr(value, "__func__", value) for key, value in members.items()}
            pending += [
                (f"{path}.{key}", value)
                for key, value in mine.items()
                if getattr(value, "__module__", name) == name and (callable(value) or isinstance(value, property))
            ]


def complaints(text: str) -> str:
    """What docutils says of a docstring as the API page reads it; nothing when it is well formed."""
    config = Config(napoleon_google_docstring=True, napoleon_numpy_docstring=False)
    restructured = str(GoogleDocstring(to_restructured(text.splitlines()), config))
    said = io.StringIO()
    docutils.core.publish_doctree(restructured, settings_overrides={"warning_stream": said, "report_level": 2})
    return said.getvalue()


@pytest.mark.parametrize("name", sorted(set(MODULES) - INTERNAL))
def test_docstrings_make_no_warning_on_the_api_page(name: str) -> None:
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    assert {path: said for path, text in documented(name) if (said := complaints(text))} == {}


def test_a_list_item_that_goes_on_in_a_returns_section_is_noticed() -> None:
    assert "unexpected" in complaints("Do.\n\nReturns:\n    - `a`: one; it\n      goes on.\n    - `b`: two.")
