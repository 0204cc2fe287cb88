"""Tables that the book's extensions make: what a link is called, the order of chapters, and what each of them took."""

from types import SimpleNamespace
from typing import Any

import api_summary
import claims_page
import page_tables
import pytest
import run_times
from docutils import nodes

TITLES = {"book/index": "Start", "book/a/02_two": "Two", "book/b/10_ten": "Ten", "book/b/map": "The map"}
PAGE = "book/teaching/page"


def result(seconds: float | None) -> dict[str, Any]:
    return {"exec_data": {"runtime": seconds, "succeeded": True}}


@pytest.fixture
def app() -> Any:
    """A build of four pages, of which two have run; links are relative to a page two folders down."""
    titles = {page: nodes.title(text=title) for page, title in TITLES.items()}
    metadata = {"book/b/10_ten": result(20.4), "book/a/02_two": result(1.6), "book/b/map": {"exec_table": True}}
    metadata["book/index"] = result(None)  # what failed has no time
    env = SimpleNamespace(titles=titles, nb_metadata=metadata)
    builder = SimpleNamespace(get_relative_uri=lambda page, other: f"../../{other}.html")
    return SimpleNamespace(env=env, builder=builder)


def texts(made: nodes.Node) -> list[list[str]]:
    """The cells of a table, row by row."""
    return [[entry.astext() for entry in row.findall(nodes.entry)] for row in made.findall(nodes.row)]


def page_with(place: nodes.Element) -> nodes.document:
    document = nodes.document(None, None)
    document += place
    return document


def test_a_link_has_the_number_that_the_file_has(app: Any) -> None:
    link = page_tables.link_to(app, PAGE, "book/a/02_two")
    assert (link.astext(), link["refuri"]) == ("2. Two", "../../book/a/02_two.html")
    assert page_tables.link_to(app, PAGE, "book/b/map").astext() == "The map"
    unbuilt = page_tables.link_to(app, PAGE, "book/b/11_eleven")
    assert isinstance(unbuilt, nodes.Text)
    assert unbuilt == "book/b/11_eleven"


def test_a_table_has_its_heads_its_rows_and_its_look() -> None:
    made = page_tables.table(["a", "b"], [75, 25], [[nodes.Text("1"), nodes.literal(text="2")]], look="own")
    assert texts(made) == [["a", "b"], ["1", "2"]]
    assert made["classes"] == ["own"]
    assert [spec["colwidth"] for spec in made.findall(nodes.colspec)] == [75, 25]
    assert [spec.astext() for spec in made.findall(nodes.literal)] == ["2"]


def test_run_times_stand_in_the_books_order_with_their_sum(app: Any) -> None:
    document = page_with(run_times.run_times())
    run_times.fill(app, document, PAGE)
    assert texts(document) == [
        ["chapter", "seconds"],
        ["2. Two", "2"],
        ["10. Ten", "20"],
        ["all, one after the other", "22"],
    ]


def test_where_nothing_has_run_there_is_no_table(app: Any) -> None:
    app.env.nb_metadata = {}
    document = page_with(run_times.run_times())
    run_times.fill(app, document, PAGE)
    assert document.astext() == run_times.NOTHING


RECORDS = [
    {"chapter": "book/a/02_two.ipynb", "cell": 3, "claim": "a < b", "left": 1.0, "sign": "<", "right": 2.0}
    | {"slack": 0.5, "elsewhere": 0.123},
    {"chapter": "book/a/02_two.ipynb", "cell": 4, "claim": "c <= d", "left": 3.0, "sign": "<=", "right": 3.5}
    | {"slack": 0.0345, "elsewhere": 0.0123},
    {"chapter": "book/b/10_ten.ipynb", "cell": 1, "claim": "e is f", "elsewhere": None},
]


def test_claims_are_told_by_chapter_and_summed_up(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_page, "claims", lambda: RECORDS)
    document = page_with(claims_page.claims_table(summary=False))
    claims_page.fill(app, document, PAGE)
    assert [rubric.astext() for rubric in document.findall(nodes.rubric)] == ["2. Two", "10. Ten"]
    assert [row for row in texts(document) if row[0] != "cell"] == [
        ["3", "a < b", "1 < 2", "50 %", "12 %"],
        ["4", "c <= d", "3 ≤ 3.5", "3.5 %", "1.2 %"],
        ["1", "e is f", "–", "–", "–"],
    ]
    document = page_with(claims_page.claims_table(summary=True))
    claims_page.fill(app, document, PAGE)
    assert texts(document)[1:] == [["2. Two", "2", "1.2 %"], ["10. Ten", "1", "–"]]


def test_without_records_the_page_of_claims_says_so(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_page, "claims", list)
    for summary in (False, True):
        document = page_with(claims_page.claims_table(summary=summary))
        claims_page.fill(app, document, PAGE)
        assert document.astext() == claims_page.NOTHING


def test_the_api_is_summed_up_by_first_lines_and_without_methods(app: Any) -> None:
    def entry(objtype: str, page: str = "book/api", aliased: bool = False) -> Any:
        return SimpleNamespace(docname=page, node_id="place", objtype=objtype, aliased=aliased)

    library = "isopo_mini.batch"
    objects = {
        f"{library}.Batch": entry("class"),
        f"{library}.Batch.select": entry("method"),
        f"{library}.other": entry("function", page="book/other"),
        "isopo_mini.Batch": entry("class", aliased=True),
    }
    app.env.domaindata = {"py": {"objects": objects}}
    document = page_with(api_summary.api_summary(page="book/api"))
    api_summary.fill(app, document, PAGE)
    from isopo_mini.batch import Batch

    first = (Batch.__doc__ or "").strip().splitlines()[0].replace("`", "")
    assert texts(document) == [["name", "what it does"], ["Batch", first]]
    (link,) = document.findall(nodes.reference)
    assert link["refuri"] == "../../book/api.html#place"
