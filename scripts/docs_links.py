"""Let `[docs]` in a module's listing lead to where the API documents the name; without a place, there is no link.

Sphinx takes the prefix of the first documented name of a module for all of them. Here one name may be documented as
`isopo_mini.rules.ISOPO` and its neighbour as `isopo_mini.rules.rule_parts.weigh`: of such a pair, one link led nowhere.
"""

import re
from collections.abc import Container
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LISTINGS = "_modules/"
BACK = re.compile(r'(?P<before><a class="viewcode-back" href="[^"#]*#)(?P<name>[^"]+)(?P<after>">\[docs\]</a>)')


def mended(body: str, module: str, documented: Container[str]) -> str:
    """The listing with every link that led nowhere led to the name in its own module, or gone if that has none."""

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        # The prefix that Sphinx chose is that of a package, so the name in the module begins after some of its dots.
        parts = name.split(".")
        tried = (name, *(".".join([module, *parts[i:]]) for i in range(1, len(parts))))
        found = next((one for one in tried if one in documented), None)
        return f"{match['before']}{found}{match['after']}" if found else ""

    return BACK.sub(link, body)


def mend(app: "Sphinx", page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Mend a listing before it is written."""
    if page.startswith(LISTINGS) and "body" in context:
        module = page.removeprefix(LISTINGS).replace("/", ".")
        context["body"] = mended(context["body"], module, app.env.domaindata["py"]["objects"])


def setup(app: "Sphinx") -> dict[str, bool]:
    """Register with Sphinx, after the theme and its like have had their say."""
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
