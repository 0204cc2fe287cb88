"""Every built page for readers with a keyboard, a screen reader, or weak eyes; and nothing comes from another host."""

import os
from importlib.resources import files
from pathlib import Path

import browsing
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.support.ui import WebDriverWait

BOOK = Path(os.environ["PAGES"]).resolve()
# The listings under _modules are pages of one kind: one stands for all.
LISTINGS = sorted(BOOK.glob("_modules/isopo_mini/batch.html"))
PAGES = sorted([*BOOK.glob("book/**/*.html"), *BOOK.glob("*.html"), *LISTINGS])

# What others write into the pages and no setting changes: axe's rule, by what its place is known, and why it may stay.
LEFT = {
    # docutils marks up a bibliography so. A screen reader passes over the roles; the text and its order are right.
    "aria-required-children": 'class="citation-list"',
    "aria-allowed-role": 'role="doc-biblioentry"',
    "aria-deprecated-role": 'role="doc-biblioentry"',
    "region": 'class="sidebar-primary-item"',  # the theme's sidebar is no landmark, though its list of chapters is one
    # Sphinx puts the arguments of a long signature into a list of descriptions that describe nothing.
    "definition-list": "<dl>",
    "empty-table-header": "<th></th>",  # pandas: the corner above the index says nothing, and there is nothing to say
}
NEEDED: set[str] = set()  # of these, those that a page has needed
LOOKED_AT: set[Path] = set()

# A formula brings hundreds of elements, and a listing one for every word. axe looks at one of each kind of word; a
# formula is left out, since MathJax writes what a screen reader says beside it, and a test of one page looks at that.
# Colours that are on their way from one theme to the other are not looked at.
THIN = """
const still = document.createElement('style');
still.textContent = '*, *::before, *::after { transition: none !important; animation: none !important; }';
document.head.append(still);
for (const formula of document.querySelectorAll('mjx-container')) formula.replaceWith('formula');
const seen = new Set();
for (const word of document.querySelectorAll('pre span, dt.sig span, code span')) {
  const kind = [word.className, getComputedStyle(word).color, word.closest('pre') !== null].join();
  if (word.children.length === 0 && word.closest('a, th') === null && seen.has(kind)) word.remove();
  seen.add(kind);
}
"""
THEME = "return document.documentElement.dataset.theme"
RUN = "const done = arguments[arguments.length - 1]; axe.run(document, arguments[0]).then(done, e => done(String(e)))"


def name(path: Path) -> str:
    return path.relative_to(BOOK).as_posix()


def violations(browser: Chrome, options: dict) -> list[str]:
    """What axe finds on the page that is open: rule, what it says, and the first places."""
    browser.execute_script(THIN)
    browser.execute_script((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    # Without preload: axe would fetch style sheets again, and look for what they import beside the page.
    found = browser.execute_async_script(RUN, {"resultTypes": ["violations"], "preload": False, **options})
    assert isinstance(found, dict), found
    places = [(rule, place["html"]) for rule in found["violations"] for place in rule["nodes"]]
    left = [(rule, html) for rule, html in places if LEFT.get(rule["id"], "nothing") in html]
    NEEDED.update(rule["id"] for rule, _ in left)
    wrong = [place for place in places if place not in left]
    return [f"{rule['id']} ({rule['impact']}): {rule['help']}, at {html[:200]}" for rule, html in wrong]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_axe_finds_nothing_in_either_theme_and_nothing_comes_from_elsewhere(
    browser: Chrome, site: str, path: Path
) -> None:
    browsing.errors(browser), browsing.requests_elsewhere(browser)  # of the page before
    browsing.show(browser, f"{site}/{name(path)}")
    assert violations(browser, {}) == []
    browsing.prefer(browser, "dark")  # the theme follows the reader's system
    WebDriverWait(browser, 20).until(lambda page: page.execute_script(THEME) == "dark")
    assert violations(browser, {"runOnly": ["color-contrast"]}) == []
    assert browsing.requests_elsewhere(browser) == []
    assert browsing.errors(browser) == []
    LOOKED_AT.add(path)


def test_every_exception_is_still_needed() -> None:
    if set(PAGES) != LOOKED_AT:
        pytest.skip("not every page has been looked at")
    assert set(LEFT) == NEEDED


def test_formulas_are_read_out(browser: Chrome, site: str) -> None:
    browsing.show(browser, f"{site}/book/index.html")
    ready = "const done = arguments[0]; MathJax.startup.promise.then(() => done(true))"
    assert browser.execute_async_script(ready)
    spoken = browser.execute_script("return [...document.querySelectorAll('mjx-assistive-mml math')].length")
    assert spoken == browser.execute_script("return document.querySelectorAll('mjx-container').length") > 0


FORMULAS = """
const hidden = part => part.scrollWidth > part.clientWidth + 1;
const done = arguments[0];
MathJax.startup.promise.then(() => requestAnimationFrame(() => requestAnimationFrame(() => {
  const wide = [...document.querySelectorAll('.bd-article div.math')].filter(hidden);
  const fading = [...document.querySelectorAll('.bd-article div.math.has-more')];
  const inner = [...document.querySelectorAll('div.math > mjx-container')].filter(
    part => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(part).overflowX) && hidden(part));
  const reached = wide.filter(part => part.tabIndex === 0).length;
  wide.forEach(part => { part.scrollLeft = part.scrollWidth; });
  setTimeout(() => done({wide: wide.length, fading: fading.length, reached, inner: inner.length,
    left: document.querySelectorAll('.bd-article div.math.has-more').length}), 500);
})));
"""


def test_a_formula_wider_than_a_phone_fades_until_it_is_scrolled_to_its_end(browser: Chrome, site: str) -> None:
    browsing.show(browser, f"{site}/book/neighbours/16_mirror_descent_and_norms.html", size="phone")
    found = browser.execute_async_script(FORMULAS)
    assert found["wide"] > 0
    assert found == {"wide": found["wide"], "fading": found["wide"], "reached": found["wide"], "inner": 0, "left": 0}


STOP = """
const at = document.activeElement;
return {
  inside: at.closest('.explorable') !== null,
  sidebar: at.closest('.bd-links') !== null,
  name: at.name || at.getAttribute('role') || '',
  says: [at.getAttribute('aria-label'), at.title, at.placeholder, at.textContent].join(' ').trim().slice(0, 80),
  seen: at.getClientRects().length > 0,
};
"""


def test_the_keyboard_reaches_search_sidebar_and_the_picture_that_moves(browser: Chrome, site: str) -> None:
    browsing.show(browser, f"{site}/book/foundations/02_fisher_metric.html")
    stops = []
    while not (stops and stops[-1]["name"] == "price") and len(stops) < 400:
        ActionChains(browser).send_keys(Keys.TAB).perform()
        stops.append(browser.execute_script(STOP))
    assert stops[0]["says"] == "Skip to main content"
    assert all(stop["seen"] for stop in stops)
    said = [stop["says"].lower() for stop in stops]
    search = next(i for i, text in enumerate(said) if "search" in text)
    sidebar = next(i for i, stop in enumerate(stops) if stop["sidebar"])
    assert 0 < search < sidebar
    order = [stop["name"] for stop in stops if stop["inside"]]
    assert order == ["slider", "reward-1", "reward-2", "reward-3", "price"]


def test_the_skip_link_leads_to_the_text(browser: Chrome, site: str) -> None:
    browsing.show(browser, f"{site}/book/foundations/02_fisher_metric.html")
    ActionChains(browser).send_keys(Keys.TAB, Keys.ENTER).perform()
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.closest('main, #main-content') !== null")
