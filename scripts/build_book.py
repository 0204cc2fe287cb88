"""Build the whole book, as strictly as possible, with as many chapters at a time as the machine has cores.

    python scripts/build_book.py

This is `jupyter-book build -W --keep-going --all .` and two things that the command line lacks: it hands Sphinx a
number of processes, and when the build fails it ends with what failed, which otherwise stands a thousand lines up.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# A warning or an error of Sphinx; what a kernel says of its own sockets is none.
TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL|SEVERE): |^\w*(Error|Exception)\b|\bExecutionError: ")

# Jupyter Book's own command line, with one argument more for Sphinx, in a process of its own. Sphinx would deal pages
# out by the dozen; one by one, a line is printed for each and the long chapters are shared better. What a cell in
# another process died of, Sphinx keeps in the error and does not print.
BUILD = """
import functools, sys
import jupyter_book.sphinx as builder
import sphinx.builders
from jupyter_book.cli.main import main
builder.build_sphinx = functools.partial(builder.build_sphinx, jobs=int(sys.argv.pop(1)))
sphinx.builders.make_chunks = lambda pages, processes, maxbatch=1: [[page] for page in pages]
try:
    main(["build", "-W", "--keep-going", "--all", *sys.argv[1:]])
except RuntimeError as error:
    sys.exit(getattr(error.__cause__, "traceback", str(error)))
"""


def trouble(lines: list[str]) -> list[str]:
    """The lines that say what is wrong, each once, in their order."""
    plain = [COLOUR.sub("", line).rstrip() for line in lines]
    return list(dict.fromkeys(line for line in plain if TROUBLE.search(line)))


def build(root: Path = ROOT, jobs: int | None = None) -> int:
    """Build the book under `root`, print what the build prints, and return its exit status."""
    command = [sys.executable, "-c", BUILD, str(jobs or os.cpu_count() or 1), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        print("\nThe book was not built. What went wrong:")
        print("\n".join(trouble(lines)) or "nothing that this script knows; see above")
    return process.returncode


if __name__ == "__main__":
    sys.exit(build())
