# SPDX-License-Identifier: Apache-2.0
"""The dashboard in a browser: alive, by keyboard alone, on a phone, in the dark."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Route,
    expect,
    sync_playwright,
)

from tests.http.harness import KEY, Server

pytestmark = pytest.mark.engine

WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "this test needs chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, which containers often run as.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page with the key given; nothing may go wrong on it, nor leave the host."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    errors: list[str] = []
    hosts: set[str] = set()

    def note(message: ConsoleMessage) -> None:
        # The browser itself notes that the first request lacked the key.
        if message.type in ("error", "warning") and "401" not in message.text:
            errors.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(f"{server.base}/dashboard")
    page.get_by_role("textbox", name="API key").fill(KEY)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("status").first).to_have_text("live")
    yield page
    page.close()
    assert errors == []
    assert hosts == {f"127.0.0.1:{server.port}"}


def ask(page: Page, prompt: str, most: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Most tokens").fill(str(most))
    page.get_by_role("button", name="Send").click()


def test_a_wrong_key_is_asked_for_again(browser: Browser, server: Server) -> None:
    page = browser.new_page()
    page.goto(f"{server.base}/dashboard")
    for _ in range(2):
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.get_by_role("button", name="Continue").click()
    expect(dialog).to_be_visible()
    page.close()


def test_the_idle_page_shows_what_the_policy_would_keep(page: Page) -> None:
    expect(page.locator("#policy")).to_have_text("policy retrieval")
    expect(page.locator("#model")).to_contain_text(re.compile("30 layers . 3 KV heads"))
    expect(page.locator("#pool")).to_contain_text("pages of the pool")
    heat = page.locator("#heat")
    heat.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#heat-cell")).to_have_text(
        re.compile(r"^Layer 2, KV head 1: [\d,]+ of [\d,]+ tokens, \d+ %$")
    )


def test_a_prompt_streams_and_moves_the_numbers(page: Page) -> None:
    page.get_by_label("Copies").fill("3")
    page.get_by_label("Most tokens").fill("40")
    page.get_by_role("button", name="Long prompt").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(
        re.compile("access code")
    )
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#ratio")).to_have_text(re.compile(r"^[1-9]\.\d.$"))
    expect(page.locator("#bar")).to_have_attribute("aria-label", re.compile("held of"))
    expect(page.locator("#heat-cell")).to_contain_text("Live")
    expect(page.locator("#running")).not_to_have_text("0")
    expect(page.locator("#answer-facts")).to_contain_text("retained")
    expect(page.locator("#answer")).not_to_be_empty()
    expect(page.locator("#ttft")).to_have_text(re.compile(r"\d (s|ms)$"))
    expect(page.locator("#rows tr").first).to_contain_text("%")
    expect(page.locator("#hits")).to_have_text(re.compile(r"^\d+ %$"))
    expect(page.locator("#hit-tokens")).to_contain_text("not read again")
    expect(page.locator("#output-chart")).to_have_attribute(
        "aria-label", re.compile("output tokens/s")
    )
    expect(page.locator("#ratio")).to_have_text("idle")


def never_ending(route: Route) -> None:
    """Let the model go on where it would end its reply before anybody stops it."""
    route.continue_(post_data=route.request.post_data_json | {"ignore_eos": True})


def test_a_reply_can_be_stopped_and_the_page_works_by_keyboard(page: Page) -> None:
    page.route("**/v1/chat/completions", never_ending)
    page.get_by_label("Prompt", exact=True).fill("Tell me a long story.")
    page.get_by_label("Most tokens").fill("1500")
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).not_to_be_empty()
    stop = page.get_by_role("button", name="Stop")
    stop.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#answer-facts")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.locator("#running")).to_have_text("0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_either_theme(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 360, "height": 740})
    # wait_for_function would poll in the page, where our policy forbids eval.
    deadline = time.monotonic() + 10
    while page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        assert time.monotonic() < deadline, "it is wider than the screen"
        page.wait_for_timeout(50)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", back))) / 3
    assert (brightness > 128) == (scheme == "light")


def _with_a_range(page: Page, client: httpx.Client) -> None:
    """Let the server's answers tell of a range of budgets."""
    names = ["50%", "25%", "12.5%"]
    started = time.time()

    def policy(route: Route) -> None:
        body = client.get("/v1/kv/policy").json()
        levels = [{"budget": name, "arguments": {}, "kept": 0.1} for name in names]
        route.fulfill(json=body | {"levels": levels})

    def events(route: Route) -> None:
        stats = client.get("/v1/kv/stats").json()
        lines = []
        for at, running in enumerate(((1, 0, 0), (0, 2, 0), (0, 1, 4))):
            counts = zip(names, running, strict=True)
            budgets = [{"budget": n, "running": r, "begun": 3 * r} for n, r in counts]
            cache = stats["cache"] | {"budgets": budgets}
            sample = stats | {"time": started + at, "cache": cache}
            lines.append(f"data: {json.dumps(sample)}\n\n")
        route.fulfill(body="".join(lines), content_type="text/event-stream")

    page.route("**/v1/kv/policy", policy)
    page.route("**/v1/kv/events", events)
    page.reload()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_budgets_are_stacked_where_a_server_has_a_range(
    page: Page, client: httpx.Client, scheme: str
) -> None:
    expect(page.locator("#budgets")).to_be_hidden()
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    _with_a_range(page, client)
    expect(page.locator("#budgets")).to_be_visible()
    expect(page.locator("#budget-chart")).to_have_attribute(
        "aria-label", "Now: 50% 0, 25% 1, 12.5% 4"
    )
    expect(page.locator("#budget-keys")).to_have_text("50%25%12.5%")
    expect(page.locator("#budget-note")).to_have_text(
        "Requests since the start: 3 at 25%, 12 at 12.5%"
    )
    keys = page.locator("#budget-keys .key").all()
    colors = [key.evaluate("e => getComputedStyle(e).backgroundColor") for key in keys]
    assert len(set(colors)) == 3
    drawn = page.locator("#budget-chart canvas").first.evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d", { willReadFrequently: true })
            .getImageData(0, 0, canvas.width, canvas.height);
          const found = new Set();
          for (let i = 0; i < data.length; i += 4) {
            const [red, green, blue, alpha] = data.subarray(i, i + 4);
            if (alpha === 255) found.add(`rgb(${red}, ${green}, ${blue})`);
          }
          return [...found];
        }"""
    )
    assert set(colors) <= set(drawn)


def test_every_control_has_a_name(page: Page) -> None:
    for control in page.locator("input, textarea, button, canvas[tabindex]").all():
        named = control.evaluate(
            "e => e.labels?.length || e.ariaLabel || e.textContent.trim()"
        )
        assert named
