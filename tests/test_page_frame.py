"""What stands around a page's text: its description, the version it was made from, and no script that nobody uses."""

from types import SimpleNamespace
from typing import Any

import build_facts
import page_frame
import pytest
from docutils import nodes
from docutils.core import publish_doctree

LONG = "A step is measured by what it does to the policy, and not by what it does to its parameters."


def described(text: str) -> str:
    """The description of a page with this text, which stands in a section as every page's does."""
    document = publish_doctree(f"A title\n=======\n\n{text}\n", settings_overrides={"doctitle_xform": False})
    return page_frame.description(document)


def test_a_page_is_described_by_its_first_paragraph_that_says_something() -> None:
    assert described(f"Short.\n\n{LONG}\n\nAnother paragraph that is long enough to describe a page.") == LONG
    assert described(f"- a point of a list that is long enough to be a paragraph\n\n{LONG}") == LONG
    assert described(f"A paragraph with a formula, :math:`x`, which no search machine can show.\n\n{LONG}") == LONG
    assert described("Short.") == ""


def test_a_long_description_is_cut_at_a_word() -> None:
    said = described(" ".join([LONG] * 5))
    assert page_frame.LENGTH - 20 < len(said) <= page_frame.LENGTH + 2
    assert said.endswith(" …")
    assert set(said.removesuffix(" …").split()) <= set(LONG.split())


def test_what_a_search_machine_reads_is_escaped_and_empty_parts_are_left_out() -> None:
    said = page_frame.metatags('The "Fisher" metric', "a < b", "A book")
    assert '<meta name="description" content="a &lt; b" />' in said
    assert '<meta property="og:title" content="The &quot;Fisher&quot; metric" />' in said
    assert "description" not in page_frame.metatags("A title", "", "A book")


@pytest.mark.parametrize("commit", ["0123456789ab", "0123456789ab+", "unknown"])
def test_every_page_says_its_commit_and_whether_it_was_changed_since(
    commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_facts.provenance()
    made["code"]["commit"] = commit
    monkeypatch.setattr(build_facts, "provenance", lambda: made)
    config = SimpleNamespace(html_theme_options={"navbar_persistent": []})
    page_frame.say_version(None, config)
    version = build_facts.read_address().version
    assert config.html_theme_options["extra_footer"] == f"<p>isopo_mini {version}, commit {commit}</p>"
    assert config.html_theme_options["navbar_persistent"] == [], "the theme's other options stay"
    assert ("isopo_mini", f"{version}, commit {commit}") in build_facts.facts()


def test_the_scripts_of_thebe_are_left_out() -> None:
    kept = SimpleNamespace(filename="wide_parts.js", attributes={})
    gone = [SimpleNamespace(filename="sphinx-thebe.js", attributes={}), "_static/sphinx-thebe.css"]
    written_out = SimpleNamespace(filename=None, attributes={"body": "const THEBE_JS_URL = '…'"})
    context: dict[str, Any] = {"script_files": [kept, gone[0], written_out], "css_files": ["book.css", gone[1]]}
    page_frame.frame(None, "page", "page.html", context, None)
    assert context == {"script_files": [kept], "css_files": ["book.css"]}


def test_a_page_gets_its_description_beside_what_others_say_of_it() -> None:
    document = publish_doctree(f"A title\n=======\n\n{LONG}\n", settings_overrides={"doctitle_xform": False})
    book = SimpleNamespace(
        env=SimpleNamespace(titles={"page": nodes.title(text="A title")}), config=SimpleNamespace(html_title="A book")
    )
    context: dict[str, Any] = {"metatags": "<meta name='theirs'>"}
    page_frame.frame(book, "page", "page.html", context, document)
    assert context["metatags"].startswith("<meta name='theirs'>")
    assert f'<meta name="description" content="{LONG}" />' in context["metatags"]
    assert '<meta property="og:site_name" content="A book" />' in context["metatags"]
