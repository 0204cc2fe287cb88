"""Build the whole book, as strictly as possible, with as many chapters at a time as the machine has cores.

    python scripts/build_book.py

This is `jupyter-book build -W --keep-going --all .` and three things that the command line lacks: it hands Sphinx a
number of processes; every chapter runs although another has failed; and a failed build ends with what failed, where,
both sides of the comparison, and the command that shows that one chapter again.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chapter_records
import yaml

ROOT = Path(__file__).resolve().parent.parent
RECORDS = Path("_build") / "claims"  # what this build's chapters claimed; the page of claims is made from it
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# A warning or an error of Sphinx.
TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL|SEVERE): |^\w*(Error|Exception)\b|\bExecutionError: ")
# What a kernel says of its own sockets is no concern of a reader; that a cell failed is told better below.
CHATTER = re.compile(r"^\[IPKernelApp\]|Kernel is running over TCP|^0\.00s - |^\s*$")
TOLD_BELOW = re.compile(r"Executing notebook failed: CellExecutionError|Notebook exception traceback saved")

# Jupyter Book's own command line, with two arguments more for Sphinx, in a process of its own. Sphinx would deal pages
# out by the dozen. To be read, and so executed, they are dealt out one by one: a line is printed for each and the long
# chapters are shared better. (To be written they stay in dozens: each new process has to load the highlighter again.)
# What a cell in another process died of, Sphinx keeps in the error and does not print. A failing cell is a warning, and
# so fails the build (-W) after all the others have run; the configuration, for whoever calls Jupyter Book itself, ends
# it at once.
BUILD = (
    chapter_records.NO_GRAMMAR
    + """
import functools, sys
from unittest import mock
import jupyter_book.sphinx as builder
from jupyter_book.cli.main import main
from sphinx.builders import Builder
plain = builder.build_sphinx
def build_sphinx(*args, confoverrides=None, **kwargs):
    confoverrides = {**(confoverrides or {}), "nb_execution_raise_on_error": False}
    return plain(*args, confoverrides=confoverrides, **kwargs)
builder.build_sphinx = functools.partial(build_sphinx, jobs=int(sys.argv.pop(1)))
one_by_one = mock.patch("sphinx.builders.make_chunks", lambda pages, processes: [[page] for page in pages])
Builder._read_parallel = one_by_one(Builder._read_parallel)
try:
    main(["build", "-W", "--keep-going", "--all", *sys.argv[1:]])
except RuntimeError as error:
    sys.exit(getattr(error.__cause__, "traceback", str(error)))
"""
)


def trouble(lines: list[str]) -> list[str]:
    """The lines that say what is wrong, each once, in their order, without those that are told otherwise."""
    plain = [COLOUR.sub("", line).rstrip() for line in lines]
    wrong = [
        line for line in plain if TROUBLE.search(line) and not CHATTER.search(line) and not TOLD_BELOW.search(line)
    ]
    return list(dict.fromkeys(wrong))


def build(root: Path = ROOT, jobs: int | None = None, options: Sequence[str] = (), records: Path | None = None) -> int:
    """Build the book under `root`, print what the build prints, and return its exit status.

    Args:
        root: the folder with `_config.yml` and `_toc.yml`.
        jobs: how many chapters at a time; as many as there are cores when None.
        options: further options of `jupyter-book build`.
        records: where the chapters' kernels write what they claim; `_build/claims` when None.
    """
    records = records or root / RECORDS
    shutil.rmtree(records, ignore_errors=True)
    jobs = jobs or os.cpu_count() or 1
    command = [sys.executable, "-c", BUILD, str(jobs), *options, str(root)]
    lines = []
    with (
        chapter_records.listening(records) as environment,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            cwd=root,
            env=with_threads(environment, jobs),
        ) as process,
    ):
        for line in process.stdout or ():
            if CHATTER.search(line) and line.strip():
                continue
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        print("\nThe book was not built. What went wrong:\n")
        failures = chapter_records.failure_report(chapter_records.read(records, root))
        others = "\n".join(trouble(lines))
        print("\n\n".join(part for part in (failures, others) if part) or "nothing that this script knows; see above")
    return process.returncode


def with_threads(environment: Mapping[str, str], jobs: int) -> dict[str, str]:
    """The environment with one thread a chapter where several run at a time, unless it says how many there are to be.

    Chapters that each take all cores wait for one another.
    """
    return ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}) | dict(environment)


def configuration(root: Path = ROOT) -> dict[str, Any]:
    """What `_config.yml` says, for a copy in another folder: those of the extensions are relative to the file."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    sphinx = config.setdefault("sphinx", {})
    sphinx["config"] = sphinx.get("config") or {}
    local = sphinx.get("local_extensions") or {}
    sphinx["local_extensions"] = {name: str((root / where).resolve()) for name, where in local.items()}
    return config


def say_what_the_screen_can() -> None:
    """Where output goes to a file on Windows, λ cannot be written; a question mark instead is no reason to stop."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


if __name__ == "__main__":
    say_what_the_screen_can()
    sys.exit(build())
