# SPDX-License-Identifier: Apache-2.0
"""Photograph the dashboard of a running server under load, for docs/images/.

kvserve serve --port 8000 --max-model-len 4096 &
python scripts/screenshots.py http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COPIES, TOKENS = 6, 300
WORDS = "The tide came in slowly over the flats and the boats began to lift. "
PATIENCE_MS = 180_000


def ask(url: str, number: int) -> None:
    """Ask for a long reply to a long prompt."""
    body = {
        "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
        "prompt": f"{number}. " + WORDS * (120 + 20 * number),
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_MS / 1000)


def ask_on_the_page(page: Page) -> None:
    """Send the page's own long prompt, and wait for its answer."""
    page.get_by_role("button", name="Long prompt").click()
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).not_to_be_empty()
    expect(page.locator("#answer-facts")).to_contain_text("retained")


def photograph(page: Page, directory: Path) -> None:
    """Take the page in the light, in the dark, and on a phone."""
    for name, scheme, width in (
        ("dashboard", "light", 1280),
        ("dashboard-dark", "dark", 1280),
        ("dashboard-phone", "light", 390),
    ):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": 900})
        # The charts redraw with the next event, a second later at most.
        page.wait_for_timeout(1_500)
        page.screenshot(path=directory / f"{name}.png", full_page=True)


def main() -> None:
    """Drive a headless Chromium."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        sys.exit("this needs chromium: apt-get install chromium")
    args.out.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{args.url}/dashboard")
        expect(page.get_by_role("status").first).to_have_text("live")
        with ThreadPoolExecutor(COPIES) as pool:
            pool.map(lambda number: ask(args.url, number), range(COPIES))
            ask_on_the_page(page)
            photograph(page, args.out)
        browser.close()


if __name__ == "__main__":
    main()
