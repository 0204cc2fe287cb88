"""Every shape in a signature is checked in every test: jaxtyping's import hook wraps the whole library.

Tests of bad input use the `unchecked` fixture, so that the library's own error is met and not the hook's.

`make test` runs them in as many processes as there are cores. So each has one thread, as has what it starts: more would
only wait for each other. What needs more sets it itself. And no example is too slow for Hypothesis, whose limits are in
seconds, since somebody else may be using the machine.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # asked for when numpy and PyTorch are loaded

import sys
from collections.abc import Iterator
from types import ModuleType

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# The hook takes its checker by name. This one accepts 1 where a float is expected, as type checkers do.
checker = ModuleType("checker_of_the_tests")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules[checker.__name__] = checker
install_import_hook("isopo_mini", "checker_of_the_tests.check")

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user meets: the library without the test suite's shape checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _same_seed_every_test() -> None:
    torch.manual_seed(0)
