"""Does every link that leads out of the book still lead somewhere? Once a week a workflow asks.

    python scripts/links_outside.py

This is Sphinx's `linkcheck` on the pages as they are written, without running a cell. It needs the network, so it is no
part of the build. A page that has moved is shown; one that is gone fails.
"""

import re
import sys
from pathlib import Path
from typing import Any

import build_book
import sync_address
import yaml

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "linkcheck_anchors": False,  # pages that a program puts together have theirs late
    "linkcheck_timeout": 30,
    "linkcheck_retries": 3,
    "linkcheck_workers": 4,
    # A DOI stays by definition; the publisher's page behind it often answers no program.
    "linkcheck_ignore": [r"https://doi\.org/"],
}


def configuration(root: Path) -> dict[str, Any]:
    """The book's own, without execution; links to a project that has no address yet are let through."""
    config = build_book.configuration(root) | {"execute": {"execute_notebooks": "off"}}
    url = sync_address.read_address(root).url if root == ROOT else ""
    unpublished = [re.escape(url)] if "/OWNER/" in url else []
    ignored = [*SETTINGS["linkcheck_ignore"], *unpublished]  # type: ignore[misc]
    config["sphinx"]["config"] |= {**SETTINGS, "linkcheck_ignore": ignored}
    return config


def check(root: Path = ROOT) -> int:
    """Follow the links of the book under `root`; 0 when all lead somewhere."""
    folder = root / "_build" / "links"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_config.yml").write_text(yaml.safe_dump(configuration(root)), encoding="utf-8")
    options = ["--builder", "linkcheck", "--config", str(folder / "_config.yml"), "--path-output", str(folder)]
    return build_book.build(root, options=options, records=folder / "claims")


if __name__ == "__main__":
    build_book.say_what_the_screen_can()
    sys.exit(check())
