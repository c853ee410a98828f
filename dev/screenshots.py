"""Take the README's screenshots of the playground: the real server with the embedded models, in Chromium.

    .venv/bin/python dev/screenshots.py            writes docs/images/*.png

Needs Chromium and ``ivg[dev]``. The same seed gives the same screenshots, except for times and fonts.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

TIMEOUT = 600.0
"""Seconds for one screenshot."""


def do_nothing(page: Page) -> None:
    """The default of ``Screenshot.prepare``."""


def open_popover(page: Page) -> None:
    """Open the popover of the token with the largest shift."""
    page.evaluate(
        """() => [...document.querySelectorAll("#guided .tok")].reduce((a, b) => b.token.shift > a.token.shift ? b : a).focus()"""
    )


@dataclass(frozen=True)
class Screenshot:
    """One screenshot: the settings of the link, the window, what to do before it is taken."""

    name: str
    link: str
    width: int
    height: int
    prepare: Callable[[Page], None] = do_nothing
    full_page: bool = False
    options: dict[str, Any] = field(default_factory=dict)


LINK = "#m=ivg&p=The+movie+was&b=1&w=4&k=4&l=5&t=0.7&n=35&s=1"
SCREENSHOTS = (
    Screenshot("playground", LINK, 1280, 1190),
    Screenshot("playground-dark", LINK, 1280, 660, open_popover, options={"color_scheme": "dark"}),
    Screenshot("playground-phone", LINK.replace("k=4", "k=2"), 360, 740, full_page=True, options={"device_scale_factor": 1}),
)


@contextmanager
def server() -> Iterator[str]:
    """Run a server of the embedded models; its URL."""
    from ivg.model import GuidedModel
    from ivg.serving.served_models import ServedModels
    from ivg.serving.server import make_server
    from ivg.settings.recipe import Recipe
    from ivg.settings.serve import ServeSettings

    running = make_server(ServedModels(GuidedModel.embedded(), Recipe(), ServeSettings()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # early connections wait
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            running.should_exit = True
            thread.join(20)


def wait_for_answers(page: Page, name: str) -> None:
    """Press Run, and wait until both answers are complete."""
    page.wait_for_selector("#method option", state="attached")
    page.click("#run")
    end = time.monotonic() + TIMEOUT
    while not (page.is_disabled("#stop") and page.is_hidden("#recorded")):
        if time.monotonic() > end or page.is_visible("#error"):
            sys.exit(f"{name}: no answer within {TIMEOUT:g} s; the page says: {page.inner_text('#error')!r}")
        time.sleep(0.1)


def take(browser: Browser, url: str, screenshot: Screenshot, folder: Path) -> Path:
    """Run, wait for both answers, take the screenshot."""
    context = browser.new_context(viewport={"width": screenshot.width, "height": screenshot.height}, **screenshot.options)
    page = context.new_page()
    page.goto(url + screenshot.link)
    wait_for_answers(page, screenshot.name)
    page.evaluate("document.activeElement.blur(), document.getElementById('tree-scroll').scrollLeft = 0")
    screenshot.prepare(page)
    path = folder / f"{screenshot.name}.png"
    page.screenshot(path=path, full_page=screenshot.full_page)
    context.close()
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main() -> None:
    """Take all screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--url", help="URL of a running server")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on this machine\n  install one, e.g. apt-get install chromium")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        if arguments.url:
            paths = [take(browser, arguments.url, screenshot, arguments.out) for screenshot in SCREENSHOTS]
        else:
            with server() as url:
                paths = [take(browser, url, screenshot, arguments.out) for screenshot in SCREENSHOTS]
        browser.close()
    for path in paths:
        sys.stdout.write(f"{path}: {path.stat().st_size / 1024:.0f} KB\n")


if __name__ == "__main__":
    main()
