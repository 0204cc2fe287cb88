"""Programs with the former names run, and are told the new names."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

import isopo_mini
from isopo_mini import engine, geometry, old_names, rules, training


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """As in a process that has not imported them yet."""

    def forget() -> None:
        for name in old_names.NEW_NAMES:
            package, _, module = name.rpartition(".")
            sys.modules.pop(name, None)
            vars(sys.modules[package]).pop(module, None)

    forget()
    yield
    forget()


@pytest.mark.parametrize(("old", "new"), old_names.NEW_NAMES.items())
def test_is_the_module_itself_and_says_where_it_is(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert (module.__name__, importlib.util.find_spec(new)) == (new, module.__spec__)


def test_lines_that_the_documentation_had() -> None:
    with pytest.warns(DeprecationWarning, match="isopo_mini.engine"):
        from isopo_mini.geometry.layerwise import NTK, FisherNormalized, Isopo, gram_matrices, register, verify
    with pytest.warns(DeprecationWarning, match="isopo_mini.rules"):
        from isopo_mini.training.update_rules import ClippedSurrogate, NtkIsopo, Reinforce, TrustRegion
    assert (NTK, FisherNormalized, Isopo) == (engine.NTK, engine.FisherNormalized, engine.Isopo)
    assert (gram_matrices, register, verify) == (engine.gram_matrices, engine.register, engine.verify)
    assert (ClippedSurrogate, NtkIsopo) == (rules.ClippedSurrogate, rules.NtkIsopo)
    assert (Reinforce, TrustRegion) == (rules.Reinforce, rules.TrustRegion)


def test_as_an_attribute_of_its_room() -> None:
    with pytest.warns(DeprecationWarning, match="isopo_mini.engine"):
        assert geometry.layerwise.Isopo is engine.Isopo
    with pytest.warns(DeprecationWarning, match="isopo_mini.experiments.records"):
        assert training.records.load_records is isopo_mini.experiments.records.load_records


@pytest.mark.parametrize("name", ["nothing", "command", "engine"])
def test_what_never_was_there_is_not_there(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(training, name)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"isopo_mini.training.{name}")


def test_the_command_under_its_old_name() -> None:
    command = [sys.executable, "-W", "always", "-m", "isopo_mini.training.experiments", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: python -m isopo_mini.experiments ")
    assert "DeprecationWarning: python -m isopo_mini.training.experiments is now" in result.stderr
