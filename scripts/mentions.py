"""A Sphinx extension: "Figure 5", "Table 17", "equation (3)" and "chapter 12" lead to what they name.

In the notebooks all four are plain text, so that they read alike in JupyterLab, in Colab and here. A caption is a
paragraph that begins with `**Figure 5.**`, `**Figure 4 and Table 9.**` or the like; an equation bears `\\tag{3}`; a
chapter's number is the one that its file's name begins with. A mention of another chapter's table stands beside a
link to that chapter: `[chapter 12](…), Table 12`, `[chapter 12](…), Tables 5 and 6` or `Table 12 of [chapter 12](…)`.

A caption out of order, and a mention of what is not there, are warnings, and so fail the build.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from citations import BIBLIOGRAPHY, sources
from docutils import nodes
from pybtex.database import parse_file
from sphinx.util import logging

TAG = re.compile(r"\\tag\{(\d+)\}")
CAPTION = re.compile(r"(?:Figure|Table)s? \d")
BETWEEN = r"(?:,\s|,?\s(?:and|or|to)\s|–)"
NUMBERED = re.compile(
    rf"\b(?P<kind>Figure|Table|Chapter|chapter)s?\s\d{{1,2}}\b(?:{BETWEEN}\d{{1,2}}\b)*"
    rf"|(?:\b[Ee]quations?\s)?(?<![\w)])\(\d{{1,2}}\)",
)
NUMBER = re.compile(r"\(?\d{1,2}\)?")
# What already leads elsewhere, or is no prose.
NOT_PROSE = (nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.title, nodes.raw)

logger = logging.getLogger(__name__)


class Mention(NamedTuple):
    """A piece of a text that names something: where it begins and ends, what kind of thing, and which."""

    start: int
    end: int
    kind: str  # figure, table, chapter or equation
    number: int
    phrase: tuple[int, int]  # where all of "Tables 5 and 6" begins and ends

    @property
    def anchor(self) -> str:
        """The name of the place on its page."""
        return f"{self.kind}-{self.number}"


def mentions(text: str) -> Iterator[Mention]:
    """Everything that a text names. Of "Tables 5 and 6" the first is "Tables 5", the second "6"."""
    for found in NUMBERED.finditer(text):
        kind = (found["kind"] or "equation").lower()
        start = found.start()
        for number in NUMBER.finditer(found[0]):
            end = found.start() + number.end()
            yield Mention(start, end, kind, int(number[0].strip("()")), found.span())
            start = end + len(re.match(rf"{BETWEEN}|", text[end:])[0])  # type: ignore[index]


def label(app: Any, document: nodes.document) -> None:
    """Called when a page has been read: name the places of its figures, tables and equations."""
    for bold in document.findall(nodes.strong):
        caption = bold.parent
        if CAPTION.match(bold.astext()) and caption.astext().startswith(bold.astext()):
            caption["classes"].append("numbered-caption")
            for mention in mentions(bold.astext()):
                _name(document, _shown_by(caption), mention.anchor)
    for equation in document.findall(nodes.math_block):
        for number in TAG.findall(equation.astext()):
            _name(document, equation, f"equation-{number}")
    for kind in ("figure", "table"):
        numbers = [int(name.removeprefix(f"{kind}-")) for name in document.ids if re.fullmatch(rf"{kind}-\d+", name)]
        if numbers != list(range(1, len(numbers) + 1)):
            logger.warning("captions: expected %ss 1, 2, 3 …, got %s", kind, numbers, location=document)


def _name(document: nodes.document, place: nodes.Element, anchor: str) -> None:
    """Give a place its name."""
    if anchor in document.ids:
        logger.warning("%s stands twice on this page", anchor, location=place)
        return
    place["ids"].append(anchor)
    document.ids[anchor] = place


def _shown_by(caption: nodes.paragraph) -> nodes.Element:
    """The output above a caption, where a reader should arrive; the caption itself where there is none."""
    above = caption.parent.index(caption) - 1
    cell = caption.parent[above] if above >= 0 else None
    outputs = [part for part in cell or [] if isinstance(part, nodes.Element) and "cell_output" in part["classes"]]
    return outputs[-1] if outputs else caption


@cache
def books() -> list[str]:
    """The authors of the sources that have chapters of their own."""
    entries = parse_file(str(BIBLIOGRAPHY)).entries
    return [sources()[key][0] for key, entry in entries.items() if entry.type == "book"]


def chapters(pages: list[str]) -> dict[int, str]:
    """The page of each chapter by its number."""
    names = {page: re.match(r"(\d\d)_", PurePosixPath(page).name) for page in pages}
    return {int(number[1]): page for page, number in names.items() if number}


class Linker:
    """Turns the mentions of one page into links."""

    def __init__(self, app: Any, page: str) -> None:
        self.app, self.page = app, page
        self.chapters = chapters(sorted(app.env.found_docs))
        # Without this page: its own address is empty, and so is that of a chapter that a draft does without.
        self.by_address = {self.address(other): other for other in self.chapters.values() if other != page}

    def address(self, page: str) -> str:
        """Of another page, as a link on this one has it."""
        return self.app.builder.get_relative_uri(self.page, page)

    def link(self, document: nodes.document) -> None:
        """Replace every text of the page that mentions something."""
        for text in list(document.findall(nodes.Text)):
            if self.is_prose(text):
                pieces = list(self.pieces(text, document))
                if len(pieces) > 1 or not isinstance(pieces[0], nodes.Text):
                    text.parent.replace(text, pieces)

    def is_prose(self, text: nodes.Text) -> bool:
        """Whether a text may hold links; a caption's own number does not lead to itself."""
        node = text.parent
        if isinstance(node, nodes.strong) and "numbered-caption" in node.parent.get("classes", []):
            return False
        while node is not None and not isinstance(node, NOT_PROSE):
            node = node.parent
        return node is None

    def pieces(self, text: nodes.Text, document: nodes.document) -> Iterator[nodes.Node]:
        """A text as links and what stands between them."""
        said, position = text.astext(), 0
        for mention in mentions(said):
            target = self.target(mention, text, document)
            if target:
                yield nodes.Text(said[position : mention.start])
                yield nodes.reference("", said[mention.start : mention.end], internal=True, **target)
                position = mention.end
        yield nodes.Text(said[position:])

    def target(self, mention: Mention, text: nodes.Text, document: nodes.document) -> dict[str, str]:
        """Where a mention leads, as a link's attributes; nothing where it is none of ours."""
        if mention.kind == "chapter":
            page = self.chapters.get(mention.number)
            theirs = any(authors in text.parent.astext() for authors in books())
            return {"refuri": self.address(page)} if page and page != self.page and not theirs else {}
        if mention.kind == "equation" and isinstance(text.parent.parent, nodes.entry):
            return {}  # in a table, a number in brackets is a number in brackets
        beside = chapter_beside(mention, text)
        other = self.by_address.get(beside.get("refuri", "")) if beside is not None else None
        if beside is not None and other is None:
            return {}  # a draft, where that chapter is not built along
        there = self.app.env.get_doctree(other) if other else document
        if mention.anchor in there.ids:
            return {"refuri": f"{self.address(other)}#{mention.anchor}"} if other else {"refid": mention.anchor}
        if mention.kind != "equation":  # a number in brackets may be another thing
            logger.warning("there is no %s %d on %s", mention.kind, mention.number, other or self.page, location=text)
        return {}


def chapter_beside(mention: Mention, text: nodes.Text) -> nodes.Element | None:
    """The link just before or just after to the chapter whose figure or table is meant; none where it is our own."""
    place = text.parent.index(text)
    begin, end = mention.phrase
    before, after = text[:begin], text[end:]
    neighbour = None
    if before.strip() in {",", "("} and place > 0:
        neighbour = text.parent[place - 1]
    elif after.split() == ["of"] and place + 1 < len(text.parent):
        neighbour = text.parent[place + 1]
    is_chapter = isinstance(neighbour, nodes.Element) and neighbour.astext().lower().startswith("chapter ")
    return neighbour if is_chapter else None


def fill(app: Any, document: nodes.document, page: str) -> None:
    """Called before a page is written."""
    Linker(app, page).link(document)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("doctree-read", label)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
