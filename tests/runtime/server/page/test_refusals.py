"""What the live page says when something is wrong."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from engines.bundle import Bundle
from engines.secret import Secret
from runtime.server.answering import AnsweringThreads, Prefilled
from runtime.server.refusals import ClientGoneError
from tests.runtime.server.conftest import POCKET, Served, serving
from tests.runtime.server.page.browser import Keys, LivePage

pytestmark = pytest.mark.browser

PICTURE = POCKET / "test" / "00000.png"


def problem(page: LivePage) -> str:
    return page.until(lambda: page.text("problem"))


def test_a_full_server_is_told_and_asked_again(browser: LivePage, pocket: Bundle) -> None:
    with serving(pocket.root, port=0, threads=1, queue=1, visual_tokens=(16,)) as served:
        browser.connected(served.url)
        browser.use_picture(PICTURE)
        with socket.create_connection(("127.0.0.1", served.port)) as other:
            other.sendall(
                b"POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
                b"Content-Length: 9\r\n\r\n"
            )  # and no body: it keeps the only place
            metrics = f"{served.url}/metrics"
            browser.until(lambda: b"foveate_in_flight 1.0" in urlopen(metrics).read())
            assert browser.ask("What is it?") == ["No answer."]
            assert "The server is full." in problem(browser)
            assert "Try again in" in problem(browser)
        browser.until(lambda: browser.ask("What is it?") != ["No answer."])
        assert not browser.at("problem").is_displayed()


def test_the_key_is_asked_for_and_stays_in_memory(browser: LivePage, pocket: Bundle) -> None:
    key = "a-long-secret"
    options = {"port": 0, "threads": 1, "visual_tokens": (16,), "api_key": Secret(key)}
    with serving(pocket.root, **options) as served:
        browser.open(served.url)
        browser.until(lambda: browser.at("key-form").is_displayed())
        assert browser.driver.switch_to.active_element == browser.at("key")
        assert not browser.at("problem").is_displayed()
        browser.at("key").send_keys("wrong\n")
        assert "The key is not right." in problem(browser)
        browser.at("key").send_keys(f"{key}\n")
        browser.until(lambda: "·" in browser.text("model"))
        assert not browser.at("key-form").is_displayed()
        assert not browser.at("problem").is_displayed()
        browser.use_picture(PICTURE)
        (answer,) = browser.ask("How many boxes are there?")
        assert answer
        assert (
            browser.driver.execute_script(
                "return localStorage.length + sessionStorage.length + document.cookie.length"
            )
            == 0
        )
        assert key not in browser.driver.current_url
        assert key not in browser.driver.page_source
        browser.open(served.url)
        browser.until(lambda: browser.at("key-form").is_displayed())


def test_a_server_that_has_gone_is_told(browser: LivePage, pocket: Bundle) -> None:
    with serving(pocket.root, port=0, threads=1, visual_tokens=(16,)) as served:
        browser.connected(served.url)
        browser.use_picture(PICTURE)
    assert browser.ask("What is it?") == ["No answer."]
    assert "The server does not answer." in problem(browser)


def test_what_the_server_refuses_is_told_in_its_words(
    browser: LivePage, server: Served, tmp_path: Path
) -> None:
    browser.connected(server.url)
    drawing = tmp_path / "drawing.svg"
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
    )
    browser.at("file").send_keys(str(drawing))
    assert "cannot be read" in problem(browser) or "not a picture" in problem(browser)


def test_what_is_missing_is_told(browser: LivePage, server: Served, tmp_path: Path) -> None:
    browser.connected(server.url)
    browser.at("ask").click()
    assert problem(browser) == "Open a picture or start the camera first."
    browser.write(" ")
    browser.at("ask").click()
    browser.until(lambda: "Write a question first." in browser.text("problem"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURE.read_bytes()[:40])
    browser.at("file").send_keys(str(broken))
    browser.until(lambda: "cannot show the file" in browser.text("problem"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NotAllowedError", "Allow it for this page"),
        ("NotFoundError", "has no camera"),
        ("NotReadableError", "Another program uses the camera"),
        ("AbortError", "did not start"),
    ],
)
def test_a_camera_that_does_not_start_is_told(
    browser: LivePage, server: Served, name: str, words: str
) -> None:
    browser.connected(server.url)
    browser.driver.execute_script(
        "navigator.mediaDevices.getUserMedia = async () => "
        "{ throw new DOMException('no', arguments[0]); }".replace("arguments[0]", f"'{name}'")
    )
    browser.at("camera").click()
    browser.until(lambda: words in browser.text("problem"))
    assert browser.text("camera") == "Start the camera"


def test_without_https_the_camera_is_explained(browser: LivePage, server: Served) -> None:
    browser.connected(server.url)
    browser.driver.execute_script(
        "Object.defineProperty(navigator, 'mediaDevices', {value: undefined})"
    )
    browser.at("camera").click()
    browser.until(lambda: "https pages and to localhost only" in browser.text("problem"))


def test_an_answer_is_stopped_by_the_keyboard(
    browser: LivePage, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = threading.Event()

    def never_end(self: AnsweringThreads, *given: Any) -> None:
        *_, ticket, _, tell = given
        tell(Prefilled())
        tell("Half an answer")
        until = time.monotonic() + 60
        while not ticket.over() and time.monotonic() < until:
            time.sleep(0.01)
        noticed.set()
        tell(ClientGoneError())

    monkeypatch.setattr(AnsweringThreads, "_write", never_end)
    browser.connected(server.url)
    browser.use_picture(PICTURE)
    browser.write("Talk.")
    browser.at("ask").click()
    browser.until(lambda: browser.all(".answer[data-state=writing]"))
    browser.at("question").send_keys(Keys.ESCAPE)
    browser.until(lambda: browser.all(".answer[data-state=failed]"))
    browser.until(lambda: browser.at("ask").get_attribute("aria-disabled") == "false")
    assert browser.all(".answer .text")[0].text == "Half an answer"
    assert not browser.at("problem").is_displayed()
    assert noticed.wait(30)  # the server hears of it, and writes no more


def test_a_server_without_a_language_model_shows_patches(browser: LivePage, pocket: Bundle) -> None:
    with serving(pocket.root, port=0, threads=1, visual_tokens=(16,), role="encoder") as served:
        browser.connected(served.url)
        assert "This server encodes only." in problem(browser)
        browser.use_picture(PICTURE)
        assert browser.ask("What is it?") == ["No answer."]
        assert "has no language model" in problem(browser)
