"""May this state be released? And what must a person still do? `make release`

    python scripts/release.py               # everything, README's two commands in a fresh clone included: half an hour
    python scripts/release.py --skip-long   # without those two commands

It looks at the last commit and changes nothing but `_build/release`, where the packages are left that it has tried.
A release is a tag: the setup cells of the notebooks, and whoever installs by the README's line, fetch it by name.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import portable
import sync_address

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("make book", "make test")  # what the README says first
BESIDE = {
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "pyproject.toml",
    "setup.cfg",
}

# In a clean environment, away from the repository: every room opens, the data is there, and the README is true.
TRIAL = """
import importlib, pathlib, pkgutil, re, sys, warnings
import isopo_mini
readme, version, home = sys.argv[1:]
assert pathlib.Path(isopo_mini.__file__).is_relative_to(home), isopo_mini.__file__
assert isopo_mini.__version__ == version, isopo_mini.__version__
optional = ("isopo_mini.integrations", "isopo_mini.policies.pretrained", "isopo_mini.tasks.reasoning")
for module in pkgutil.walk_packages(isopo_mini.__path__, "isopo_mini."):
    if not module.name.startswith(optional) and not module.name.endswith("__main__"):
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # former names
            importlib.import_module(module.name)
from isopo_mini.experiments.setups import SETUPS
import torch
SETUPS["addition"].make(torch.device("cpu"))
namespace = {}
for block in re.findall(r"(?ms)^```python\\n(.*?)^```$", pathlib.Path(readme).read_text(encoding="utf-8")):
    exec(block, namespace)
"""


def run(command: list[str], where: Path, **options: object) -> subprocess.CompletedProcess:
    """Run a command and keep what it prints."""
    return subprocess.run(command, cwd=where, capture_output=True, encoding="utf-8", check=False, **options)  # type: ignore[call-overload]


def failed(what: str, done: subprocess.CompletedProcess) -> list[str]:
    """Nothing, or what failed and the end of what it said."""
    return [f"{what} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}"] if done.returncode else []


def git(root: Path, *words: str) -> list[str]:
    """The lines that git prints; none where it fails."""
    return run(["git", *words], root).stdout.splitlines()


def version_of(root: Path) -> str:
    """The version in `pyproject.toml`."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def check_address(root: Path) -> list[str]:
    """The project has an address of its own, and it stands everywhere."""
    try:
        url = sync_address.read_address(root).url
        found = [f"{path.relative_to(root)} has another address or version" for path in sync_address.differing(root)]
    except ValueError as error:
        return [str(error)]
    if "/OWNER/" in url:
        found.append(f"{url} in _config.yml still names OWNER: choose where the project is published")
    for remote in git(root, "remote", "get-url", "origin"):
        meant = sync_address.suggestion(remote).removeprefix("; write ")
        if meant and meant.lower() != url.lower():
            found.append(f"the remote origin is {meant}, and _config.yml says {url}")
    return found


def check_version(root: Path) -> list[str]:
    """The version is told everywhere, and the tag is free or here."""
    version, found = version_of(root), []
    source = (root / "isopo_mini" / "__init__.py").read_text(encoding="utf-8")
    if f'__version__ = "{version}"' not in source:
        found.append(f"isopo_mini/__init__.py has another version than pyproject.toml, {version}")
    sections = re.split(r"(?m)^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"))[1:]
    if sections and sections[0].startswith("Unreleased") and sections.pop(0).partition("\n")[2].strip():
        found.append(f"CHANGELOG.md has changes under Unreleased: put them under {version}, or raise the version")
    if not sections or sections[0].split()[0] != version:
        found.append(
            f"CHANGELOG.md: expected {version} as the last version, got {(sections or ['none'])[0].split()[0]}"
        )
    here, tag = git(root, "tag", "--points-at", "HEAD"), f"v{version}"
    if tag not in here and git(root, "tag", "--list", tag):
        found.append(f"the tag {tag} is at another commit: raise the version")
    if here and tag not in here:
        found.append(f"this commit has the tag {' '.join(here)}, and the version is {version}")
    return found


def check_tree(root: Path) -> list[str]:
    """What is looked at is what is tagged."""
    changed = git(root, "status", "--porcelain")
    return [f"not committed: {', '.join(line[3:] for line in changed)}"] if changed else []


def check_claims(root: Path) -> list[str]:
    """Every claim of the book has been measured on other processors and with other seeds."""
    new = portable.not_measured(root)
    again = f"python scripts/portable.py --update --chapters {' '.join(new)}"
    return [f"results/portability lacks claims of {len(new)} chapters: {again}"] if new else []


def check_packages(root: Path) -> list[str]:
    """The wheel and the source distribution carry the library, its data and its licence, and nothing else."""
    folder = root / "_build" / "release"
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as copy:  # of the commit: a build leaves folders behind
        run(["git", "clone", "--quiet", str(root), copy], root)
        done = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), copy], root)
    if done.returncode:
        return failed("building the packages", done)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    library = {name for name in git(root, "ls-files", "isopo_mini") if "__pycache__" not in name}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    information = {name for name in packed if ".dist-info/" in name}
    with tarfile.open(source) as archive:
        members = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    others = {name for name in members if not name.startswith("isopo_mini.egg-info/")}
    found = compared("the wheel", packed - information, library)
    found += compared("the source distribution", others, library | BESIDE)
    if not any(name.endswith("LICENSE") for name in information):
        found.append("the wheel: LICENSE is missing")
    found += [f"the library has no {name}" for name in ("isopo_mini/py.typed",) if name not in library]
    return found


def compared(what: str, got: set[str], expected: set[str]) -> list[str]:
    """What is missing and what is too much."""
    found = [f"{what}: {', '.join(sorted(expected - got))} missing"] if expected - got else []
    return found + ([f"{what}: {', '.join(sorted(got - expected))} should not be in it"] if got - expected else [])


def check_import(root: Path) -> list[str]:
    """The wheel, installed with the locked versions of what it needs into an empty environment, works."""
    (wheel,) = (root / "_build" / "release").glob("*.whl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        run([sys.executable, "-m", "venv", "venv"], folder)
        python = str(folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = run([*pip, "--constraint", str(root / "requirements.txt"), str(wheel)], folder)
        return failed("installing the wheel", done) or tried(python, root, folder)


def tried(python: str, root: Path, home: Path, **environment: str) -> list[str]:
    """Whether the package that lies in `home` does what README says, with no other in sight."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    command = [python, "-c", TRIAL, str(root / "README.md"), version_of(root), str(home)]
    return failed("trying the wheel in a clean environment", run(command, home, env=clean))


def check_commands(root: Path) -> list[str]:
    """What the README says to type, in a fresh clone."""
    readme, found = (root / "README.md").read_text(encoding="utf-8"), []
    # Not as a part of `make release`: a make inside of another speaks of folders, and takes its options.
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    with tempfile.TemporaryDirectory() as clone:
        run(["git", "clone", "--quiet", str(root), clone], root)
        for command in COMMANDS:
            if command not in readme:
                found.append(f"README.md does not say {command}")
            found += failed(command, run(command.split(), Path(clone), env=alone))
    return found


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_address,
    check_version,
    check_tree,
    check_claims,
    check_packages,
    check_import,
)


def left_to_do(root: Path) -> str:
    """What no script can do."""
    tag = f"v{version_of(root)}"
    return f"""What is left to a person:
  1. Read the section of CHANGELOG.md as somebody who has the version before.
  2. git tag --annotate {tag} --message {tag}
     git push origin HEAD {tag}
     From then on the first cell of every notebook fetches {tag}. Open one in Colab and run it.
  3. Once, in the repository's settings: "GitHub Actions" as the source of Pages; and, to spare downloads, the variable
     PIP_EXTRA_INDEX_URL with an index that has CPU builds of PyTorch."""


def main(given: list[str] | None = None, root: Path = ROOT) -> int:
    """Check, say what is wrong or left to do; the exit status is 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-long", action="store_true", help="do not try README's two commands")
    arguments = parser.parse_args(given)
    checks = CHECKS if arguments.skip_long else (*CHECKS, check_commands)
    wrong = False
    for check in checks:
        if check is check_import and not list((root / "_build" / "release").glob("*.whl")):
            continue  # said already
        print(f"{(check.__doc__ or '').strip()}", flush=True)
        for complaint in check(root):
            wrong = True
            print(f"  ! {complaint}", flush=True)
    if arguments.skip_long:
        print(f"Not tried: {' and '.join(COMMANDS)} in a fresh clone.")
    print("\nNot yet: see the lines with ! above." if wrong else "\n" + left_to_do(root))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
