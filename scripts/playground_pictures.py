"""Take the pictures of the playground in docs/images, from a running server: answers that it writes, in Chromium.

    ivg serve --port 8000 &
    python scripts/playground_pictures.py http://127.0.0.1:8000

Needs Chromium (Debian: apt-get install chromium) and Playwright (the extra ``dev``). Look at the pictures before you commit them.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
IVG = "#m=ivg&p=The+movie+was&b=1&w=4&k=4&l=5&t=0.7&n=48&s=1"
PHONE = "#m=ivg&p=The+movie+was&b=1&w=4&k=2&l=5&t=0.7&n=30&s=1"
PICTURES = {
    "playground": (IVG, {"viewport": {"width": 1280, "height": 1190}}),
    "playground-dark": (IVG, {"viewport": {"width": 1280, "height": 660}, "color_scheme": "dark"}),
    "playground-phone": (PHONE, {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}),
}
"""By name: the settings of the link, and the window; a phone is shown whole."""
FLAGS = ["--no-sandbox", "--disable-gpu"]
FINGER = "--blink-settings=primaryHoverType=1,availableHoverTypes=1,primaryPointerType=2,availablePointerTypes=2"
"""Without a screen Chromium says that it has a mouse, on a phone too."""
PATIENCE = 300_000
"""Milliseconds."""


def take(browser: Browser, url: str, name: str) -> None:
    """Run the link of a picture, and write the page when both answers stand."""
    link, options = PICTURES[name]
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(f"{url.rstrip('/')}/{link}")
    page.locator("#method option").nth(1).wait_for(state="attached")
    page.click("#run")
    page.locator("#stop:enabled").wait_for()
    page.locator("#stop:disabled").wait_for()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0); document.querySelector('#tree-scroll').scrollLeft = 0")
    page.screenshot(path=IMAGES / f"{name}.png", full_page="is_mobile" in options, animations="disabled")
    context.close()


def main() -> None:
    """Take all of them."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if len(sys.argv) != 2 or program is None:
        sys.exit("usage: python scripts/playground_pictures.py URL, with Chromium on the path")
    with sync_playwright() as p:
        for name, (_, options) in PICTURES.items():
            browser = p.chromium.launch(executable_path=program, args=[*FLAGS, FINGER] if "is_mobile" in options else FLAGS)
            take(browser, sys.argv[1], name)
            browser.close()


if __name__ == "__main__":
    main()
