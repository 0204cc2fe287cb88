"""Where lines break: no line begins with the comma after a formula, and no long word is cut off."""

import browsing
import pytest
from selenium.webdriver import Chrome

# A formula and the mark after it, kept together in one span: which marks stand below the formula, at a line's start?
TORN = """const [done] = arguments, torn = [];
MathJax.startup.promise.then(() => {
    const kept = document.querySelectorAll('.bd-article .kept-together');
    for (const span of kept) {
        const set = span.querySelector('mjx-container'), mark = span.lastChild;
        if (!set || !set.getClientRects().length || mark.nodeType !== Node.TEXT_NODE) continue;
        const range = document.createRange();
        range.selectNodeContents(mark);
        const place = range.getBoundingClientRect(), formula = set.getBoundingClientRect();
        if (place.left < formula.right - 1) torn.push(span.textContent);
    }
    done([kept.length, torn]);
});"""
CUT = "return [...document.querySelectorAll('.prev-next-area a')].filter(a => a.scrollWidth > a.clientWidth).length"


@pytest.mark.parametrize("size", browsing.SIZES)
@pytest.mark.parametrize("page", ["neighbours/14_log_linear_npg", "isopo/07_one_backward_pass"])
def test_no_line_begins_with_the_mark_after_a_formula(browser: Chrome, site: str, page: str, size: str) -> None:
    browsing.show(browser, f"{site}/book/{page}.html", size=size)
    number, torn = browser.execute_async_script(TORN)
    assert number > 20
    assert torn == []


def test_the_titles_of_the_neighbouring_pages_are_whole_on_a_phone(browser: Chrome, site: str) -> None:
    browsing.show(browser, f"{site}/book/neighbours/19_constraints_and_many_objectives.html", size="phone")
    assert browser.execute_script(CUT) == 0
