"""Renew the locks: `make lock`. One resolution for Python 3.11 and newer on Linux, macOS and Windows.

    python scripts/lock.py                                  # all of them, with the newest versions that fit
    python scripts/lock.py --keep                           # only what pyproject.toml asks for anew
    python scripts/lock.py requirements.txt                 # some of them

`requirements.txt` is what the book is built with, `requirements-models.txt` what the tests with transformers, peft, trl
and a real language model run with (`make models`), `requirements-course.txt` the coursework (`make course`). For each,
uv in a throwaway environment resolves the minimum versions of `pyproject.toml`; what only one system needs has a marker
that says so.

Two things are left out: local version suffixes such as `+cpu`, which only some package indexes offer; and NVIDIA's and
Triton's packages, more than two gigabytes, which PyTorch brings along where its build is for CUDA.

`requirements-hashed.txt` is `requirements.txt` with the hashes of every file, for whoever wants downloads checked. pip
checks all or nothing, and PyTorch has other files on other indexes, so PyTorch is the one package that is not in it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
OLDEST = "3.11"

HEADER = """\
# The exact versions that {purpose}. Written by `make lock` (scripts/lock.py); do not edit.
# The package itself asks only for the minimum versions in pyproject.toml.
"""
BOOK = HEADER.format(purpose="the book is built and tested with")
COURSE = HEADER.format(purpose="the coursework is made, graded and tested with")
MODELS = HEADER.format(purpose="the tests with transformers, peft, trl and a language model run with")
HASHED = f"""\
# requirements.txt with hashes and without PyTorch. Written by `make lock` (scripts/lock.py); do not edit.
#     python -m pip install --require-hashes --requirement requirements-hashed.txt
#     python -m pip install {TORCH}
"""
HEADERS = {"requirements-models.txt": MODELS, "requirements-course.txt": COURSE}
# What the tests with other people's models need of the extra `dev`.
TESTING = ("pytest", "hypothesis", "beartype")


def pinned(resolved: str) -> dict[str, list[str]]:
    """What uv printed, without what is left out: each pin (with its marker, where it has one) and its hashes."""
    pins: dict[str, list[str]] = {}
    for line in resolved.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        match = re.fullmatch(r"([\w.-]+)==([^+\s]+)(?:\+\S+)?(\s*;.+)?", requirement)
        if match is None:
            continue  # a comment, or something that is not from an index
        name, version, marker = match.groups(default="")
        if not re.match(r"(?i)nvidia-|cuda-|triton$", name):
            pins[f"{name}=={version}{marker}"] = hashes
    return dict(sorted(pins.items(), key=lambda pin: pin[0].lower().partition("==")))


def locked(resolved: str, header: str = BOOK) -> str:
    """The text of a lock for what uv printed."""
    return header + "".join(f"{pin}\n" for pin in pinned(resolved))


def hashed(resolved: str) -> str:
    """The same with hashes, and without PyTorch."""
    pins = {pin: hashes for pin, hashes in pinned(resolved).items() if not pin.startswith("torch==")}
    return HASHED + "".join(" \\\n    --hash=".join([pin, *hashes]) + "\n" for pin, hashes in pins.items())


def requirements() -> dict[str, list[str]]:
    """What `pyproject.toml` asks for, by the name of the lock, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    always, extras = project["dependencies"], project["optional-dependencies"]
    testing = [line for line in extras["dev"] if re.match(r"[\w-]+", line)[0] in TESTING]  # type: ignore[index]
    return {
        "requirements.txt": [*always, *extras["book"], *extras["dev"]],
        "requirements-models.txt": [*always, *extras["models"], *extras["trl"], *extras["language"], *testing],
        "requirements-course.txt": [*always, *extras["coursework"], *testing],
    }


def resolve(wanted: list[str], old: str = "") -> str:
    """What uv finds for all systems at once, with hashes; versions of the old lock are kept where they still fit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wanted.in").write_text("\n".join([TORCH, *wanted]), encoding="utf-8")
        (folder / "lock.txt").write_text(old, encoding="utf-8")
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = str(folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True)
        # One version of a package for all systems, rather than the newest that each of them could have.
        options = ["--universal", "--python-version", OLDEST, "--fork-strategy", "fewest", "--generate-hashes"]
        options += ["--no-header", "--no-annotate", "--output-file", "lock.txt"]
        command = [python, "-m", "uv", "pip", "compile", "wanted.in", *options]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, encoding="utf-8").stdout


def main(given: list[str]) -> None:
    """Resolve and write each lock, or those that are named."""
    wanted = requirements()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="LOCK", help=f"{' or '.join(wanted)}; all when left out")
    parser.add_argument("--keep", action="store_true", help="keep the versions that still fit")
    arguments = parser.parse_args(given)
    if unknown := set(arguments.names) - set(wanted):
        parser.error(f"expected {' or '.join(wanted)}, got {' '.join(sorted(unknown))}")
    for name in arguments.names or wanted:
        old = (ROOT / name).read_text(encoding="utf-8") if arguments.keep else ""
        resolved = resolve(wanted[name], old)
        write_whole(ROOT / name, locked(resolved, HEADERS.get(name, BOOK)))
        if name == "requirements.txt":
            write_whole(ROOT / "requirements-hashed.txt", hashed(resolved))
        print(f"{name}: {len(pinned(resolved))} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
