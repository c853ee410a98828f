"""Record the runs that the playground shows before its first run: its own examples, the real server, the embedded models, in Chromium.

    .venv/bin/python dev/record_playground.py      writes src/ivg/serving/playground/recorded/*.json

Needs Chromium and ``ivg[dev]``. Record again when the embedded models, the examples or the events of the server change.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Route, sync_playwright
from screenshots import server, wait_for_answers

import ivg

FOLDER = Path(__file__).parents[1] / "src" / "ivg" / "serving" / "playground" / "recorded"


def events(body: str) -> list[dict[str, Any]]:
    """The events that api.js makes of a stream, without what the page shows only while it is written."""
    tree: list[dict[str, Any]] = []
    text, tokens, end = "", [], {}
    for name, data in re.findall(r"(?:event: (\S+)\r?\n)?data: (\{.*\})\r?\n\r?\n", body):
        found = json.loads(data, parse_float=lambda number: round(float(number), 3))
        if name == "ivg.beams":
            sides = {
                side: [{k: v for k, v in node.items() if k not in ("tokens", "shift")} for node in found[side]]
                for side in ("kept", "dropped")
            }
            tree.append({"type": "beams", "data": sides})
        elif name == "ivg.tokens":
            tokens += found["tokens"]
        elif found["choices"]:
            choice = found["choices"][0]
            text += choice["text"]
            if "ivg" in found:
                end = {"finish": choice["finish_reason"], **found["ivg"]}
    return [*tree, {"type": "tokens", "data": tokens}, {"type": "text", "data": text}, {"type": "end", "data": end}]


def record(browser: Browser, url: str, example: dict[str, Any]) -> dict[str, Any]:
    """Run one example in the page; what came, and what was asked for."""
    context = browser.new_context()
    page, found = context.new_page(), []

    def keep(route: Route) -> None:
        response = route.fetch(timeout=600_000)
        found.append((route.request.post_data_json, response.text()))
        route.fulfill(response=response)

    page.route("**/v1/completions", keep)
    page.goto(url + example["link"])
    wait_for_answers(page, example["name"])
    context.close()
    (unguided, left), (guided, right) = found
    scorer = unguided["guidance"]["select_value"]
    scoring = {"scorer": scorer, "guidedScorer": scorer, "scoredOnly": "select_value" in guided["guidance"]}
    seed, method = guided["seed"], guided["guidance"]["method"]
    made = {"version": ivg.__version__, "made": datetime.datetime.now(tz=datetime.UTC).date().isoformat()}
    return {
        "prompt": guided["prompt"],
        "method": method,
        "seed": seed,
        **made,
        "end_at_sentence": guided["guidance"]["end_at_sentence"],
        "scoring": scoring,
        "base": events(left),
        "guided": events(right),
    }


def main() -> None:
    """Record all examples of the page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on this machine\n  install one, e.g. apt-get install chromium")
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as p, server() as url:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(url)
        examples = page.evaluate("import('/gallery.js').then(m => m.EXAMPLES)")
        for example in examples:
            path = FOLDER / f"{example['name']}.json"
            path.write_text(json.dumps(record(browser, url, example), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
            sys.stdout.write(f"{path}: {path.stat().st_size / 1024:.0f} KB\n")
        browser.close()


if __name__ == "__main__":
    main()
