"""One lock serves Python 3.11 to 3.14 on Linux, macOS on Arm and Windows; hashes go with it; it is written whole."""

import os
import re
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lock
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"requirements.txt": lock.BOOK, "requirements-models.txt": lock.MODELS}

SYSTEMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "linux-arm": {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": "aarch64",
    },
    "macos-arm": {
        "sys_platform": "darwin",
        "platform_system": "Darwin",
        "os_name": "posix",
        "platform_machine": "arm64",
    },
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}
CPYTHON = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
ENVIRONMENTS = {
    f"{system} {python}": {
        **CPYTHON,
        **markers,
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
    }
    for system, markers in SYSTEMS.items()
    for python in ("3.11.0", "3.11.14", "3.12.0", "3.13.0", "3.14.0")  # the oldest, and one of each
}


def lines(name: str) -> list[Requirement]:
    """The pins of a lock, without hashes."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line.removesuffix("\\")) for line in text.splitlines() if re.match(r"\w", line)]


def applies(requirement: Requirement, environment: dict[str, str], extras: frozenset[str] = frozenset()) -> bool:
    """Is it wanted there?"""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**environment, "extra": extra}) for extra in extras | {""})


def pins(name: str, environment: dict[str, str]) -> dict[str, str]:
    """The versions that pip installs there."""
    found = [requirement for requirement in lines(name) if applies(requirement, environment)]
    twice = [name for name, count in Counter(requirement.name for requirement in found).items() if count > 1]
    assert twice == []
    return {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in found}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_all_that_the_package_asks_for(name: str, environment: str) -> None:
    """And, as far as they are installed here, all that the packages in it ask for in turn."""
    where = ENVIRONMENTS[environment]
    locked = pins(name, where)
    asked = [(Requirement(line), frozenset[str]()) for line in lock.requirements()[name]]
    seen = set()
    while asked:
        requirement, extras = asked.pop()
        key = canonicalize_name(requirement.name)
        if not applies(requirement, where, extras) or re.match("nvidia-|cuda-|triton$", key):
            continue
        assert key in locked, f"{environment}: {requirement} is not in {name}"
        assert requirement.specifier.contains(locked[key], prereleases=True), f"{environment}: {requirement}"
        if (key, frozenset(requirement.extras)) in seen:
            continue
        seen.add((key, frozenset(requirement.extras)))
        try:
            installed = metadata.distribution(key)
        except metadata.PackageNotFoundError:
            continue  # of another system
        if installed.version == locked[key]:
            asked += [(Requirement(line), frozenset(requirement.extras)) for line in installed.requires or ()]
    assert len(seen) > len(lock.requirements()[name]) / 2


def test_the_walk_through_the_lock_notices_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENTS, "windows", ENVIRONMENTS["windows 3.13.0"])
    without = [requirement for requirement in lines("requirements.txt") if requirement.name != "colorama"]
    monkeypatch.setitem(globals(), "lines", lambda name: without)
    with pytest.raises(AssertionError, match=r"windows: colorama.* is not in requirements\.txt"):
        test_the_lock_has_all_that_the_package_asks_for("requirements.txt", "windows")


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_names_exact_public_versions(name: str) -> None:
    for requirement in lines(name):
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), requirement
    torch = [str(requirement) for requirement in lines(name) if requirement.name == "torch"]
    assert torch == [lock.TORCH]


def test_the_hashed_lock_is_the_lock_without_pytorch() -> None:
    """pip checks all or nothing, and another index has another file of PyTorch."""
    text = (ROOT / "requirements-hashed.txt").read_text(encoding="utf-8")
    others = [str(pin) for pin in lines("requirements.txt") if pin.name != "torch"]
    assert [str(pin) for pin in lines("requirements-hashed.txt")] == others
    blocks = re.findall(r"(?m)^\w.*(?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+$", text)
    assert len(blocks) == len(others)
    assert f"pip install {lock.TORCH}\n" in text


RESOLVED = """\
# note
attrs==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:cc
Attr-more==2.0
nvidia-nccl-cu12==2.1 ; sys_platform == 'linux' \\
    --hash=sha256:dd
torch==2.13.0+cpu \\
    --hash=sha256:ee
triton==3.0 ; sys_platform == 'linux'
"""


def test_the_lock_leaves_out_what_not_every_index_has() -> None:
    expected = "Attr-more==2.0\nattrs==1.0\ncolorama==0.4.6 ; sys_platform == 'win32'\ntorch==2.13.0\n"
    assert lock.locked(RESOLVED) == lock.BOOK + expected
    assert lock.hashed(RESOLVED) == lock.HASHED + (
        "Attr-more==2.0\n"
        "attrs==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n"
    )


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_lock_is_written_whole_and_twice_is_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    monkeypatch.setattr(lock, "requirements", lambda: {name: ["numpy"] for name in LOCKS})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="numpy==2.0.0\n"))
    expected = {name: header + "numpy==2.0.0\n" for name, header in LOCKS.items()}
    expected["requirements-hashed.txt"] = lock.HASHED + "numpy==2.0.0\n"
    for arguments in ([], ["--keep"]):
        lock.main(arguments)
        assert contents(tmp_path) == expected
    monkeypatch.setattr(os, "replace", interrupt)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="numpy==3.0.0\n"))
    with pytest.raises(KeyboardInterrupt):
        lock.main(["requirements.txt"])
    assert contents(tmp_path) == expected


def test_the_old_versions_are_handed_on_only_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    monkeypatch.setattr(lock, "requirements", lambda: {"requirements.txt": ["numpy"]})
    (tmp_path / "requirements.txt").write_text("numpy==1.0\n", encoding="utf-8")
    seen = []

    def resolve(wanted: list[str], old: str) -> str:
        seen.append((wanted, old))
        return "numpy==1.0\n"

    monkeypatch.setattr(lock, "resolve", resolve)
    lock.main(["--keep"])
    lock.main([])
    assert seen == [(["numpy"], "numpy==1.0\n"), (["numpy"], "")]
