"""The repository keeps its promises: one address, a full lock, documented commands, nothing opaque in git."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import build_book
import pytest
import sync_address
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
THIS_FILE = Path(__file__).resolve().relative_to(ROOT).as_posix()

# Files that may name the project's public address: the one that states it, and those sync_address.py writes.
ADDRESS_STATED = "_config.yml"
ADDRESS_WRITTEN = re.compile(r"README\.md|CITATION\.cff|pyproject\.toml|book/appendix/install\.md|book/.*\.ipynb")

MACHINE_PATHS = re.compile(r"(?<![\w./:*-])/(?:home|root|Users|work|tmp|opt|mnt|srv)/[\w.-]|file://|[A-Z]:\\\\")
# In a workflow's PowerShell: a command that fails ends the step, as it does in bash.
STOP_AT_A_FAILURE = "$PSNativeCommandUseErrorActionPreference = $true"
INDEX_HOSTS = re.compile(r"pypi\.org|pythonhosted|index-url|find-links|download\.pytorch", re.IGNORECASE)


def tracked_files() -> list[str]:
    """What git tracks or would track; every file when there is no git, as in an unpacked archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    names = [name for name in tracked_files() if name != THIS_FILE and not name.endswith((".png", ".safetensors"))]
    return [(name, (ROOT / name).read_text(encoding="utf-8")) for name in names]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_everything_that_needs_the_address_agrees_with_config() -> None:
    assert {path.name for path in sync_address.differing(ROOT)} == set()


def test_the_address_stands_once() -> None:
    slug = sync_address.read_address(ROOT).slug
    naming = {name for name, text in texts() if slug in text}
    assert naming - {ADDRESS_STATED} == {name for name in naming if ADDRESS_WRITTEN.fullmatch(name)}
    assert (ROOT / ADDRESS_STATED).read_text(encoding="utf-8").count(slug) == 1


def test_a_new_address_reaches_every_place(tmp_path: Path) -> None:
    """Change `_config.yml` in a copy; the script must then find every file that names the old address."""
    old = sync_address.read_address(ROOT)
    copied = {name for name, text in texts() if old.slug in text}
    for name in [*copied, "pyproject.toml"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    config = (tmp_path / ADDRESS_STATED).read_text(encoding="utf-8").replace(old.slug, "someone/elsewhere")
    (tmp_path / ADDRESS_STATED).write_text(config, encoding="utf-8")
    for path, text in sync_address.differing(tmp_path).items():
        path.write_text(text, encoding="utf-8")
    left = {name for name in copied if old.slug in (tmp_path / name).read_text(encoding="utf-8")}
    assert left == set()
    assert sync_address.differing(tmp_path) == {}


def test_no_file_names_a_machine_or_a_package_index() -> None:
    found = [
        f"{name}: {match.group()}"
        for name, text in texts()
        for match in [*MACHINE_PATHS.finditer(text), *INDEX_HOSTS.finditer(text)]
        if not name.startswith(".github/")  # where a package index may be a setting of the repository
    ]
    assert found == []


def test_the_book_is_built_by_jupyter_book_1() -> None:
    assert "\njupyter-book==1.0.4.post1\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_the_package_itself_pins_nothing() -> None:
    """Exact pins in a package are what breaks old course material on a host with versions of its own."""
    for line in project()["dependencies"]:
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert operators == {">="}, line


def test_the_version_is_said_once_more_and_equally() -> None:
    source = (ROOT / "isopo_mini" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'__version__ = "(.*)"', source).group(1) == project()["version"]


def test_every_command_of_the_makefile_is_explained_and_phony() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z]+):", makefile))
    assert targets == set(re.findall(r"(?m)^([a-z]+):.*## \w", makefile))
    assert targets == set(re.search(r"\.PHONY: (.*)", makefile).group(1).split())
    promised = {"book", "test", "portable", "changed", "margins", "lab", "serve", "draft", "lint", "format", "lock"}
    promised |= {
        "gpu",
        "clean",
        "help",
        "models",
        "course",
        "student",
        "grade",
        "autograder",
        "release",
        "pages",
        "pdf",
    }
    assert targets == promised
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {target for target in targets if f"make {target}" not in readme} <= {"clean", "help", "format"}


def test_who_has_no_make_runs_the_tests_as_make_does() -> None:
    recipe = re.search(r"(?m)^ON_ALL_CORES := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8")).group(1)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (typed,) = re.findall(r"(?m)^    python -m pytest (.*?) +# make test$", readme)
    assert typed == re.sub(r" --maxprocesses \d+", "", recipe)


def test_the_build_is_strict() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["execute"]["execute_notebooks"] == "force"
    assert config["execute"]["raise_on_error"] is True
    assert config["execute"]["allow_errors"] is False
    assert all(f'"{flag}"' in build_book.BUILD for flag in ("-W", "--keep-going", "--all"))
    assert "scripts/build_book.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ci_runs_the_same_commands() -> None:
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111, ".ci/run must be executable"
    assert [f"make {name}" in ci.read_text(encoding="utf-8") for name in ("lint", "test", "book", "changed")] == [
        True
    ] * 4


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflow_can_be_read(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["jobs"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        for step in job["steps"]:
            if "run" in step and "windows" not in job["runs-on"]:
                subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)
            elif "run" in step:
                lines = step["run"].splitlines()
                assert len(lines) == 1 or lines[0] == STOP_AT_A_FAILURE, "PowerShell reports the last command alone"
            if "run" in step:  # what it names must be there
                named = re.findall(r"(?<![\w/])(?:scripts|tests)[/\w]+(?:\.py)?", step["run"])
                assert [name for name in named if not (ROOT / name).exists()] == []


def test_dependabot_can_be_read() -> None:
    config = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))
    assert config["version"] == 2
    assert {update["package-ecosystem"] for update in config["updates"]} == {"github-actions", "pip"}


def test_a_windows_user_types_no_path_of_another_system() -> None:
    """`.venv/bin` is nowhere on Windows; where it is written, the line says for which systems."""
    for name in ("README.md", "CONTRIBUTING.md", "book/teaching/how_to_teach.md", ".github/workflows/windows.yml"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert ".venv/bin" not in line or "Windows" in line or "Linux and macOS" in line, line


def test_nothing_opaque_is_tracked_and_files_stay_short() -> None:
    names = tracked_files()
    assert [name for name in names if re.search(r"\.(npz|pt|pth|pkl|pickle)$", name)] == []
    library = [name for name in names if name.startswith("isopo_mini/") and name.endswith(".py")]
    assert [name for name in library if len((ROOT / name).read_text(encoding="utf-8").splitlines()) > 300] == []


def test_bibliography_has_no_entry_twice_and_the_references_explain_each() -> None:
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"(?m)^@\w+\{([^,\s]+),", bibliography)
    assert len(keys) == len(set(keys)) > 0
    explained = set(
        re.findall(r"\{cite:t\}`([^`]+)`", (ROOT / "book" / "appendix" / "references.md").read_text(encoding="utf-8"))
    )
    assert explained == set(keys)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository with the tag `v0.1.0` and two branches at another commit, and a file that says which it is."""
    folder = tmp_path / "published"
    folder.mkdir()

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=A", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(folder), *author, *arguments], check=True, capture_output=True)

    git("init", "--quiet", "--initial-branch", "main")
    for name in ("tag", "main"):
        (folder / "which").write_text(name, encoding="utf-8")
        git("add", "which")
        git("commit", "--quiet", "-m", name)
        if name == "tag":
            git("tag", "v0.1.0")
    git("branch", "a/course")
    return folder


class Fetch:
    """What the setup cell does where this package is missing: git for real, and pip's command noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, found: object = None) -> None:
        self.folder, self.installed = folder, []
        actual = subprocess.run

        def run(command: list[str], **options: object) -> object:
            if command[0] == "git":
                return actual(command, **options, capture_output=True)
            self.installed.append(command)

        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    def by(self, address: str, tag: str, branch: str) -> str:
        exec(sync_address.SETUP_CELL.format(url=address, tag=tag, branch=branch), {})
        assert self.installed[0][-2:] == ["--editable", str(self.folder / "isopo-mini")]
        assert sys.path[0] == str(self.folder / "isopo-mini")
        return (self.folder / "isopo-mini" / "which").read_text(encoding="utf-8")


def test_the_setup_cell_does_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("the package is here, and so are its records"))
    exec(sync_address.read_address(ROOT).setup_cell, {})


@pytest.mark.parametrize(
    ("tag", "branch", "which"), [("v0.1.0", "main", "tag"), ("v9.9.9", "main", "main"), ("v9.9.9", "a/course", "main")]
)
def test_the_setup_cell_fetches_the_release_or_else_the_branch(
    tag: str, branch: str, which: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Fetch(tmp_path / "here", monkeypatch).by(published.as_uri(), tag, branch) == which


def test_the_setup_cell_fetches_the_records_of_a_package_that_came_without(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "isopo_mini" / "__init__.py"
    found = importlib.util.spec_from_file_location("isopo_mini", package)
    assert Fetch(tmp_path / "here", monkeypatch, found).by(published.as_uri(), "v0.1.0", "main") == "tag"


def test_the_setup_cell_says_what_it_could_not_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Fetch(tmp_path / "here", monkeypatch)
    with pytest.raises(RuntimeError, match=r"expected v0\.1\.0 or main of file:.*nowhere, got neither: .*by hand"):
        fetch.by((tmp_path / "nowhere").as_uri(), "v0.1.0", "main")
    assert fetch.installed == []
