"""Log-probabilities inside vLLM: of drawn and of given tokens, those of the transformers engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from making import models, prompts, trio

from ivg.engines.vllm.client import EngineClient, EngineClientOptions
from ivg.errors import ConfigError

CHUNKS = {"method": "custom", "token": "implicit", "chunk_length": 5}


@pytest.fixture(scope="module")
def slow(folder):
    with models("transformers", models=trio(folder, "llama")) as model:
        yield model


@pytest.fixture(scope="module")
def fast(folder):
    with models("vllm", models=trio(folder, "llama"), search={"method": "eft"}) as model:
        yield model


def check(found, expected):
    assert [d.token for d in found] == [d.token for d in expected] and found
    for got, want in zip(found, expected, strict=True):
        assert (got.logprob, got.base_logprob) == pytest.approx((want.logprob, want.base_logprob), abs=2e-4)
        for tops in ((got.top, want.top), (got.top_base, want.top_base)):
            assert [i for i, _ in tops[0]] == [i for i, _ in tops[1]]
            assert [p for _, p in tops[0]] == pytest.approx([p for _, p in tops[1]], abs=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("method", [{"method": "eft"}, CHUNKS], ids=["whole", "chunks"])
def test_of_drawn_tokens(fast, slow, method, temperature):
    """At the request's temperature, before penalties and filters, with the drawn token among them."""
    settings = {"beta": 1.5, "temperature": temperature}
    drawing = {"max_new_tokens": 12, "seed": 3, "top_k": 30, "presence_penalty": 1.0, "bad_words": ["film"]}
    for text, done in zip(prompts(3), fast.generate(prompts(3), **method, **settings, **drawing, alternatives=3), strict=True):
        plain = slow.logprobs(text, done.token_ids, "eft", beta=1.5, temperature=temperature or 1.0, alternatives=3)
        check(done.details, plain.tokens)
        assert "".join(d.text for d in done.details) == done.text
        assert any(d.logprob != d.base_logprob for d in done.details)


def test_asking_changes_no_answer(fast):
    """Nor those of other requests, which go on meanwhile."""
    settings = {"max_new_tokens": 16, "temperature": 1.0, "beta": 1.0}
    asked = [fast.request(text, "eft", seed=i, **settings) for i, text in enumerate(prompts(6))]
    plain = [c.token_ids for _, c in sorted(fast.run(asked))]
    mixed = [c for _, c in sorted(fast.run([replace(r, alternatives=2 if i % 2 else None) for i, r in enumerate(asked)]))]
    assert [c.token_ids for c in mixed] == plain
    assert [len(c.details) for c in mixed] == [len(c.token_ids) if i % 2 else 0 for i, c in enumerate(mixed)]
    assert not fast.engine.running and not fast.engine.client.busy


def test_the_text_ends_at_a_stop_string(fast):
    plain = fast.generate(prompts(2)[1], "eft", temperature=0.0, max_new_tokens=12)
    stop = plain.text[len(plain.text) // 2 :][:3]
    done = fast.generate(prompts(2)[1], "eft", temperature=0.0, max_new_tokens=12, stop=[stop], alternatives=0)
    assert done.finish_reason == "stop" and "".join(d.text for d in done.details) == done.text
    assert all(d.top == () for d in done.details)


def test_best_of(fast, slow):
    best = fast.generate(prompts(2)[1], "eft", n=2, best_of=5, seed=4, max_new_tokens=8, temperature=1.0)
    every = fast.generate(prompts(2)[1], "eft", n=5, seed=4, max_new_tokens=8, temperature=1.0)
    scores = {}
    for c in every:
        found = slow.logprobs(prompts(2)[1], c.token_ids, "eft", temperature=1.0)
        scores[c.token_ids] = sum(d.logprob for d in found.tokens) / len(found.tokens)
    assert [c.token_ids for c in best] == sorted(scores, key=scores.get, reverse=True)[:2]


def test_of_given_texts(fast, slow):
    texts, responses = prompts(3), [" was long and nobody laughed", " end", " in the very last scene"]
    for settings in ({"method": "eft", "beta": 2.0, "temperature": 0.7}, {"method": "base", "temperature": 1.0}):
        expected = slow.logprobs(texts, responses, **settings, alternatives=4)
        for got, want in zip(fast.logprobs(texts, responses, **settings, alternatives=4), expected, strict=True):
            check(got.tokens, want.tokens)
            assert [d.text for d in got.tokens] == [d.text for d in want.tokens]
    with pytest.raises(ConfigError, match="log-probabilities with top_k: the engine vllm cannot do that"):
        fast.logprobs(texts[0], " end", "eft", top_k=5, temperature=1.0)


def test_a_base_without_guides(folder):
    paths = {"base": trio(folder, "llama")["base"]}
    with models("transformers", models=paths) as slow, models("vllm", models=paths) as fast:
        done = fast.generate(prompts(2)[1], "base", temperature=1.0, seed=2, max_new_tokens=8, alternatives=25)
        check(done.details, slow.logprobs(prompts(2)[1], done.token_ids, "base", temperature=1.0, alternatives=25).tokens)
        assert all(d.logprob == d.base_logprob and d.top == d.top_base for d in done.details)
        for ask in (fast.generate, lambda *a, alternatives, **k: fast.logprobs(a[0], " end", a[1], **k)):
            with pytest.raises(ConfigError, match=r"log-probabilities are those at temperature 1, got 0\.7"):
                ask(prompts(2)[1], "base", temperature=0.7, alternatives=0)


def test_what_is_refused(fast):
    for settings in ({"ignore_eos": True}, {"regex": "[ab]+"}):
        (name,) = settings
        with pytest.raises(ConfigError, match=rf"alternatives \(logprobs\) beside {name}: vLLM's log-probabilities count"):
            fast.generate("The film", "eft", alternatives=1, **settings)
    with pytest.raises(ConfigError, match=r"logprobs_mode='raw_logits'\n  ivg needs raw_logprobs"):
        EngineClient("", EngineClientOptions(extra={"logprobs_mode": "raw_logits"}))
