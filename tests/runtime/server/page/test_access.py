"""The live page for everyone: by keyboard alone, with names, contrast, and on a phone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runtime.server.conftest import POCKET, Served
from tests.runtime.server.page.browser import ActionChains, Keys, LivePage

pytestmark = pytest.mark.browser

PICTURE = POCKET / "test" / "00000.png"
CONTRASTS = """
const channel = (value) => {
  const share = value / 255;
  return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
};
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const light = ([red, green, blue]) =>
  0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue);
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = numbers(getComputedStyle(at).backgroundColor);
    if (color.length < 4 || color[3] === 1) return color;
    if (color[3] > 0) throw new Error(`${at.tagName}#${at.id} is half transparent`);
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  const value = element.matches("textarea, [type=password], [type=number]");
  if ((!own && !value) || !element.checkVisibility({visibilityProperty: true})) continue;
  if (element.classList.contains("unseen")) continue;
  const [one, other] = [light(numbers(getComputedStyle(element).color)), light(ground(element))];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  found.push([`${element.tagName}#${element.id} ${element.textContent}`, ratio]);
}
return found;
"""


def fill(page: LivePage) -> None:
    """Bring everything on the page that there can be."""
    page.use_picture(PICTURE)
    page.all("input[value=in-turn]")[0].click()
    page.ask("How many objects are there?")
    page.until(lambda: page.at("ratio").is_displayed())
    page.driver.execute_script(
        "document.getElementById('key-form').hidden = false;"
        "const problem = document.getElementById('problem'); problem.hidden = false;"
        "const title = document.createElement('strong'); title.textContent = 'Title. ';"
        "problem.append(title, 'What is wrong.');"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_contrast(page: LivePage, dark: bool) -> None:
    page.look(dark=dark)
    fill(page)
    found = page.driver.execute_script(CONTRASTS)
    assert len(found) > 40
    assert [one for one in found if one[1] < 4.5] == []
    background = page.driver.execute_script(
        "return getComputedStyle(document.body).backgroundColor"
    )
    first = int(background.removeprefix("rgb(").split(",")[0])
    assert first < 60 if dark else first > 200


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(page: LivePage, dark: bool) -> None:
    script = Path(os.environ.get("FOVEATE_AXE", "axe.min.js"))
    if not script.is_file():
        pytest.skip("axe-core is not here: run `make test-page`")
    page.look(dark=dark)
    fill(page)
    page.driver.execute_script(script.read_text("utf-8"))
    found = page.driver.execute_async_script("axe.run(document).then(arguments[0])")
    assert len(found["passes"]) > 30
    told = [
        f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']]}"
        for one in found["violations"]
    ]
    assert told == []


def test_every_control_has_a_name(page: LivePage) -> None:
    fill(page)
    controls = page.all("input, textarea, button, svg[role=img], video, img, table, fieldset")
    shown = [one for one in controls if one.is_displayed() or one.get_attribute("type") == "file"]
    assert len(shown) > 14
    nameless = [
        one.get_attribute("outerHTML")
        for one in shown
        if not one.accessible_name and one.tag_name != "table"
    ]
    assert nameless == []
    ids = [one.get_attribute("id") for one in page.all("[id]")]
    assert len(ids) == len(set(ids))
    assert page.driver.execute_script("return document.documentElement.lang") == "en"
    assert page.at("spoken").get_attribute("aria-live") == "polite"
    assert page.at("problem").get_attribute("role") == "alert"


def test_the_keyboard_reaches_and_does_everything(page: LivePage) -> None:
    page.use_picture(PICTURE)
    keys = ActionChains(page.driver)
    page.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(8):
        keys.send_keys(Keys.TAB).perform()
        focused = page.driver.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.get_attribute("name"))
        outline = page.driver.execute_script(
            "const at = document.activeElement;"
            "const seen = at.type === 'file' ? at.nextElementSibling : at;"
            "const style = getComputedStyle(seen);"
            "return [style.outlineStyle, parseFloat(style.outlineWidth)]"
        )
        assert outline[0] != "none" and outline[1] >= 2, reached[-1]
        if reached[-1] == "question":
            focused.send_keys(Keys.CONTROL, "a")
            focused.send_keys("How many")
            focused.send_keys(Keys.SHIFT, Keys.ENTER)
            focused.send_keys("objects are there?")
            assert focused.get_attribute("value") == "How many\nobjects are there?"
            page.answers(lambda: ActionChains(page.driver).send_keys(Keys.ENTER).perform())
        if reached[-1] == "budget":
            assert focused.get_attribute("aria-valuetext") == "64 of 576 tokens"
            focused.send_keys(Keys.ARROW_LEFT)
            assert focused.get_attribute("aria-valuetext") == "16 of 576 tokens"
        if reached[-1] == "compare":
            focused.send_keys(Keys.ARROW_RIGHT)
            assert page.all("input[value=at-once]")[0].is_selected()
        if reached[-1] == "show-patches":
            focused.send_keys(Keys.SPACE)
            assert not page.at("patches").is_displayed()
        if reached[-1] == "ask":
            assert len(page.answers(lambda: focused.send_keys(Keys.ENTER))) == 2  # noqa: B023
            assert page.driver.switch_to.active_element == focused
    assert reached == [
        "file", "camera", "show-patches", "question", "budget", "compare", "ask", "stop",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page: LivePage, width: int) -> None:
    page.look(width=width, height=800)
    fill(page)
    page.driver.execute_script("document.getElementById('key-form').hidden = true")
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    for control in page.all("button, .button, textarea, input[type=range], input[type=number]"):
        if control.is_displayed():
            assert control.rect["x"] >= 0
            assert control.rect["x"] + control.rect["width"] <= width
            assert control.rect["height"] >= 24
    one, other = (one.rect for one in page.all(".answer"))
    assert one["y"] == other["y"]


def test_nothing_moves_for_who_asked_for_that(page: LivePage) -> None:
    moving = "return document.getAnimations().length"
    waiting = (
        "const one = document.querySelector('.answer'); one.dataset.state = 'waiting';"
        "return getComputedStyle(one.querySelector('.text'), '::after').animationName"
    )
    page.use_picture(PICTURE)
    page.ask("How many objects are there?")
    assert page.driver.execute_script(waiting) == "wait"
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]},
    )
    assert page.driver.execute_script(waiting) == "none"
    assert page.driver.execute_script(moving) == 0


def test_the_browser_keeps_to_the_policy(browser: LivePage, server: Served) -> None:
    browser.connected(server.url)
    tried = browser.driver.execute_async_script(
        """
        const done = arguments[0];
        const refused = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          refused.push(event.effectiveDirective);
          if (refused.length >= 4) done(refused.sort());
        });
        const script = document.createElement("script");
        try { script.text = "window.ran = true"; } catch { }
        const image = new Image();
        image.src = "http://127.0.0.2:1/x.png";
        document.body.setAttribute("style", "color: red");
        fetch("http://127.0.0.2:1/").catch(() => {});
        document.body.append(image, script);
        """
    )
    assert {"connect-src", "img-src", "require-trusted-types-for"} <= set(tried)
    assert browser.driver.execute_script("return window.ran === undefined")
