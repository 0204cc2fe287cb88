"""The pictures one can move: mouse, keys and finger move them, and their numbers are the library's to 1e-6."""

import json

import browsing
import pytest
import torch
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.remote.webelement import WebElement

from isopo_mini.explorables import damping_numbers, simplex_paths, simplex_steps

TRIANGLES = ["book/foundations/02_fisher_metric.html", "book/isopo/05_fisher_normalised.html"]
DAMPING = "book/isopo/06_ntk_layerwise.html"
RULES = {"policy": "Policy gradient", "natural": "Natural gradient", "isopo": "ISOPO (Fisher)", "ppo": "PPO"}
# Both sides compute in double precision; what is left is rounding, and a threshold for an eigenvalue zero.
TOLERANCE = 1e-6


def opened(browser: Chrome, site: str, page: str, **how: str) -> WebElement:
    """The page's explorable, scrolled to the middle of the screen."""
    browsing.show(browser, f"{site}/{page}", **how)
    place = browser.find_element("css selector", ".explorable")
    browser.execute_script("arguments[0].scrollIntoView({block: 'start', behavior: 'instant'})", place)
    return place


def state(place: WebElement) -> dict:
    """What the picture shows, in all digits."""
    return json.loads(place.get_attribute("data-state"))


def shown(place: WebElement) -> dict[str, list[float]]:
    """The numbers of the picture's table, row by row; each cell's text must be its number, rounded."""
    rows = {}
    for row in place.find_elements("css selector", "tbody tr"):
        cells = row.find_elements("tag name", "td")
        numbers = [float(cell.get_attribute("data-value")) for cell in cells]
        texts = [f"{number:.4f}".replace("-0.0000", "0.0000").replace("-", "−") for number in numbers]
        assert [cell.text for cell in cells] == texts
        rows[row.get_attribute("data-row")] = numbers
    return rows


def assert_simplex_agrees(place: WebElement) -> None:
    """Every number of the table against the library, for the policy and the rewards that are shown."""
    now = state(place)
    probs, rewards = (torch.tensor(now[name], dtype=torch.float64) for name in ("pi", "rewards"))
    steps, paths = simplex_steps(probs, rewards, now["price"]), simplex_paths(probs, rewards)
    table = shown(place)
    assert list(table) == list(RULES)
    for key, rule in RULES.items():
        gain = (steps[rule] - probs) @ rewards
        divergence = probs @ (probs / steps[rule]).log()
        expected = [gain.item(), divergence.item(), (paths[rule][-1] @ rewards).item()]
        assert table[key] == pytest.approx(expected, abs=TOLERANCE), rule


@pytest.mark.parametrize("page", TRIANGLES)
def test_the_triangle_starts_with_the_numbers_of_the_cell(browser: Chrome, site: str, page: str) -> None:
    place = opened(browser, site, page)
    data = json.loads(place.find_element("tag name", "script").get_attribute("textContent"))
    assert state(place) == {"pi": data["probs"], "rewards": data["rewards"], "price": data["price"]}
    assert_simplex_agrees(place)


def test_mouse_and_keys_move_the_policy(browser: Chrome, site: str) -> None:
    place = opened(browser, site, TRIANGLES[0])
    handle, before = place.find_element("css selector", "[role=slider]"), state(place)["pi"]
    ActionChains(browser).drag_and_drop_by_offset(handle, -60, -45).perform()
    dragged = state(place)["pi"]
    assert dragged[0] > before[0] + 0.05
    assert dragged[2] > before[2] + 0.05
    assert_simplex_agrees(place)

    assert browser.switch_to.active_element == handle  # a click gives the keys
    handle.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    keyed = state(place)["pi"]
    change = [keyed[arm] - dragged[arm] for arm in range(3)]
    assert change == pytest.approx([-0.03, 0.05, -0.02], abs=0.003)
    assert f"arm 2: {100 * keyed[1]:.0f} %" in handle.get_attribute("aria-valuetext")
    assert_simplex_agrees(place)

    handle.send_keys(Keys.ARROW_UP * 60)  # into the corner and no further
    assert state(place)["pi"] == pytest.approx([0.01, 0.01, 0.98], abs=1e-9)
    assert_simplex_agrees(place)


def test_a_click_calls_the_policy_and_sliders_set_rewards_and_price(browser: Chrome, site: str) -> None:
    place = opened(browser, site, TRIANGLES[0])
    triangle = place.find_element("tag name", "svg")
    ActionChains(browser).move_to_element(triangle).click().perform()
    assert min(state(place)["pi"]) > 0.1
    for arm, keys in ((1, Keys.ARROW_LEFT * 7), (3, Keys.ARROW_RIGHT * 5)):
        place.find_element("name", f"reward-{arm}").send_keys(keys)
    price = place.find_element("name", "price")
    price.send_keys(Keys.HOME)
    now = state(place)
    assert now["rewards"] == pytest.approx([0.65, 0.7, 0.25])
    assert now["price"] == pytest.approx(0.002)
    assert price.get_attribute("aria-valuetext") == "0.002 nats"
    assert_simplex_agrees(place)


def test_nothing_moves_where_all_rewards_are_equal(browser: Chrome, site: str) -> None:
    place = opened(browser, site, TRIANGLES[0])
    for arm in (1, 2, 3):
        place.find_element("name", f"reward-{arm}").send_keys(Keys.HOME)
    assert state(place)["rewards"] == [0, 0, 0]
    for row in shown(place).values():
        assert row == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


def test_a_finger_drags_the_policy_and_scrolls_elsewhere(browser: Chrome, site: str) -> None:
    place = opened(browser, site, TRIANGLES[0], size="phone")
    handle, before = place.find_element("css selector", "[role=slider]"), state(place)["pi"]
    box = "const box = arguments[0].getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]"
    x, y = browser.execute_script(box, handle)
    touch(browser, (x, y), (x - 50, y - 40))
    dragged = state(place)["pi"]
    assert dragged[0] > before[0] + 0.05
    assert browser.execute_script("return arguments[0].getBoundingClientRect().height", handle) >= 24
    assert_simplex_agrees(place)

    scrolled = "return document.scrollingElement.scrollTop"
    was = browser.execute_script(scrolled)
    left = browser.execute_script("return arguments[0].getBoundingClientRect().x", place)
    touch(browser, (left + 20, y + 20), (left + 20, y - 120))
    assert browser.execute_script(scrolled) > was + 50
    assert state(place)["pi"] == dragged


def touch(browser: Chrome, start: tuple[float, float], end: tuple[float, float], moves: int = 8) -> None:
    """One finger down, along, and up."""

    def point(share: float) -> list[dict[str, float]]:
        x, y = (one + share * (other - one) for one, other in zip(start, end, strict=True))
        return [{"x": x, "y": y}]

    events = [
        ("touchStart", point(0)),
        *(("touchMove", point(i / moves)) for i in range(1, moves + 1)),
        ("touchEnd", []),
    ]
    for kind, points in events:
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def assert_damping_agrees(place: WebElement) -> dict[str, list[float]]:
    """Every number of the table against the library, for the damping that is shown; the table."""
    data = json.loads(place.find_element("tag name", "script").get_attribute("textContent"))
    advantages, rho, table = torch.tensor(data["advantages"], dtype=torch.float64), state(place)["rho"], shown(place)
    for column, gram in enumerate(data["grams"].values()):
        expected = damping_numbers(torch.tensor(gram, dtype=torch.float64), advantages, rho)
        assert {key: row[column] for key, row in table.items()} == pytest.approx(expected, abs=TOLERANCE)
    return table


def test_the_slider_lowers_the_damping_from_reinforce_to_the_natural_gradient(browser: Chrome, site: str) -> None:
    place = opened(browser, site, DAMPING)
    slider = place.find_element("name", "damping")
    middle = assert_damping_agrees(place)
    assert state(place)["rho"] == 1
    slider.send_keys(Keys.HOME)
    reinforce = assert_damping_agrees(place)
    assert state(place)["rho"] == pytest.approx(1e3)
    slider.send_keys(Keys.END)
    natural = assert_damping_agrees(place)
    assert state(place)["rho"] == pytest.approx(1e-3)
    assert slider.get_attribute("aria-valuetext") == "ρ = 0.0010"
    for column in range(len(middle["damping"])):
        assert reinforce["cosine_reinforce"][column] > middle["cosine_reinforce"][column]
        assert natural["cosine_natural"][column] > middle["cosine_natural"][column]
        assert reinforce["gradient_length"][column] > middle["gradient_length"][column]
        assert natural["natural_length"][column] > middle["natural_length"][column]
    slider.send_keys(Keys.ARROW_LEFT * 7)
    assert state(place)["rho"] == pytest.approx(10**-2.3)
    assert_damping_agrees(place)


def test_the_other_layer_has_another_spectrum(browser: Chrome, site: str) -> None:
    place = opened(browser, site, DAMPING)

    def dots() -> list[str]:
        return [dot.get_attribute("cy") for dot in place.find_elements("css selector", ".explorable-dots circle")]

    first = dots()
    place.find_element("name", "layer").send_keys(Keys.ARROW_DOWN)
    assert state(place)["layer"] == 1
    assert len(dots()) == len(first)
    assert dots() != first


@pytest.mark.parametrize("page", [*TRIANGLES, DAMPING])
def test_the_still_picture_is_for_paper_and_the_moving_one_for_the_screen(
    browser: Chrome, site: str, page: str
) -> None:
    place = opened(browser, site, page)
    still = browser.execute_script("return arguments[0].closest('.cell_output').querySelector('img, svg.still')", place)
    seen = "return arguments[0].getClientRects().length > 0"
    assert browser.execute_script(seen, place)
    assert not browser.execute_script(seen, still)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.execute_script(seen, place)
    assert browser.execute_script(seen, still)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("page", [*TRIANGLES, DAMPING])
def test_without_scripts_the_still_picture_stays(browser: Chrome, site: str, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        place = opened(browser, site, page)
        assert "this picture moves" in place.text
        pictures = browser.find_elements("css selector", ".cell_output:has(.explorable) img")
        assert [picture.is_displayed() for picture in pictures] == [True]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("page", [*TRIANGLES, DAMPING])
def test_a_phone_shows_all_of_it(browser: Chrome, site: str, page: str) -> None:
    place = opened(browser, site, page, size="phone")
    outside = """const frame = arguments[0].getBoundingClientRect();
    return [...arguments[0].querySelectorAll('svg, input, select, table, p')].filter(part => {
        const box = part.getBoundingClientRect();
        return box.left < frame.left || box.right > frame.right || box.width === 0;
    }).map(part => part.outerHTML.slice(0, 80))"""
    assert browser.execute_script(outside, place) == []
    frame = "const frame = arguments[0].getBoundingClientRect(); return frame.left >= 0 && frame.right <= innerWidth"
    assert browser.execute_script(frame, place)


@pytest.mark.parametrize("page", [*TRIANGLES, DAMPING])
def test_it_stands_on_the_pages_own_ground(browser: Chrome, site: str, page: str) -> None:
    """The theme lays what a cell writes on a light plate in the dark, where the picture's light lines would vanish."""
    place = opened(browser, site, page, theme="dark")
    ground = "return getComputedStyle(arguments[0].parentElement).backgroundColor"
    assert browser.execute_script(ground, place) in ("rgba(0, 0, 0, 0)", "transparent")
    light = "return getComputedStyle(arguments[0]).color.match(/\\d+/g).slice(0, 3).every(part => part > 120)"
    assert browser.execute_script(light, place)
