"""Rows whose state is transformers' own cache: forks, cuts, failures, and whole searches on hybrid and recurrent networks."""

import random

import pytest
import torch

import naive
import naive_methods
from architectures import tiny
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ConfigError
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.state_cache import StateCache
from ivg.models.value_head import ValueModel
from ivg.search.methods import get_method
from ivg.search.searcher import Request, Searcher
from ivg.testing import byte_tokenizer
from ivg.types import Prompt, SamplingParams
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import ImplicitValue
from naive import compare, outputs_of

pytestmark = pytest.mark.numerics

KINDS = ["qwen3_next", "bloom", "mamba"]
MORE = ["rwkv", "jamba", "lfm2", "llama4_text", "falcon_h1", "deepseek_v32", "xlstm"]
PROMPTS = ["I am", "The movie was fine", "no", "Go!", "What a long prompt this one is", "I am", "never a", "abc"]


def lm(name, role, seed=1):
    return CachedLM(ModelRunner(tiny(name, seed), role), byte_tokenizer())


def run(engine, method, prompts, values=None, seed=5, **sampling):
    settings = SamplingParams(**{"max_new_tokens": 8, "temperature": 1.0, **sampling})
    requests = [Request(Prompt(p), method.search(values or {}), settings, seed) for p in prompts]
    return [completion for _, completion in sorted(Searcher(engine).run(requests), key=lambda pair: pair[0])]


def test_rows_that_are_read_together_stay_one_batch():
    model = ModelRunner(tiny("qwen3_next"), "base")
    root = model.open([1, 2, 3, 4])
    model.last_outputs([root], [[1, 2, 3, 4]])
    rows = [root, *(model.fork(root) for _ in range(3))]
    before = root.batch
    model.last_outputs(rows, [[5 + i] for i in range(4)])
    batch = root.batch
    assert batch is not before
    for step in range(3):
        for row, out in zip(rows, model.last_outputs(rows, [[9 + step + i] for i in range(4)]), strict=True):
            compare(out, outputs_of(model, row.ids), 1e-3)
        assert all(row.batch is batch for row in rows)
    for row, out in zip(rows[::-1], model.last_outputs(rows[::-1], [[20 + i] for i in range(4)]), strict=True):  # in another order
        compare(out, outputs_of(model, row.ids), 1e-3)
    assert root.batch is batch
    model.free(rows.pop(1))
    for row, out in zip(rows, model.last_outputs(rows, [[3]] * 3), strict=True):
        compare(out, outputs_of(model, row.ids), 1e-3)
    assert root.batch is not batch
    assert root.batch.size == 3


def test_a_cut_goes_back_to_the_fork_or_to_the_prompt():
    model = ModelRunner(tiny("lfm2"), "base")
    row = model.open([1, 2, 3, 4, 5], mark=4)
    model.last_outputs([row], [[1, 2, 3, 4, 5]])
    model.last_outputs([row], [[6, 7]])
    other = model.fork(row)
    model.last_outputs([row, other], [[8, 9], [10, 11]])
    for length, kept in ((9, 9), (8, 7), (7, 7), (6, 4), (3, 0)):
        model.truncate(row, length)
        assert len(row.ids) == kept
        if kept < 7:
            tokens = [1, 2, 3, 4, 5, 6, 7][kept:]
            compare(model.last_outputs([row], [tokens])[0], outputs_of(model, row.ids), 1e-3)
    compare(model.last_outputs([other], [[12]])[0], outputs_of(model, other.ids), 1e-3)


def test_later_prompts_begin_where_an_earlier_one_ended():
    model = ModelRunner(tiny("lfm2"), "base")
    row = model.open([1, 2, 3, 4, 5], mark=4)
    model.last_outputs([row], [[1, 2, 3, 4, 5]])
    model.free(row)
    later = model.open([1, 2, 3, 4, 9, 9], mark=5)
    assert later.ids == [1, 2, 3, 4]
    compare(model.last_outputs([later], [[9, 9]])[0], outputs_of(model, later.ids), 1e-3)
    model.release_memory()
    assert model.open([1, 2, 3, 4, 9]).ids == []


@pytest.mark.parametrize("name", ["qwen3_next", "mamba"])
def test_rows_of_a_pass_that_failed_are_read_again(name, monkeypatch):
    model = ModelRunner(tiny(name), "base")
    rows = [model.open([1, 2, 3]), model.open([4, 5, 6])]
    model.last_outputs(rows, [[1, 2, 3], [4, 5, 6]])
    with monkeypatch.context() as patch:
        patch.setattr(model.network.get_output_embeddings(), "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.last_outputs(rows, [[7], [8]])
    for row, out in zip(rows, model.last_outputs(rows, [[1, 2, 3, 7][len(rows[0].ids) :], [4, 5, 6, 8][len(rows[1].ids) :]]), strict=True):
        compare(out, outputs_of(model, row.ids), 1e-3)
    assert rows[0].ids == [1, 2, 3, 7]


def test_memory_is_counted_once_where_it_is_shared():
    model = ModelRunner(tiny("qwen3_next"), "base")
    row = model.open([1, 2, 3])
    model.last_outputs([row], [[1, 2, 3]])
    one = model.cache.used_bytes
    forks = [model.fork(row) for _ in range(3)]
    assert (model.cache.used_bytes, model.cache.unshared_bytes) == (one, 4 * one)
    for r in (row, *forks):
        model.free(r)
    assert model.cache.used_bytes == 0


@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(kind, marks=pytest.mark.long) for kind in [*MORE, "nemotron_h", "zamba2"])])
def test_greedy_answers_equal_generate_and_do_not_depend_on_the_batch(name):
    base = lm(name, "base")
    engine = TransformersEngine(base)
    together = run(engine, get_method("base"), PROMPTS, temperature=0, max_new_tokens=12)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([base.tokenizer(prompt).input_ids], device=base.model.device)
        expected = base.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()
    sampled = run(engine, get_method("base"), PROMPTS)
    assert [c.token_ids for c in sampled] == [run(engine, get_method("base"), [p])[0].token_ids for p in PROMPTS]
    assert base.model.live_rows == 0


@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(kind, marks=pytest.mark.long) for kind in MORE)])
@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
def test_guidance_and_values_equal_naive(name, head):
    base, tuned, untuned = (lm(name, role, seed) for seed, role in enumerate(("base", "tuned", "untuned"), 1))
    whole = tiny(name, 4)
    body = whole.base_model if whole.base_model is not whole else whole.model  # Llama 4
    network = ValueModel(body, head)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.head.weight, std=0.3)
    network.to(base.model.device)
    values = {
        "implicit": ImplicitValue(tuned, untuned),
        "explicit": ExplicitValue(CachedLM(ModelRunner(network, "explicit"), byte_tokenizer())),
    }
    plain = {model.name: model.network for model in (base, tuned, untuned)}
    reference = {
        "implicit": naive.Implicit(plain["tuned"], plain["untuned"]),
        "explicit": (naive.QHead if head == "vocabulary" else naive.VHead)(network),
    }
    method = get_method("ivg", width=2, successors=2, chunk_length=3)
    for prompt, completion in zip(PROMPTS[:3], run(TransformersEngine(base), method, PROMPTS[:3], values), strict=True):
        tokens, score = naive.search(plain["base"], reference, method, base.tokenizer(prompt).input_ids, 5, 1.0, 8)
        assert list(completion.token_ids) == tokens
        assert completion.score == pytest.approx(score, abs=1e-3)
    assert all(model.model.live_rows == 0 for model in (base, tuned, untuned))


def test_the_implicit_value_that_also_selects_equals_naive():
    base, tuned, untuned = (lm("lfm2", role, seed) for seed, role in enumerate(("base", "tuned", "untuned"), 1))
    reference = {"implicit": naive.Implicit(tuned.network, untuned.network)}
    method = get_method("ivg", width=2, successors=2, chunk_length=3, select="implicit")
    values = {"implicit": ImplicitValue(tuned, untuned)}
    for prompt, completion in zip(PROMPTS[:3], run(TransformersEngine(base), method, PROMPTS[:3], values), strict=True):
        tokens, score = naive.search(base.network, reference, method, base.tokenizer(prompt).input_ids, 5, 1.0, 8)
        assert list(completion.token_ids) == tokens
        assert completion.score == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("method", ["rsd", "gsi", "mcts"])
@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_chunks_of_a_draft_model_and_trees_equal_naive(name, method):
    """Whole chunks need no cut: refused ones are dropped with their rows."""
    base, tuned, untuned = (lm(name, role, seed) for seed, role in enumerate(("base", "tuned", "untuned"), 1))
    reference = {"implicit": naive.Implicit(tuned.network, untuned.network)}
    values = {"implicit": ImplicitValue(tuned, untuned)}
    more = {"acceptance": "sigmoid", "accept_threshold": 0.5} if method != "mcts" else {"width": 2}
    chosen = get_method(method, select="implicit", successors=2, chunk_length=3, **more)
    expected = naive_methods.tree if method == "mcts" else naive_methods.speculate
    for prompt, completion in zip(PROMPTS[:3], run(TransformersEngine(base), chosen, PROMPTS[:3], values), strict=True):
        tokens, score = expected(base.network, reference, chosen, base.tokenizer(prompt).input_ids, 5, 1.0, 8)
        assert list(completion.token_ids) == tokens
        assert completion.score == pytest.approx(score, abs=1e-3)
    assert all(model.model.live_rows == 0 for model in (base, tuned, untuned))


def test_drafts_are_refused_where_a_state_cannot_be_cut():
    base, tuned, untuned = lm("llama", "base"), lm("mamba", "tuned", 2), lm("mamba", "untuned", 3)
    method = get_method("eft", draft=4)
    with pytest.raises(ConfigError, match=r"draft=4 .* but tuned \(MambaForCausalLM\) keeps a state .*\n  leave draft out"):
        run(TransformersEngine(base), method, ["I am"], {"implicit": ImplicitValue(tuned, untuned)})


@pytest.mark.long
@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_rows_at_random_equal_plain_passes(name):
    model = ModelRunner(tiny(name), name)
    assert isinstance(model.cache, StateCache)
    for seed in range(6):
        model.reset_cache()
        naive.wander(model, random.Random(f"{name} {seed}"), 256, 2e-3)
