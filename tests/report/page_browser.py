"""A headless Chromium over a page on the disk: what it asked for, what it complained of, what it shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One window; every page begins with its own logs."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load ``page`` in a window of that size and colour scheme, with nothing remembered from before."""
        self.media(scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.complaints(), self.requests()
        self.driver.get(page.as_uri())
        if self.run("const kept = localStorage.length; localStorage.clear(); return kept"):
            self.driver.get("about:blank")
            self.complaints(), self.requests()
            self.driver.get(page.as_uri())

    def media(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, what: str) -> Any:
        """Wait until ``script`` returns something true, and return it."""
        return WebDriverWait(self.driver, 60, 0.05).until(lambda driver: driver.execute_script(script), what)

    def draw_everything(self) -> int:
        """Open every model and bring every plot into view; return how many are drawn."""
        self.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        wanted = "[...document.querySelectorAll('.panels, .cards .plot, .histograms')]"
        for index in range(self.run(f"return {wanted}.length")):
            self.run(f"{wanted}[{index}].scrollIntoView()")
            self.until(f"return {wanted}[{index}].querySelector('svg') !== null", f"plot {index}")
        return int(self.run("return document.querySelectorAll('.plot svg').length"))

    def draw_near(self) -> None:
        """Wait for the plots in view and near it, which draw themselves."""
        shown = "(({top, bottom}) => bottom > 0 && top < innerHeight)(e.getBoundingClientRect())"
        near = f"[...document.querySelectorAll('.plot')].filter(e => e.offsetParent && {shown})"
        self.until(f"return {near}.every(e => e.querySelector('svg') !== null)", "plots in view")

    def click(self, selector: str, index: int = 0) -> None:
        """Click as a finger does: where the element is, whatever lies on top of it."""
        self.run(
            "document.querySelectorAll(arguments[0])[arguments[1]].scrollIntoView({block: 'center'})", selector, index
        )
        self.driver.find_elements("css selector", selector)[index].click()

    def texts(self, selector: str) -> list[str]:
        """Return the text of every element that is shown."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.textContent)"
        )
        return list(self.run(script, selector))

    def complaints(self) -> list[str]:
        """Return what the console said since the last look."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses asked for since the last look."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def browser(make: Callable[..., webdriver.Chrome] = webdriver.Chrome) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = make(options=options, service=Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
