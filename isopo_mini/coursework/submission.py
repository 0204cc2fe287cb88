"""A submission as the tests see it: names whose values live in a process of their own.

`Submission(cells)` is a mapping from names to values. A number or a tensor comes as it is, everything else as a
`Remote`: calling it, or asking for an attribute, happens over there. So a test is written once, `def test(f): assert
f(x) == …`, and runs in a student's notebook on the function itself and in the grader on its stand-in.

A call that takes too long, or ends the process, costs that call alone: the process is started anew and executes the
cells again, without those that did this.
"""

import contextlib
import os
import pickle
import select
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isopo_mini.coursework import messages
from isopo_mini.coursework.isolation import MEBIBYTE, ORDINARY, Guarded, Limits, most_processes
from isopo_mini.coursework.remote import Remote, SubmissionError
from isopo_mini.coursework.stopwatch import Stopwatch
from isopo_mini.coursework.worker import Held

RESTARTS = 12
ALL_SPENT = "the time of the whole submission is spent"
START_SECONDS = 120.0  # for Python and torch, on a busy machine; not the submission's time


class Submission:
    """The names that the cells of a notebook define.

    Args:
        cells: the source of each code cell.
        limits: what the process may use.
        hidden: folders it shall not see, such as those of the solutions and of other submissions.

    Use it in a `with` statement: at its end the process and its folder are gone.
    """

    def __init__(self, cells: Sequence[str], limits: Limits = ORDINARY, hidden: Sequence[Path] = ()) -> None:
        self.cells, self.limits, self.hidden = list(cells), limits, hidden
        self.noted: dict[str, Any] = {}  # what a test leaves here for the grader
        self.problems: list[str] = []  # what went wrong, by cell
        self.broken = ""  # what went wrong before any of it ran, so that no mark is fair
        self.spent = 0.0
        self._starts = 0
        self._forfeited: set[int] = set()  # cells that ended the process
        self._guarded: Guarded | None = None

    def __enter__(self) -> "Submission":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a name, as otter's tests ask for it; the default when there is none.

        What begins with `noted_` comes from the tests, and never from the submission.
        """
        if name.startswith("noted_"):
            return self.noted.get(name, default)
        value = self._ask(do="name", name=name)
        return default if value is None else value

    def __setitem__(self, name: str, value: Any) -> None:
        """Note something for the grader. The submission does not see it."""
        self.noted[name] = value

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function over there: one of the submission's objects, or a function of the library."""
        held = [value for value in (function, *args, *kwargs.values()) if isinstance(value, Remote)]
        if any(value.start != self._starts for value in held):
            raise SubmissionError("the process that had this object is gone")
        kwargs = {name: _sent(value) for name, value in kwargs.items()}
        return self._ask(do="call", function=_sent(function), args=tuple(map(_sent, args)), kwargs=kwargs)

    def attribute(self, remote: "Remote", name: str) -> Any:
        """An attribute of one of the submission's objects."""
        if remote.start != self._starts:
            raise SubmissionError("the process that had this object is gone")
        return self._ask(do="attribute", held=_sent(remote), name=name)

    def _ask(self, **question: Any) -> Any:
        """Put a question to a process that has executed the cells."""
        self._start()
        said = self._exchange(question)
        if "error" in said:
            raise SubmissionError(str(said["error"]))
        if "held" in said:
            return Remote(self, self._starts, int(said["held"]), str(said.get("type")))
        return said.get("data")

    def _start(self) -> None:
        """Start the process if it is not running, and execute the cells; again, without those that end it."""
        while self._guarded is None:
            if self.spent >= self.limits.seconds:
                raise SubmissionError(ALL_SPENT)
            if self._starts == RESTARTS:
                raise SubmissionError(f"its process ended {RESTARTS} times")
            self._starts += 1
            self._launch()
            try:
                self._exchange({"do": "ready"}, START_SECONDS)
            except SubmissionError as error:
                self.broken = f"the process for submissions did not start: {error}"
                raise
            first = self._starts == 1 + len(self._forfeited)
            for number, source in enumerate(self.cells, start=1):
                if number in self._forfeited:
                    continue
                try:
                    said = self._exchange({"do": "cell", "source": source, "number": number})
                    self._settle()
                except SubmissionError as error:
                    self._forfeited.add(number)
                    self.problems.append(f"cell {number}: {error}")
                    break
                if first and "error" in said:
                    self.problems.append(f"cell {number}: {said['error']}")

    def _settle(self) -> None:
        """What a cell has left running, and is too much, costs this cell and not a call that comes after it."""
        if self._guarded is not None and (excess := self._guarded.settled()):
            raise SubmissionError(self._stop(excess))

    def _launch(self) -> None:
        """A new process, which has executed nothing yet."""
        self._folder = tempfile.TemporaryDirectory(prefix="submission-", ignore_cleanup_errors=True)
        theirs_in, self._questions = os.pipe()
        self._answers, theirs_out = os.pipe()
        limits = self.limits
        numbers = (
            theirs_in,
            theirs_out,
            limits.memory,
            int(limits.seconds + START_SECONDS),  # the system's own end, for when the stopwatch has failed
            limits.disk // 2,
            most_processes(limits),
        )
        self._guarded = Guarded(
            "isopo_mini.coursework.worker",
            list(map(str, numbers)),
            Path(self._folder.name),
            limits,
            self.hidden,
            descriptors=(theirs_in, theirs_out),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._questions, False)

    def _stop(self, reason: str = "") -> str:
        """End the process, if there is one; why it ended."""
        if self._guarded is None:
            return reason
        guarded, self._guarded = self._guarded, None
        guarded.end(reason)
        for descriptor in (self._questions, self._answers):
            os.close(descriptor)
        self._folder.cleanup()
        return guarded.reason

    def _exchange(self, question: dict[str, Any], allowed: float | None = None) -> dict[str, Any]:
        """One question and its answer, or the end of the process and an error that says why.

        Args:
            question: see `worker`.
            allowed: seconds that are not counted; those of a call when None. See `stopwatch` for what they are.

        Raises:
            SubmissionError: the process is gone, took too long or answered what is no answer.
        """
        assert self._guarded is not None
        counted = allowed is None
        if counted and self.spent >= self.limits.seconds:  # what answers at once would still get through
            raise SubmissionError(self._stop(ALL_SPENT))
        allowed = min(self.limits.call_seconds, self.limits.seconds - self.spent) if allowed is None else allowed
        watch = Stopwatch(self._guarded, allowed)
        try:
            content = pickle.dumps(question)
            self._send(len(content).to_bytes(messages.HEAD, "big") + content, watch)
            size = messages.length(self._receive(messages.HEAD, watch))
            if size > self.limits.answer:
                raise _EndedError(f"it returned more than {self.limits.answer / MEBIBYTE:.3g} MiB")
            answer = messages.unpacked(self._receive(size, watch))
        except (TimeoutError, EOFError, BrokenPipeError, ValueError, _EndedError) as error:
            self.spent += watch.seconds() * counted  # before it is gone, and its seconds with it
            whole = counted and self.spent >= self.limits.seconds
            took = f"it took more than {allowed:.3g} s" if not whole else ALL_SPENT
            said = took if isinstance(error, TimeoutError) else str(error)
            # A guard that ends it at this moment has the better reason, so nothing is said yet where it is just gone.
            gone = isinstance(error, EOFError | BrokenPipeError)
            reason = self._stop("" if gone else said) or "its process ended"
            raise SubmissionError(reason) from error
        self.spent += watch.seconds() * counted
        return answer

    def _send(self, content: bytes, watch: Stopwatch) -> None:
        """Write to the process, which may not read."""
        view = memoryview(content)
        while len(view):
            _wait((), (self._questions,), watch)
            view = view[os.write(self._questions, view) :]

    def _receive(self, size: int, watch: Stopwatch) -> bytes:
        """Read that many bytes from the process, which may never write them."""
        parts = []
        while size:
            _wait((self._answers,), (), watch)
            part = os.read(self._answers, min(size, MEBIBYTE))
            if not part:
                raise EOFError("its process ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class _EndedError(Exception):
    """The process is to be ended, for this reason."""


def _wait(reading: Sequence[int], writing: Sequence[int], watch: Stopwatch) -> None:
    """Wait until a pipe can be read from or written to.

    Raises:
        TimeoutError: the process has taken all of its time.
    """
    while not any(select.select(reading, writing, (), max(0.05, watch.left()))):
        if watch.left() <= 0:
            raise TimeoutError


def _sent(value: Any) -> Any:
    """What stands for a value in a question."""
    return Held(value.number) if isinstance(value, Remote) else value


def quietly(submission: Submission) -> list[str]:
    """Execute the cells now rather than at the first question; what went wrong."""
    with contextlib.suppress(SubmissionError):
        submission.get("__name__")
    return submission.problems
