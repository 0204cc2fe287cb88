"""A formula and the marks that touch it are one piece, which no line is broken in."""

import pytest
from docutils import nodes
from formula_marks import keep_together


def paragraph(*parts: str) -> nodes.paragraph:
    """Texts, and formulas between dollars."""
    made = nodes.paragraph()
    made += [nodes.math("", part.strip("$")) if part.startswith("$") else nodes.Text(part) for part in parts]
    return made


def written(node: nodes.Node) -> str:
    """The same again, with what is kept together between braces."""
    if isinstance(node, nodes.math):
        return f"${node.astext()}$"
    if isinstance(node, nodes.Text):
        return node.astext()
    inside = "".join(map(written, node.children))
    return f"{{{inside}}}" if "kept-together" in node.get("classes", []) else inside


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("For ", "$x$", ", and"), "For {$x$,} and"),
        (("for all (", "$x$", ") and ", "$y$", "."), "for all {($x$)} and {$y$.}"),
        (("“", "$x$", "”"), "{“$x$”}"),
        (("$x$", ",", "$y$", "; so"), "{$x$,}{$y$;} so"),
        (("of ", "$x$", " and (see) ", "$y$", " alone"), "of $x$ and (see) $y$ alone"),
        (("$x$",), "$x$"),
    ],
)
def test_marks_stay_with_their_formula(parts: tuple[str, ...], expected: str) -> None:
    made = paragraph(*parts)
    text = made.astext()
    for formula in list(made.findall(nodes.math)):
        keep_together(formula)
    assert written(made) == expected
    assert made.astext() == text
    assert all(child.parent is node for node in made.findall(nodes.Element) for child in node.children)
