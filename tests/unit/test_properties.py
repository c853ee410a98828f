"""Properties of the pure pieces, on random input."""

from itertools import takewhile

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.engines.transformers.sampling import keep_top_p, sample_from_logits
from ivg.models.cache import common_length
from ivg.models.vocabulary import Vocabulary
from ivg.search import ranking
from ivg.search.particles import normalised
from ivg.search.selection import budgets
from ivg.testing import EOS, byte_tokenizer
from ivg.types import DecodeState
from ivg.utils.rng import child_rng_path, uniform

VOCABULARY = Vocabulary(byte_tokenizer([("t", "h"), ("Ġ", "w")]))
ids = st.lists(st.integers(0, 3), max_size=30)
numbers = st.lists(st.floats(-50, 50), min_size=1, max_size=20)


@given(ids, ids)
def test_common_length(a, b):
    assert common_length(a, b) == sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(st.lists(st.text("ab", max_size=8), min_size=1, max_size=5))
def test_common_prefix(texts):
    prefix = ranking.common_prefix(texts)
    assert all(t.startswith(prefix) for t in texts)
    longer = [t[: len(prefix) + 1] for t in texts]
    assert len(set(longer)) > 1 or longer[0] == prefix


@given(numbers, st.integers(1, 25))
def test_top_keeps_the_best(scores, width):
    kept = ranking.top(scores, width)
    assert len(kept) == len(set(kept)) == min(width, len(scores))
    assert sorted((scores[i] for i in kept), reverse=True) == sorted(scores, reverse=True)[:width]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 6), st.floats(0.05, 1))
def test_budgets_are_exact_and_fall(chunks, successors, width, decay):
    got = budgets(chunks, width * successors, decay, width)
    assert sum(got) == chunks * width * successors
    assert len(got) == chunks
    assert got == sorted(got, reverse=True)
    assert min(got) >= width
    assert budgets(chunks, width * successors, 1.0, width) == [width * successors] * chunks


@given(numbers, st.integers(1, 40), st.floats(0, 1, exclude_max=True))
def test_systematic_resampling_is_as_near_as_whole_numbers_can_be(log_weights, count, u):
    weights = normalised(log_weights)
    chosen = ranking.systematic(weights, count, u)
    assert len(chosen) == count
    assert chosen == sorted(chosen)
    for i, weight in enumerate(weights):
        assert abs(chosen.count(i) - count * weight) < 1 + 1e-6


@given(numbers, st.integers(1, 25), st.floats(0.01, 10), st.integers(0, 1 << 40))
def test_soft_draws_without_replacement(scores, width, scale, seed):
    kept = ranking.soft(scores, width, scale, lambda i: uniform(seed, i))
    assert len(kept) == len(set(kept)) == min(width, len(scores))


@settings(deadline=None)
@given(  # the name of a special token is that token, not text; hypothesis knows the strings of our code
    st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=12).filter(lambda t: EOS not in t)
)
def test_streamed_text_is_the_text(text):
    """Token by token, every piece is whole characters, and together they are the text."""
    tokens = VOCABULARY.tokenizer(text, add_special_tokens=False).input_ids
    state, out = DecodeState(), ""
    for end in range(1, len(tokens) + 1):
        new, state = VOCABULARY.continue_text(tokens[:end], state)
        out += new
        assert text.startswith(out)
    assert out == text


@settings(deadline=None)
@given(numbers, st.floats(0.05, 0.99))
def test_top_p_is_the_smallest_sufficient_set(logits, p):
    row = torch.tensor([logits])
    kept = keep_top_p(row, p)[0] > -torch.inf
    mass = row[0].double().softmax(-1)
    assert mass[kept].sum() >= p - 1e-5
    assert mass[kept].sum() - mass[kept].min() < p + 1e-5


@settings(deadline=None)
@given(numbers, st.floats(0, 1, exclude_max=True))
def test_draws_stay_in_the_vocabulary(logits, u):
    picked = int(sample_from_logits(torch.tensor([logits]), [u])[0])
    assert 0 <= picked < len(logits)


@given(st.integers(0, 1 << 63), st.integers(0, 1000), st.integers(1, 64))
def test_children_have_lineages_of_their_own(rng_path, position, count):
    assert child_rng_path(rng_path, position, 0) == rng_path
    assert len({child_rng_path(rng_path, position, k) for k in range(count)}) == count
