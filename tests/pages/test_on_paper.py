"""Built pages on paper: nothing to click, nothing cut off at the edge; and the whole book as one file holds."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import browsing
import make_pdf
import pytest
from bs4 import BeautifulSoup
from selenium.webdriver import Chrome

CHAPTER = "book/experiments/12_head_to_head.html"  # long code, wide tables, folded cells
# Of these, what takes up room; and code that is wider than its box.
SHOWN = """return [...document.querySelectorAll(arguments[0])].filter(part => part.getClientRects().length)
    .map(part => part.outerHTML.slice(0, 80))"""
CUT = """return [...document.querySelectorAll('.bd-article div.highlight pre')].filter(
    part => part.getClientRects().length && part.scrollWidth > part.clientWidth + 1).map(part => part.textContent)"""


@pytest.fixture
def paper(browser: Chrome, site: str) -> Iterator[Chrome]:
    """The chapter as it is printed, on a sheet that is as wide as A4 without its margins."""
    browsing.show(browser, f"{site}/{CHAPTER}")
    sheet = {"width": 673, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sheet)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    yield browser
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_nothing_to_click_is_printed(paper: Chrome) -> None:
    clicked = ".bd-article :is(button.copybtn, details.hide:not([open]))"
    assert paper.execute_script("return document.querySelectorAll(arguments[0]).length", clicked) > 0
    assert paper.execute_script(SHOWN, clicked) == []


def test_code_is_not_cut_off(paper: Chrome) -> None:
    assert paper.execute_script("return document.querySelectorAll('.bd-article div.highlight pre').length") > 0
    assert paper.execute_script(CUT) == []


def test_no_table_fades_out(paper: Chrome) -> None:
    """On a screen the mask says that more can be scrolled to."""
    paper.execute_script("document.querySelector('.bd-article table').classList.add('has-more')")
    mask = "return getComputedStyle(document.querySelector('.bd-article table.has-more')).maskImage"
    assert paper.execute_script(mask) == "none"
    paper.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen"})
    assert "gradient" in paper.execute_script(mask)


@pytest.fixture(scope="module")
def one_file(book: Path) -> BeautifulSoup:
    """What `make pdf` prints."""
    return BeautifulSoup(make_pdf.one_page(html=book), "html.parser")


def test_in_one_file_every_name_stands_once_and_every_link_leads_to_one(one_file: BeautifulSoup) -> None:
    names = [str(part["id"]) for part in one_file.select("[id]")]
    assert [name for name, times in Counter(names).items() if times > 1] == []
    links = {str(link["href"]).removeprefix("#") for link in one_file.select('a[href^="#"]')}
    assert len(links) > 100
    assert links - set(names) == set()


def test_in_one_file_pictures_and_style_sheets_are_found(one_file: BeautifulSoup, book: Path) -> None:
    loaded = {str(part["src"]) for part in one_file.select("img[src], script[src]")}
    loaded |= {str(part["href"]) for part in one_file.select("link[href]")}
    assert [path for path in loaded if not path.startswith("data:") and not (book / path).is_file()] == []


def test_in_one_file_solutions_stand_at_the_end(one_file: BeautifulSoup) -> None:
    assert one_file.select("details") == []
    places = one_file.find_all("em", string="The solution stands at the end of the book.")
    solutions = one_file.select_one("#solutions")
    assert solutions is not None
    assert len(places) == len(solutions.select("hr")) > 20
