"""Let `[docs]` in a module's listing lead to where the API documents the name.

Sphinx takes the prefix of the first documented name of a module for all of them. Here one name may be documented as
`isopo_mini.rules.ISOPO` and its neighbour as `isopo_mini.rules.rule_parts.weigh`: of such a pair, one link led nowhere.
"""

import re
from collections.abc import Container
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LISTINGS = "_modules/"
BACK = re.compile(r'(?P<before><a class="viewcode-back" href="[^"#]*#)(?P<name>[^"]+)')


def mended(body: str, module: str, documented: Container[str]) -> str:
    """The listing with every link that leads nowhere led to the name in its own module, if it is documented there."""

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        if name in documented:
            return match[0]
        # The prefix that Sphinx chose is that of a package, so the name in the module begins after some of its dots.
        parts = name.split(".")
        own = next((own for i in range(1, len(parts)) if (own := ".".join([module, *parts[i:]])) in documented), name)
        return match["before"] + own

    return BACK.sub(link, body)


def mend(app: "Sphinx", page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Mend a listing before it is written."""
    if page.startswith(LISTINGS) and "body" in context:
        module = page.removeprefix(LISTINGS).replace("/", ".")
        context["body"] = mended(context["body"], module, app.env.domaindata["py"]["objects"])


def setup(app: "Sphinx") -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
