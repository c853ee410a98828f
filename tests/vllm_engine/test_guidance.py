"""The composite inside vLLM against the transformers engine: same tokens, same distribution, every request its own weight."""

from __future__ import annotations

import math

import pytest
import torch
from making import VOCABULARY, make, models, prompts, trio, with_added_tokens, with_biased_head, with_loud_padding, with_vocabulary_head

from ivg.embedded import path
from ivg.errors import ConfigError, PromptError, VocabularyError
from ivg.settings.recipe import Recipe

GREEDY = {"temperature": 0.0, "max_new_tokens": 64, "ignore_eos": True}


@pytest.mark.parametrize(
    ("base", "guides"),
    [
        ("llama", "small-llama"),
        ("qwen2", "small-llama"),
        ("qwen3", "small-llama"),
        ("gpt2", "small-llama"),
        ("mistral-window", "small-llama"),
        ("small-llama", "gpt2"),
        ("llama", "padded-llama"),
        ("padded-llama", "small-llama"),
        ("opt", "small-llama"),
        ("llama", "opt"),
    ],
)
def test_greedy_tokens_are_those_of_the_transformers_engine(folder, base, guides):
    paths, texts = trio(folder, base, guides), prompts()
    # layers with windows beside layers without: one kind of cache for all (docs/how-to/vllm.md)
    plain = {"arguments": {"disable_hybrid_kv_cache_manager": True}} if "window" in base else {}
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": "eft"}, vllm=plain) as fast:
        seen = set()
        for beta in (0.0, 0.5, 1.0, 2.0):
            expected = [c.token_ids for c in slow.generate(texts, "eft", beta=beta, **GREEDY)]
            got = [c.token_ids for c in fast.generate(texts, "eft", beta=beta, **GREEDY)]
            assert got == expected, f"beta {beta}"
            assert all(len(ids) == 64 for ids in got)
            seen.add(tuple(got))
        assert len(seen) == 4
        unguided = [c.token_ids for c in slow.generate(texts, "base", **GREEDY)]
        assert [c.token_ids for c in fast.generate(texts, "eft", beta=0.0, **GREEDY)] == unguided
        assert [c.token_ids for c in fast.generate(texts, "base", **GREEDY)] == unguided


@pytest.mark.parametrize("guides", ["pair", "padded pair", "reward", "padded reward"])
def test_rows_that_only_pad_are_guided_as_by_the_transformers_engine(folder, guides):
    """Of a pair, what the untuned model lacks is not taken from the tuned one alone; what the tokenizer lacks is not guided."""
    loud = with_loud_padding(make(folder, "padded-llama", 2), 3.0)
    small = {"pair": "small-llama", "padded pair": "padded-llama", "reward": "small-llama"}
    paths = {"base": with_loud_padding(make(folder, "padded-llama", 1), 1.5)}
    if "reward" in guides:
        method, paths["arm"] = "genarm", loud if "padded" in guides else make(folder, small[guides], 2)
    else:
        method, paths["tuned"], paths["untuned"] = "eft", loud, make(folder, small[guides], 3)
    settings = GREEDY | {"max_new_tokens": 32}
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": method}) as fast:
        for beta in (0.0, 0.3, 1.0, 2.0):
            expected = [c.token_ids for c in slow.generate(prompts(), method, beta=beta, **settings)]
            assert [c.token_ids for c in fast.generate(prompts(), method, beta=beta, **settings)] == expected, f"beta {beta}"
            padding = sum(token >= VOCABULARY for ids in expected for token in ids)
            assert padding or beta, "the base chooses rows that pad"


@pytest.mark.parametrize("method", ["eft", "genarm"])
def test_tokens_that_only_the_base_has_are_guided_as_by_the_transformers_engine(folder, method):
    paths = trio(folder, "llama") | {"base": with_added_tokens(make(folder, "llama", 1))}
    if method == "genarm":
        paths = {"base": paths["base"], "arm": paths["tuned"]}
    settings = {"temperature": 0.0, "max_new_tokens": 16}
    found = set()
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": method}) as fast:
        for beta in (0.0, 0.5, 1.0, -1.0):
            expected = [c.token_ids for c in slow.generate(prompts(), method, beta=beta, **settings)]
            assert [c.token_ids for c in fast.generate(prompts(), method, beta=beta, **settings)] == expected, f"beta {beta}"
            found.update(token for ids in expected for token in ids)
    assert {VOCABULARY, VOCABULARY + 1} <= found, "both are written"


def test_a_vocabulary_head_is_not_scaled_as_logits_are(folder):
    """Granite divides its logits; a value head over its body is linear, as in the transformers engine."""
    paths = {"base": make(folder, "llama", 1), "value": with_vocabulary_head(folder, "granite", 2)}
    tables = {"models": paths, "search": {"method": "eft", "token": "explicit"}, "vllm": {"guides": ["explicit"]}}
    settings = GREEDY | {"max_new_tokens": 24}
    with models("transformers", models=paths) as slow, models("vllm", **tables) as fast:
        expected = [c.token_ids for c in slow.generate(prompts(4), "eft", token="explicit", beta=1.0, **settings)]
        assert [c.token_ids for c in fast.generate(prompts(4), "eft", token="explicit", beta=1.0, **settings)] == expected


def test_a_vocabulary_head_keeps_its_bias(folder):
    plain = {"base": str(path("base")), "value": str(path("value"))}
    biased = plain | {"value": with_biased_head(folder, plain["value"])}
    settings = GREEDY | {"max_new_tokens": 24}
    found = {}
    for name, paths in (("plain", plain), ("biased", biased)):
        tables = {"models": paths, "search": {"method": "eft", "token": "explicit"}, "vllm": {"guides": ["explicit"]}}
        with models("transformers", models=paths) as slow, models("vllm", **tables) as fast:
            for beta in (0.5, 1.0):
                expected = [c.token_ids for c in slow.generate(prompts(4), "eft", token="explicit", beta=beta, **settings)]
                assert [c.token_ids for c in fast.generate(prompts(4), "eft", token="explicit", beta=beta, **settings)] == expected
            found[name] = expected
    assert found["plain"] != found["biased"]


def test_weights_of_one_batch_do_not_mix(folder):
    betas = [0.0, 0.25, 0.5, 1.0, 2.0, -1.0, 0.5, 3.0]
    with models(
        "vllm",
        models=trio(folder, "llama"),
        search={"method": "eft"},
        vllm={"arguments": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}},
    ) as model:
        alone = [model.generate(p, "eft", beta=b, **GREEDY).token_ids for p, b in zip(prompts(), betas, strict=True)]
        requests = [model.request(p, "eft", beta=b, **GREEDY) for p, b in zip(prompts(), betas, strict=True)]
        assert [c.token_ids for _, c in sorted(model.run(requests))] == alone


def test_sampled_tokens_have_the_guided_distribution(folder):
    paths, draws, temperature = trio(folder, "llama"), 3000, 0.9
    with models("transformers", models=paths) as slow:
        values = slow.values["implicit"]
        base, tuned, untuned = (reader.network for reader in (slow.reader, values.tuned, values.untuned))
        ids = torch.tensor([slow.base.tokenizer("The film").input_ids])
        with torch.no_grad():
            z, t, u = (network(ids).logits[0, -1].double() for network in (base, tuned, untuned))
    expected = ((z + 1.5 * (t - u)) / temperature).softmax(-1) * draws
    with models("vllm", models=paths, search={"method": "eft"}) as fast:
        settings = {"beta": 1.5, "temperature": temperature, "max_new_tokens": 1, "ignore_eos": False}
        requests = [fast.request("The film", "eft", index=i, **settings) for i in range(draws)]
        firsts = torch.tensor([c.token_ids[0] for _, c in fast.run(requests)])
    observed = torch.bincount(firsts, minlength=len(expected)).double()
    often = expected >= 5
    seen, wanted = torch.cat([observed[often], observed[~often].sum()[None]]), torch.cat([expected[often], expected[~often].sum()[None]])
    chi, freedom = float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1
    assert freedom >= 5
    assert chi < freedom + 4 * math.sqrt(2 * freedom), f"chi-square {chi:.1f} with {freedom} degrees of freedom"


def test_a_seed_reproduces_and_another_differs(folder):
    with models("vllm", models=trio(folder, "llama"), search={"method": "eft"}) as model:
        first, again, other = (model.generate(prompts(4), "eft", seed=s, max_new_tokens=12) for s in (1, 1, 2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again] != [c.token_ids for c in other]


def test_several_values_guide_with_their_weights(folder):
    paths = trio(folder, "llama")
    values = {"plain": {"tuned": make(folder, "small-llama", 4), "untuned": paths["untuned"]}}
    weights = {"implicit": 0.7, "plain": 0.6}
    with (
        models("transformers", models=paths, values=values) as slow,
        models("vllm", models=paths, values=values, search={"method": "eft", "weights": weights}) as fast,
    ):
        expected = [c.token_ids for c in slow.generate(prompts(4), "eft", weights=weights, **GREEDY)]
        assert [c.token_ids for c in fast.generate(prompts(4), "eft", weights=weights, **GREEDY)] == expected
        one = [c.token_ids for c in slow.generate(prompts(4), "eft", token="plain", beta=1.2, **GREEDY)]
        assert [c.token_ids for c in fast.generate(prompts(4), "eft", token="plain", beta=1.2, **GREEDY)] == one != expected


def test_repetition_and_least_lengths_look_back_over_prompt_and_answer(folder):
    paths = trio(folder, "llama")
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": "eft"}) as fast:
        for settings in ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.2, "min_new_tokens": 9, "min_length": 20}):
            for method, more in (("eft", {}), ("custom", {"token": "implicit", "chunk_length": 4})):
                expected = [c.token_ids for c in slow.generate(prompts(4), method, **GREEDY, **settings, **more)]
                assert [c.token_ids for c in fast.generate(prompts(4), method, **GREEDY, **settings, **more)] == expected
                assert expected != [c.token_ids for c in slow.generate(prompts(4), method, **GREEDY, **more)]


def test_an_autoregressive_reward_guides(folder):
    paths = {"base": make(folder, "llama", 1), "arm": make(folder, "small-llama", 2)}
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": "genarm"}) as fast:
        expected = [c.token_ids for c in slow.generate(prompts(4), "genarm", beta=0.8, **GREEDY)]
        assert [c.token_ids for c in fast.generate(prompts(4), "genarm", beta=0.8, **GREEDY)] == expected


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("eft-gated", {}, "gate"),
        ("eft", {"draft": 4}, "draft"),
        ("eft", {"candidates": 5}, "candidates"),
        ("eft", {"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ("eft", {"suppress_tokens": [5]}, "suppress_tokens"),
        ("eft", {"alternatives": 2, "ignore_eos": True}, "alternatives"),
    ],
)
def test_unsupported_settings_are_errors(one, method, settings, message):
    with pytest.raises(ConfigError, match=message):
        one.generate("The film", method, max_new_tokens=3, **settings)
    assert one.generate("The film", "eft", max_new_tokens=3).text


def test_bad_prompts_are_errors_and_others_continue(one):
    with pytest.raises(PromptError, match="context"):
        one.generate("The film was " * 400, "eft", max_new_tokens=3)
    with pytest.raises(PromptError, match="empty"):
        one.generate("", "eft", max_new_tokens=3)
    from ivg.types import Prompt

    with pytest.raises(PromptError, match="prompt token 1000000 is outside the vocabulary"):
        one.generate(Prompt("x", (5, 10**6)), "eft", max_new_tokens=3)
    good = [one.request("The film", "eft", max_new_tokens=3, index=i) for i in range(3)]
    assert all(c.error is None and c.text for _, c in one.run(good))


@pytest.fixture(scope="module")
def one(folder):
    with models("vllm", models=trio(folder, "llama"), search={"method": "eft"}) as model:
        yield model


def test_guides_with_other_tokens_are_refused(folder, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    paths = trio(folder, "llama")
    other = tmp_path / "other"
    import shutil

    shutil.copytree(paths["tuned"], other)
    words = {f"w{i}": i for i in range(100)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")), eos_token="w0").save_pretrained(other)
    from ivg.factory.recipe import load_models

    recipe = Recipe.parse({"run": {"engine": "vllm"}, "models": paths | {"tuned": str(other)}, "search": {"method": "eft"}})
    with pytest.raises(VocabularyError, match="transformers engine"):
        load_models(recipe)
