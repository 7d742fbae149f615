"""The pictures of docs/serving_page.md: the running page in Chromium, used as people use it.

    make serve                                    # in another terminal: a trained mini model
    python docs/pictures/make.py http://127.0.0.1:8000/

Needs playwright and Debian's chromium (apt-get install chromium).
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
ARGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WAIT_MS = 300_000


def main(address: str) -> None:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT_MS)
        page.goto(address)
        example(page, "“mushroom”")
        draw(page)
        keep(page, "page-word.png")
        example(page, "two pictures")
        draw(page)
        keep(page, "page-two.png")
        page.set_viewport_size({"width": 390, "height": 844})
        example(page, "a mask")
        draw(page)
        keep(page, "page-narrow.png", until="#results")
        browser.close()


def example(page: Page, name: str) -> None:
    """Fill the form in, and wait for what is selected."""
    before = page.locator("#look-1").inner_html()
    page.locator("#gallery button", has_text=name).first.click()
    page.wait_for_function(
        "before => { const look = document.querySelector('#look-1');"
        " return look.querySelector('img') && look.innerHTML !== before; }",
        arg=before,
    )


def draw(page: Page) -> None:
    """With the subjects and without, to the end."""
    page.locator("#draw").click()
    page.locator("#progress progress").wait_for()
    page.locator("#progress progress").wait_for(state="detached")
    page.wait_for_function("document.querySelectorAll('#results img').length == 2")


def keep(page: Page, name: str, until: str = "#table") -> None:
    """The page from its top to the end of an element."""
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    box = page.locator(until).bounding_box()
    size = page.viewport_size
    assert box and size
    clip = {"x": 0.0, "y": 0.0, "width": size["width"], "height": box["y"] + box["height"] + 16}
    shot = page.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(shot)) as image:
        image.convert("RGB").save(HERE / name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
