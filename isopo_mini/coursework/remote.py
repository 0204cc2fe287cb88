"""What stands in the grader for an object of a submission, which lives in another process. See `submission`."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, runtime_checkable

Function = TypeVar("Function", bound=Callable[..., Any])


class SubmissionError(Exception):
    """What went wrong in the submission, in words."""


@runtime_checkable
class Process(Protocol):
    """Where such objects are."""

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function over there."""

    def attribute(self, remote: "Remote", name: str) -> Any:
        """Ask an object for an attribute."""


class Remote:
    """An object of a submission: it can be called, and asked for attributes.

    Args:
        process: where it is.
        start: which start of that process made it. After the next it is gone.
        number: what it is called over there.
        type_name: of what type it says that it is.
    """

    def __init__(self, process: Process, start: int, number: int, type_name: str) -> None:
        self.process, self.start, self.number, self.type_name = process, start, number, type_name

    def __repr__(self) -> str:
        return f"<{self.type_name} of the submission>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.process.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python itself asks for, to copy or to show an object
            raise AttributeError(name)
        return self.process.attribute(self, name)


def where_it_lives(function: Function) -> Function:
    """Make a function of the library run in the process of the submission whose objects it is given."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        remote = next((value for value in (*args, *kwargs.values()) if isinstance(value, Remote)), None)
        return function(*args, **kwargs) if remote is None else remote.process.call(run, args, kwargs)

    return run  # type: ignore[return-value]
