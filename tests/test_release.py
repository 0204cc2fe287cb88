"""A renamed clone gets links of its own by one edit and one command, and may be released; what may not is named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import release
import sync_address

ROOT = Path(__file__).resolve().parent.parent
VERSION = "7.0.0"
URL, BRANCH = "https://github.com/someone/a-course", "course/2027"


def git(folder: Path, *words: str) -> str:
    author = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "core.hooksPath=none"]
    return subprocess.run(["git", *author, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def rewrite(path: Path, pattern: str, new: str) -> None:
    """Replace the one place where the pattern is."""
    text, count = re.subn(pattern, lambda _: new, path.read_text(encoding="utf-8"))
    assert count == 1, (path, pattern)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as somebody's course, on a branch with a slash, cloned by ssh: one edit, one command, one commit."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone") / "isopo-mini"
    for name in found.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch", BRANCH)
    git(folder, "remote", "add", "origin", "git@github.com:someone/a-course.git")
    rewrite(folder / "_config.yml", r"(?m)^  url: .*\n  branch: .*$", f"  url: {URL}\n  branch: {BRANCH}")
    rewrite(folder / "pyproject.toml", r'(?m)^version = ".*"$', f'version = "{VERSION}"')
    rewrite(folder / "isopo_mini" / "__init__.py", r'(?m)^__version__ = ".*"$', f'__version__ = "{VERSION}"')
    log = (folder / "CHANGELOG.md").read_text(encoding="utf-8").replace("## Unreleased\n\n", "")
    (folder / "CHANGELOG.md").write_text(
        re.sub(r"(?m)^##+ ", f"## {VERSION}\n\n\\g<0>", log, count=1), encoding="utf-8"
    )
    command = [sys.executable, "scripts/sync_address.py"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Ours")
    return folder


@pytest.fixture
def changed(clone: Path) -> Path:
    """The clone; what a test changes in it is undone afterwards."""
    head = git(clone, "rev-parse", "HEAD").strip()
    yield clone
    git(clone, "reset", "--quiet", "--hard", head)
    git(clone, "clean", "--quiet", "-d", "--force")
    for tag in git(clone, "tag").split():
        git(clone, "tag", "--delete", tag)


def test_one_edit_and_one_command_give_a_clone_its_own_links(clone: Path) -> None:
    old = sync_address.read_address(ROOT).slug
    names = [name for name in git(clone, "ls-files").splitlines() if not name.endswith((".png", ".safetensors"))]
    assert [name for name in names if old in (clone / name).read_text(encoding="utf-8")] == []
    assert sync_address.main(["--check"], clone) == 0
    readme = (clone / "README.md").read_text(encoding="utf-8")
    assert f"git clone {URL}\n" in readme
    assert f"{URL.replace('github.com', 'colab.research.google.com/github')}/blob/{BRANCH}/book/index.ipynb" in readme
    for path in sync_address.notebooks(clone):
        first = next(
            cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
        )
        assert f'"{URL}"' in "".join(first["source"])
        assert f'("v{VERSION}", "{BRANCH}")' in "".join(first["source"])


def test_a_clone_with_an_address_may_be_released(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The packages are built and looked into; instead of an empty environment, an empty folder comes first."""

    def check_import(root: Path) -> list[str]:
        (wheel,) = (root / "_build" / "release").glob("*.whl")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
        subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
        return release.tried(sys.executable, root, tmp_path, PYTHONPATH=str(tmp_path))

    # Whether this tree's claims were measured is no matter of a clone.
    instead = {release.check_import: check_import, release.check_claims: lambda _: []}
    monkeypatch.setattr(release, "CHECKS", tuple(instead.get(check, check) for check in release.CHECKS))
    assert release.main(["--skip-long"], clone) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "  ! " not in printed
    assert f"git push origin HEAD v{VERSION}" in printed


def test_without_an_address_it_may_not(changed: Path) -> None:
    rewrite(changed / "_config.yml", re.escape(f"url: {URL}"), "url: https://github.com/OWNER/a-course")
    assert "https://github.com/OWNER/a-course in _config.yml still names OWNER" in str(release.check_address(changed))
    rewrite(changed / "_config.yml", "(?m)^  url: .*$", f"  url: {URL}.git")
    assert release.check_address(changed)[0].endswith(f"got '{URL}.git'; write {URL}")


def test_of_this_tree_it_says_the_truth() -> None:
    """`OWNER` stands there until somebody has chosen where to publish."""
    chosen = "/OWNER/" not in sync_address.read_address(ROOT).url
    assert chosen != any("still names OWNER" in complaint for complaint in release.check_address(ROOT))


def test_a_claim_that_was_not_measured_elsewhere_is_noticed(changed: Path) -> None:
    (path,) = (changed / "book").glob("foundations/01_*.ipynb")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    last = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][-1]
    last["source"] = [*last["source"], "\nassert 1 < 2 < 3"]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    name = path.relative_to(changed).as_posix()
    assert "1 < 2 < 3" in release.portable.not_measured(changed)[name]
    (complaint,) = release.check_claims(changed)
    assert name in complaint.partition("--update --chapters ")[2].split()


@pytest.mark.parametrize(
    ("remote", "meant"),
    [
        ("git@github.com:someone/else.git", "https://github.com/someone/else"),
        ("ssh://git@github.com/someone/else.git", "https://github.com/someone/else"),
        ("https://github.com/someone/else", "https://github.com/someone/else"),
        ("https://github.com/Someone/A-Course.git", None),
        ("/somewhere/on/disk", None),
    ],
)
def test_the_tag_is_pushed_to_where_the_links_lead(remote: str, meant: str | None, changed: Path) -> None:
    before = git(changed, "remote", "get-url", "origin").strip()
    git(changed, "remote", "set-url", "origin", remote)
    found = release.check_address(changed)
    git(changed, "remote", "set-url", "origin", before)
    assert found == ([f"the remote origin is {meant}, and _config.yml says {URL}"] if meant else [])


def test_a_tag_is_that_of_the_version(changed: Path) -> None:
    git(changed, "tag", f"v{VERSION}")
    assert release.check_version(changed) == []
    git(changed, "commit", "--quiet", "--allow-empty", "--message", "More")
    assert release.check_version(changed) == [f"the tag v{VERSION} is at another commit: raise the version"]
    git(changed, "tag", "v8.0.0")
    assert release.check_version(changed)[1] == f"this commit has the tag v8.0.0, and the version is {VERSION}"


def test_a_version_is_told_in_the_changelog_and_in_the_package(changed: Path) -> None:
    rewrite(changed / "CHANGELOG.md", f"## {VERSION}\n", "## Unreleased\n")
    first, second = release.check_version(changed)
    assert first == f"CHANGELOG.md has changes under Unreleased: put them under {VERSION}, or raise the version"
    assert second.startswith(f"CHANGELOG.md: expected {VERSION} as the last version, got ")
    rewrite(changed / "isopo_mini" / "__init__.py", VERSION, "6.0.0")
    assert (
        release.check_version(changed)[0]
        == f"isopo_mini/__init__.py has another version than pyproject.toml, {VERSION}"
    )
    assert release.check_tree(changed) == ["not committed: CHANGELOG.md, isopo_mini/__init__.py"]


def test_a_package_with_too_little_or_too_much_is_noticed(changed: Path) -> None:
    (changed / "isopo_mini" / "data" / "forgotten.csv").write_text("1\n", encoding="utf-8")
    (changed / "isopo_mini" / "py.typed").unlink()
    rewrite(changed / "MANIFEST.in", "prune book\n", "include book/references.bib\n")
    git(changed, "add", "--all")
    git(changed, "commit", "--quiet", "--message", "Wrong")
    assert release.check_packages(changed) == [
        "the wheel: isopo_mini/data/forgotten.csv missing",
        "the source distribution: isopo_mini/data/forgotten.csv missing",
        "the source distribution: book/references.bib should not be in it",
        "the library has no isopo_mini/py.typed",
    ]


def test_a_package_that_is_not_the_one_in_sight_is_noticed(tmp_path: Path) -> None:
    (complaint,) = release.tried(sys.executable, ROOT, tmp_path, PYTHONPATH=str(ROOT))
    assert "trying the wheel in a clean environment failed" in complaint
    assert "AssertionError" in complaint


def test_a_command_of_the_readme_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("make book\n", encoding="utf-8")
    (tmp_path / "Makefile").write_text("book:\n\ttrue\ntest:\n\techo no; exit 3\n", encoding="utf-8")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "A")
    first, second = release.check_commands(tmp_path)
    assert first == "README.md does not say make test"
    assert second.startswith("make test failed:\necho no; exit 3\nno\n")
