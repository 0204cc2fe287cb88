"""`[docs]` in a listing leads to where the name is documented: under its own module, or under the package."""

from docs_links import mended

MODULE = "isopo_mini.rules.rule_parts"
DOCUMENTED = {"isopo_mini.rules.Parts", f"{MODULE}.weigh", f"{MODULE}.Cut", f"{MODULE}.Cut.at", f"{MODULE}.rules.rules"}


def back(name: str) -> str:
    return f'<a class="viewcode-back" href="../../../book/appendix/api.html#{name}">[docs]</a>'


def test_links_lead_where_the_name_is_documented() -> None:
    for wrong, right in (
        ("isopo_mini.rules.weigh", f"{MODULE}.weigh"),
        ("isopo_mini.rules.Cut.at", f"{MODULE}.Cut.at"),
        ("isopo_mini.rules.Parts", "isopo_mini.rules.Parts"),  # was right
        (f"{MODULE}.weigh", f"{MODULE}.weigh"),  # was right
    ):
        assert mended(f"<p>{back(wrong)}</p>", MODULE, DOCUMENTED) == f"<p>{back(right)}</p>"


def test_a_name_that_nobody_documents_has_no_link() -> None:
    assert mended(f"<p>{back('isopo_mini.rules.elsewhere')}</p>", MODULE, DOCUMENTED) == "<p></p>"


def test_other_links_are_left_alone() -> None:
    body = '<a class="reference" href="api.html#isopo_mini.rules.weigh">weigh</a>'
    assert mended(body, MODULE, DOCUMENTED) == body
