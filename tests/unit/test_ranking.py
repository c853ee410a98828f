"""Metrics of a reward on rated responses and preferences, each by hand."""

import math

import numpy as np
import pytest

from ivg.diagnostics.ranking import all_pairs, like_length, pair_accuracies, spearman_within
from ivg.training.data import RatedResponse
from ivg.training.ranking import ranking
from ivg.types import Preference, Prompt


def words(count, name):
    return " ".join([name] * count)


def test_pairs_are_of_one_prompt_with_different_texts_and_scores():
    scores = np.array([1.0, 3.0, 3.0, 5.0, 2.0])
    found = all_pairs(scores, np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 4]))
    assert sorted(zip(found.better, found.worse, found.margin, found.groups, strict=True)) == [
        (1, 0, 2.0, 0),
        (2, 0, 2.0, 0),
        (3, 4, 3.0, 1),
    ]
    assert len(all_pairs(scores, np.zeros(5, int), np.zeros(5, int)).better) == 0  # all the same text
    assert len(all_pairs(np.zeros(0), np.zeros(0, int), np.zeros(0, int)).better) == 0


def test_word_counts_within_a_fifth():
    assert like_length(np.array([8.0, 10, 7, 0]), np.array([10.0, 8, 10, 0])).tolist() == [True, True, False, True]


def test_accuracies_by_hand():
    """Scores 0, 1, 3; words 10, 9, 20. Pairs (better, worse): (1, 0) by 1: not clear; (2, 0) by 3; (2, 1) by 2: both clear."""
    prompt = Prompt("p")
    rows = [RatedResponse(prompt, words(n, c), s) for n, c, s in ((10, "a", 0.0), (9, "b", 1.0), (20, "c", 3.0))]
    scores = dict(zip([(prompt, r.response) for r in rows], (0.0, 5.0, 2.0), strict=True))
    found = ranking(rows, {"reward": scores})
    rates = {kind: {k: v["rate"] for k, v in part.items() if k in ("reward", "length")} for kind, part in found.items() if "pairs" in kind}
    assert [found[kind]["count"] for kind in ("pairs", "clear_pairs", "clear_pairs_of_like_length")] == [3, 2, 0]
    assert rates["pairs"] == {"reward": pytest.approx(2 / 3, abs=1e-5), "length": pytest.approx(2 / 3, abs=1e-5)}
    assert rates["clear_pairs"] == {"reward": 0.5, "length": 1.0}
    assert found["clear_pairs_of_like_length"] == {"count": 0}
    # ranks of scores 1 2 3, of rewards 1 3 2, of lengths 2 1 3: Spearman 1 - 6·2 / (3·8)
    assert found["spearman_within_prompts"] == {"prompts": 1, "reward": 0.5, "length": 0.5}


def test_clear_pairs_of_like_length_by_hand():
    p, q = Prompt("p"), Prompt("q")
    rows = [RatedResponse(p, words(10, "a"), 0.0), RatedResponse(p, words(9, "b"), 2.0), RatedResponse(q, words(5, "c"), 4.0)]
    rows += [RatedResponse(q, words(5, "d"), 1.0), RatedResponse(q, words(5, "e"), 1.0)]
    rewards = {"reward": {(r.prompt, r.response): s for r, s in zip(rows, (0.0, 1.0, 1.0, 1.0, 0.0), strict=True)}}
    found = ranking(rows, rewards)
    like = found["clear_pairs_of_like_length"]
    assert like["count"] == 3  # 9 of 10 words; twice 5 of 5
    assert like["reward"]["rate"] == pytest.approx((1 + 0.5 + 1) / 3, abs=1e-5)  # equal rewards count half
    assert like["length"]["rate"] == pytest.approx((0 + 0.5 + 0.5) / 3, abs=1e-5)
    assert like["reward"]["low"] < like["reward"]["rate"] < like["reward"]["high"]
    # q: scores 4 1 1 have the ranks 3 1.5 1.5, rewards 1 1 0 have 2.5 2.5 1; equal lengths have 0
    of_q = np.corrcoef([3, 1.5, 1.5], [2.5, 2.5, 1])[0, 1]
    assert found["spearman_within_prompts"] == {
        "prompts": 2,
        "reward": pytest.approx((1 + of_q) / 2, abs=1e-5),
        "length": pytest.approx((-1 + 0) / 2, abs=1e-5),
    }


def test_preferences_have_no_clear_pairs_without_margins():
    p = Prompt("p")
    pairs = [Preference(p, words(3, "a"), words(2, "b")), Preference(p, words(2, "b"), words(9, "c"))]
    rewards = {"reward": {(p, words(3, "a")): 1.0, (p, words(2, "b")): 0.0, (p, words(9, "c")): 1.0}}
    found = ranking([], rewards, pairs)
    assert list(found) == ["pairs"]
    assert (found["pairs"]["count"], found["pairs"]["reward"]["rate"], found["pairs"]["length"]["rate"]) == (2, 0.5, 0.5)
    known = [Preference(p, pair.chosen, pair.rejected, margin) for pair, margin in zip(pairs, (1.5, -0.5), strict=True)]
    found = ranking([], rewards, known)
    assert found["clear_pairs"]["count"] == 1 and found["clear_pairs"]["reward"]["rate"] == 1.0


def test_groups_of_equal_scores_have_no_rank_correlation():
    scores, groups = np.array([1.0, 1.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
    found = spearman_within(scores, groups, {"x": np.array([1.0, 2.0, 2.0, 1.0]), "constant": np.zeros(4)})
    assert found == {"prompts": 1, "x": -1.0, "constant": 0.0}
    assert spearman_within(scores[:2], groups[:2], {"x": scores[:2]}) == {"prompts": 0}
    none = all_pairs(scores[:2], groups[:2], np.array([0, 1]))
    assert pair_accuracies(none, scores, {"x": scores})["pairs"] == {"count": 0}
    assert not math.isnan(found["x"])
