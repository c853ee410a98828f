"""Usage of a request is the same whatever the caches held; what they held is reported beside it."""

import pytest

from ivg import GuidedModel
from ivg.serving.responses import ResponseBuilder
from ivg.serving.served_models import RequestBatch
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import SamplingParams
from ivg.values.implicit import ImplicitValue

PROMPT = "The movie was a film that I saw"


@pytest.fixture(scope="module")
def model():
    pair = ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    other = byte_tokenizer(merges=[("t", "h"), ("a", "b")], permute=True)
    values = {
        "implicit": pair,
        "explicit": tiny_value("vocabulary", seed=5),
        "other": tiny_value("scalar", seed=6, tokenizer=other, name="other"),
    }
    return GuidedModel(tiny_lm("base", seed=1), values, SamplingParams(max_new_tokens=12))


METHODS = {
    "base": {},
    "eft": {},
    "eft-gated": {"gate": 1.0},
    "bon": {"successors": 3},
    "ivg": {"width": 2, "successors": 2, "chunk_length": 5},
    "args": {},
    "cbs-explicit": {"select": "other", "width": 2, "successors": 2},
    "cards": {"tries": 3, "segment_entropy": 1.0, "chunk_length": 8},
    "smc": {"width": 3},
    "mcts": {"width": 2, "successors": 2, "chunk_length": 4},
    "rsd": {"chunk_length": 4, "accept_threshold": 1.0, "acceptance": "sigmoid"},
    "gsi": {"chunk_length": 4, "successors": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_usage_does_not_depend_on_the_cache(model, method):
    settings = METHODS[method]
    model.reset_caches()
    cold = model.generate(PROMPT, method, **settings)
    warm = [model.generate(PROMPT, method, **settings) for _ in range(2)]
    model.generate(PROMPT + " yesterday", "ivg")
    warm.append(model.generate(PROMPT, method, **settings))
    assert not cold.usage.cached_tokens
    for c in warm:
        assert c.usage == cold.usage and c.usage.forward_tokens == cold.usage.forward_tokens
        assert 0 < c.usage.cached_tokens["base"] < c.usage.forward_tokens["base"]
        assert all(0 < n <= c.usage.forward_tokens[name] for name, n in c.usage.cached_tokens.items())


def test_what_the_base_reads_by_hand(model):
    """A prompt of p tokens and an answer of n: p + n - 1 tokens, of which a second time the cache has all of the prompt but the last."""
    model.reset_caches()
    p = len(model.reader.prompt_ids(model.request(PROMPT, "base").prompt))
    for cached in (0, p - 1):
        c = model.generate(PROMPT, "base", ignore_eos=True, seed=cached)
        assert c.usage.forward_tokens == {"base": p + 11}
        assert c.usage.cached_tokens.get("base", 0) == cached
    batch = [c for _, c in model.run([model.request(PROMPT, "base", index=i, ignore_eos=True) for i in range(3)])]
    assert [c.usage.forward_tokens["base"] for c in batch] == [p + 11] * 3


def test_company_changes_nothing(model):
    """The same numbers for a request alone and in a batch."""
    requests = [model.request(PROMPT, m, seed=3, **s) for m, s in METHODS.items()]
    model.reset_caches()
    together = dict(model.run(requests))
    for i, request in enumerate(requests):
        model.reset_caches()
        ((_, alone),) = model.run([request])
        assert together[i].usage.forward_tokens == alone.usage.forward_tokens, list(METHODS)[i]


def test_the_server_says_what_was_cached(model):
    model.reset_caches()
    first, second = (model.generate(PROMPT, "ivg") for _ in range(2))
    request = model.request(PROMPT, "ivg")
    builder = ResponseBuilder(False, "m", RequestBatch([request], "ivg", 0, first.usage.prompt_tokens, 1, [None], 1), None, None)
    cold, warm = builder.usage([first]), builder.usage([second])
    assert cold["prompt_tokens_details"] == {"cached_tokens": 0}
    assert warm["prompt_tokens_details"] == {"cached_tokens": warm["prompt_tokens"] - 1}
    assert {k: v for k, v in cold.items() if k != "prompt_tokens_details"} == {
        k: v for k, v in warm.items() if k != "prompt_tokens_details"
    }


def test_rows_carry_both(model):
    row = model.generate(PROMPT, "base").to_dict()["usage"]
    assert set(row) == {"forward_tokens", "prompt_tokens", "completion_tokens", "seconds", "cached_tokens"}
