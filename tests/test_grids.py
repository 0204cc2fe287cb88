"""The long comparisons are commands that the experiments understand, whatever it would take to run them."""

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import grids
import pytest

from isopo_mini.experiments.command import grid, parse_rules
from isopo_mini.rules.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_rule_is_searched_alike(name: str) -> None:
    one = grids.GRIDS[name]
    command = one.command(name)
    rules = command[command.index("--rules") + 1 : command.index("--search")]
    sizes, families = parse_rules(rules, [])
    assert set(families) == set(one.rules)
    for rule, members in families.items():
        assert {text.rpartition("/")[2] for text in members} == set(one.rules[rule].optimizers) <= set(OPTIMIZERS)
    for some in sizes.values():
        assert len(some) == grids.POINTS
        assert all(b / a == pytest.approx(one.factor, rel=1e-4) for a, b in itertools.pairwise(some))
    assert set(one.report) <= {"best", "all"} | set(sizes)
    assert grid(one.task, sizes, [0], steps=1), "settings that a run accepts"


def test_the_command_is_shown_without_being_run() -> None:
    command = [sys.executable, "scripts/grids.py", "addition_60", "--show"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown)[:4] == ["python", "-m", "isopo_mini.experiments", "addition"]
    assert shlex.split(shown)[-2:] == ["--out", "results/addition_60"]
