"""Check built pages: nothing is loaded from another host, every picture says what it shows, nothing failed quietly.

python scripts/check_pages.py _build/html
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
NOT_LOADED = {"next", "prev", "index", "search", "canonical", "author", "copyright"}


class Page(HTMLParser):
    """Collects what a page loads and which of its pictures lack a description."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one tag."""
        found = {name: value or "" for name, value in attrs}
        address = found.get(LOADS.get(tag, ""), "")
        if re.match(r"(https?:)?//", address) and found.get("rel", "") not in NOT_LOADED:
            self.complaints.append(f"<{tag}> loads {address}")
        if tag == "img" and (not found.get("alt", "").strip() or re.search(r"\.(png|svg|jpg)$", found["alt"])):
            self.complaints.append(f"picture {address} has no alt text")


def complaints(html: str) -> list[str]:
    """What is wrong with one page."""
    page = Page()
    page.feed(html)
    return page.complaints


def main(root: Path) -> int:
    """Check every page under `root`; print what is wrong and return the exit status."""
    pages = sorted(path for path in root.rglob("*.html") if "_static" not in path.parts)
    wrong = [f"{path.relative_to(root)}: {complaint}" for path in pages for complaint in complaints(path.read_text())]
    wrong += [f"{root}: no index.html"] if not (root / "index.html").exists() else []
    print(
        "\n".join(wrong)
        if wrong
        else f"{len(pages)} pages load nothing from another host, and every picture has alt text"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
