"""The process in which a submission runs: it executes cells, then answers questions about what they defined.

    python -m isopo_mini.coursework.worker QUESTIONS ANSWERS MEMORY SECONDS DISK PROCESSES

with two file descriptors and four limits, which it puts on itself first. See `messages` for what is said and
`isolation` for what stands around it. No test and no right answer ever comes here, only the arguments of a call.
"""

import builtins
import importlib.machinery
import os
import pickle
import re
import select
import sys
import threading
import types
from typing import Any

import torch

from isopo_mini.coursework import messages

MAGIC = re.compile(r"(?m)^(\s*)[%!?].*$")


class Held:
    """Stands in a question for an object that has stayed here."""

    def __init__(self, number: int) -> None:
        self.number = number


class Worker:
    """A namespace like a notebook's, and the objects of it that the grader has been told of."""

    def __init__(self) -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.names = module.__dict__
        self.names["display"] = lambda *values, **options: None
        self.objects: list[Any] = []

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; what goes wrong is an answer too."""
        try:
            return self.described(getattr(self, f"do_{question.pop('do')}")(**question))
        except KeyboardInterrupt:
            return {"error": "KeyboardInterrupt"}
        except BaseException as error:  # SystemExit is no reason to stop either
            return {"error": f"{type(error).__name__}: {error}"[:2000]}

    def described(self, value: Any) -> dict[str, Any]:
        """A value, or the number under which it is kept."""
        try:
            return {"data": messages.as_data(value)}
        except messages.NotData:
            self.objects.append(value)
            return {"held": len(self.objects) - 1, "type": type(value).__name__, "callable": callable(value)}

    def do_ready(self) -> None:
        """Say that everything is loaded."""

    def do_cell(self, source: str, number: int) -> None:
        """Execute a cell; what only IPython understands is left out."""
        if source.lstrip().startswith("%%"):
            return
        plain = MAGIC.sub(r"\1pass", source)
        exec(compile(plain, f"<cell {number}>", "exec"), self.names)

    def do_name(self, name: str) -> Any:
        """The value of a global name; None when there is none, as otter has it."""
        return self.names.get(name)

    def do_attribute(self, held: Held, name: str) -> Any:
        """An attribute of an object."""
        return getattr(self.known(held), name)

    def do_call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call an object that is here, or a function of the library."""
        torch.manual_seed(0)
        args = tuple(map(self.known, args))
        return self.known(function)(*args, **{name: self.known(value) for name, value in kwargs.items()})

    def known(self, value: Any) -> Any:
        """The object, if a number stands for one."""
        return self.objects[value.number] if isinstance(value, Held) else value


def limit(memory: int, seconds: int, disk: int, processes: int) -> None:
    """Limits of this process and of all that it starts, as far as the system has them."""
    import resource

    wanted = {"RLIMIT_AS": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": disk, "RLIMIT_NPROC": processes}
    wanted |= {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}
    for name, value in wanted.items():
        which = getattr(resource, name)
        _, most = resource.getrlimit(which)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):  # macOS has no limit of address space
            continue


def without_otter() -> types.ModuleType:
    """What a notebook imports as otter: its checks do nothing here."""
    stub = types.ModuleType("otter")
    stub.__spec__ = importlib.machinery.ModuleSpec("otter", None)
    nothing = type("Notebook", (), {"__init__": lambda *_, **__: None, "__getattr__": lambda *_: lambda *_, **__: None})
    stub.Notebook = nothing  # type: ignore[attr-defined]
    return stub


def leave_with_the_grader(questions: int) -> None:
    """Wait until nobody holds the other end of the pipe, then end, whatever the submission is doing."""
    waiting = select.poll()
    waiting.register(questions, 0)  # its end alone
    waiting.poll()
    os._exit(0)


def main(questions: int, answers: int, memory: int, seconds: int, disk: int, processes: int) -> None:
    """Answer questions until there are no more."""
    torch.set_num_threads(1)
    sys.modules["otter"] = without_otter()
    builtins.input = lambda prompt="": ""
    limit(memory, seconds, disk, processes)
    threading.Thread(target=leave_with_the_grader, args=(questions,), daemon=True).start()
    worker, own = Worker(), os.getpid()
    with os.fdopen(questions, "rb") as incoming, os.fdopen(answers, "wb") as outgoing:
        while True:
            try:
                question = pickle.loads(messages.read(incoming))
            except EOFError:
                os._exit(0)  # without waiting for threads of the submission
            answer = messages.packed(worker.answer(question))
            if os.getpid() != own:
                os._exit(0)  # a fork that came back from the submission has no voice
            messages.write(outgoing, answer)


if __name__ == "__main__":
    # Not from this module, which is `__main__` and about to be the notebook: pickled questions name the other one.
    from isopo_mini.coursework import worker as importable

    importable.main(*map(int, sys.argv[1:]))
