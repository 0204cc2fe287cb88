"""Built pages in a browser: Debian's Chromium, driven by Selenium, with the network cut. `make pages` runs these.

They need a built book and a browser, so all other tests run without them: nothing here is collected, and Selenium is
not imported, unless `PAGES` names the folder of the built pages.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if "PAGES" in os.environ else ["*.py"]


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built pages."""
    return Path(os.environ["PAGES"]).resolve()


@pytest.fixture(scope="session")
def site(book: Path) -> Iterator[str]:
    """The address under which the built pages are served."""
    import browsing

    with browsing.served(book) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One browser for all tests; `browsing.show` sets theme and screen anew each time."""
    import browsing

    driver = browsing.started()
    yield driver
    driver.quit()
