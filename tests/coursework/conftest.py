"""The three assignments as otter makes them: once for all tests."""

import pytest
from masters_here import MASTERS, NAMES


@pytest.fixture(scope="session")
def assigned():
    """What otter makes of each master, by name."""
    from isopo_mini.coursework import handing_out

    return {name: handing_out.assign(MASTERS / f"{name}.ipynb") for name in NAMES}
