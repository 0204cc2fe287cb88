"""The printed book: names that hold in one file, links that lead inside it, solutions taken to the end."""

import make_pdf
import pytest
from bs4 import BeautifulSoup

PAGE = """
<html><body><nav>sidebar</nav><article class="bd-article"><section id="one"><h1>1. One<a class="headerlink">#</a></h1>
<div id="figure-1"><img alt="A line." src="../../_images/a.svg"></div>
<p><a href="#figure-1">Figure 1</a>, <a href="../b/02_two.html#table-2">Table 2</a>, <a href="../b/02_two.html">two</a>,
<a href="../../_modules/x.html">source</a>, <a href="https://arxiv.org/abs/1">paper</a></p>
<div class="cell"><details class="admonition hide above-input"><summary>Show</summary>setup</details></div>
<details><summary>Solution</summary><p>Because.</p></details>
</section></article></body></html>
"""


def test_names_and_links_hold_in_one_file() -> None:
    text = make_pdf.article("book/a/01_one", PAGE, {"book/a/01_one", "book/b/02_two"})
    assert text["id"] == "book.a.01_one"
    assert [part["id"] for part in text.select("[id]")] == ["book.a.01_one--one", "book.a.01_one--figure-1"]
    assert [link.get("href") for link in text.select("a")] == [
        "#book.a.01_one--figure-1",
        "#book.b.02_two--table-2",
        "#book.b.02_two",
        None,
        "https://arxiv.org/abs/1",
    ]
    assert text.select_one("img")["src"] == "_images/a.svg"
    assert "setup" not in text.get_text()
    assert "sidebar" not in text.get_text()


def test_solutions_are_taken_out_and_unfolded() -> None:
    text = make_pdf.article("book/a/01_one", PAGE, {"book/a/01_one"})
    (solution,) = make_pdf.take_solutions(text)
    assert solution.name == "div"
    assert solution.get_text().strip() == "Because."
    assert "Because" not in text.get_text()
    assert "stands at the end of the book" in text.get_text()


def test_a_page_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match=r"book/a: expected a built page with an <article>, got none"):
        make_pdf.article("book/a", str(BeautifulSoup("<p></p>", "html.parser")), set())


def test_every_page_of_the_table_of_contents_is_printed() -> None:
    pages = make_pdf.pages()
    assert pages[0] == "book/index"
    assert "book/appendix/api/tasks" in pages
    assert len(pages) == len(set(pages))
