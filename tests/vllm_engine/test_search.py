"""The search over vLLM: values from the pooling engine, prefixes from its cache, everything freed, deaths told."""

from __future__ import annotations

from itertools import pairwise

import pytest
from making import make, models, prompts, trio

from ivg.build import load_models
from ivg.config import Recipe
from ivg.decoding.strategies import STRATEGIES
from ivg.errors import ModelError
from ivg.types import Beam, Prompt, new_key
from ivg.vllm.engine import PrefixStats

CHUNKED = {"width": 2, "successors": 2, "chunk_length": 4, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def embedded():
    with models("vllm", every_guide=True) as model:
        yield model


def test_scores_are_those_of_the_value_outside(embedded):
    outside = load_models(Recipe.parse({"run": {"dtype": "float32", "device": "cpu"}}))
    done = embedded.generate(prompts(6), "ivg", seed=3, **CHUNKED)
    for prompt, completion in zip(prompts(6), done, strict=True):
        assert completion.score == pytest.approx(score_outside(outside, prompt, completion), abs=2e-3)
        assert completion.usage.forward_tokens["base"] == completion.usage.forward_tokens["tuned"] > 0
        assert completion.usage.forward_tokens["explicit"] > 0


def score_outside(model, prompt, completion) -> float:
    ids, text = completion.token_ids, completion.text
    beam = Beam(new_key(), None, Prompt(prompt), ids, text, vocabulary=model.base.vocabulary, inherits=False)
    return model.values["explicit"].score([beam])[0]


@pytest.mark.parametrize("method", ["base", "bon", "soft-bon", "eft", "cbs-implicit", "cbs-explicit", "cd-blockwise", "adaptive", "ivg"])
def test_methods(embedded, method):
    sizes = {"successors": 3} if method in ("bon", "soft-bon") else {}
    done = embedded.generate(prompts(3), method, seed=1, max_new_tokens=12, **sizes)
    assert all(c.error is None and c.token_ids for c in done)
    assert all((c.score is not None) == bool(STRATEGIES[method].selectors) for c in done)
    assert not embedded.engine._flights


def test_best_of_n_chooses_the_best(embedded):
    texts = prompts(2)
    one = embedded.generate(texts, "bon", seed=5, successors=1, max_new_tokens=12)
    best = embedded.generate(texts, "bon", seed=5, successors=8, max_new_tokens=12)
    assert sum(b.score for b in best) > sum(a.score for a in one)


def test_trace_and_pieces(embedded):
    completion = embedded.generate("The movie was", "ivg", trace=True, seed=2, **CHUNKED)
    last = completion.trace[-1]
    assert all("".join(node.tokens) == node.text for step in completion.trace for node in (*step.kept, *step.dropped))
    assert completion.text in {node.text for node in last.kept}


@pytest.mark.parametrize("length", [3, 24])
def test_stop_strings_even_across_chunks(embedded, length):
    settings = {"seed": 4, "width": 1, "successors": 1, "chunk_length": length, "max_new_tokens": 24, "ignore_eos": True}
    text = embedded.generate("The movie was", "cbs-explicit", **settings).text
    for start in (len(text) // 3, len(text) // 2):
        stop = text[start : start + 6]
        cut = embedded.generate("The movie was", "cbs-explicit", stop=stop, **settings)
        assert cut.text == text[: text.find(stop)]
        assert cut.finish_reason == "stop"


def test_long_prompts_are_read_from_the_cache(embedded):
    long = [" ".join(prompts(9)[-1].split() * 4)[: 700 + 20 * i] for i in range(6)]
    stats = embedded.engine.prefix = PrefixStats()
    embedded.generate(long, "ivg", seed=1, width=4, successors=4, chunk_length=5, max_new_tokens=40)
    print(f"{stats.hit_rate:.1%} of {stats.submitted} tokens that were submitted again came from the cache")
    assert stats.hit_rate >= 0.8
    value = embedded.values["explicit"]
    assert value.cached / value.submitted >= 0.5


def test_watched_text_arrives_token_by_token(embedded):
    from dataclasses import replace

    request = replace(embedded.request("The movie was", "eft", seed=7, max_new_tokens=20, ignore_eos=True), stride=1)
    searcher, texts = embedded.searcher(), []
    searcher.add(request)
    while searcher.busy:
        texts += [s.completion.text if s.completion else s.committed for s in searcher.step()]
    assert len(set(texts)) > 10
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert texts[-1] == embedded.generate("The movie was", "eft", seed=7, max_new_tokens=20, ignore_eos=True).text


def held_blocks(core) -> int:
    pool = core._engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def test_cancelling_frees_everything(embedded):
    searcher = embedded.searcher()
    numbers = [
        searcher.add(embedded.request(p, "ivg", seed=1, width=4, successors=4, chunk_length=8, max_new_tokens=64)) for p in prompts(6)
    ]
    for _ in range(3):
        searcher.step()
    for number in numbers:
        searcher.cancel(number)
    assert not searcher.busy and not embedded.engine._flights
    embedded.generate("The movie was", "eft", max_new_tokens=2)  # vLLM frees aborted requests with its next pass
    assert held_blocks(embedded.engine.core) == 0 == held_blocks(embedded.values["explicit"].core)


def test_an_engine_that_dies_is_told_and_revived(folder):
    with models("vllm", models=trio(folder, "llama"), search={"method": "eft"}) as model:
        before = model.generate(prompts(3), "eft", seed=1, max_new_tokens=8)
        core = model.engine.core
        runner = core._engine.model_executor

        def dies(*_, **__):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        runner.execute_model = dies
        searcher = model.searcher()
        for p in prompts(3):
            searcher.add(model.request(p, "eft", seed=1, max_new_tokens=8))
        with pytest.raises(ModelError, match=r"died.*illegal memory"):
            while searcher.busy:
                searcher.step()
        with pytest.raises(ModelError, match="died"):
            model.generate("The film", "eft", max_new_tokens=2)
        model.forget()
        again = model.generate(prompts(3), "eft", seed=1, max_new_tokens=8)
        assert [c.token_ids for c in again] == [c.token_ids for c in before]


def test_scalar_heads_score_as_outside(folder, tmp_path):
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    from ivg.embedded import path

    base = make(folder, "llama", 1)
    from transformers import AutoConfig

    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(make(folder, "small-llama", 2), num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(path("base")).save_pretrained(tmp_path)
    paths = {"base": base, "value": str(tmp_path)}
    with models("vllm", models=paths, search={"method": "cbs-explicit"}) as fast, models("transformers", models=paths) as slow:
        done = fast.generate(prompts(4), "cbs-explicit", seed=1, **CHUNKED)
        for prompt, completion in zip(prompts(4), done, strict=True):
            assert completion.score == pytest.approx(score_outside(slow, prompt, completion), abs=1e-4)
