"""A Sphinx extension: a comma after a formula, or a bracket before it, stays on the formula's line.

To a browser a formula is a picture, and before and after a picture it may break a line, whatever stands there; no
character that joins words keeps it from that. So formula and marks are put into one span that does not wrap
(`kept-together` in book.css).
"""

import re
from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

BEFORE = re.compile(r"[(\[“‘]+\Z")
AFTER = re.compile(r"\A[,.;:!?)\]’”]+")


def keep_together(formula: nodes.math) -> None:
    """Put a formula in a text, and the marks that touch it, into one `inline`; leave it alone where there are none."""
    parent = formula.parent
    place = parent.index(formula)
    first, last, kept = place, place + 1, [formula]
    together = nodes.inline(classes=["kept-together"])
    around: list[nodes.Node] = [together]
    before, after = text_at(parent, place - 1), text_at(parent, place + 1)
    if opening := BEFORE.search(before):
        first, kept = place - 1, [nodes.Text(opening[0]), formula]
        around.insert(0, nodes.Text(before[: opening.start()]))
    if closing := AFTER.match(after):
        last, kept = place + 2, [*kept, nodes.Text(closing[0])]
        around.append(nodes.Text(after[closing.end() :]))
    if len(kept) > 1:
        parent[first:last] = [node for node in around if not isinstance(node, nodes.Text) or node]
        together.extend(kept)


def text_at(parent: nodes.Element, place: int) -> str:
    """The text that is the child of a node at this place; empty where there is none."""
    child = parent[place] if 0 <= place < len(parent) else None
    return child if isinstance(child, nodes.Text) else ""


class KeepTogether(SphinxPostTransform):
    """Applies `keep_together` to every formula of a page."""

    default_priority = 900
    formats = ("html",)

    def run(self, **_: Any) -> None:
        """Called by Sphinx."""
        for formula in list(self.document.findall(nodes.math)):
            keep_together(formula)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_post_transform(KeepTogether)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
