"""Imports follow the data: task → Batch → advantages, geometry, engine → rule → loop → grid. None goes backwards."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "isopo_mini"
ROOMS = ("tasks", "policies", "geometry", "engine", "objectives", "rules", "training", "experiments", "integrations")

# What a room may import of the library, beside itself. `experiments` see all but `integrations`, which only other
# people's programs see; the others see what flows into them.
SHARED = {"batch", "checks", "precision", "writing"}
ALLOWED = {
    "tasks": SHARED | {"policies"},
    "policies": SHARED,
    "geometry": SHARED | {"old_names"},
    "objectives": SHARED | {"policies"},
    "engine": SHARED | {"geometry"},
    "rules": SHARED | {"policies", "geometry", "engine", "objectives"},
    "training": SHARED | {"policies", "rules", "old_names"},
    "experiments": SHARED | {*ROOMS, "__init__"} - {"integrations"},
    "integrations": SHARED | set(ROOMS),
    "coursework": SHARED | {*ROOMS, "__init__"} - {"integrations"},
    "batch": {"checks"},
    "checks": set(),
    "old_names": set(),
    "precision": set(),
    "writing": set(),
    "plotting": SHARED | set(ROOMS) - {"integrations"},
    "explorables": SHARED | {"plotting", *ROOMS} - {"integrations"},
    "exercises": SHARED | set(ROOMS) - {"integrations"},
    "__init__": SHARED | {*ROOMS, "old_names"} - {"integrations"},
}


def imported(source: str, package: str) -> set[str]:
    """The parts of `isopo_mini` that a module's text imports, anywhere in it; `package` resolves relative imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "isopo_mini" else [base]
        found |= {module.split(".")[1] for module in modules if module.startswith("isopo_mini.")}
    return found


def part_of(path: Path) -> str:
    """`geometry` for isopo_mini/geometry/gram.py, `batch` for isopo_mini/batch.py."""
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_module_imports_only_what_flows_into_it(path: Path) -> None:
    package = ".".join(path.relative_to(LIBRARY.parent).parent.parts)
    part = part_of(path)
    backwards = imported(path.read_text(encoding="utf-8"), package) - {part} - ALLOWED[part]
    assert not backwards, f"{part} must not import {', '.join(sorted(backwards))}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import isopo_mini.training.loop", {"training"}),
        ("from isopo_mini import checks, plotting", {"checks", "plotting"}),
        ("from isopo_mini.tasks.bandit import Bandit", {"tasks"}),
        ("from ..tasks import bandit", {"tasks"}),
        ("from . import gram", {"geometry"}),
        ("def f():\n    from isopo_mini.training import loop", {"training"}),
        ("import torch\nfrom collections import abc", set()),
    ],
)
def test_every_way_of_importing_is_seen(source: str, expected: set[str]) -> None:
    assert imported(source, "isopo_mini.geometry") == expected
