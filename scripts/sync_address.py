"""Write the project's public address, which stands once in `_config.yml`, wherever else it is needed.

The address is `repository.url` of `_config.yml`; the version is that of `pyproject.toml`, released under the tag
`v<version>`. From these two come the setup cell of every notebook, the Colab badge and the clone line of
`README.md`, and the links of `CITATION.cff` and of `pyproject.toml` itself. After changing either, run

    python scripts/sync_address.py            # write
    python scripts/sync_address.py --check    # only compare; exits 1 and names the files that differ
"""

import argparse
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent

SETUP_CELL = """\
# Where isopo_mini or its records are missing, as in a fresh Colab, this cell fetches the repository.
import importlib.util
import subprocess
import sys
from pathlib import Path

found = importlib.util.find_spec("isopo_mini")
if found is None or not (Path(found.origin).parents[1] / "results").is_dir():
    address, repository = "{url}", Path("isopo-mini").resolve()
    clone = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1"]
    for version in ("{tag}", "{branch}"):  # as released, or else as it is now
        if not repository.exists():
            subprocess.run([*clone, "--branch", version, address, str(repository)])
    if not repository.exists():
        raise RuntimeError(
            f"expected {tag} or {branch} of {{address}}, got neither: see what git said above, "
            "or clone the repository by hand beside this notebook, as isopo-mini"
        )
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--editable"]
    subprocess.run([*install, str(repository)], check=True)
    sys.path.insert(0, str(repository))  # a running kernel does not see what was installed after its start"""


# Colab opens notebooks from there only; and the book appends to the address what it links to, so no `.git`.
REPOSITORY = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+(?<!\.git)")


@dataclass(frozen=True)
class Address:
    """Where the project is published, and under which version.

    Raises:
        ValueError: the address is not that of a repository's page, such as one that is copied from its *Clone* button.
    """

    url: str
    branch: str
    version: str

    def __post_init__(self) -> None:
        if not REPOSITORY.fullmatch(self.url):
            raise ValueError(
                "repository.url of _config.yml: expected https://github.com/OWNER/NAME, as a browser shows it, "
                f"got {self.url!r}{suggestion(self.url)}"
            )

    @property
    def tag(self) -> str:
        """The git tag of this version."""
        return f"v{self.version}"

    @property
    def slug(self) -> str:
        """`owner/name`, as Colab's addresses have it."""
        return urlsplit(self.url).path.strip("/")

    @property
    def setup_cell(self) -> str:
        """The first code cell of every notebook."""
        return SETUP_CELL.format(url=self.url, tag=self.tag, branch=self.branch)

    def colab(self, notebook: str) -> str:
        """The address that opens a notebook of this repository in Colab."""
        return f"https://colab.research.google.com/github/{self.slug}/blob/{self.branch}/{notebook}"


def suggestion(url: str) -> str:
    """What was probably meant by the address of a clone."""
    match = re.fullmatch(r"(?:https?://|ssh://)?(?:git@)?(?:www\.)?github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    return f"; write https://github.com/{match[1]}" if match else ""


def read_address(root: Path = ROOT) -> Address:
    """The address and version as `_config.yml` and `pyproject.toml` state them."""
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return Address(repository["url"].rstrip("/"), repository["branch"], project["version"])


def synced_notebook(text: str, address: Address) -> str:
    """A notebook's text with every cell tagged `setup` replaced by the current one."""
    notebook, current = json.loads(text), address.setup_cell
    cells = [cell for cell in notebook["cells"] if "setup" in cell["metadata"].get("tags", [])]
    if all("".join(cell["source"]) == current for cell in cells):
        return text  # another notebook's form is not this script's to change
    for cell in cells:
        cell["source"] = current.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def synced_readme(text: str, address: Address) -> str:
    """The README with the clone line, the pip line and the links to Colab and the repository rewritten."""
    text = re.sub(r"git clone \S+", f"git clone {address.url}", text)
    text = re.sub(r"git\+https?://[^\s\"'`]+", f"git+{address.url}@{address.tag}", text)
    return re.sub(
        # A branch may have slashes; the path of a notebook begins with book/.
        r"https://colab\.research\.google\.com/github/[^/\s]+/[^/\s]+/blob/[^\s)\"]+?/(book/[^\s)\"]+)",
        lambda match: address.colab(match.group(1)),
        text,
    )


def synced_citation(text: str, address: Address) -> str:
    """`CITATION.cff` with its address and version rewritten."""
    text = re.sub(r"(?m)^repository-code:.*$", f'repository-code: "{address.url}"', text)
    return re.sub(r"(?m)^version:.*$", f'version: "{address.version}"', text)


def synced_project(text: str, address: Address) -> str:
    """`pyproject.toml` with the three addresses of `[project.urls]` rewritten."""
    changelog = f"{address.url}/blob/{address.branch}/CHANGELOG.md"
    for name, link in {"Repository": address.url, "Issues": f"{address.url}/issues", "Changelog": changelog}.items():
        text = re.sub(rf"(?m)^{name} = .*$", f'{name} = "{link}"', text)
    return text


def differing(root: Path = ROOT) -> dict[Path, str]:
    """What should stand in each file that does not yet say so."""
    address = read_address(root)
    wanted = {path: synced_notebook(path.read_text(encoding="utf-8"), address) for path in notebooks(root)}
    others = {
        "README.md": synced_readme,
        "book/appendix/install.md": synced_readme,
        "CITATION.cff": synced_citation,
        "pyproject.toml": synced_project,
    }
    for name, synced in others.items():
        if (root / name).exists():
            wanted[root / name] = synced((root / name).read_text(encoding="utf-8"), address)
    return {path: text for path, text in wanted.items() if path.read_text(encoding="utf-8") != text}


def notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook of the book, without editors' checkpoints."""
    return sorted(path for path in (root / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def main(given: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or compare; the exit status says whether the address is none, or anything differed on a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when a file differs")
    arguments = parser.parse_args(given)
    try:
        changes = differing(root)
    except ValueError as error:
        print(error)
        return 1
    for path, text in changes.items():
        if arguments.check:
            print(f"{path.relative_to(root)}: not in step with _config.yml; run python scripts/sync_address.py")
        else:
            write_whole(path, text)
            print(f"{path.relative_to(root)}: written")
    return int(arguments.check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
