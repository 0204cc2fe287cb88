"""Renew `requirements.txt`, the full lock that the book is built with: `make lock`.

A throwaway environment resolves the minimum versions of `pyproject.toml` to the newest ones that fit together.
What pip then lists becomes the lock, with two things left out: local version suffixes such as `+cpu`, which only
some package indexes offer; and NVIDIA's and Triton's packages, which PyTorch brings along where the platform has
them.
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
# The exact versions that the book is built and tested with. Written by `make lock` (scripts/lock.py); do not edit.
# The package itself asks only for the minimum versions in pyproject.toml.
"""


def locked(frozen: str) -> str:
    """The text of `requirements.txt` for what `pip freeze` printed."""
    pins = {}
    for line in frozen.splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line.strip())
        if match is None:
            continue  # a comment, or something that is not from an index
        name, version = match.group(1), match.group(2)
        if re.match(r"(?i)nvidia-|cuda-|triton$", name):
            continue
        pins[name.lower()] = f"{name}=={version}"
    return HEADER + "".join(f"{pins[name]}\n" for name in sorted(pins))


def requirements() -> list[str]:
    """What `pyproject.toml` asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *project["optional-dependencies"]["book"],
        *project["optional-dependencies"]["dev"],
    ]


def main() -> None:
    """Resolve, freeze, write."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH, *requirements()], check=True)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    text = locked(frozen)
    write_whole(ROOT / "requirements.txt", text)
    print(f"requirements.txt: {len(text.splitlines()) - len(HEADER.splitlines())} packages")


if __name__ == "__main__":
    main()
