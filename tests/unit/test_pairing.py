"""Pairs of rated responses: how many, which ones, which one is chosen, and length regressed out of the scores."""

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.errors import ConfigError
from ivg.settings.train import PairSettings, ValueSettings
from ivg.testing import byte_tokenizer
from ivg.training import encoding
from ivg.training.data import RatedResponse, pair_up, read_comparable, read_rated
from ivg.training.length import length_controlled
from ivg.training.pairing import compare, draw_pairs
from ivg.types import Preference, Prompt
from ivg.utils.jsonl import as_lines


def rated(prompt, *responses):
    return [RatedResponse(Prompt(prompt), text, float(score)) for text, score in responses]


def words(count, name="w"):
    return " ".join([name] * count)


RESPONSES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(-3, 3)), max_size=12)


@given(RESPONSES, st.integers(1, 30), st.sampled_from([0.0, 1.0, 2.5]), st.integers(0, 5))
@settings(deadline=None)
def test_drawn_pairs_are_different_and_as_many_as_there_are(responses, count, margin, seed):
    rows = rated("p", *responses)
    possible = {
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(rows), 2)
        if a.response != b.response and a.score != b.score and abs(a.score - b.score) >= margin
    }
    how = PairSettings(pairs_per_prompt=count, min_margin=margin)
    found = draw_pairs(rows, how, seed)
    assert len(found) == len(set(found)) == min(count, len(possible))
    assert set(found) <= possible
    assert draw_pairs(rows, how, seed) == found


@given(st.integers(2, 14), st.integers(1, 60), st.integers(0, 99))
@settings(deadline=None)
def test_each_response_is_in_about_as_many_pairs(responses, count, seed):
    rows = rated("p", *((words(k + 1), k) for k in range(responses)))
    found = draw_pairs(rows, PairSettings(pairs_per_prompt=count), seed)
    uses = Counter(i for pair in found for i in pair)
    assert max(uses.values()) - min(uses[i] for i in range(responses)) <= 2


def test_other_seeds_draw_other_pairs():
    rows = rated("p", *((str(k), k) for k in range(10)))
    draws = {tuple(draw_pairs(rows, PairSettings(pairs_per_prompt=5), seed)) for seed in range(20)}
    assert len(draws) > 15


def test_a_share_of_the_drawn_pairs_has_like_length():
    rows = rated("p", *((words(10 * 2**k + extra), 2 * k + extra) for k in range(6) for extra in (0, 1)))
    like = {(2 * k, 2 * k + 1) for k in range(6)}  # 10 and 11 words, 20 and 21, …: no others are within 20 %
    for share, least in ((0.5, 4), (1.0, 6)):  # of 8 pairs; there are no more than 6
        found = draw_pairs(rows, PairSettings(pairs_per_prompt=8, like_length=share), 1)
        assert len(found) == 8
        assert len(like & set(found)) >= least
    edge = rated("p", (words(4), 1), (words(5), 2), (words(6), 4))  # 4 of 5 is within 20 %, 5 of 6 too, 4 of 6 is not
    for seed in range(10):
        assert set(draw_pairs(edge, PairSettings(pairs_per_prompt=2, like_length=1.0), seed)) == {(0, 1), (1, 2)}


def test_the_defaults_pair_consecutive_responses_of_each_source():
    sources = [[row for k in range(30) for row in rated(f"p{k % 9}", (f"{s}-{k}", k % 4))] for s in "ab"]
    found = compare(sources, seed=3, eval_share=0.25, limit=25)
    assert found.pairs == [pair for rows in sources for pair in pair_up(rows, 3)][:25]
    in_order = list(dict.fromkeys(pair.prompt for pair in found.pairs))
    assert found.held_out == set(in_order[-round(0.25 * len(in_order)) :])
    assert found.rated == found.given == [row for rows in sources for row in rows if row.prompt in found.held_out]
    assert (found.provenance, found.metrics) == ({}, {})


def test_higher_scores_are_chosen_and_small_margins_left_out():
    rows = rated("p", ("a", 1), ("b", 3), ("c", 2), ("d", 2), ("e", 5), ("f", 4.5))
    found = compare([rows], PairSettings(label="higher"), eval_share=0)
    assert found.pairs == [Preference(Prompt("p"), "b", "a", 2.0), Preference(Prompt("p"), "e", "f", 0.5)]
    found = compare([rows], PairSettings(label="higher", min_margin=1), eval_share=0)
    assert [pair.chosen for pair in found.pairs] == ["b"]
    assert found.metrics == {"pairs_below_min_margin": 2}
    finished = [Preference(Prompt("p"), "a", "b", margin) for margin in (0.5, -2.0, 1.0)]
    assert compare([finished], PairSettings(min_margin=1), eval_share=0).pairs == finished[1:]
    for seed in range(5):
        drawn = compare([rows], PairSettings(pairs_per_prompt=9, label="higher"), seed=seed, eval_share=0).pairs
        assert len(drawn) == 9 and all(pair.margin > 0 for pair in drawn)


def test_labels_of_drawn_pairs_follow_the_scores():
    rows = [row for k in range(700) for row in rated(f"p{k}", ("a", 0), ("b", 1), ("c", 2))]
    pairs = compare([rows], PairSettings(pairs_per_prompt=3), seed=1, eval_share=0).pairs
    for apart, chance in ((1.0, 0.7311), (2.0, 0.8808)):
        of = [pair.margin > 0 for pair in pairs if abs(pair.margin) == apart]
        assert len(of) == (1400 if apart == 1 else 700)
        assert sum(of) / len(of) == pytest.approx(chance, abs=0.05)


def test_the_same_prompts_are_held_out_whatever_the_pairs():
    rows = [row for k in range(10) for row in rated(f"p{k}", ("a", 0), ("b b", k + 1), ("c c c", -k - 1))]
    for how in (
        PairSettings(pairs_per_prompt=2),
        PairSettings(pairs_per_prompt=3, min_margin=11),  # of p5 to p9 alone
        PairSettings(pairs_per_prompt=1, control_length=True),
    ):
        assert compare([rows], how, eval_share=0.3).held_out == {Prompt("p7"), Prompt("p8"), Prompt("p9")}
    some = compare([rows], PairSettings(pairs_per_prompt=2), eval_share=0.5, limit=7)  # of four prompts
    assert len(some.pairs) == 7 and some.held_out == {Prompt("p2"), Prompt("p3")}
    train, test = some.split()
    assert {pair.prompt for pair in train} == {Prompt("p0"), Prompt("p1")}
    assert len(train) + len(test) == 7 and len(some.rated) == 6


def test_length_is_regressed_out_within_prompts():
    """By hand: x = log(1 + words) is log 2 or log 4; the slope is (2 + 1) / 2 / log 2, so half of 1.5 comes off above and below."""
    rows = rated("p", (words(1), 0), (words(3), 2)) + rated("q", (words(1), 10), (words(3), 11))
    found, slope = length_controlled(rows)
    assert slope == pytest.approx(1.5 / math.log(2))
    assert [row.score for row in found] == pytest.approx([0.75, 1.25, 10.75, 10.25])
    alone, of_p = length_controlled(rows, {Prompt("q")})
    assert of_p == pytest.approx(2 / math.log(2))  # q does not enter the fit, and is corrected all the same
    assert [row.score for row in alone] == pytest.approx([1, 1, 11, 10])
    made = compare([rows], PairSettings(pairs_per_prompt=1, label="higher", control_length=True), eval_share=0.5)
    assert made.length_slope == made.metrics["length_slope"] == pytest.approx(of_p)
    assert [(pair.chosen, pair.margin) for pair in made.pairs if pair.prompt == Prompt("q")] == [(words(1), pytest.approx(1))]
    assert [row.score for row in made.rated] == pytest.approx([11, 10]) and [row.score for row in made.given] == [10, 11]
    with pytest.raises(ConfigError, match="no training prompt has responses of different lengths"):
        length_controlled(rated("p", ("a", 1), ("b", 2)) + rated("q", ("c d", 3)))


def test_scores_are_asked_for(tmp_path):
    pairs = [Preference(Prompt("p"), "a", "b")]
    for how in (PairSettings(pairs_per_prompt=2), PairSettings(label="higher"), PairSettings(control_length=True)):
        with pytest.raises(ConfigError, match=r"need scores of single responses.*\n  give rows with prompt, response, score"):
            compare([pairs], how)
    with pytest.raises(ConfigError, match="--min-margin needs scores"):
        compare([pairs], PairSettings(min_margin=1))
    with pytest.raises(ConfigError, match="no pair of different responses to one prompt whose scores differ by 3 or more"):
        compare([rated("p", ("a", 1), ("b", 2))], PairSettings(pairs_per_prompt=2, min_margin=3))
    with pytest.raises(ConfigError, match="--like-length is a share of drawn pairs"):
        PairSettings(like_length=0.5)
    with pytest.raises(ConfigError, match="leave out --control-length"):
        ValueSettings(target="binary", control_length=True)
    file = tmp_path / "imdb.jsonl"
    file.write_text(as_lines([{"prompt": "p", "responses": ["a", "b"], "scores": [9, -9], "chosen": 1}]))
    assert read_comparable(file) == [Preference(Prompt("p"), "b", "a", -18.0)]  # the data's own label, unless the scores are asked for
    assert read_comparable(file, by_score=True) == read_rated(file)


def test_a_response_in_many_pairs_is_tokenised_once():
    class Reader:
        def __init__(self):
            self.read = []

        def text(self, prompt, response):
            self.read.append(response)
            return f"{prompt.content}{response}"

        def ids(self, text):
            return [ord(c) for c in text]

    rows = rated("p", *((str(k), k) for k in range(6)))
    pairs = compare([rows], PairSettings(pairs_per_prompt=15, label="higher"), eval_share=0).pairs
    reader = Reader()
    found = encoding.encode_for_reward(pairs, reader, 99)
    assert sorted(reader.read) == [str(k) for k in range(6)]
    assert found == [{"chosen_ids": [ord(c) for c in "p" + p.chosen], "rejected_ids": [ord(c) for c in "p" + p.rejected]} for p in pairs]
    cut = Preference(Prompt("p"), "x", "y", None, False, True)
    whole = Preference(Prompt("p"), "x", "y")
    one, two = encoding.encode_preferences([cut, whole], byte_tokenizer(), None, 99)
    assert len(one["chosen_ids"]) == 1 and len(two["chosen_ids"]) == 2 and one["rejected_ids"] == two["rejected_ids"]
