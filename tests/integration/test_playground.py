"""The playground in Chromium: answers, search tree, tokens, errors."""

# ruff: noqa: F811
import itertools
import json
import re
import threading

import pytest

from ivg.serving.app import PLAYGROUND
from playground_tools import EFT, IVG, answer, browser, events, finished, keep, model, ready, run, url, visit  # noqa: F401
from serving_tools import wait_for

pytestmark = pytest.mark.long


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
    assert any(grey for _, grey in seen)  # a beam that may still change is shown as such
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
    page = visit("#m=eft&n=4&e=0&x=implicit:1,explicit:0.5,explicit-other:0", keep(bodies))
    run(page)
    assert [b["guidance"].get("weights") for b, _ in bodies if b["guidance"]["method"] == "eft"] == [{"implicit": 1, "explicit": 0.5}]
    assert [b["guidance"].get("weights") for b, _ in bodies if b["guidance"]["method"] == "base"] == [None]


def test_one_answer_after_the_other_and_only_what_changed(visit):
    page = visit(EFT)
    ready(page)
    log = []
    page.on("request", lambda r: r.method == "POST" and log.append(r.post_data_json["guidance"]["method"]))
    page.on("requestfinished", lambda r: r.method == "POST" and log.append("done"))
    run(page)
    wait_for(lambda: page.evaluate("true") and log == ["base", "done", "eft", "done"])
    before = answer(page, "base")
    page.fill("#beta", "2")
    run(page)
    wait_for(lambda: page.evaluate("true") and log[4:] == ["eft", "done"])  # the unguided answer is the same
    assert answer(page, "base") == before
    page.fill("#seed", "2")
    run(page)
    wait_for(lambda: page.evaluate("true") and log[6:] == ["base", "done", "eft", "done"])
    assert visit.complaints == []


def test_a_recorded_run_is_shown_first(visit):
    page = visit()
    ready(page)
    wait_for(lambda: page.is_visible("#recorded"))
    assert "recorded run, not an answer of this server" in page.inner_text("#recorded")
    recorded = json.loads((PLAYGROUND / "recorded" / "ivg.json").read_text())
    text = next(e["data"] for e in recorded["guided"] if e["type"] == "text")
    assert answer(page, "guided") == text
    columns = [e["data"] for e in recorded["guided"] if e["type"] == "beams"]
    assert page.locator("#tree-scroll .node").count() == sum(len(c["kept"]) + len(c["dropped"]) for c in columns) > 0
    assert "recorded on" in page.inner_text("#guided .facts")
    page.select_option("#method", "eft")
    page.fill("#max_tokens", "4")
    run(page)
    assert page.is_hidden("#recorded")
    assert "recorded" not in page.inner_text("#answers")
    assert answer(page, "guided") != text
    assert visit.complaints == []


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
    assert f"{len(selections)} chunks, {len(scores)} beams tried" in page.inner_text("#tree-summary")
    assert page.locator("#tree-scroll .edge.won").count() == len(selections) - 1


def test_texts_of_the_tree_are_shortened_not_clipped(visit):
    """Letters differ in width: a count of characters once cut the ellipsis off, or half a letter."""
    page = visit()
    ready(page)
    wait_for(lambda: page.locator("#tree-scroll .node").count() > 100)
    found = page.locator("#tree-scroll .node svg").evaluate_all(
        "all => all.map(s => [s.firstChild.textContent, s.firstChild.getComputedTextLength(), s.width.baseVal.value])"
    )
    assert [text for text, length, space in found if length > space] == []
    assert [text for text, length, space in found if text.endswith("…") and length < space - 25] == []
    assert any(text.endswith("…") for text, *_ in found) and any(not text.endswith("…") for text, *_ in found)


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
    page = visit("#m=ivg&w=16&k=16&n=10&e=0")
    ready(page)
    assert "This server allows 64" in page.inner_text("#successors-help")
    run(page)
    words = page.inner_text("#error")
    assert "256" in words
    assert "64" in words
    assert "Continuations per beam K" in words
    assert page.get_attribute("#successors", "aria-invalid") == "true"
    page.fill("#prompt", "")
    page.click("#run")
    wait_for(lambda: "prompt" in page.inner_text("#error").lower() and page.get_attribute("#prompt", "aria-invalid") == "true")
    page.fill("#prompt", "The movie was")
    page.evaluate("location.hash = '#m=eft&n=4&e=0'")
    wait_for(lambda: page.input_value("#method") == "eft")
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
        assert "<img src=x" in answer(page, "base")  # what had come stays, as text
    assert answer(page, "guided") == "Not asked, because the unguided answer failed."
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

    page = visit("#m=eft&n=4&e=0", [("**/v1/*", guard)])
    wait_for(lambda: page.is_visible("#key"))
    assert "needs an API key" in page.inner_text("#key-form")
    assert page.is_hidden("#key-error")
    assert page.is_hidden("#error")
    page.fill("#key", "wrong-key")
    page.keyboard.press("Enter")
    wait_for(lambda: "no valid API key" in page.inner_text("#key-form"))
    page.fill("#key", "secret-key")
    page.click("#key-form button")
    ready(page)
    assert page.is_hidden("#key-form")
    run(page)
    assert keys[-1] == "Bearer secret-key"
    assert "secret-key" not in page.url
    assert answer(page, "guided")


def test_stop_stops(visit, monkeypatch):
    from ivg.search.searcher import Searcher

    step, selections, stopped = Searcher.step, [], threading.Event()

    def wait_behind_the_first_selection(self):
        if selections:
            stopped.wait(200)
        steps = step(self)
        selections.extend(s for s in steps if len(s.kept) > 1)  # not of the unguided answer, which comes first
        return steps

    monkeypatch.setattr(Searcher, "step", wait_behind_the_first_selection)
    page = visit("#m=ivg&w=4&k=8&l=5&n=200&s=3")
    ready(page)
    page.click("#run")
    wait_for(lambda: page.locator("#tree-scroll .node").count() > 0)
    page.keyboard.press("Escape")
    finished(page)
    stopped.set()
    assert "stopped by you" in page.inner_text("#guided .facts")
    assert page.is_hidden("#error")
    metrics = lambda: page.evaluate("fetch('metrics').then(r => r.text())")  # noqa: E731
    wait_for(lambda: re.search(r"^ivg_live_beams\S* 0", metrics(), re.M))
    assert visit.complaints == []
