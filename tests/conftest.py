"""Every shape in a signature is checked in every test: jaxtyping's import hook wraps the whole library.

Tests of bad input use the `unchecked` fixture, so that the library's own error is met and not the hook's.
"""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("isopo_mini", "beartype.beartype")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user meets: the library without the test suite's shape checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _same_seed_every_test() -> None:
    torch.manual_seed(0)
