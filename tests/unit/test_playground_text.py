"""Texts of the playground are shortened to a width without measuring a whole answer again and again. Needs node."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import ivg

SCRIPT = """
let measured = 0;
const context = { measureText: (t) => { measured += t.length; return { width: t.length * 7 }; } };
globalThis.document = { createElement: () => ({ getContext: () => context }) };
const { shorten } = await import("./dom.mjs");
const texts = ["abc", "a", "word ".repeat(800), "ab   cdefghijkl", "ab cdefgh  "];
console.log(JSON.stringify(texts.map((t) => { measured = 0; return [shorten(t, t === "a" ? 5 : 43, "f"), measured]; })));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_long_text_is_shortened_at_once(tmp_path):
    """Letters of 7 pixels in 43 (less 1): five and the ellipsis fit."""
    (tmp_path / "dom.mjs").write_text((Path(ivg.__file__).parent / "serving/playground/dom.js").read_text())
    (tmp_path / "run.mjs").write_text(SCRIPT)
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert [text for text, _ in found] == ["abc", "…", "word…", "ab…", "ab cd…"]
    assert found[2][1] < 4000 + 100, "the whole text once, then some of its beginning"
