"""Comparisons with other programs: their value is ivg's, replies are read, tables say what was equal, and one whole comparison."""

import io
import json
import os
import sys

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import protocol
from benchmarks.peers.value import Value
from ivg import GuidedModel, LoadOptions
from ivg.embedded import path

PROMPTS = ["The movie was", "My wife and I"]


def test_the_value_of_the_peers_is_the_explicit_value():
    model = GuidedModel.embedded(LoadOptions(dtype="float32"))
    judge = Value(str(path("value")))
    for prompt in PROMPTS:
        texts = [done.text for done in model.generate(prompt, "base", n=5, seed=3, max_new_tokens=12) if done.text]
        assert len(texts) > 2 and judge.of_texts(prompt, texts) == pytest.approx(model.score(prompt, texts), abs=1e-4)


def test_a_program_answers_line_by_line(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setenv(protocol.REPLIES, str(write))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompts": ["a", "b"], "seed": 7, "tokens": 3}\n'))
    protocol.serve({"torch": "1"}, lambda prompts, seed, tokens: [f"{p}{seed}{tokens}" for p in prompts])
    with os.fdopen(read) as replies:
        ready, reply = (json.loads(replies.readline()) for _ in range(2))
    assert ready == {"ready": {"torch": "1"}}
    assert reply["answers"] == ["a73", "b73"] and reply["seconds"] >= 0


def test_tables_name_what_differs():
    row = {
        "task": "greedy",
        "peer": "other",
        "prompts": 8,
        "seconds": {"peer": 3.0, "ivg": 1.5},
        "ratio": 2.0,
        "cpu_ratio": 1.25,
        "value": {"peer": 0.5, "ivg": -0.5},
    }
    rows = [row | {"equal": None}, row | {"equal": True}, row | {"equal": False}]
    first, second, third = peers.table(rows).splitlines()[2:]
    assert first == "| greedy | other | 8 | 3.00 | 1.50 | 2.00 | 1.25 | +0.50 | -0.50 |"
    assert "greedy; equal texts" in second and "greedy; **other texts**" in third


@pytest.mark.long
def test_a_comparison_with_what_is_installed(monkeypatch, tmp_path, capfd):
    """transformers needs no environment of its own; a peer without one is named."""
    page = tmp_path / "page.md"
    page.write_text("# Page\n", encoding="utf-8")
    sizes = ["--prompts", "2", "--tokens", "4", "--rounds", "1"]
    words = ["--peers", "transformers", "genlm-control", "--environments", str(tmp_path), *sizes]
    monkeypatch.setattr(sys, "argv", ["peers", *words, "--docs", str(page)])
    peers.main()
    printed = capfd.readouterr()
    assert "genlm-control: no environment; scripts/peers.sh" in printed.err
    assert "| best of 16 by the value | transformers | 2 |" in printed.out
    assert printed.out.strip() in page.read_text(encoding="utf-8")
