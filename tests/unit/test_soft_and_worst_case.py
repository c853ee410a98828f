"""Soft selection of chunks and the worst case of several values: formulas by hand, distributions by enumeration."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from test_selection_rules import COUNT_A, answers

from ivg.errors import ConfigError
from ivg.search.methods import get_method
from ivg.testing import FakeEngine
from ivg.types import Prompt, SamplingParams
from ivg.values.base import CompositeValue, FunctionValue, WorstCaseValue, combine_values

pytestmark = pytest.mark.numerics

LENGTH = FunctionValue(lambda p, r: len(r), "length")


# Soft selection of chunks


def _chains(width, successors, scale, length):
    """The exact distribution of the answer of soft chunk selection, chunks of one letter out of two: every draw, one after the other."""
    first = dict.fromkeys(itertools.product("ab", repeat=width * successors), 0.0)
    for letters_ in first:
        first[letters_] = math.prod(2 / 3 if letter == "a" else 1 / 3 for letter in letters_)
    states = {("",): 1.0}
    for chunk in range(length):
        after = Counter()
        for kept, chance in states.items():
            parents = kept * (width * successors) if chunk == 0 else [beam for beam in kept for _ in range(successors)]
            for letters_, p in first.items():
                pool = [beam + letter for beam, letter in zip(parents, letters_, strict=True)]
                for chosen, q in _without_replacement([math.exp(soft_reward(text) / scale) for text in pool], width):
                    after[tuple(pool[i] for i in chosen)] += chance * p * q
        states = after
    answers_ = Counter()
    for kept, chance in states.items():
        answers_[kept[0]] += chance
    return answers_


def _without_replacement(weights, count, chosen=()):
    """(positions in order, probability) of every way to draw ``count`` of them."""
    if count == 0:
        yield chosen, 1.0
        return
    left = [i for i in range(len(weights)) if i not in chosen]
    for i in left:
        p = weights[i] / sum(weights[j] for j in left)
        for rest, q in _without_replacement(weights, count - 1, (*chosen, i)):
            yield rest, p * q


def soft_reward(text):
    return 1.0 * text.count("b") - 0.6 * text.count("bb") + 0.4 * text.count("aba")


@pytest.mark.parametrize("width,successors,length", [(1, 3, 3), (2, 2, 3)])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_soft_selection_of_chunks_has_the_enumerated_distribution(width, successors, length, scale):
    """W drawn of W*K without replacement, chunk after chunk: answers over many seeds against the sum over all draws."""
    engine, runs = FakeEngine("ab", lambda text: [2, 1, 0]), 3000
    search = get_method("cbs-soft", width=width, successors=successors, chunk_length=1, soft_scale=scale)
    search = search.search({"explicit": FunctionValue(lambda p, r: soft_reward(r))})
    counts = Counter(c.text for c in answers(engine, search, runs, max_new_tokens=length))
    expected = _chains(width, successors, scale, length)
    assert sum(expected.values()) == pytest.approx(1)
    chi = sum((counts[t] - runs * p) ** 2 / (runs * p) for t, p in expected.items())
    assert chi < len(expected) + 4 * math.sqrt(2 * len(expected))
    best = replace(search, rule="top")
    off = Counter(c.text for c in answers(engine, best, runs, max_new_tokens=length))
    assert sum((off[t] - runs * p) ** 2 / (runs * p) for t, p in expected.items()) > 100  # the test can fail


# Worst case of several values


def test_worst_case_by_hand():
    """(V_a, V_length): aab (2, 3), b (0, 1), aaaa (4, 4); min(V_a, 0.5 * (V_length - 1)): 1, 0, 1.5."""
    texts = ["aab", "b", "aaaa"]
    beams = [FakeEngine().open(Prompt("p"), SamplingParams()) for _ in texts]
    beams = [replace(b, text=text, token_ids=tuple(range(len(text)))) for b, text in zip(beams, texts, strict=True)]
    assert WorstCaseValue([(1.0, COUNT_A), (0.5, LENGTH)], reference=[0.0, 1.0]).score(beams) == [1.0, 0.0, 1.5]
    assert WorstCaseValue([(1.0, COUNT_A), (0.5, LENGTH)]).score(beams) == [1.5, 0.0, 2.0]
    assert WorstCaseValue([(1.0, COUNT_A), (-1.0, LENGTH)]).score(beams) == [-3.0, -1.0, -4.0]
    assert CompositeValue([(1.0, COUNT_A), (0.5, LENGTH)]).score(beams) == [3.5, 0.5, 6.0]


def test_the_worst_case_is_the_least_weighted_sum_of_the_simplex():
    """As RMOD's inner problem: over weights that sum to 1 the least sum puts all of them on one value."""
    scores = [1.5, -0.25, 0.75]
    simplex = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(21) for j in range(21 - i)]
    least = min(sum(w * s for w, s in zip(weights, scores, strict=True)) for weights in simplex)
    (beam,) = [FakeEngine().open(Prompt("p"), SamplingParams())]
    value = WorstCaseValue([(1.0, FunctionValue(lambda p, r, s=s: s)) for s in scores])
    assert value.score([beam]) == [pytest.approx(least)]


def test_search_by_the_worst_case_balances_what_a_sum_does_not():
    """Twice the a's and the b's: the sum takes a alone, the worst of both as many of each."""
    values = {"a": FunctionValue(lambda p, r: 2.0 * r.count("a")), "b": FunctionValue(lambda p, r: r.count("b"))}
    settings = {"width": 1, "successors": 30, "chunk_length": 2, "select_weights": "a=1,b=1"}
    got = {}
    for how in ("sum", "min"):
        search = get_method("custom", **settings, select_combine=how).search(values, combine_values)
        (done,) = answers(FakeEngine("ab"), search, 1, max_new_tokens=6)
        got[how] = done
    assert got["sum"].text == "aaaaaa"
    assert got["min"].text.count("a") in (2, 3)
    assert got["min"].score == min(2 * got["min"].text.count("a"), got["min"].text.count("b")) >= 3
    assert get_method("rmod").search({"implicit": COUNT_A, "explicit": LENGTH}, combine_values).value.name == "min(1*implicit, 1*explicit)"


@pytest.mark.parametrize("settings,words", [
    ({"select": "explicit", "select_combine": "min"}, "worst of several values"),
    ({"select_weights": "a=1,b=1", "select_reference": "a=1"}, "changes no selection"),
    ({"select_weights": "a=1,b=1", "select_combine": "min", "select_reference": "c=1"}, "expected names of select_weights: a, b"),
    ({"select_weights": "a=1", "select_combine": "max"}, "sum or min"),
    ({"select_weights": "a=1", "select_combine": "min", "select_reference": "a=1e300"}, "within 1e9"),
])  # fmt: skip
def test_impossible_combinations_are_errors(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_method("custom", **settings)


def test_one_value_takes_the_place_of_several():
    assert get_method("rmod", select="explicit", select_combine="sum").selectors == (("explicit", 1.0),)
    assert get_method("rmod", select_weights="a=1,b=2", select_reference="a=0.5").needs == {"a", "b"}


@pytest.mark.parametrize("bad", [{"parts": []}, {"reference": [1.0]}, {"reference": [1.0, math.nan]}])
def test_unusable_worst_cases_are_errors(bad):
    with pytest.raises(ConfigError):
        WorstCaseValue(**{"parts": [(1.0, COUNT_A), (1.0, LENGTH)], **bad})
