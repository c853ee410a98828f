"""The slot cache against the plain model, under random operations; what forks copy, what is freed and reused."""

import random

import pytest
import torch

import naive
from ivg.decoding.search import Request, Search, Searcher
from ivg.engine.transformers import TransformersEngine
from ivg.errors import ModelError, PromptError
from ivg.models.cached import CachedModel, common_length
from ivg.testing import ARCHITECTURES, tiny_model, tiny_reader
from ivg.types import Prompt, SamplingParams


def outputs_of(model, row_ids):
    return naive.outputs(model.network, row_ids)[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 0.35)], ids=["float32", "bfloat16"])
def test_random_operations_equal_plain_forward(architecture, dtype, tolerance):
    """Open, fork, truncate, free and feed ragged pieces at random; every output equals a forward pass over the row's tokens."""
    model = CachedModel(tiny_model(architecture, seed=3).to(dtype), "tiny")
    rng = random.Random(architecture)
    rows = []
    for _ in range(30):
        action = rng.choice(["open", "fork", "feed", "feed", "truncate", "free"])
        if action == "open" or not rows:
            ids = [rng.randrange(1, 257) for _ in range(rng.randrange(1, 24))]
            row = model.open(ids)
            assert row.ids == ids[: len(row.ids)]
            assert len(row.ids) < len(ids)
            out = model.last([row], [ids[len(row.ids) :]])
            rows.append(row)
            compare(out[0], outputs_of(model, row.ids), tolerance)
        elif action == "fork":
            rows.append(model.fork(rng.choice(rows)))
        elif action == "truncate":
            row = rng.choice(rows)
            del row.ids[rng.randrange(1, len(row.ids) + 1) :]
        elif action == "free" and len(rows) > 1:
            model.free(rows.pop(rng.randrange(len(rows))))
        else:
            chosen = rng.sample(rows, rng.randrange(1, len(rows) + 1))
            new = [[rng.randrange(1, 257) for _ in range(rng.randrange(1, 7))] for _ in chosen]
            for row, out in zip(chosen, model.last(chosen, new), strict=True):
                compare(out, outputs_of(model, row.ids), tolerance)
        assert model.live_rows == len(rows)


def compare(got, expected, tolerance):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_feed_gives_every_wanted_position_in_blocks(monkeypatch):
    from ivg.models import cached

    monkeypatch.setattr(cached, "BLOCK_TOKENS", 5)
    model = CachedModel(tiny_model("llama"), "tiny")
    rows, new, keep = [model.open([1] * 20), model.open([2] * 3)], [list(range(1, 20)), [7, 8, 9]], [12, 3]
    rows[1].ids.clear()
    got = {0: [], 1: []}
    for i, out in model.feed(rows, new, keep):
        got[i].append(out)
    for i in (0, 1):
        assert torch.allclose(torch.cat(got[i]), naive.outputs(model.network, new[i])[-keep[i] :], atol=1e-3)


def test_forks_copy_only_what_differs(monkeypatch):
    model = CachedModel(tiny_model("llama"), "tiny")
    root = model.open(list(range(1, 41)))
    model.last([root], [list(range(1, 41))])
    copied = []
    real = model.cache.copy
    monkeypatch.setattr(model.cache, "copy", lambda s, t, a, b: (copied.append(b - a), real(s, t, a, b)))
    first = model.fork(root)
    assert copied.pop() == 40
    model.last([root, first], [[50, 51], [60, 61]])
    model.free(first)
    again = model.fork(root)
    assert copied.pop() == 2
    assert again.slot == first.slot
    compare(model.last([again], [[5]])[0], outputs_of(model, again.ids), 1e-3)


def test_slots_grow_by_doubling_and_are_reused():
    model = CachedModel(tiny_model("gpt2"), "tiny")
    rows = [model.open([i, i]) for i in range(1, 10)]
    model.last(rows, [[i, i] for i in range(1, 10)])
    assert model.cache.slots == 16
    for row in rows:
        model.free(row)
    for i in range(100):
        row = model.open([200, i])
        model.last([row], [[200, i][len(row.ids) :]])
        model.free(row)
    assert model.cache.slots == 16


def test_common_length():
    for a, b, n in [
        ([], [1], 0),
        ([1], [1], 1),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([2], [1], 0),
        ([1] * 9 + [2], [1] * 12, 9),
    ]:
        assert common_length(a, b) == n == common_length(b, a)


def test_context_limit_is_told():
    model = CachedModel(tiny_model("llama", context=32), "tiny")
    row = model.open([1] * 40)
    with pytest.raises(PromptError, match="at most 32"):
        model.last([row], [[1] * 40])


def test_a_network_without_positions_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    with pytest.raises(ModelError, match="position_ids"):
        CachedModel(BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2)), "bloom")


def test_equal_prompts_are_read_once():
    base = tiny_reader("base")
    prompt, n = "The movie was a great surprise", 6
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    done = dict(Searcher(TransformersEngine(base)).run([Request(Prompt(prompt), Search(), sampling, 0, i) for i in range(n)]))
    read = sum(c.usage.forward_tokens["base"] for c in done.values())
    length = len(base.tokenizer(prompt).input_ids)
    assert read == (length - 1) + n * 4  # the prompt but its last token once; then for each: that token and three more


def test_usage_is_what_was_read():
    """One prompt of T tokens: the prompt once, W·K continuations of every chunk, first tokens drawn from the parents' pass."""
    base = tiny_reader("base")
    from ivg.testing import tiny_value

    value = tiny_value("scalar")
    search = Search(width=2, successors=3, chunk_length=4, value=value)
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    completion = dict(Searcher(TransformersEngine(base)).run([Request(Prompt("abcdef"), search, sampling)]))[0]
    assert completion.usage.forward_tokens["base"] == 6 + 6 * 3 + 2 + 6 * 3
    assert completion.usage.prompt_tokens == 6
    assert completion.usage.completion_tokens == 8
    assert completion.usage.forward_tokens["explicit"] <= 6 * (6 + 4) + 6 * 4
