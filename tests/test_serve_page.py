"""The chat page in a real browser: Chromium without a screen, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_serve import Script, listening, scripted, service_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("there is no Chromium here (Debian: apt-get install chromium)", allow_module_level=True)

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> & **bold**"


def answer(prompt: str) -> str:
    asked = prompt.split("<|user|>")[-1].partition("\n")[2].removesuffix("<|assistant|>").strip()
    if asked == "long":
        return "\n " + "word " * 150
    if asked == "count":
        return f"\n {prompt.count('<|user|>')} turns, {'with' if 'Be brief' in prompt else 'without'} instruction"
    return "\n 你好 🙂 " + asked


@pytest.fixture(scope="module")
def runner() -> Script:
    return scripted("chatglm3-6b", answer, context=1024)


@pytest.fixture(scope="module")
def address(runner: Script) -> Iterator[str]:
    with listening(service_of("chatglm3-6b", runner)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1000, 700), (360, 640)], ids=["desk", "phone"])
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, on screens of two sizes; nothing may go to the console, nor anywhere but to the server."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith((address, "data:,")) or complaints.append(r.url))
    page.goto(address)
    yield page
    keep(page, request.node.name)
    context.close()
    assert not complaints


def keep(page: Any, name: str) -> None:
    """Screenshots to look at, where GLMQUANT_SCREENSHOTS says."""
    if folder := os.environ.get("GLMQUANT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def say(page: Any, text: str, expect: int) -> str:
    """Ask with the keyboard, and wait for the answer; `expect` messages are there then."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.querySelectorAll('#messages li').length == n", arg=expect)
    page.wait_for_selector("#stop", state="hidden")
    return page.locator("#messages li").last.inner_text()


def test_a_conversation(page: Any) -> None:
    page.wait_for_function("() => document.title == 'chatglm3-6b'")
    assert say(page, "hello", 2) == "你好 🙂 hello"
    assert "tokens in" in page.locator("#status").inner_text()
    assert say(page, "count", 4) == "2 turns, without instruction"
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#messages li").count() == 0
    assert say(page, "count", 2) == "1 turns, without instruction"
    # It fits the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = page.get_by_role("button", name="Send").bounding_box()
    assert box["y"] + box["height"] <= page.viewport_size["height"]


def test_an_answer_appears_while_it_is_written_and_escape_stops_it(page: Any, runner: Script) -> None:
    runner.delay = 0.03
    try:
        page.get_by_label("Message").fill("long")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.assistant')?.textContent.length > 30")
        assert page.get_by_role("button", name="Stop").is_visible()
        assert not page.get_by_role("button", name="Send").is_visible()
        page.keyboard.press("Escape")
        page.wait_for_selector("#stop", state="hidden")
    finally:
        runner.delay = 0.0
    text = page.locator(".assistant").inner_text()
    assert page.locator("#status").inner_text() == "Stopped."
    assert 30 < len(text) < 700
    assert say(page, "count", 4).startswith("2 turns")  # what was said before the stop is part of it


def test_text_is_text(page: Any) -> None:
    assert say(page, EVIL, 2) == "你好 🙂 " + EVIL
    assert page.title() == "chatglm3-6b"
    assert page.locator("#messages img, #messages script").count() == 0


def test_shift_enter_begins_a_line(page: Any) -> None:
    page.get_by_label("Message").fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.get_by_label("Message").input_value() == "one\ntwo"
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#messages li').length == 2")
    assert page.locator(".user").inner_text() == "one\ntwo"


def test_settings_reach_the_model(page: Any, request: pytest.FixtureRequest) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief")
    page.get_by_label("Max tokens").fill("200")
    keep(page, request.node.name + "-dialog")
    page.get_by_role("button", name="Done").click()
    assert say(page, "count", 2) == "1 turns, with instruction"
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens").fill("3")
    page.keyboard.press("Escape")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "long", 4)
    body = asked.value.post_data_json
    assert (body["temperature"], body["max_tokens"], "top_p" in body) == (0.5, 3, False)
    assert "limit of tokens" in page.locator("#status").inner_text()


def test_everything_can_be_reached_with_the_keyboard(page: Any) -> None:
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"open", "clear", "query", "send"} <= set(reached)


def test_errors_are_told_and_the_question_kept(browser: Any) -> None:
    service = service_of("chatglm3-6b", scripted("chatglm3-6b", answer))
    with listening(service, api_key="secret") as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_function("() => document.getElementById('status').textContent.includes('API key')")
        page.get_by_label("Message").fill("hello")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop", state="hidden")
        page.wait_for_function("() => document.getElementById('query').value == 'hello'")
        assert page.locator("#messages li").count() == 0
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Done").click()
        page.wait_for_function("() => document.title == 'chatglm3-6b'")
        assert say(page, "hello", 2) == "你好 🙂 hello"
        page.close()


def test_the_page_may_load_nothing_else(address: str) -> None:
    import httpx

    response = httpx.get(address)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert response.text.count("http") == 0
