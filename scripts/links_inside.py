"""Check the links of built pages: what is linked inside of the book is there, and outside addresses are well formed.

    python scripts/links_inside.py _build/html

Followed are `href` and `src` of every page, to the file and, after `#`, to the part of it. No other host is asked.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ELSEWHERE = {"http", "https"}
# Addresses that lead to no page: mail, a place where a script stands, pictures and styles that are written out.
NO_PAGE = {"mailto", "javascript", "data"}
# On every page, and made by a script of the theme when it is needed.
MADE_BY_SCRIPTS = {"", "top"}


class Page(HTMLParser):
    """Collects the places of a page that can be linked to, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one tag."""
        found = {name: value or "" for name, value in attrs}
        self.places.add(found.get("id", ""))
        if tag == "a":
            self.places.add(found.get("name", ""))
        self.links += [found[name] for name in ("href", "src") if name in found]


def read(html: str) -> Page:
    """The places and links of one page."""
    page = Page()
    page.feed(html)
    page.close()
    return page


def complaint(link: str, path: Path, root: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link on the page at `path`; None when nothing is."""
    if link != link.strip() or " " in link:
        return f"{link!r}: not an address, it has a blank"
    try:
        parts = urlsplit(link)
    except ValueError as error:
        return f"{link}: not an address ({error})"
    if parts.scheme in NO_PAGE:
        return None
    if parts.scheme or parts.netloc:
        well_formed = parts.scheme in ELSEWHERE | {""} and "." in parts.netloc.strip(".")
        return None if well_formed else f"{link}: not an address of another host"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_relative_to(root):
        return f"{link}: leads out of the book"
    if not target.is_file():
        return f"{link}: there is no such file"
    place = unquote(parts.fragment)
    if target in pages and place not in pages[target].places | MADE_BY_SCRIPTS:
        return f"{link}: the page has no such place"
    return None


def complaints(root: Path) -> list[str]:
    """What is wrong with the links of all pages under `root`, page by page, each link once a page."""
    root = root.resolve()
    paths = sorted(path for path in root.rglob("*.html") if "_static" not in path.relative_to(root).parts)
    pages = {path: read(path.read_text(encoding="utf-8")) for path in paths}
    wrong = []
    for path, page in pages.items():
        said = [complaint(link, path, root, pages) for link in dict.fromkeys(page.links)]
        wrong += [f"{path.relative_to(root).as_posix()}: {text}" for text in said if text]
    return wrong


def main(root: Path) -> int:
    """Print what is wrong and return the exit status."""
    wrong = complaints(root)
    print("\n".join(wrong) if wrong else "Every link inside of the book leads somewhere")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
