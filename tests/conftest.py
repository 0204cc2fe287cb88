"""Every shape in a signature is checked in every test: jaxtyping's import hook wraps the whole library.

Tests of bad input use the `unchecked` fixture, so that the library's own error is met and not the hook's.

`make test` runs them in as many processes as there are cores. So each has one thread, as has what it starts: more would
only wait for each other. What needs more sets it itself. And no example is too slow for Hypothesis, whose limits are in
seconds, since somebody else may be using the machine.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # asked for when numpy and PyTorch are loaded

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, get_args, get_origin

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  # what for is said in scripts/chapter_records.py

_written = beartype(conf=BeartypeConf(is_pep484_tower=True))  # accepts 1 where a float is expected, as type checkers do
_checks: dict[Any, Callable[..., Any]] = {}


def told(hint: Any) -> Any:
    """What a hint says, so that two that say the same are equal; those of arrays are another class each time."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype, hint.array_type, hint.dim_str
    parts = hint if isinstance(hint, list) else get_args(hint)  # a list: of the arguments of a Callable
    return (get_origin(hint), *map(told, parts)) if parts or isinstance(hint, list) else hint


def check(signature: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a signature: beartype writes it once for all functions that are defined inside of one function.

    The hook gives what it checks as an empty function with the signature of the real one. It does so whenever a `def`
    is reached, for one inside of another at every call, and to write a check takes longer than what most of them do.
    A signature with defaults gets a check of its own, which would else keep alive what its defaults hold.
    """
    if "<locals>" not in signature.__qualname__ or signature.__defaults__ or signature.__kwdefaults__:
        return _written(signature)
    code, hints = signature.__code__, tuple((name, told(hint)) for name, hint in signature.__annotations__.items())
    arguments = (code.co_varnames, code.co_posonlyargcount, code.co_argcount, code.co_kwonlyargcount, code.co_flags)
    key = (signature.__module__, signature.__qualname__, arguments, hints)
    if key not in _checks:
        _checks[key] = _written(signature)
    return _checks[key]


# The hook takes its checker by name.
checker = ModuleType("checker_of_the_tests")
checker.check = check  # type: ignore[attr-defined]
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
