"""The live page in a real Chromium without a screen, as a person uses it."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image

pytest.importorskip("selenium", reason="selenium is not installed: pip install 'foveate[dev]'")

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

__all__ = ["ActionChains", "Keys", "LivePage", "chromium", "write_camera_file"]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
WAIT_S = 60.0
T = TypeVar("T")


class LivePage:
    """The page in a browser.

    Attributes:
        driver: Selenium's.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load the page anew, and forget what the last one logged."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)

    def connected(self, url: str) -> None:
        """Load the page, and wait until it knows the server."""
        self.open(url)
        self.until(lambda: "·" in self.text("model"))

    def at(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, name: str) -> str:
        return self.at(name).text

    def until(self, true: Callable[[], T]) -> T:
        """Wait until a condition holds, and return what it returned.

        Raises:
            TimeoutError: with what the page shows then.
        """
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            with suppress(StaleElementReferenceException):  # it was replaced just now
                if found := true():
                    return found
            time.sleep(0.02)
        raise TimeoutError(f"the page shows: {self.driver.find_element(By.TAG_NAME, 'body').text}")

    def use_picture(self, file: Path) -> None:
        """Open a picture, and wait until its patches are drawn."""
        self.at("file").send_keys(str(file.resolve()))
        self.until(lambda: self.all("#patches rect"))

    def write(self, question: str) -> None:
        box = self.at("question")
        box.clear()
        box.send_keys(question)

    def set_budget(self, at: int) -> None:
        """Move the slider to a stop, as its arrow keys do."""
        self.driver.execute_script(
            "const slider = document.getElementById('budget'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input', {bubbles: true}));",
            at,
        )

    def answers(self, ask: Callable[[], object]) -> list[str]:
        """Ask somehow, wait until the page has done with it, and return the answers."""
        self.driver.execute_script(
            "document.querySelectorAll('.answer').forEach((one) => one.classList.add('old'))"
        )
        ask()
        self.until(lambda: self.all(".answer:not(.old)"))
        self.until(lambda: self.at("ask").get_attribute("aria-disabled") == "false")
        return [one.text for one in self.all(".answer .text")]

    def ask(self, question: str) -> list[str]:
        """Ask by the button, and return the answers."""
        self.write(question)
        return self.answers(self.at("ask").click)

    def marked(self) -> int:
        """How many patches the overlay marks as tokens."""
        return len(self.all("#patches rect.kept, #patches rect.target"))

    def requests(self) -> list[tuple[str, str, str]]:
        """Method, address and body of each request since the last call."""
        sent = []
        for line in self.driver.get_log("performance"):
            told = json.loads(line["message"])["message"]
            if told["method"] == "Network.requestWillBeSent":
                request = told["params"]["request"]
                if not request["url"].startswith(("blob:", "data:", "about:")):
                    sent.append((request["method"], request["url"], request.get("postData", "")))
        return sent

    def complaints(self) -> list[str]:
        """What stands in the console."""
        return [f"{line['level']}: {line['message']}" for line in self.driver.get_log("browser")]

    def look(self, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Choose the colour scheme and the size of the window."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@contextmanager
def chromium(profile: Path, camera: Path | None = None) -> Iterator[LivePage]:
    """Open a browser with an empty profile.

    Args:
        profile: its folder.
        camera: a Motion JPEG file that its camera shows.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    server = shutil.which("chromedriver")
    if browser is None or server is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    if camera is not None:
        options.add_argument(f"--use-file-for-fake-video-capture={camera}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(server))
    driver.set_page_load_timeout(WAIT_S)
    try:
        yield LivePage(driver)
    finally:
        driver.quit()


def write_camera_file(file: Path, picture: Path, frames: int = 10) -> None:
    """Write a Motion JPEG file that shows one picture."""
    jpeg = io.BytesIO()
    Image.open(picture).convert("RGB").resize((480, 480)).save(jpeg, "JPEG", quality=95)
    file.write_bytes(jpeg.getvalue() * frames)
