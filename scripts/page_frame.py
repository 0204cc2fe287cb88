"""A Sphinx extension: what stands around a page's text.

- For search machines and for whoever gets a link: a description, from the first paragraph, and Open Graph's title.
- In the footer: the version and the commit that the page was made from.
- Not there: the scripts of Thebe, which the theme loads twice and this book never uses.
"""

from html import escape
from typing import Any

from build_facts import version_and_commit
from docutils import nodes

LENGTH = 200  # about what is shown of a description


def description(document: nodes.document) -> str:
    """The first paragraph of a page that says something, cut at a word; formulas are left out."""
    for paragraph in document.findall(nodes.paragraph):
        in_text = isinstance(paragraph.parent, nodes.section)  # not in a list
        if in_text and paragraph.next_node(nodes.math) is None and len(paragraph.astext()) > 40:
            words = " ".join(paragraph.astext().split())
            return words if len(words) <= LENGTH else words[:LENGTH].rsplit(" ", 1)[0] + " …"
    return ""


def say_version(app: Any, config: Any) -> None:
    """Called once: the line of the footer."""
    line = f"isopo_mini {version_and_commit()}"
    config.html_theme_options = config.html_theme_options | {"extra_footer": f"<p>{escape(line)}</p>"}


def metatags(title: str, text: str, site: str) -> str:
    """A description, and Open Graph's title, description, kind and site."""
    named = [("name", "description", text)] if text else []
    graph = {"title": title, "description": text, "type": "article", "site_name": site}
    named += [("property", f"og:{name}", value) for name, value in graph.items() if value]
    return "".join(f'\n<meta {kind}="{name}" content="{escape(value)}" />' for kind, name, value in named)


def is_thebe(script: Any) -> bool:
    """Whether a script or style sheet belongs to Thebe."""
    attributes = getattr(script, "attributes", {})
    return "thebe" in f"{getattr(script, 'filename', script)} {attributes.get('body', '')}".lower()


def frame(app: Any, page: str, template: str, context: dict[str, Any], document: nodes.document | None) -> None:
    """Called for every page, after the other extensions have had their say."""
    if document is not None:
        title = app.env.titles[page].astext() if page in app.env.titles else context.get("title", "")
        context["metatags"] = context.get("metatags", "") + metatags(
            title, description(document), app.config.html_title
        )
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, []) if not is_thebe(file)]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", say_version, priority=900)
    app.connect("html-page-context", frame, priority=900)
    app.add_js_file("wide_parts.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
