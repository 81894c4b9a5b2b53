"""One headless Chromium for a module of tests; and what it has asked the network for."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,900",
)
PATIENCE_S = 20.0


class Browser:
    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def js(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def until(self, script: str, what: str = "") -> Any:
        """What the script returns as soon as it is truthy."""
        over = time.monotonic() + PATIENCE_S
        while time.monotonic() < over:
            if found := self.js(script):
                return found
            time.sleep(0.02)
        raise AssertionError(
            f"{what or script} did not come; the page says: {self.text()[:2000]}\n{self.complaints()}"
        )

    def open(self, url: str, shown: str | None = None) -> None:
        """A page of its own, until it shows what is asked for."""
        self.driver.get("about:blank")
        self.driver.get(url)
        wanted = json.dumps(shown)
        self.until(
            f"document.documentElement.dataset.shown{f' === {wanted}' if shown is not None else ' !== undefined'}",
            url,
        )

    def go(self, place: str, shown: str) -> None:
        self.js(f"void (location.hash = {json.dumps(place)})")
        self.until(f"document.documentElement.dataset.shown === {json.dumps(shown)}", shown)

    def text(self) -> str:
        return str(self.js("document.body.innerText"))

    def waits_for(self, text: str) -> None:
        self.until(f"document.body.innerText.includes({json.dumps(text)})", text)

    def click(self, selector: str, text: str = "") -> None:
        all_, wanted = f"[...document.querySelectorAll({json.dumps(selector)})]", json.dumps(text)
        found = f"{all_}.find((each) => each.textContent.includes({wanted}))"
        self.until(
            f"(({{ it }}) => (it && it.click(), Boolean(it)))({{ it: {found} }})", f"{selector} with {text}"
        )

    def key(self, key: str) -> None:
        self.driver.switch_to.active_element.send_keys(key)

    def cdp(self, command: str, **about: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, about)

    def size(self, width: int, height: int = 900) -> None:
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def prefers(self, scheme: str) -> None:
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def shoot(self, path: Path, height: int = 4000) -> None:
        width = self.js("innerWidth")
        clip = {
            "x": 0,
            "y": 0,
            "width": width,
            "height": min(height, self.js("document.documentElement.scrollHeight")),
            "scale": 1,
        }
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Of the console, since the last time."""
        return [
            f"{line['level']}: {line['message']}"
            for line in self.driver.get_log("browser")
            if line["level"] != "INFO"
        ]

    def asked_for(self) -> list[str]:
        """Every address that was asked for, since the last time."""
        found = []
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(str(message["params"]["request"]["url"]))
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs the Debian packages chromium and chromium-driver")
    selenium = pytest.importorskip("selenium", reason="needs selenium, of the dev extra")
    del selenium
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    try:
        found.set_page_load_timeout(30)
        found.set_script_timeout(30)
        yield Browser(found)
    finally:
        found.quit()
