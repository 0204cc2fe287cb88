"""Renew `requirements.txt`, the full lock that the book is built with, and the two smaller ones: `make lock`.

`requirements-models.txt` is for the tests with transformers, peft, trl and a real language model (`make models`),
`requirements-course.txt` for the coursework (`make course`). For each, a throwaway environment resolves the minimum
versions of `pyproject.toml` to the newest ones that fit together. What pip then lists becomes the lock, with two things
left out: local version suffixes such as `+cpu`, which only some package indexes offer; and NVIDIA's and Triton's
packages, which PyTorch brings along where the platform has them.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"

HEADER = """\
# The exact versions that {purpose}. Written by `make lock` (scripts/lock.py); do not edit.
# The package itself asks only for the minimum versions in pyproject.toml.
"""
BOOK = HEADER.format(purpose="the book is built and tested with")
COURSE = HEADER.format(purpose="the coursework is made, graded and tested with")
MODELS = HEADER.format(purpose="the tests with transformers, peft, trl and a language model run with")
HEADERS = {"requirements-models.txt": MODELS, "requirements-course.txt": COURSE}
# What the tests with other people's models need of the extra `dev`.
TESTING = ("pytest", "hypothesis", "beartype")


def locked(frozen: str, header: str = BOOK) -> str:
    """The text of a lock for what `pip freeze` printed."""
    pins = {}
    for line in frozen.splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line.strip())
        if match is None:
            continue  # a comment, or something that is not from an index
        name, version = match.group(1), match.group(2)
        if re.match(r"(?i)nvidia-|cuda-|triton$", name):
            continue
        pins[name.lower()] = f"{name}=={version}"
    return header + "".join(f"{pins[name]}\n" for name in sorted(pins))


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


def main(names: list[str]) -> None:
    """Resolve, freeze, write each lock, or those that are named."""
    wanted = requirements()
    for name in names or wanted:
        write(name, wanted[name], HEADERS.get(name, BOOK))


def write(name: str, wanted: list[str], header: str) -> None:
    """One lock."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH, *wanted], check=True)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    text = locked(frozen, header)
    write_whole(ROOT / name, text)
    print(f"{name}: {len(text.splitlines()) - len(header.splitlines())} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
