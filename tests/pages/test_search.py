"""What a reader types into the search field leads to the page that is about it, before all that mention it."""

import browsing
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait

# The page of results says how many there are when all of them stand there.
SAID = "return document.querySelector('#search-results .search-summary')?.textContent ?? ''"
FOUND = "return [...document.querySelectorAll('#search-results ul.search > li > a')].map(link => link.pathname)"
FIRST = {
    "own model": "book/appendix/your_own_model",
    "your own model": "book/appendix/your_own_model",
    "install": "book/appendix/install",
    "how to teach": "book/teaching/how_to_teach",
    "Fisher metric": "book/foundations/02_fisher_metric",
    "importance sampling": "book/neighbours/17_importance_sampling",
    "damping": "book/foundations/03_natural_gradient",  # the title of a section
}


@pytest.mark.parametrize(("query", "page"), FIRST.items())
def test_the_first_answer_is_the_page_about_it(browser: Chrome, site: str, query: str, page: str) -> None:
    browsing.show(browser, f"{site}/search.html?q={query.replace(' ', '+')}")
    WebDriverWait(browser, 60).until(lambda opened: "found" in opened.execute_script(SAID))
    assert browser.execute_script(FOUND)[0] == f"/{page}.html"
