"""Citations in the notebooks: links that read as text where no book is built, in JupyterLab and in Colab.

A source is cited as `[Kakade (2001)](#ref-kakade2001natural)`, or in brackets as
`([Kakade, 2001](#ref-kakade2001natural))`. The names are those of `book/references.bib`; the target is the source's
entry in `book/appendix/references.md`, where it is explained.
"""

import re
from functools import lru_cache
from pathlib import Path

from pybtex.database import Entry, parse_file
from pybtex.richtext import Text

ROOT = Path(__file__).resolve().parent.parent
BIBLIOGRAPHY = ROOT / "book" / "references.bib"
ROLE = re.compile(r"\{cite:(?P<kind>[tp])\}`(?P<key>[^`]+)`")
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\(#ref-(?P<key>[^)]+)\)")


@lru_cache
def sources() -> dict[str, tuple[str, str]]:
    """Who wrote each source, as one cites them, and when."""
    entries = parse_file(str(BIBLIOGRAPHY)).entries
    return {key: (_authors(entry), entry.fields["year"]) for key, entry in entries.items()}


def _authors(entry: Entry) -> str:
    """`Kakade`, `Baxter and Bartlett`, `Jacot et al.`"""
    last = [str(Text.from_latex(" ".join(person.last_names))) for person in entry.persons["author"]]
    if len(last) > 2 or last[-1] == "others":
        return f"{last[0]} et al."
    return " and ".join(last)


def as_links(text: str) -> str:
    """Sphinx's roles written as links. (A role in brackets brings its own.)"""

    def link(match: re.Match[str]) -> str:
        authors, year = sources()[match["key"]]
        textual = f"[{authors} ({year})](#ref-{match['key']})"
        return textual if match["kind"] == "t" else f"([{authors}, {year}](#ref-{match['key']}))"

    return ROLE.sub(link, text)


def complaints(text: str) -> list[str]:
    """Roles, which are noise outside of a built book, and links that name a source otherwise than the bibliography."""
    wrong = [f"{match[0]}: a role; make format writes a link" for match in ROLE.finditer(text)]
    for match in LINK.finditer(text):
        if match["key"] not in sources():
            wrong.append(f"{match[0]}: there is no such source in {BIBLIOGRAPHY.name}")
            continue
        authors, year = sources()[match["key"]]
        if match["text"] not in (f"{authors} ({year})", f"{authors}, {year}"):
            wrong.append(f"{match[0]}: expected {authors} ({year}) or {authors}, {year}")
    return wrong
