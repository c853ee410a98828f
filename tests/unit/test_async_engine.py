"""Engines whose orders end each at its own time: the same answers, nobody waits for another, everything is given up and freed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from test_search import COUNT_A, CountSteps, request, run

from ivg.errors import ConfigError
from ivg.search.methods import METHODS
from ivg.search.searcher import Search, Searcher
from ivg.testing import AsyncFakeEngine, FakeEngine
from ivg.values.base import combine_values

VALUES = dict.fromkeys(("implicit", "explicit", "arm", "contrast"), COUNT_A) | {"reward": CountSteps("reward")}


def answers(engine, requests):
    return {i: (c.text, c.token_ids, c.score, c.finish_reason) for i, c in Searcher(engine).run(requests)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_same_answers_at_any_pace(name):
    search = METHODS[name].search(VALUES, combine_values)
    requests = [request(search, seed, stop=("cab",), max_new_tokens=20 + 7 * seed) for seed in range(4)]
    paced = AsyncFakeEngine()
    assert answers(paced, requests) == answers(FakeEngine(), requests)
    assert not paced.held


def test_no_request_waits_for_another():
    requests = [
        request(Search(width=2, successors=2, chunk_length=2, value=COUNT_A), s, max_new_tokens=40, ignore_eos=True) for s in range(6)
    ]
    searcher, boards, ahead = Searcher(AsyncFakeEngine()), Counter(), 0
    for r in requests:
        searcher.add(r)
    while searcher.busy:
        for step in searcher.step():
            boards[step.request] += bool(step.kept)
        ahead = max(ahead, max(boards.values(), default=0) - min(boards[i] for i in range(6)))
    assert ahead >= 3
    assert set(boards.values()) == {20}


def test_watched_text_grows_inside_a_chunk_and_is_never_taken_back():
    watched = [replace(request(Search(), s, max_new_tokens=60, ignore_eos=True, stop=("hh",)), stride=1) for s in range(6)]
    searcher, texts = Searcher(AsyncFakeEngine()), {}
    for r in watched:
        texts[searcher.add(r)] = []
    while searcher.busy:
        for step in searcher.step():
            texts[step.request].append(step.completion.text if step.completion else step.committed)
    assert sum(len({*seen}) >= 2 for seen in texts.values()) >= 2
    for (_, seen), r in zip(texts.items(), watched, strict=True):
        assert all(later.startswith(sooner) for sooner, later in pairwise(seen))
        (alone,) = [s.completion.text for s in run(FakeEngine(), r) if s.completion]
        assert seen[-1] == alone


def test_cancelling_gives_the_orders_up():
    engine = AsyncFakeEngine()
    searcher = Searcher(engine)
    search = Search(width=3, successors=3, chunk_length=4, value=COUNT_A)
    numbers = [searcher.add(request(search, s, max_new_tokens=40, ignore_eos=True)) for s in range(5)]
    for _ in range(4):
        searcher.step()
    for number in numbers:
        searcher.cancel(number)
    assert engine.given_up
    assert not engine.held and not searcher.busy
    assert engine.collect() == []


def test_an_abandoned_loop_does_not_affect_later_ones():
    engine = AsyncFakeEngine()
    search = Search(width=3, successors=3, chunk_length=4, value=COUNT_A)
    abandoned = Searcher(engine)
    numbers = [abandoned.add(request(search, s, max_new_tokens=40, ignore_eos=True)) for s in range(4)]
    abandoned.step()
    wanted = [request(search, s, max_new_tokens=20) for s in range(3)]
    assert answers(engine, wanted) == answers(FakeEngine(), wanted)
    for number in numbers:
        abandoned.cancel(number)
    assert not engine.held  # what came of the first loop's requests meanwhile, too
    assert not engine.running and engine.collect() == []


def test_unsupported_features_are_errors_before_anything_runs():
    class Lacking(FakeEngine):
        unsupported = {"ignore_eos": "another engine can"}  # noqa: RUF012

    engine = Lacking()
    with pytest.raises(ConfigError, match="ignore_eos: the engine fake cannot do that\n  another engine can"):
        Searcher(engine).add(request(Search(), ignore_eos=True))
    assert not engine.held
