"""The slot cache against plain forward passes, under random operations; what forks copy, what is freed and reused."""

import dataclasses
import math
import mmap
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import naive
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import PromptError
from ivg.models import forward_metadata, mapped_memory, slot_forward
from ivg.models.cache import PassLimits, common_length
from ivg.models.kv_cache import KVCache
from ivg.models.mapped_memory import zeros
from ivg.models.runner import ModelRunner
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import ARCHITECTURES, hypothesis, tiny_lm, tiny_model, tiny_value
from ivg.types import Prompt, SamplingParams
from naive import compare, outputs_of, wander

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 0.5)], ids=["float32", "bfloat16"])
def test_random_operations_equal_plain_forward(architecture, dtype, tolerance, monkeypatch):
    """Open, fork, cut, free, release memory and read ragged pieces at random; every output equals a forward pass over the row's tokens.

    Few different tokens, so that rows often agree; rows that are forked before anything was read; cuts of whole groups.
    """
    network = tiny_model(architecture, seed=3).to(dtype)
    for seed in range(6 if dtype is torch.float32 else 1):
        rng = random.Random(f"{architecture} {seed}")
        of_gpu = dataclasses.replace(PassLimits.on(torch.device("cuda")), grouped_columns=rng.choice([1, 64]))  # good on a CPU, too
        limits = rng.choice([PassLimits(grouped_columns=rng.choice([1, 4, 64]), row_tokens=rng.choice([5, 2048])), of_gpu])
        monkeypatch.setattr(forward_metadata, "BLOCK_COST", rng.choice([0, 256]))
        monkeypatch.setattr(forward_metadata, "BLOCK_POSITIONS", rng.choice([1, 20, 4096]))
        monkeypatch.setattr(mapped_memory, "MAPPED_BYTES", rng.choice([1, 1 << 16]))
        wander(ModelRunner(network, "tiny", limits), rng, rng.choice([2, 256]), tolerance)


def begun(ids=(1, 2, 3), *, broken=None):
    """A model and a row that holds ``ids``; the token ``broken`` makes everything behind it NaN."""
    network = tiny_model("llama", seed=0 if broken is None else 3)
    if broken is not None:
        network.model.embed_tokens.weight.data[broken] = torch.nan
    model = ModelRunner(network, "tiny")
    row = model.open(list(ids))
    model.last_outputs([row], [list(ids)])
    return model, row


def read(model, rows, pieces):
    """Read on; every output equals a forward pass over the row's tokens."""
    for row, got in zip(rows, model.last_outputs(rows, pieces), strict=True):
        compare(got, outputs_of(model, row.ids), 1e-3)


@pytest.mark.parametrize(
    ("limits", "texts", "keep"),
    [
        (PassLimits(row_tokens=5), (list(range(1, 20)), [7, 8, 9]), (12, 3)),
        (PassLimits(outputs=257 * 6), (list(range(1, 31)), list(range(2, 11))), (20, 9)),
    ],
    ids=["short pieces", "few outputs"],
)
def test_forward_returns_every_wanted_position_in_pieces(limits, texts, keep, monkeypatch):
    model = ModelRunner(tiny_model("llama"), "tiny", limits)
    sizes, forward = [], model.cache.forward
    monkeypatch.setattr(model.cache, "forward", lambda rows, pieces, n: sizes.append(len(rows) * n) or forward(rows, pieces, n))
    got = {0: [], 1: []}
    for i, out in model.forward([model.open([5]), model.open([6])], texts, keep):
        got[i].append(out)
    assert max(sizes) <= limits.outputs // 257
    for i, ids in enumerate(texts):
        assert torch.allclose(torch.cat(got[i]).cpu(), naive.outputs(model.network, ids)[-keep[i] :], atol=1e-3)


def copied(model, monkeypatch):
    """Every copy of suffixes from now on: (source slot, first position, target slot, count)."""
    moves = []
    real = model.cache.memory.copy_suffixes
    monkeypatch.setattr(model.cache.memory, "copy_suffixes", lambda m: (moves.extend(m), real(m)))
    return moves


def test_forks_copy_only_what_is_not_shared(monkeypatch):
    model, root = begun(range(1, 41))
    moves = copied(model, monkeypatch)
    first = model.fork(root)
    model.last_outputs([root, first], [[50, 51], [60, 61]])
    assert moves == []
    assert root.group is first.group
    assert [root.prefix_length, first.prefix_length] == [40, 40]
    second = model.fork(first)
    third = model.fork(second)
    read(model, [second, third], [[5], [6]])
    assert [m[3] for m in moves] == [2, 2]


def test_prefixes_grow_by_what_all_live_rows_share(monkeypatch):
    model, root = begun()
    other = model.fork(root)
    model.last_outputs([root, other], [list(range(50, 60)), list(range(50, 57)) + [90, 91, 92]])
    rows = [root, other, model.fork(other)]
    model.last_outputs(rows, [[7], [8], [9]])
    assert [r.prefix_length for r in rows] == [3, 3, 3]  # nothing was freed: not looked at
    model.free(root)
    read(model, rows[1:], [[10], [11]])
    assert [r.prefix_length for r in rows[1:]] == [13, 13]
    model.free(other)
    read(model, rows[2:], [[12]])
    assert rows[2].suffix_length == 0  # alone: everything lies in the prefix slot


def test_a_prefix_that_all_rows_were_cut_from_is_forgotten():
    model, root = begun(range(1, 11))
    rows = [root, model.fork(root)]
    spare = model.fork(root)
    for row in rows:
        model.truncate(row, 4)
    model.free(spare)
    model.last_outputs(rows, [list(range(50, 62))] * 2)
    model.free(model.fork(root))
    read(model, rows, [[7], [8]])


def test_a_fork_of_a_nonfinite_row_is_cut_and_read_on():
    """Keys and values of the tokens that broke it were copied too, and must not reach what is read behind the cut."""
    model, root = begun(broken=9)
    broken, other = model.fork(root), model.fork(root)
    model.last_outputs([broken, other], [[5, 4], [6, 6]])
    model.last_outputs([broken, other], [[9, 7, 8], [6, 6, 6]])
    fork = model.fork(broken)
    model.truncate(fork, fork.finite_length)
    assert fork.ids == [1, 2, 3, 5, 4]
    read(model, [fork, other], [[11], [12]])  # beside a longer one


def test_a_fork_that_waits_keeps_what_its_broken_parent_had():
    model, root = begun(broken=9)
    parent = model.fork(root)
    model.last_outputs([root, parent], [[5, 6], [6, 7]])
    model.last_outputs([parent], [[9]])
    assert parent.nonfinite
    model.truncate(parent, parent.finite_length)
    child = model.fork(parent)
    model.free(parent)
    read(model, [child], [[8]])


def test_memory_is_used_again():
    model = ModelRunner(tiny_model("gpt2"), "tiny")
    for _ in range(3):
        rows = [model.open([i, i]) for i in range(1, 10)]
        model.last_outputs(rows, [[i, i][len(r.ids) :] for i, r in enumerate(rows, 1)])
        rows += [model.fork(r) for r in rows]
        model.last_outputs(rows, [[5]] * 18)
        for row in rows:
            model.free(row)
        assert (model.cache.memory.prefixes.count, model.cache.memory.suffixes.count) == (16, 18)
    for i in range(100):
        row = model.open([200, i])
        model.last_outputs([row], [[200, i][len(row.ids) :]])
        model.free(row)
    assert (model.cache.memory.prefixes.count, model.live_rows) == (16, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="pages go back to the system on Linux")
@pytest.mark.cpu
def test_memory_that_no_row_holds_goes_back_to_the_system():
    """A busy moment, then one short row: its pages stay, most others go, and it is read on as if nothing had happened."""
    model = ModelRunner(tiny_model("llama", seed=3), "tiny")
    short, others = model.open([1, 2, 3]), [model.open([5 + i]) for i in range(40)]
    model.last_outputs([short], [[1, 2, 3]])
    forks = [model.fork(row) for row in others for _ in range(3)]
    for start in range(4):
        model.last_outputs(forks, [[1 + (7 * i + start + j) % 250 for j in range(40)] for i in range(len(forks))])
    model.last_outputs(others, [[9] * 200] * len(others))
    busy = resident(model.cache.memory)
    for row in (*forks, *others):
        model.free(row)
    assert resident(model.cache.memory) == busy  # freed for other rows only
    model.release_memory()
    memory = model.cache.memory
    kept = sum(len(g.prefix) for g in model.cache.idle_groups) + len(short.ids)  # prefixes that may serve later prompts
    heads = sum(t.shape[1] for t in memory.prefixes.tensors)
    assert resident(memory) <= kept * memory.token_bytes + 2 * mmap.PAGESIZE * heads * memory.prefixes.count
    assert resident(model.cache.memory) < busy / 3
    compare(model.last_outputs([short], [[4, 5]])[0], outputs_of(model, [1, 2, 3, 4, 5]), 2e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="pages go back to the system on Linux")
@pytest.mark.cpu
def test_only_pages_behind_what_is_held_go_back():
    memory = KVCache()
    kinds = ((memory.suffixes, (5, 64, 3, 40), [10, 0, 0, 64, 33], 3), (memory.prefixes, (3, 2, 128, 40), [100, 0, 31], 5))
    for slots, shape, lengths, gaps in kinds:
        slots.tensors, slots.capacity = [zeros(shape, torch.empty(0)).fill_(1) for _ in range(4)], shape[slots.axis]
        slots.release_memory(lengths)
        for held in map(slots.by_position, slots.tensors):
            assert all(bool((held[i, :n] == 1).all()) for i, n in enumerate(lengths))
            left = sum(int((held[i, n:] == 1).sum()) for i, n in enumerate(lengths)) * 4
            assert left <= 2 * gaps * mmap.PAGESIZE  # a part of a page at either end of each gap


def resident(memory):
    """Bytes of the cache's pages that are in memory."""
    count = 0
    with Path("/proc/self/pagemap").open("rb") as pages:
        for tensor in (*memory.suffixes.tensors, *memory.prefixes.tensors):
            pages.seek(tensor.data_ptr() // mmap.PAGESIZE * 8)
            found = pages.read(-(-tensor.nbytes // mmap.PAGESIZE) * 8)
            count += sum(entry >> 63 for (entry,) in struct.iter_unpack("=Q", found))
    return count * mmap.PAGESIZE


def test_a_prompt_read_before_is_not_read_again():
    prompt = list(range(1, 31))
    model, first = begun(prompt)
    beside = model.open([*prompt, 77])
    assert len(beside.ids) == 30
    model.free(first)
    again = model.open(prompt)
    assert len(again.ids) == 29
    read(model, [again, beside], [[30], [77]])


def test_a_long_prompt_outlives_others_that_begin_alike():
    model = ModelRunner(tiny_model("llama"), "tiny")
    for prompt in (list(range(1, 31)), [1, 99, 98], [1, 97]):
        row = model.open(prompt)
        model.last_outputs([row], [prompt[len(row.ids) :]])
        model.free(row)
    assert len(model.open(list(range(1, 31))).ids) == 29


def test_nan_stays_with_the_row_that_has_it():
    model, root = begun(broken=9)
    rows = [root, *(model.fork(root) for _ in range(3))]
    out = model.last_outputs(rows, [[9, 9, 9, 9], [4, 5, 6, 7], [5, 5, 5, 5], [9, 6, 7, 8]])
    assert out.isnan().any(-1).tolist() == [True, False, False, True]
    model.free(rows[0])
    model.free(rows[3])
    fresh = [model.fork(rows[1]), model.fork(rows[1]), model.open([7, 7])]
    read(model, [*rows[1:3], *fresh], [[11], [12], [13], [14], [7, 7]])
    model.truncate(rows[1], 5)
    assert model.last_outputs([rows[1]], [[9]]).isnan().any()
    model.truncate(rows[1], 5)  # a draft that was taken back
    read(model, [rows[1]], [[6]])
    alone = model.open([50, 51])
    model.last_outputs([alone], [[50]])
    assert model.last_outputs([alone], [[9]]).isnan().any()
    model.truncate(alone, 1)
    read(model, [alone], [[51]])
    assert model.last_outputs([alone], [[9]]).isnan().any()
    model.free(alone)
    again = model.open([50, 51, 52])
    assert again.ids == []
    read(model, [again], [[50, 51, 52]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grouped_attention_equals_dense_attention(architecture):
    """The same rows and pieces read both ways."""
    outputs = []
    for columns in (64, 0):
        model = ModelRunner(tiny_model(architecture, seed=3), "tiny", PassLimits(grouped_columns=columns))
        roots = [model.open([i] * (4 * i)) for i in (1, 2, 3, 5)]
        model.last_outputs(roots, [[i] * (4 * i) for i in (1, 2, 3, 5)])
        rows = [*roots, *(model.fork(roots[i]) for i in (0, 0, 0, 2, 1, 1))]
        seen = [model.last_outputs(rows, [[40 + i] for i in range(10)])]
        seen.append(model.last_outputs(rows[2:8], [[60 + i] * (1 + i % 3) for i in range(6)]))
        for row in (rows[0], rows[5]):
            model.free(row)
        seen.append(model.last_outputs([rows[4], rows[6], rows[9], rows[1]], [[70 + i] for i in range(4)]))
        outputs.append(torch.cat(seen))
        assert model.cache.network.groups_prefixes
    assert torch.allclose(*outputs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_side_by_side_of_one_length_need_no_masks(architecture, monkeypatch):
    """One token behind prompts of one length, also where a window (of 6 tokens) begins to hide some; ragged rows between."""
    model = ModelRunner(tiny_model(architecture), "tiny")
    made, real = [], slot_forward.build_metadata
    monkeypatch.setattr(slot_forward, "build_metadata", lambda *args, **own: made.append(real(*args, **own)) or made[-1])
    rows = [model.open([i, 7, 9]) for i in (3, 4, 5)]
    read(model, rows, [[i, 7, 9] for i in (3, 4, 5)])
    read(model, rows, [[6], [7], [8]])
    assert masked(made) == [True, False]
    read(model, [rows[0], rows[2]], [[1], [2]])  # not side by side
    read(model, rows, [[11], [12], [13]])  # not of one length
    assert masked(made) == [True, False, True, True]
    read(model, rows[1:2], [[5]])
    for i in range(5):
        read(model, rows, [[20 + i], [30 + i], [40 + i]])


def masked(passes):
    """For each pass whether masks were made for it."""
    return [any(masks.prefix.numel() for masks in metadata.masks.values()) for metadata in passes]


def test_common_length():
    for a, b, n in [
        ([], [1], 0),
        ([1], [1], 1),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([2], [1], 0),
        ([1] * 9 + [2], [1] * 12, 9),
    ]:
        assert common_length(a, b) == n == common_length(b, a) == common_length(tuple(a), b)


def test_context_limit_is_reported():
    model = ModelRunner(tiny_model("llama", context=32), "tiny")
    row = model.open([1] * 40)
    with pytest.raises(PromptError, match="at most 32"):
        model.last_outputs([row], [[1] * 40])


def test_siblings_that_are_new_to_a_value_share_their_prompt():
    value = tiny_value("scalar")
    siblings = [hypothesis("The movie was", f" {i} good", value.model) for i in range(4)]
    token_counter = siblings[0].token_counter
    siblings = [dataclasses.replace(h, token_counter=token_counter) for h in siblings]
    scores = value.score(siblings)
    assert value.model.model.peak_bytes < 0.7 * value.model.model.unshared_peak_bytes
    value.release([h.key for h in siblings])
    for h, expected in zip(siblings, scores, strict=True):
        value.model.reset_cache()
        assert value.score([h]) == pytest.approx([expected], abs=1e-4)
        value.release([h.key])


def test_networks_that_cache_something_else_attend_densely():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=257, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, initializer_range=0.3,
    )  # fmt: skip
    model = ModelRunner(DeepseekV3ForCausalLM(config).eval(), "deepseek")
    row = model.open([1, 2, 3, 4])
    model.last_outputs([row], [[1, 2, 3, 4]])
    read(model, [row, model.fork(row)], [[5], [6]])


def test_networks_with_softcapped_scores():
    """Gemma 2, which transformers runs eagerly; here by prefix groups, and not by the flash kernel."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=1.0, initializer_range=0.3,
    )  # fmt: skip
    model = ModelRunner(Gemma2ForCausalLM(config).eval(), "gemma2")
    wander(model, random.Random(0), 256, 2e-3)
    assert model.cache.network.groups_prefixes


def test_two_threads_and_the_users_own_passes():
    """The same network in two caches at once; afterwards it attends as before."""
    from concurrent.futures import ThreadPoolExecutor

    network = tiny_model("llama", seed=3)
    before, plain = network.config._attn_implementation, naive.outputs(network, [1, 2, 3])

    def work(token):
        model = ModelRunner(network, "tiny")
        row = model.open([1, token])
        for i in range(1, 30):
            out = model.last_outputs([row], [[1, token][len(row.ids) :] if i == 1 else [i]])
            compare(out[0], outputs_of(model, row.ids), 2e-3)
        assert model.cache.network.groups_prefixes

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, (4, 5)))
    assert network.config._attn_implementation == before
    assert torch.equal(naive.outputs(network, [1, 2, 3]), plain)


def test_equal_prompts_are_read_once():
    base = tiny_lm("base")
    prompt, n = "The movie was a great surprise", 6
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    done = dict(Searcher(TransformersEngine(base)).run([Request(Prompt(prompt), Search(), sampling, 0, i) for i in range(n)]))
    read = sum(c.usage.forward_tokens["base"] - c.usage.cached_tokens.get("base", 0) for c in done.values())
    length = len(base.tokenizer(prompt).input_ids)
    assert read == (length - 1) + n * 4  # the prompt but its last token once; then for each: that token and three more


def test_usage_is_what_was_read():
    """One prompt of T tokens: the prompt once, W·K continuations of every chunk, first tokens drawn from the parents' pass."""
    base = tiny_lm("base")
    value = tiny_value("scalar")
    search = Search(width=2, successors=3, chunk_length=4, value=value)
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    completion = dict(Searcher(TransformersEngine(base)).run([Request(Prompt("abcdef"), search, sampling)]))[0]
    assert completion.usage.forward_tokens["base"] == 6 + 6 * 3 + 2 + 6 * 3
    assert completion.usage.prompt_tokens == 6
    assert completion.usage.completion_tokens == 8
    assert completion.usage.forward_tokens["explicit"] <= 6 * (6 + 4) + 6 * 4


@given(st.lists(st.tuples(st.integers(1, 40), st.one_of(st.integers(1, 60), st.integers(1000, 6000))), min_size=1, max_size=30))
def test_blocks_of_suffixes_hold_every_row_and_read_little_more(runs):
    """Positions read, with what each block costs, are at most those of blocks of rows of one length."""
    lengths = [length for count, length in runs for _ in range(count)]
    blocks = forward_metadata.suffix_blocks(lengths)
    assert [row for first, end, _ in blocks for row in range(first, end)] == list(range(len(lengths)))
    assert all(longest == max(lengths[first:end]) for first, end, longest in blocks)
    assert all(end - first == 1 or longest * (end - first) <= forward_metadata.BLOCK_POSITIONS for first, end, longest in blocks)
    limit, cost = forward_metadata.BLOCK_POSITIONS, forward_metadata.BLOCK_COST
    apart = sum(count * length + math.ceil(count / max(1, limit // length)) * cost for count, length in runs)
    assert sum(longest * (end - first) + cost for first, end, longest in blocks) <= apart
    assert len(forward_metadata.suffix_blocks([16] * 256)) == 1
