"""The project's address is that of a page, reaches every file whole, and twice is once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sync_address
import yaml
from sync_address import Address
from whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "url", ["https://github.com/me/fork", "https://github.com/me-2/the.fork_1", "https://github.com/me/git"]
)
def test_colab_opens_the_notebook_of_this_repository(url: str) -> None:
    found = Address(url, "main", "0.1.0").colab("book/index.ipynb")
    owner_and_name = url.removeprefix("https://github.com/")
    assert found == f"https://colab.research.google.com/github/{owner_and_name}/blob/main/book/index.ipynb"


@pytest.mark.parametrize(
    ("url", "suggested"),
    [
        ("https://github.com/me/fork.git", "; write https://github.com/me/fork"),
        ("git@github.com:me/fork.git", "; write https://github.com/me/fork"),
        ("ssh://git@github.com/me/fork.git", "; write https://github.com/me/fork"),
        ("http://github.com/me/fork", "; write https://github.com/me/fork"),
        ("https://www.github.com/me/fork/", "; write https://github.com/me/fork"),
        ("https://github.com/me/fork/tree/main", ""),
        ("https://github.com/me", ""),
        ("https://gitlab.com/me/fork", ""),  # Colab opens nothing from there
        ("", ""),
    ],
)
def test_the_address_of_a_clone_is_refused(url: str, suggested: str) -> None:
    with pytest.raises(ValueError) as caught:
        Address(url, "main", "0.1.0")
    expected = "repository.url of _config.yml: expected https://github.com/OWNER/NAME, as a browser shows it"
    assert str(caught.value) == f"{expected}, got {url!r}{suggested}"


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A copy of what the script writes, under another address."""
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "book/index.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    state(tmp_path, "https://github.com/me/fork")
    return tmp_path


def state(folder: Path, url: str, branch: str = "main") -> None:
    """Say in `_config.yml` where the project is."""
    (folder / "_config.yml").write_text(
        yaml.safe_dump({"repository": {"url": url, "branch": branch}}), encoding="utf-8"
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_twice_is_once(fork: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync_address.main(["--check"], fork) == 1
    assert "README.md: not in step" in capsys.readouterr().out
    states = []
    for _ in range(2):
        assert sync_address.main([], fork) == 0
        states.append(contents(fork))
    assert states[0] == states[1]
    assert capsys.readouterr().out.count("written") == 4  # by the first time only
    assert sync_address.main(["--check"], fork) == 0
    assert b"github.com/me/fork" in states[0][fork / "book" / "index.ipynb"]


@pytest.mark.parametrize("branch", ["course/2027", "book/2027", "a/b/c"])
def test_a_branch_may_have_slashes(branch: str, fork: Path) -> None:
    """A pattern that takes the branch for one word would put the rest of it into the path, again each time."""
    state(fork, "https://github.com/me/fork", branch)
    for _ in range(2):
        assert sync_address.main([], fork) == 0
    link = f"https://colab.research.google.com/github/me/fork/blob/{branch}/book/index.ipynb)"
    assert (fork / "README.md").read_text(encoding="utf-8").count(link) == 1
    assert f', \\"{branch}\\"):' in (fork / "book" / "index.ipynb").read_text(encoding="utf-8")  # the setup cell
    state(fork, "https://github.com/me/fork", "main")
    assert sync_address.main([], fork) == 0
    assert branch not in (fork / "README.md").read_text(encoding="utf-8")


def test_an_address_that_is_none_is_said_and_changes_nothing(fork: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state(fork, "https://github.com/me/fork.git")
    before = contents(fork)
    for arguments in ([], ["--check"]):
        assert sync_address.main(arguments, fork) == 1
        assert "got 'https://github.com/me/fork.git'; write https://github.com/me/fork" in capsys.readouterr().out
    assert contents(fork) == before


def test_a_notebook_without_our_cell_stays_as_it_is(fork: Path) -> None:
    """A draft of somebody's, in a form of its own."""
    draft = fork / "book" / "draft.ipynb"
    draft.write_text(
        json.dumps({"cells": [{"cell_type": "code", "source": ["1"], "metadata": {}}], "nbformat": 4}), encoding="utf-8"
    )
    before = draft.read_bytes()
    assert sync_address.main([], fork) == 0
    assert draft.read_bytes() == before


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_interrupted_it_leaves_the_old_file(fails: str, fork: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(fork)
    monkeypatch.setattr(*((os, "replace") if fails == "replace" else (Path, "write_text")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        sync_address.main([], fork)
    assert contents(fork) == before


def test_a_script_of_its_own_can_write_whole_files(tmp_path: Path) -> None:
    """`make lock` runs before anything is installed, so nothing but Python may be needed."""
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import lock, whole_files"
    subprocess.run([sys.executable, "-S", "-c", program], check=True)  # without site-packages
    write_whole(tmp_path / "a.txt", "ρ\n")
    assert contents(tmp_path) == {tmp_path / "a.txt": "ρ\n".encode()}
