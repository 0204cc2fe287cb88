"""Write the project's public address, which stands once in `_config.yml`, wherever else it is needed.

The address is `repository.url` of `_config.yml`; the version is that of `pyproject.toml`, released under the tag
`v<version>`. From these two come the setup cell of every notebook, the Colab badge and the clone line of
`README.md`, and the links of `CITATION.cff`. After changing either, run

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

ROOT = Path(__file__).resolve().parent.parent

SETUP_CELL = """\
# Where isopo_mini is missing, as in a fresh Colab, this cell fetches the repository. Elsewhere it does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("isopo_mini") is None:
    repository = Path("isopo-mini").resolve()  # the package, and the records that some chapters read
    if not repository.exists():
        clone = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", "{tag}"]
        subprocess.run([*clone, "{url}", str(repository)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", str(repository)], check=True)
    sys.path.insert(0, str(repository))  # a running kernel does not see what was installed after its start"""


@dataclass(frozen=True)
class Address:
    """Where the project is published, and under which version."""

    url: str
    branch: str
    version: str

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
        return SETUP_CELL.format(url=self.url, tag=self.tag)

    def colab(self, notebook: str) -> str:
        """The address that opens a notebook of this repository in Colab."""
        return f"https://colab.research.google.com/github/{self.slug}/blob/{self.branch}/{notebook}"


def read_address(root: Path = ROOT) -> Address:
    """The address and version as `_config.yml` and `pyproject.toml` state them."""
    repository = yaml.safe_load((root / "_config.yml").read_text())["repository"]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return Address(repository["url"].rstrip("/"), repository["branch"], project["version"])


def synced_notebook(text: str, address: Address) -> str:
    """A notebook's text with every cell tagged `setup` replaced by the current one."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if "setup" in cell["metadata"].get("tags", []):
            cell["source"] = address.setup_cell.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def synced_readme(text: str, address: Address) -> str:
    """The README with the clone line, the pip line and the links to Colab and the repository rewritten."""
    text = re.sub(r"git clone \S+", f"git clone {address.url}", text)
    text = re.sub(r"git\+https?://[^\s\"'`]+", f"git+{address.url}@{address.tag}", text)
    return re.sub(
        r"https://colab\.research\.google\.com/github/[^/\s]+/[^/\s]+/blob/[^/\s]+/([^\s)\"]+)",
        lambda match: address.colab(match.group(1)),
        text,
    )


def synced_citation(text: str, address: Address) -> str:
    """`CITATION.cff` with its address and version rewritten."""
    text = re.sub(r"(?m)^repository-code:.*$", f'repository-code: "{address.url}"', text)
    return re.sub(r"(?m)^version:.*$", f'version: "{address.version}"', text)


def differing(root: Path = ROOT) -> dict[Path, str]:
    """What should stand in each file that does not yet say so."""
    address = read_address(root)
    wanted = {path: synced_notebook(path.read_text(), address) for path in notebooks(root)}
    for name, synced in (("README.md", synced_readme), ("CITATION.cff", synced_citation)):
        if (root / name).exists():
            wanted[root / name] = synced((root / name).read_text(), address)
    return {path: text for path, text in wanted.items() if path.read_text() != text}


def notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook of the book, without editors' checkpoints."""
    return sorted(path for path in (root / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def main() -> int:
    """Write or compare; the exit status says whether anything differed on a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when a file differs")
    arguments = parser.parse_args()
    changes = differing()
    for path, text in changes.items():
        if arguments.check:
            print(f"{path.relative_to(ROOT)}: not in step with _config.yml; run python scripts/sync_address.py")
        else:
            path.write_text(text)
            print(f"{path.relative_to(ROOT)}: written")
    return int(arguments.check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
