"""Structured output inside vLLM, in chunks and beams too: the tokens and the distribution of the transformers engine's masks."""

from __future__ import annotations

import json
import re

import pytest
from making import models, prompts, trio

from grammar_texts import PROMPT, close, enumerated, mixed
from ivg.engines.vllm.client import EngineClient, EngineClientOptions
from ivg.errors import ConfigError

REGEX = "[ab]{9}|c(de)*f"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["xyz", "zyx"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CALL = f'%llguidance {{}}\nstart: "<call>" name "(" arguments ")"\nname: /[a-c]{{1,4}}/\narguments: %json {json.dumps(SCHEMA)}\n'
"""In llguidance's own notation, which is that of required calls of tools."""
GRAMMARS = [{"regex": REGEX}, {"json_schema": SCHEMA}, {"grammar": CALL}, {"choice": ["yes", "yes please", "no"]}]
TEXTS = ["b", "ab", "abab", "bab", "film", "filma"]
"""One is the beginning of another."""


@pytest.fixture(scope="module")
def fast(folder):
    with models("vllm", models=trio(folder, "llama"), search={"method": "eft"}, vllm={"max_num_seqs": 256}) as model:
        yield model


@pytest.fixture(scope="module")
def slow(folder):
    with models("transformers", models=trio(folder, "llama")) as model:
        yield model


@pytest.fixture(scope="module")
def searching():
    with models("vllm", every_guide=True) as model:
        yield model


@pytest.mark.parametrize("settings", GRAMMARS, ids=lambda s: next(iter(s)))
@pytest.mark.parametrize("length", [1, 3, 7, None])
def test_tokens_are_those_of_the_transformers_engine(fast, slow, settings, length):
    """In whole and in chunks: a grammar that began anew in each chunk would write other ones."""
    settings = {"temperature": 0.0, "max_new_tokens": 60, "beta": 1.0, **settings}
    expected = [(c.token_ids, c.text, c.finish_reason) for c in slow.generate(prompts(3), "eft", **settings)]
    method = {"method": "eft"} if length is None else {"method": "custom", "token": "implicit", "chunk_length": length}
    found = fast.generate(prompts(3), **method, **settings)
    assert [(c.token_ids, c.text, c.finish_reason) for c in found] == expected and not any(c.error for c in found)


@pytest.mark.parametrize("length", [1, None])
def test_the_distribution_is_the_method_s_over_the_texts_of_the_grammar(fast, slow, length):
    chunks = {"method": "eft"} if length is None else {"method": "custom", "token": "implicit", "chunk_length": length}
    answers = fast.generate(PROMPT, **chunks, n=800, choice=TEXTS, seed=4, beta=1.3, temperature=1.0)
    assert len(close(answers, enumerated(slow, TEXTS, mixed(slow, 1.3)))) > 2
    assert {c.finish_reason for c in answers} == {"stop"}


def valid(settings, text):
    if "regex" in settings:
        return re.fullmatch(settings["regex"], text)
    if "choice" in settings:
        return text in settings["choice"]
    if "grammar" in settings:
        text = re.fullmatch(r"<call>[a-c]{1,4}\((.*)\)", text, re.DOTALL)[1]
    found = json.loads(text)
    return set(found) == {"a", "b"} and 0 <= found["a"] <= 99 and found["b"] in ("xyz", "zyx")


@pytest.mark.parametrize("method", ["ivg", "cbs-explicit", "bon"])
@pytest.mark.parametrize("settings", GRAMMARS, ids=lambda s: next(iter(s)))
def test_every_beam_follows_the_grammar(searching, method, settings):
    """Beams differ, so each has a state of its own; they are freed."""
    sizes = {"successors": 3} if method == "bon" else {"width": 2, "successors": 2, "chunk_length": 4}
    done = searching.generate(prompts(3), method, n=3, seed=2, max_new_tokens=200, temperature=1.0, **sizes, **settings)
    answers = [c for some in done for c in some]
    assert all(c.error is None and c.finish_reason == "stop" and valid(settings, c.text) for c in answers), answers
    assert len({c.text for c in answers}) > 1
    assert searching.engine.grammars.live == 0


def test_white_space_ends(fast):
    """Where white space is likeliest: a model could write it for ever."""
    spaces = {fast.base.tokenizer(text).input_ids[0]: 50.0 for text in (" ", "\n")}
    done = fast.generate(prompts(3), "eft", json_schema=SCHEMA, logit_bias=spaces, max_new_tokens=200, seed=1)
    assert all(c.finish_reason == "stop" and valid({}, c.text) for c in done)
    assert any(" " in c.text or "\n" in c.text for c in done)


def test_streamed(searching):
    """Pieces of the one answer, also where the grammar is complete before vLLM stops."""
    settings = {"max_new_tokens": 40, "temperature": 0.0, "regex": REGEX}
    for method in ("eft", "cbs-explicit"):
        pieces = list(searching.stream("The film", method, **settings))
        assert "".join(pieces) == searching.generate("The film", method, **settings).text


def test_lengths(fast, slow):
    """The grammar decides where a response may end; where nothing else can follow, it ends before any least number of tokens."""
    b = slow.base.tokenizer("b").input_ids[0]
    for settings in (
        {"regex": "[ab]{3}", "ignore_eos": True},
        {"regex": "[ab]+", "ignore_eos": True, "max_new_tokens": 6},
        {"regex": "[ab]+", "min_new_tokens": 7},
        {"choice": ["yes", "no"], "min_new_tokens": 12},
        {"regex": "[ab]{3}", "max_new_tokens": 3},
        {"regex": "[ab]{40}", "max_new_tokens": 3},
        {"regex": "(ab)+", "stop_token_ids": [b]},
        {"regex": "(ab)+", "stop_token_ids": [b], "ignore_eos": True, "logit_bias": {slow.base.tokenizer.eos_token_id: 90.0}},
        {"regex": "a+", "stop_token_ids": [b], "ignore_eos": True, "min_new_tokens": 3, "logit_bias": {b: 90.0}},
    ):
        settings = {"temperature": 0.0, "max_new_tokens": 20, "beta": 1.0, **settings}
        expected = [(c.token_ids, c.text, c.finish_reason) for c in slow.generate(prompts(3), "eft", **settings)]
        for method in ({"method": "eft"}, {"method": "custom", "token": "implicit", "chunk_length": 2}):
            assert [(c.token_ids, c.text, c.finish_reason) for c in fast.generate(prompts(3), **method, **settings)] == expected


def test_nothing_valid_left_is_a_clear_error(fast):
    done = fast.generate(prompts(1)[0], "eft", regex="c[ab]{9}", bad_words=["a", "b", "aa", "ab", "ba", "bb"], seed=1)
    assert (done.finish_reason, done.text) == ("error", "c")
    assert "regex and other settings (bad_words …) seem to forbid all tokens after 1" in done.error


def test_unusable_grammars_are_refused(fast):
    for settings, message in (
        ({"regex": "a["}, "regex cannot be used"),
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be used: .*objekt"),
        ({"grammar": "nonsense {"}, "grammar cannot be"),
    ):
        with pytest.raises(ConfigError, match=message):
            fast.generate("The film", "eft", **settings)
    with pytest.raises(ConfigError, match=r"scheduler_cls='x'\n  ivg has its own"):
        EngineClient("", EngineClientOptions(extra={"scheduler_cls": "x"}))
