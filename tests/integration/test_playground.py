"""The playground in Chromium, with the real server and the embedded models."""

import itertools
import json
import re
import shutil
import socket
import threading
import time

import pytest

pytestmark = pytest.mark.long
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
    from ivg.serving.served_models import ServedModels
    from ivg.serving.server import make_server
    from ivg.settings.recipe import Recipe
    from ivg.settings.serve import ServeSettings

    server = make_server(ServedModels(embedded(), Recipe(), ServeSettings()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # whoever comes before the server is up waits
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


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
    """Opens the page with the link's settings; what the console complained about must be nothing, unless it is expected."""
    contexts, complaints = [], []

    def open_page(link="", routes=(), **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        for pattern, handler in routes:
            page.route(pattern, handler)
        page.goto(url + "/" + link)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()


def until(check, seconds=PATIENCE / 1000):
    """Wait till ``check()`` is true; what it gave."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return found


def ready(page):
    until(lambda: page.locator("#method option").count() > 1)


def run(page):
    """Press Run and wait for both answers."""
    ready(page)
    page.click("#run")
    finished(page)


def finished(page):
    until(lambda: page.is_disabled("#stop") and page.get_attribute("#guided .answer", "aria-busy") == "false")


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

    return [("**/v1/completions", handler)]


EFT = "#m=eft&p=The+movie+was&b=1&t=0.7&n=24&s=1"
IVG = "#m=ivg&p=The+movie+was&b=1&w=2&k=3&l=5&t=0.7&n=20&s=1"


# Answers


def test_both_answers_equal_the_librarys_and_show_their_cost(visit, model):
    page = visit(IVG)
    run(page)
    settings = {"seed": 1, "max_new_tokens": 20, "temperature": 0.7}
    assert answer(page, "base") == model.generate("The movie was", "base", **settings).text
    best = model.generate("The movie was", "ivg", width=2, successors=3, chunk_length=5, **settings)
    assert answer(page, "guided") == best.text
    facts = page.inner_text("#guided .facts")
    assert f"{best.score:.2f}".replace("-", "−") in facts
    assert int(re.search(r"base ([\d,]+)", page.inner_text("#base .facts"))[1]) <= 24  # a prompt of four tokens is read once
    assert re.search(r"[\d.]+ × plain sampling", facts)
    for name in ("base", "tuned", "untuned", "explicit"):
        assert re.search(rf"{name} \d+", facts)
    assert "tuned" not in page.inner_text("#base .facts")
    assert "1.0 × plain sampling" in page.inner_text("#base .facts")
    assert visit.complaints == []


def test_text_is_streamed_and_never_taken_back(visit):
    page = visit(EFT)
    ready(page)
    page.evaluate("""() => {
      window.seen = [];
      const answer = document.querySelector("#guided .answer");
      new MutationObserver(() => window.seen.push(answer.textContent))
        .observe(answer, {childList: true, subtree: true, characterData: true});
    }""")
    page.click("#run")
    finished(page)
    seen = list(dict.fromkeys(page.evaluate("window.seen")))
    whole = page.locator("#guided .answer").text_content()
    growing = [text for text in seen if text.startswith("The movie was")]
    assert len(growing) >= 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(growing))
    assert growing[-1] == whole


def test_committed_text_of_a_search_is_never_taken_back(visit):
    page = visit(IVG.replace("n=20", "n=40").replace("w=2", "w=4"))
    ready(page)
    page.evaluate("""() => {
      window.seen = [];
      const answer = document.querySelector("#guided .answer");
      const solid = () => { const copy = answer.cloneNode(true); let grey = 0;
        copy.querySelectorAll(".tentative").forEach(t => { grey += 1; t.remove(); }); window.seen.push([copy.textContent, grey]); };
      new MutationObserver(solid).observe(answer, {childList: true, subtree: true, characterData: true, attributes: true});
    }""")
    page.click("#run")
    finished(page)
    seen = [(text, grey) for text, grey in page.evaluate("window.seen") if text.startswith("The movie was")]
    texts = list(dict.fromkeys(text for text, _ in seen))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert any(grey for _, grey in seen)  # a draft that may still change is shown as such
    assert seen[-1] == (page.locator("#guided .answer").text_content(), 0)


def test_beta_changes_the_answer(visit):
    page = visit(EFT.replace("b=1", "b=0"))
    run(page)
    assert answer(page, "guided") == answer(page, "base")
    assert page.locator("#guided .tok.up, #guided .tok.down").count() == 0
    page.focus("#beta")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#beta-value") == "2"
    run(page)
    assert answer(page, "guided") != answer(page, "base")
    assert page.locator("#guided .tok.up").count() > 0
    assert page.locator("#base .tok.up, #base .tok.down").count() == 0


def test_weights_are_sent(visit):
    bodies = []
    page = visit("#m=eft&n=4&x=implicit:1,explicit:0.5,explicit-other:0", keep(bodies))
    run(page)
    assert [b["guidance"].get("weights") for b, _ in bodies if b["guidance"]["method"] == "eft"] == [{"implicit": 1, "explicit": 0.5}]
    assert [b["guidance"].get("weights") for b, _ in bodies if b["guidance"]["method"] == "base"] == [None]


# The tree


def test_tree_shows_all_beam_events(visit):
    bodies = []
    page = visit(IVG, keep(bodies))
    run(page)
    (body,) = [body for asked, body in bodies if asked["guidance"]["method"] == "ivg"]
    selections = events(body, "ivg.beams")
    assert len(selections) > 1
    assert page.locator("#tree-scroll .node.kept").count() == sum(len(b["kept"]) for b in selections)
    assert page.locator("#tree-scroll .node.dropped").count() == sum(len(b["dropped"]) for b in selections) > 0
    assert page.locator("#tree-scroll .column-title").count() == len(selections)
    shown = page.locator("#tree-scroll .node .score").all_text_contents()
    scores = [n["score"] for b in selections for n in (*b["kept"], *b["dropped"])]
    assert sorted(shown) == sorted(f"{s:.2f}".replace("-", "−") for s in scores)
    assert page.locator("#tree-scroll .node.won").count() == len(selections)
    labels = page.locator("#tree-scroll .node.won").evaluate_all("all => all.map(n => n.getAttribute('aria-label'))")
    assert all("kept" in label for label in labels)
    assert f"{len(selections)} chunks, {len(scores)} drafts tried" in page.inner_text("#tree-summary")
    assert page.locator("#tree-scroll .edge.won").count() == len(selections) - 1


def test_tree_by_keyboard(visit):
    page = visit(IVG)
    run(page)
    page.focus("#tree-scroll .node[tabindex='0']")
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#pop")
    assert "Chunk 2" in first
    assert re.search(r"Score −?\d", first)
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#pop") != first
    page.keyboard.press("ArrowLeft")
    assert "Chunk 1" in page.inner_text("#pop")
    assert page.locator("#tree-scroll .node[tabindex='0']").count() == 1


# Tokens


def test_popover_by_keyboard_shows_alternatives(visit):
    bodies = []
    page = visit(EFT, keep(bodies))
    run(page)
    (body,) = [body for asked, body in bodies if asked["guidance"]["method"] == "eft"]
    tokens = [t for e in events(body, "ivg.tokens") for t in e["tokens"] if t["text"]]
    assert page.locator("#guided .tok").all_text_contents() == [t["text"] for t in tokens]
    page.focus("#guided .tok[tabindex='0']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    token = tokens[2]
    words = page.inner_text("#pop")
    assert token["text"].strip() in words
    assert f"{abs(token['shift']):.2f} nats" in words
    rows = page.locator("#pop tbody tr").all_inner_texts()
    listed = {t["text"] for t in (*token["top"][:5], *token["top_base"][:5])} | {token["text"]}
    assert len(rows) == len(listed)
    best = round(100 * 2.718281828459045 ** token["top"][0]["logprob"])
    assert any(re.search(rf"\b{best} %", row) for row in rows)
    assert page.locator("#pop tr.drawn").count() == 1
    page.keyboard.press("Escape")
    assert page.is_hidden("#pop")
    assert page.locator("#guided .tok[tabindex='0']").count() == 1


def test_colours_show_direction_and_strength(visit):
    bodies = []
    page = visit(EFT.replace("b=1", "b=3"), keep(bodies))
    run(page)
    (body,) = [body for asked, body in bodies if asked["guidance"]["method"] == "eft"]
    shifts = [t["shift"] for e in events(body, "ivg.tokens") for t in e["tokens"] if t["text"]]
    classes = page.locator("#guided .tok").evaluate_all("all => all.map(t => t.className)")
    expected = ["" if abs(s) < 0.1 else "up" if s > 0 else "down" for s in shifts]
    assert [next((c for c in ("up", "down") if c in found.split()), "") for found in classes] == expected
    assert {"up"} <= set(expected)


# What can go wrong


def test_an_error_marks_its_field(visit):
    page = visit("#m=ivg&w=16&k=16&n=10")
    ready(page)
    assert "This server allows 64" in page.inner_text("#successors-help")
    run(page)
    words = page.inner_text("#error")
    assert "256" in words
    assert "64" in words
    assert "Continuations per draft K" in words
    assert page.get_attribute("#successors", "aria-invalid") == "true"
    page.fill("#prompt", "")
    page.click("#run")
    until(lambda: "prompt" in page.inner_text("#error").lower() and page.get_attribute("#prompt", "aria-invalid") == "true")
    page.fill("#prompt", "The movie was")
    page.evaluate("location.hash = '#m=eft&n=4'")
    until(lambda: page.input_value("#method") == "eft")
    run(page)
    assert page.is_hidden("#error")
    assert page.locator("[aria-invalid]").count() == 0


STREAM = {"content_type": "text/event-stream"}
CHUNK = 'data: {"choices": [{"index": 0, "text": " <img src=x onerror=alert(1)> fine", "finish_reason": null}]}\n\n'
BUSY = json.dumps({"error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "queue_full"}})
BROKEN = (
    'data: {"error": {"message": "the value explicit gave NaN", "type": "server_error", "param": null, "code": null}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"status": 429, "headers": {"retry-after": "3"}, "body": BUSY}, ["the queue is full", "Try again in 3 s"]),
        ({"status": 502, "body": "<html>bad gateway</html>"}, ["502"]),
        ({**STREAM, "body": CHUNK + BROKEN}, ["the value explicit gave NaN"]),
        ({**STREAM, "body": CHUNK}, ["closed before the answer was complete"]),
        ({**STREAM, "body": "data: {broken\n\n"}, ["cannot read"]),
        (None, ["cannot be reached"]),
    ],
    ids=["busy", "gateway", "breaks", "cut", "nonsense", "gone"],
)
def test_errors_are_shown(visit, reply, expected):
    page = visit("#m=eft", [("**/v1/completions", lambda route: route.abort() if reply is None else route.fulfill(**reply))])
    run(page)
    for words in expected:
        assert words in page.inner_text("#error")
    if reply and CHUNK in reply["body"]:
        assert "<img src=x" in answer(page, "guided")  # what had come stays, as text
    assert page.locator("img").count() == 0
    assert page.is_enabled("#run")


def test_api_key(visit):
    keys = []

    def guard(route):
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer secret-key":
            route.continue_()
        else:
            error = {"message": "no valid API key", "type": "authentication_error", "param": None, "code": "invalid_api_key"}
            route.fulfill(status=401, body=json.dumps({"error": error}))

    page = visit("#m=eft&n=4", [("**/v1/*", guard)])
    until(lambda: page.is_visible("#key"))
    assert "no valid API key" in page.inner_text("#error")
    page.fill("#key", "secret-key")
    page.keyboard.press("Enter")
    ready(page)
    run(page)
    assert keys[-1] == "Bearer secret-key"
    assert "secret-key" not in page.url
    assert answer(page, "guided")


def test_stop_stops(visit, monkeypatch):
    from ivg.search.searcher import Searcher

    step = Searcher.step
    monkeypatch.setattr(Searcher, "step", lambda self: (time.sleep(0.3), step(self))[1])  # the answer cannot be there before the key
    page = visit("#m=ivg&w=4&k=8&l=5&n=200&s=3")
    ready(page)
    page.click("#run")
    until(lambda: page.locator("#tree-scroll .node").count() > 0)
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped by you" in page.inner_text("#guided .facts")
    assert page.is_hidden("#error")
    metrics = lambda: page.evaluate("fetch('metrics').then(r => r.text())")  # noqa: E731
    until(lambda: re.search(r"^ivg_live_beams\S* 0", metrics(), re.M))
    assert visit.complaints == []


# The page itself


def test_ctrl_enter_runs_from_the_prompt(visit):
    page = visit("#m=eft&n=4")
    ready(page)
    page.fill("#prompt", "I went to")
    page.press("#prompt", "Control+Enter")
    until(lambda: page.locator("#guided .tok").count() > 0)
    finished(page)
    assert page.inner_text("#guided .prompt") == "I went to"


def test_examples_run(visit):
    page = visit("#m=eft&n=4")
    ready(page)
    assert page.locator("#examples button").count() == 3
    page.click("#examples button >> nth=1")
    text = page.inner_text("#examples button >> nth=1")
    until(lambda: page.locator("#guided .tok").count() > 0)
    finished(page)
    assert page.input_value("#prompt") == text == page.inner_text("#guided .prompt")


FIELDS = ("prompt", "method", "beta", "width", "successors", "chunk_length", "temperature", "max_tokens", "seed", "weight-explicit")


def test_the_link_restores_all_settings(visit):
    page = visit()
    ready(page)
    page.select_option("#method", "cbs-implicit")
    page.fill("#prompt", "Zwölf & <b>50 %</b> = #1\nnext")
    wanted = {
        "width": "3",
        "successors": "5",
        "chunk_length": "7",
        "temperature": "1.25",
        "max_tokens": "33",
        "seed": "77",
        "weight-explicit": "0.5",
    }
    for name, value in wanted.items():
        page.fill(f"#{name}", value)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#share")
    until(lambda: page.inner_text("#share") == "Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    first = {f: page.input_value(f"#{f}") for f in FIELDS}
    assert {f: first[f] for f in wanted} == wanted
    other = visit(link[link.index("#") :])
    ready(other)
    until(lambda: {f: other.input_value(f"#{f}") for f in FIELDS} == first)


def test_method_sets_its_defaults(visit):
    page = visit()
    ready(page)
    assert (page.input_value("#method"), page.input_value("#width"), page.input_value("#chunk_length")) == ("ivg", "4", "5")
    page.select_option("#method", "eft")
    assert page.is_disabled("#width")
    assert "one draft" in page.inner_text("#width-help")
    page.select_option("#method", "bon")
    assert page.inner_text("#chunk_length-value") == "whole answer"
    assert page.is_disabled("#beta")
    assert page.input_value("#successors") == "16"


def test_nothing_overflows_a_phone(visit):
    page = visit(IVG, viewport={"width": 360, "height": 740})
    run(page)
    page.locator("#settings summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#guided .tok").last.click()
    assert page.is_visible("#pop")
    box = page.locator("#pop").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paint = (colours) => { canvas.clearRect(0, 0, 1, 1); for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)]; };
  const light = (rgb) => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const behind = (e) => { const all = [];
    for (; e; e = e.parentElement) all.unshift(getComputedStyle(e).backgroundColor);
    return ["white", ...all]; };
  const texts = [...document.querySelectorAll("body *:not(.visually-hidden):not(script):not(noscript)")]
    .filter(e => e.getClientRects().length && !e.closest("svg") && !e.disabled
      && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  return texts.map(e => [`${e.tagName}.${e.className} ${e.textContent.slice(0, 24)}`,
    ratio(paint([...behind(e), getComputedStyle(e).color]), paint(behind(e)))]).concat(
    [...document.querySelectorAll("svg .node")].map(e => { const fill = getComputedStyle(e.querySelector("rect")).fill;
      return [`node ${e.textContent}`, ratio(paint([fill, getComputedStyle(e.querySelector("text")).fill]), paint([fill]))]; }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme):
    page = visit("#m=ivg&w=2&k=3&l=5&n=15&s=1&b=3", color_scheme=scheme)
    run(page)
    page.locator("#guided .tok").nth(1).focus()
    found = page.evaluate(CONTRAST)
    assert len(found) > 60
    poor = [(what, round(ratio, 2)) for what, ratio in found if ratio < 4.5]
    assert poor == []


def test_dark_follows_the_system_and_the_toggle(visit):
    page = visit(color_scheme="dark")
    paper = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    dark = paper()
    assert max(int(v) for v in re.findall(r"\d+", dark)[:3]) < 60
    page.click("#theme")
    assert min(int(v) for v in re.findall(r"\d+", paper())[:3]) > 230
    page.reload()
    assert min(int(v) for v in re.findall(r"\d+", paper())[:3]) > 230
    page.click("#theme")
    assert paper() == dark


NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, [role=button], [role=region], svg")]
  .filter(e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim())
    || (e.matches("input, select, textarea") && !e.labels.length))
  .map(e => e.outerHTML.slice(0, 80))"""
DANGLING = """() => [...document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]")]
  .flatMap(e => [e.getAttribute("aria-describedby"), e.getAttribute("aria-labelledby"), e.getAttribute("for")])
  .filter(id => id && !document.getElementById(id))"""


def test_names_and_tab_order(visit):
    page = visit(IVG)
    run(page)
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(DANGLING) == []
    assert page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)") == []
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.get_attribute("html", "lang") == "en"
    page.focus(".skip")
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        place = page.evaluate("(e => e.id || e.closest('[id]')?.id)(document.activeElement)")
        if place in (None, order[0] if order else None):
            break
        order.append(place)
        outline = page.evaluate("(e => [getComputedStyle(e).outlineStyle, e.matches('.node')])(document.activeElement)")
        assert outline[0] != "none" or outline[1], f"no visible focus on {place}"
    wanted = ["share", "theme", "prompt", "examples", "method", "run", "beta", "width", "seed", "base", "guided", "tree-scroll"]
    assert [p for p in dict.fromkeys(order) if p in wanted] == wanted


def test_live_regions_are_updated_rarely(visit):
    page = visit(IVG)
    ready(page)
    page.evaluate("""() => { window.messages = [];
      new MutationObserver(() => window.messages.push(document.getElementById("status").textContent))
        .observe(document.getElementById("status"), {childList: true, subtree: true, characterData: true}); }""")
    run(page)
    messages = page.evaluate("window.messages")
    assert 2 <= len(messages) <= 4
    assert "done" in messages[-1]
    live = page.locator("[aria-live], [role=status], [role=alert]").evaluate_all("all => all.map(e => e.id)")
    assert sorted(live) == ["error", "status"]


def test_reduced_motion(visit):
    page = visit(reduced_motion="reduce")
    page.evaluate("document.querySelector('#base .answer').setAttribute('aria-busy', 'true')")
    assert page.evaluate("getComputedStyle(document.querySelector('#base .answer'), '::after').animationName") == "none"


def test_page_loads_nothing_from_elsewhere(visit):
    asked = []
    page = visit("#m=eft&n=4", [("**/*", lambda route: (asked.append(route.request.url), route.continue_()))])
    run(page)
    home = page.url[: page.url.index("/", 8)]
    assert len(asked) > 8
    assert all(address.startswith((home, "data:")) for address in asked)
