"""Fixtures and helpers for the tests of the playground: Chromium, the real server, the embedded models."""

import json
import re
import shutil

import pytest

from serving_tools import Running, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -c constraints.txt -e '.[dev]'")

PATIENCE = 60_000
"""Milliseconds: the machine may be busy."""


def embedded():
    """In float32: two runs, one batch or another, then differ by less than what decides a draw."""
    from ivg.model import GuidedModel
    from ivg.models.loading import LoadOptions

    return GuidedModel.embedded(LoadOptions(dtype="float32"))


@pytest.fixture(scope="module")
def url():
    with Running(embedded(), name=None) as server:
        yield server.url


@pytest.fixture(scope="module")
def model():
    return embedded()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        yield (browser := p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE))
        browser.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page, of the server ``at``, with the settings of a link; the console must not have complained, unless that is expected."""
    contexts, complaints = [], []

    def open_page(link="", routes=(), at=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        for pattern, handler in routes:
            page.route(pattern, handler)
        page.goto(f"{at or url}/{link}")
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()


def ready(page):
    wait_for(lambda: page.locator("#method option").count() > 1)


def run(page):
    """Press Run and wait for both answers."""
    ready(page)
    page.click("#run")
    finished(page)


def finished(page):
    wait_for(lambda: page.is_disabled("#stop") and page.get_attribute("#guided .answer", "aria-busy") == "false")


def answer(page, side):
    """The text of an answer, without the prompt before it."""
    return page.evaluate(
        """side => { const copy = document.querySelector(`#${side} .answer`).cloneNode(true);
          copy.querySelector(".prompt")?.remove(); return copy.textContent }""",
        side,
    )


def events(body, name):
    """Data of the server-sent events of that name."""
    found = re.findall(r"(?:event: (\S+)\n)?data: (.*)\n\n", body)
    return [json.loads(data) for event, data in found if event == name and data != "[DONE]"]


def keep(bodies):
    """A route that lets the request through and keeps (request, response body)."""

    def handler(route):
        response = route.fetch()
        bodies.append((route.request.post_data_json, response.text()))
        route.fulfill(response=response)

    return [("**/v1/**completions", handler)]


EFT = "#m=eft&p=The+movie+was&b=1&t=0.7&n=24&s=1&e=0"
IVG = "#m=ivg&p=The+movie+was&b=1&w=2&k=3&l=5&t=0.7&n=20&s=1&e=0"
"""``e=0``: the length is the length, also inside a sentence."""
