"""Who does not use an integration needs none of what it integrates."""

import subprocess
import sys

import pytest

OTHERS = ("trl", "transformers", "accelerate", "peft", "datasets")


def loaded_by(statement: str) -> set[str]:
    """Which of the others a fresh interpreter has loaded after a statement."""
    program = f"{statement}\nimport sys\nprint(*[name for name in {OTHERS!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_the_room_of_integrations_loads_none_of_them() -> None:
    assert loaded_by("import isopo_mini.integrations") == set()


def test_the_integration_of_trl_loads_trl() -> None:
    """The test above can fail."""
    pytest.importorskip("trl")
    assert "trl" in loaded_by("import isopo_mini.integrations.trl")
