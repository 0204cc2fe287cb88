"""A browser and a server for the tests of built pages."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver import Chrome

HOST = "127.0.0.1"
# A browser by itself calls home; here nothing may, and no name of another host is resolved.
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    f"host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HOST}",
)
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not print what it serves."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder while the block runs; its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer((HOST, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{HOST}:{server.server_port}"
        server.shutdown()
        thread.join()


def started() -> Chrome:
    """A browser without window and with an empty profile."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        raise FileNotFoundError("chromium, chromedriver: not found; on Debian apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in SWITCHES:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(110)
    return browser


def show(browser: Chrome, address: str, *, theme: str = "light", size: str = "desktop") -> None:
    """Open a page as a reader whose system asks for this theme, on a screen of this size."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": size == "phone"})
    prefer(browser, theme)
    browser.get(address)


def prefer(browser: Chrome, theme: str) -> None:
    """Let the reader's system ask for this theme."""
    wish = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wish})


def requests_elsewhere(browser: Chrome) -> list[str]:
    """What was asked of other hosts since the last call."""
    asked = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    return [url for url in asked if urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname != HOST]


def errors(browser: Chrome) -> list[str]:
    """What the browser complained about since the last call: failed scripts, files that are not there."""
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in severe if "/favicon.ico" not in message]  # asked for by the browser, not by the page
