"""The three assignments as otter makes them: once for all tests."""

from pathlib import Path

import pytest

MASTERS = Path(__file__).resolve().parent.parent.parent / "coursework"
NAMES = sorted(path.stem for path in MASTERS.glob("*.ipynb"))


@pytest.fixture(scope="session")
def assigned():
    """What otter makes of each master, by name."""
    pytest.importorskip("otter")
    from isopo_mini.coursework import handing_out

    return {name: handing_out.assign(MASTERS / f"{name}.ipynb") for name in NAMES}
