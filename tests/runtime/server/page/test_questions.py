"""Pictures and questions on the live page: upload, camera, budgets, two answers at once."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from tests.runtime.server.conftest import POCKET, Served, asking
from tests.runtime.server.page.browser import Keys, LivePage
from tests.runtime.server.page.conftest import CAMERA_PICTURE

pytestmark = pytest.mark.browser

MODEL = "pocket-llava"
PICTURE = POCKET / "test" / "00000.png"
QUESTION = "List the objects from left to right."
TIMES = "\N{MULTIPLICATION SIGN}"
STOPS = (16, 64, 576)


def told_by_the_api(server: Served, file: Path, question: str, tokens: int) -> str:
    completion = server.client().chat.completions.create(
        model=MODEL, messages=asking(question, file), extra_body={"visual_tokens": tokens}
    )
    return str(completion.choices[0].message.content)


def chats(page: LivePage) -> list[dict[str, object]]:
    return [
        json.loads(body)
        for method, address, body in page.requests()
        if method == "POST" and address.endswith("/v1/chat/completions")
    ]


def count_of(page: LivePage, kind: str) -> int:
    found = page.all(f"#legend .{kind}")
    return int(found[0].get_attribute("data-count") or 0) if found else 0


def test_the_answer_about_an_upload_is_the_apis(page: LivePage, server: Served) -> None:
    page.use_picture(PICTURE)
    assert page.ask(QUESTION) == [told_by_the_api(server, PICTURE, QUESTION, 64)]
    assert page.text("spoken") or page.at("spoken").get_attribute("textContent")
    panel = page.all(".answer")[0]
    assert panel.find_element("css selector", ".text").get_attribute("aria-busy") == "false"
    for name in ("first", "whole"):
        beside = page.all(f"#beside [data-figure={name}]")[0].text
        assert re.fullmatch(r"[\d.]+ ms", beside)
    assert int(page.all("#beside [data-figure=read]")[0].text) > 64


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_the_slider_chooses_the_budget_and_its_patches(
    page: LivePage, server: Served, stop: int
) -> None:
    tokens = STOPS[stop]
    page.use_picture(PICTURE)
    page.set_budget(stop)
    assert page.text("chosen") == f"{tokens} of 576"
    page.until(lambda: count_of(page, "tokens") == tokens)
    # A token that stands for no single patch, such as the class token, is told in the legend.
    assert page.marked() + count_of(page, "whole") == tokens
    page.requests()
    page.ask(QUESTION)
    (sent,) = chats(page)
    assert sent["visual_tokens"] == tokens
    assert sent["fresh"] is True
    assert page.marked() + count_of(page, "whole") == tokens
    page.at("show-patches").click()
    assert not page.at("patches").is_displayed()


def test_patches_lie_where_the_server_says(page: LivePage, server: Served) -> None:
    page.use_picture(PICTURE)
    completion = server.client().chat.completions.create(
        model=MODEL, messages=asking("?", PICTURE), extra_body={"patches": True}
    )
    (seen,) = completion.foveate["pictures"]
    top, left, bottom, right = seen["box"]
    height, width = (bottom - top) / seen["patch_rows"], (right - left) / seen["patch_columns"]
    expected = {(left + column * width, top + row * height) for row, column in seen["kept"]}
    drawn = {
        (float(one.get_attribute("x") or -1), float(one.get_attribute("y") or -1))
        for one in page.all("#patches rect.kept")
    }
    assert drawn == expected
    frame, over = page.at("frame").rect, page.at("patches").rect
    assert all(abs(frame[side] - over[side]) < 1 for side in frame)


def test_a_frame_of_the_camera_is_answered(page: LivePage, server: Served) -> None:
    question = "How many objects are there?"
    page.at("camera").click()
    page.until(lambda: page.at("live").is_displayed() and page.text("camera") == "Stop the camera")
    (answer,) = page.ask(question)
    assert answer == told_by_the_api(server, CAMERA_PICTURE, question, 64) == "three"
    assert page.marked() + count_of(page, "whole") == 64
    assert page.at("frame").is_displayed() and page.at("live").is_displayed()
    page.at("camera").click()
    assert not page.at("live").is_displayed()
    assert page.driver.execute_script("return document.getElementById('live').srcObject") is None


def test_it_asks_again_until_it_is_stopped(page: LivePage) -> None:
    assert not page.at("again").is_enabled()
    page.at("camera").click()
    page.until(lambda: page.at("again").is_enabled() and page.at("live").is_displayed())
    page.at("seconds").clear()
    page.at("seconds").send_keys("1")
    page.at("again").click()
    page.requests()
    page.write("How many objects are there?")
    page.at("ask").click()
    page.until(lambda: page.all("#runs tr") and int(page.all("#runs tr td")[4].text) > 2)
    page.at("question").send_keys(Keys.ESCAPE)
    page.until(lambda: page.at("ask").get_attribute("aria-disabled") == "false")
    pictures = [json.dumps(one["messages"]) for one in chats(page)]
    assert len(pictures) >= 3
    assert not page.at("problem").is_displayed()
    page.at("camera").click()


@pytest.mark.parametrize("choice", ["at-once", "in-turn"])
def test_two_answers_stand_side_by_side(page: LivePage, server: Served, choice: str) -> None:
    page.use_picture(PICTURE)
    page.set_budget(0)
    page.all(f"input[value={choice}]")[0].click()
    page.requests()
    few, whole = page.ask(QUESTION)
    assert few == told_by_the_api(server, PICTURE, QUESTION, 16)
    assert whole == told_by_the_api(server, PICTURE, QUESTION, 576)
    page.until(lambda: page.at("ratio").is_displayed())
    sent = chats(page)
    assert [one["visual_tokens"] for one in sent] == [16, 576]
    assert sent[0]["messages"] == sent[1]["messages"]
    left, right = (one.rect for one in page.all(".answer"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    for name in ("first", "whole"):
        told = page.all(f"#ratio [data-ratio={name}]")[0].text
        assert re.fullmatch(rf"\d+(\.\d)?{TIMES} (sooner|later)", told)
    read = page.all("#ratio [data-ratio=read]")[0].text
    assert read.endswith("fewer") and float(read.split(TIMES)[0]) > 10
    same = "Both say the same." if few == whole else "They say different things."
    assert page.text("ratio").find(same) >= 0
    assert ("at once" in page.text("ratio")) == (choice == "at-once")
    assert "medians" not in page.text("ratio")
    page.ask(QUESTION)
    assert "medians of 2 such pairs" in page.text("ratio")
    assert page.marked() + count_of(page, "whole") == 16  # the patches are the few ones


def test_with_the_largest_budget_there_is_nothing_to_compare(page: LivePage) -> None:
    page.use_picture(PICTURE)
    page.set_budget(2)
    page.all("input[value=at-once]")[0].click()
    assert "Choose fewer tokens" in page.text("compare-hint")
    assert len(page.ask(QUESTION)) == 1


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(page: LivePage, server: Served, way: str) -> None:
    give = """
        const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], "given.png", {type: arguments[2]}));
        const init = {bubbles: true, cancelable: true};
        document.body.dispatchEvent(arguments[1] === "paste"
            ? new ClipboardEvent("paste", {...init, clipboardData: files})
            : new DragEvent("drop", {...init, dataTransfer: files}));
    """
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    page.driver.execute_script(give, data, way, "text/plain")
    assert "is not a picture" in page.text("problem")
    page.driver.execute_script(give, data, way, "image/png")
    page.until(lambda: page.all("#patches rect"))
    assert page.ask(QUESTION) == [told_by_the_api(server, PICTURE, QUESTION, 64)]
    assert not page.at("problem").is_displayed()
