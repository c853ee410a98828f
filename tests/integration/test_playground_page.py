"""The playground in Chromium: keyboard, links, settings, layout, contrast, accessibility."""

# ruff: noqa: F811
import itertools
import re
from pathlib import Path

import pytest

from playground_tools import IVG, answer, browser, finished, model, ready, run, url, visit  # noqa: F401
from serving_tools import wait_for

pytestmark = pytest.mark.long


# The page itself


def test_ctrl_enter_runs_from_the_prompt(visit):
    page = visit("#m=eft&n=4&e=0")
    ready(page)
    page.fill("#prompt", "I went to")
    page.press("#prompt", "Control+Enter")
    wait_for(lambda: page.locator("#guided .tok").count() > 0)
    finished(page)
    assert page.inner_text("#guided .prompt") == "I went to"


def test_examples_run(visit):
    page = visit("#m=eft&n=4&e=0")
    ready(page)
    assert page.locator("#examples button").count() == 3
    page.click("#examples button >> nth=1")
    text = page.inner_text("#examples button >> nth=1")
    wait_for(lambda: page.locator("#guided .tok").count() > 0)
    finished(page)
    assert page.input_value("#prompt") == text == page.inner_text("#guided .prompt")


def test_an_instruction_guides_and_is_in_the_link(visit):
    page = visit("#m=contrast&n=4&e=0&i=A+wonderful+film.")
    ready(page)
    assert page.is_visible("#contrast")
    assert page.input_value("#contrast") == "A wonderful film."
    with page.expect_request(lambda r: r.method == "POST" and "contrast" in (r.post_data or "")) as asked:
        run(page)
    assert asked.value.post_data_json["guidance"]["contrast"] == "A wonderful film."
    assert "negative" not in asked.value.post_data_json["guidance"]
    page.fill("#contrast", "")
    page.click("#run")
    wait_for(lambda: "needs an instruction" in page.inner_text("#error"))
    page.select_option("#method", "eft")
    assert not page.is_visible("#contrast")


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
    wait_for(lambda: page.inner_text("#share") == "Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    first = {f: page.input_value(f"#{f}") for f in FIELDS}
    assert {f: first[f] for f in wanted} == wanted
    other = visit(link[link.index("#") :])
    ready(other)
    wait_for(lambda: {f: other.input_value(f"#{f}") for f in FIELDS} == first)


def test_method_sets_its_defaults(visit):
    page = visit()
    ready(page)
    assert (page.input_value("#method"), page.input_value("#width"), page.input_value("#chunk_length")) == ("ivg", "4", "5")
    page.select_option("#method", "eft")
    assert page.is_disabled("#width")
    assert "one beam" in page.inner_text("#width-help")
    page.select_option("#method", "bon")
    assert page.inner_text("#chunk_length-value") == "whole answer"
    assert page.is_disabled("#beta")
    assert page.input_value("#successors") == "16"


def test_methods_are_those_of_the_servers_table(visit):
    page = visit()
    ready(page)
    listed = page.evaluate("fetch('v1/models').then(r => r.json())")
    table = {e["ivg"]["method"]: e["ivg"] for e in listed["data"] if e["ivg"]["method"] != "base"}
    assert set(page.locator("#method option").evaluate_all("all => all.map(o => o.value)")) == set(table)
    titles = page.locator("#method optgroup").evaluate_all("all => all.map(g => [g.label, [...g.children].map(o => o.value)])")
    assert {len({table[name]["level"] for name in names}) for _, names in titles} == {1}
    page.click("#methods summary")
    words = page.inner_text("#method-list")
    assert all(entry["summary"][1:] in words for entry in table.values())
    page.click("#method-list .pick >> text=fudge")
    assert page.input_value("#method") == "fudge"
    page.focus("#method-help .term")
    assert "Future discriminators" in page.inner_text("#pop")


def test_a_phone_scrolls_to_the_answers(visit):
    page = visit("#m=eft&n=4&e=0", viewport={"width": 320, "height": 700})
    ready(page)
    assert "below it the guided one" in page.inner_text(".lead")
    assert "Right: guided" not in page.inner_text(".lead")
    assert page.locator("#answers").bounding_box()["y"] > 500
    run(page)
    wait_for(lambda: abs(page.locator("#answers").bounding_box()["y"]) < 30)


def test_nothing_overflows_a_phone(visit):
    page = visit(IVG, viewport={"width": 320, "height": 740})
    run(page)
    page.locator("#settings summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.locator("#guided .tok").last.click()
    assert page.is_visible("#pop")
    box = page.locator("#pop").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 320
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


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
  .flatMap(ids => ids?.split(" ") ?? []).filter(id => !document.getElementById(id))"""


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
        if place is None:
            break  # at the beginning again
        order.append(place)
        outline = page.evaluate("(e => [getComputedStyle(e).outlineStyle, e.matches('.node')])(document.activeElement)")
        assert outline[0] != "none" or outline[1], f"no visible focus on {place}"
    wanted = [
        "links",
        "share",
        "theme",
        "gallery",
        "prompt",
        "examples",
        "method",
        "run",
        "beta",
        "width",
        "seed",
        "base",
        "guided",
        "tree-scroll",
    ]
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
    assert sorted(live) == ["error", "key-error", "status"]


def test_reduced_motion(visit):
    page = visit(reduced_motion="reduce")
    page.evaluate("document.querySelector('#base .answer').setAttribute('aria-busy', 'true')")
    assert page.evaluate("getComputedStyle(document.querySelector('#base .answer'), '::after').animationName") == "none"


def test_page_loads_nothing_from_elsewhere(visit):
    asked = []
    page = visit("#m=eft&n=4&e=0", [("**/*", lambda route: (asked.append(route.request.url), route.continue_()))])
    run(page)
    home = page.url[: page.url.index("/", 8)]
    assert len(asked) > 8
    assert all(address.startswith((home, "data:")) for address in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_axe_finds_no_fault(visit, width, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="no axe: pip install -c constraints.txt -e '.[dev]'")
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
    ready(page)
    wait_for(lambda: page.is_visible("#recorded"))
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.evaluate("for (const id of ['key-form', 'conversation', 'system-field']) document.getElementById(id).hidden = false")
    page.click("[data-form=recipe]")
    page.locator("#guided .tok").nth(1).focus()
    faults = {}
    for place in ("", "reference"):
        if place:
            page.goto(f"{page.url.split('#')[0]}{place}")
        page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
        found = page.evaluate("axe.run()")["violations"]
        faults |= {f"{place} {v['id']}: {v['help']}": [n["html"][:120] for n in v["nodes"]] for v in found}
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert faults == {}
