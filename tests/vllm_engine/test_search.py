"""The search over vLLM: values from the pooling engine, prefixes from its cache, everything freed, deaths told."""

from __future__ import annotations

import os
from itertools import pairwise
from queue import Queue
from threading import Timer
from types import SimpleNamespace

import pytest
from making import make, models, prompts, trio

from ivg.engines.vllm.client import EngineClient, EngineClientOptions
from ivg.engines.vllm.engine import PrefixStats
from ivg.errors import ConfigError, ModelError, PromptError
from ivg.factory.recipe import load_models
from ivg.search.methods import METHODS
from ivg.settings.recipe import Recipe
from ivg.testing import (
    check_batch_invariance,
    check_children,
    check_engine_batch,
    check_outputs_are_kept,
    check_unsupported,
    check_vocabulary,
    hypothesis,
)
from ivg.types import Beam, Prompt, new_key

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
    assert all((c.score is not None) == bool(METHODS[method].selectors) for c in done)
    assert not embedded.engine.running


def test_laws_of_engines_and_values(embedded):
    words = [Prompt("The movie was"), Prompt("A long film about a short man")]
    check_children(embedded.engine, words)
    check_engine_batch(embedded.engine, words)
    check_outputs_are_kept(embedded.engine, words)
    check_unsupported(embedded.engine, words[0])
    texts = [hypothesis(str(prompt.content), " fine, and so was the cinema", embedded.base) for prompt in words]
    for name in ("explicit", "implicit"):
        check_batch_invariance(embedded.values[name], texts, tolerance=2e-3)
        check_vocabulary(embedded.values[name], texts)
    assert not embedded.engine.running


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
    pool = core.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
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
    assert not searcher.busy and not embedded.engine.running
    embedded.generate("The movie was", "eft", max_new_tokens=2)  # vLLM frees aborted requests with its next pass
    assert held_blocks(embedded.engine.client) == 0 == held_blocks(embedded.values["explicit"].client)
    for core in (embedded.engine.client, embedded.values["explicit"].client):
        known = core.llm_engine.output_processor
        assert not (known.request_states or known.parent_requests or known.external_req_ids or core.requests)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("bon", {"successors": 8}),
        ("bon", {"successors": 3, "temperature": 0}),
        ("bon", {"successors": 3, "temperature": 0, "regex": "[ab]{5}"}),
        ("ivg", CHUNKED),
        ("ivg", CHUNKED | {"regex": "[ab]{9}"}),
        ("eft", {"end_at_sentence": 3, "max_new_tokens": 60}),
        ("bon", {"end_at_sentence": 3, "max_new_tokens": 60, "successors": 4}),
    ],
)
def test_forward_tokens_are_those_that_vllm_scheduled(embedded, monkeypatch, method, sizes):
    runner, passes = embedded.engine.client.llm_engine.model_executor.driver_worker.worker.model_runner, []
    executes = runner.execute_model

    def spy(scheduled, *args, **kwargs):
        passes.append(scheduled.total_num_scheduled_tokens)
        return executes(scheduled, *args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", spy)
    prompt = f"{method} {len(sizes)} " + prompts(9)[-1]
    asked = []
    for _ in range(2):  # read, and found in the cache
        passes.clear()
        stats = embedded.engine.prefix = PrefixStats()
        done = embedded.generate(prompt, method, seed=3, ignore_eos=True, **{"max_new_tokens": 8, **sizes})
        usage = done.usage
        assert usage.forward_tokens["base"] - usage.cached_tokens.get("base", 0) == sum(passes) > 0
        asked.append(usage.forward_tokens["base"])
        assert stats.cached <= stats.submitted
    assert asked[0] == asked[1]  # whatever was cached


@pytest.mark.parametrize("reason", ["error", "abort", "stop"])
def test_what_vllm_breaks_off_ends_with_an_error(embedded, monkeypatch, reason):
    engine = embedded.engine.client.llm_engine
    steps = engine.step

    def broken():
        outputs = steps()
        for completion in (c for output in outputs for c in output.outputs):
            completion.token_ids, completion.finish_reason = [], reason
        return outputs

    monkeypatch.setattr(engine, "step", broken)
    searcher, found = embedded.searcher(), []
    number = searcher.add(embedded.request("The movie was", "eft", seed=1, max_new_tokens=4))
    for _ in range(50):
        found += [s.completion for s in searcher.step() if s.completion] if searcher.busy else []
    searcher.cancel(number)
    assert [c.finish_reason for c in found] == ["error"]
    assert found[0].error == f"vLLM stopped this request: {reason}"


def test_the_value_refuses_a_text_that_is_too_long(embedded):
    value, words = embedded.values["explicit"], embedded.base.vocabulary
    assert value.score([]) == []

    def text(tokens):
        return Beam(new_key(), None, Prompt("a", token_ids=(5,)), (5,) * tokens, "", vocabulary=words, inherits=False)

    most = 512 + 1 - len(value.encoder.prompt_ids(text(0).prompt))  # a vocabulary head: the last token is not read
    assert len(value.score([text(most)])) == 1
    with pytest.raises(PromptError, match=r"explicit reads at most 512 tokens, got 513\n  shorten"):
        value.score([text(2), text(most + 1)])
    assert not value.client.busy


def test_an_abort_that_fails_prevents_no_revival(embedded, monkeypatch):
    core, revived = embedded.engine.client, []
    searcher = embedded.searcher()
    number = searcher.add(embedded.request("The movie was", "eft", seed=1, max_new_tokens=40))
    searcher.step()

    def dies(*_, **__):
        raise RuntimeError("zmq: no such socket")

    with monkeypatch.context() as broken:
        broken.setattr(core.llm_engine, "abort_request", dies)
        broken.setattr(core, "restart", lambda: revived.append(core.failure))
        embedded.reset_caches()
    assert revived == ["RuntimeError: zmq: no such socket"]
    core.failure = None
    core.llm_engine.abort_request(list(core.llm_engine.output_processor.external_req_ids))
    searcher.cancel(number)
    assert not embedded.engine.running


def test_a_killed_process_is_an_error():
    """By a stand-in for vLLM's client: a real process of its own takes minutes to start."""
    end, alive = os.pipe()
    manager = SimpleNamespace(sentinels=lambda: [end])
    client = SimpleNamespace(outputs_queue=Queue(), resources=SimpleNamespace(engine_dead=False, engine_manager=manager))
    engine = SimpleNamespace(engine_core=client, has_unfinished_requests=lambda: True, step=lambda: client.outputs_queue.get(timeout=1000))

    class Connected(EngineClient):
        def start(self):
            self.llm_engine = engine

    core = Connected("", EngineClientOptions())
    Timer(0.7, client.outputs_queue.put, [[]]).start()
    assert core.step() == []
    Timer(0.2, os.close, [alive]).start()
    with pytest.raises(ModelError, match=r"engine stopped: RuntimeError: the engine process exited"):
        core.step()  # told by the end of the process: the queue, which gives nothing for 1000 s, would raise Empty
    os.close(end)
    client.outputs_queue.put([])
    client.resources = SimpleNamespace(engine_dead=True)
    core.failure = None
    assert core.step() == []  # what it sent before its end counts
    with pytest.raises(ModelError, match="the engine process exited"):
        core.step()


def test_arguments_that_vllm_does_not_take(folder):
    path = make(folder, "small-llama", 2)
    for extra, message in (
        ({"nonsense": 1}, r"these engine arguments: .*argument 'nonsense'"),
        ({"compilation_config": {"nonsense": 1, "mode": "x"}}, r"these engine arguments: (?s:.*)nonsense: "),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            EngineClient(path, EngineClientOptions(extra=extra))
        assert str(caught.value).count("\n") <= 4
    with pytest.raises(ModelError, match=r"cannot run .*max_model_len \(100000\) is greater"):
        EngineClient(path, EngineClientOptions(max_model_len=100_000))


def test_an_engine_that_stops_is_reported_and_restarted(folder):
    with models("vllm", models=trio(folder, "llama"), search={"method": "eft"}) as model:
        before = model.generate(prompts(3), "eft", seed=1, max_new_tokens=8)
        core = model.engine.client
        runner = core.llm_engine.model_executor

        def dies(*_, **__):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        runner.execute_model = dies
        searcher = model.searcher()
        for p in prompts(3):
            searcher.add(model.request(p, "eft", seed=1, max_new_tokens=8))
        with pytest.raises(ModelError, match=r"stopped.*illegal memory"):
            while searcher.busy:
                searcher.step()
        with pytest.raises(ModelError, match="stopped"):
            model.generate("The film", "eft", max_new_tokens=2)
        model.reset_caches()
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
