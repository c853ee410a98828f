"""The loop and the selections with a fake engine: exact, and without torch."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from ivg.errors import ConfigError
from ivg.search import ranking
from ivg.search.methods import METHODS, get_method
from ivg.search.searcher import Particles, Rejection, Request, Search, Searcher
from ivg.testing import FakeEngine
from ivg.types import Prompt, SamplingParams
from ivg.types.steps import split_steps
from ivg.values.base import FunctionValue, combine_values
from ivg.values.process import StepLogProbs, StepReward

COUNT_A = FunctionValue(lambda p, r: r.count("a"))


class CountSteps(StepReward):
    """A step is right with probability e^-(letters without an a)."""

    def log_probabilities(self, pairs):
        steps = [split_steps(response, self.separator) for _, response in pairs]
        return [StepLogProbs([float(step.count("a") - len(step) - 99 * (not step)) for step in some], 1) for some in steps]


def run(engine, *requests, **settings):
    searcher = Searcher(engine, **settings)
    for r in requests:
        searcher.add(r)
    steps = []
    while searcher.busy:
        steps += searcher.step()
    return steps


def request(search, seed=0, trace=False, **sampling):
    return Request(Prompt("p"), search, SamplingParams(**{"max_new_tokens": 12, **sampling}), seed, trace=trace)


def completion(engine, search, seed=0, **sampling):
    return next(s.completion for s in run(engine, request(search, seed, **sampling)) if s.completion)


def test_no_torch():
    code = "import sys; import ivg.testing, ivg.search.searcher, ivg.search.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_top_is_stable():
    assert ranking.top([1, 3, 3, 2], 3) == [1, 2, 3]


def test_common_prefix():
    assert ranking.common_prefix(["abc", "abd", "ab"]) == "ab"
    assert ranking.common_prefix([]) == ""


@pytest.mark.parametrize("scale", [0.7, 1.0, 3.0])
def test_soft_selection_frequencies(scale):
    """Two of three without replacement: the first by weight, the second by weight among those left, by a number of its own."""
    from ivg.utils.rng import uniform

    counts = Counter(tuple(ranking.soft([0.0, 1.0, 2.0], 2, scale, lambda i, n=n: uniform(n, i))) for n in range(6000))
    weights = [math.exp(score / scale) for score in range(3)]
    for i, j in itertools.permutations(range(3), 2):
        chance = weights[i] / sum(weights) * weights[j] / (sum(weights) - weights[i])
        assert counts[i, j] / 6000 == pytest.approx(chance, abs=0.025)


def test_search_prefers_the_value():
    plain = sum(completion(FakeEngine(), Search(), s, ignore_eos=True).text.count("a") for s in range(20))
    best = sum(
        completion(FakeEngine(), Search(width=2, successors=4, chunk_length=2, value=COUNT_A), s, ignore_eos=True).text.count("a")
        for s in range(20)
    )
    assert best > 2.5 * plain


def test_score_is_the_value_of_the_text():
    got = completion(FakeEngine(), Search(width=3, successors=2, chunk_length=3, value=COUNT_A), 4)
    assert got.score == got.text.count("a")


def test_everything_is_released():
    engine = FakeEngine()
    run(
        engine,
        *(
            request(get_method(n).search({"explicit": COUNT_A, "implicit": COUNT_A}), seed)
            for n in ("base", "bon", "soft-bon", "cbs-explicit", "cd-blockwise", "cards", "smc", "adaptive", "rsd", "gsi", "mcts")
            for seed in range(5)
        ),
    )
    assert engine.held == set()


def end_early(text):
    """After an a, the text most likely ends."""
    return [1] * 8 + [40 if text.endswith("a") else 0]


def test_finished_hypotheses_compete_and_are_kept_once():
    """A finished best hypothesis stays; the other place goes on growing, and the best of all wins."""
    engine = FakeEngine(weights=end_early)
    steps = run(engine, request(Search(width=2, successors=3, chunk_length=2, value=FunctionValue(lambda p, r: -len(r))), 3, trace=True))
    for step in steps:
        keys = [n.key for n in step.kept]
        assert len(keys) == len(set(keys))
        texts = [(n.text, n.finish) for n in step.kept]
        assert len(texts) == len(set(texts))
    done = steps[-1].completion
    assert done.finish_reason == "stop"


def test_original_lets_copies_of_a_finished_hypothesis_fill_all_places():
    engine = FakeEngine(weights=end_early)
    value = FunctionValue(lambda p, r: 100.0 if r.endswith("a") else 0.0)

    def rounds(*, original):
        search = Search(width=2, successors=2, chunk_length=2, value=value, original=original)
        return [len(run(engine, request(search, s, max_new_tokens=40))) for s in range(10)]

    assert sum(rounds(original=True)) < sum(rounds(original=False))


@pytest.mark.parametrize("name", list(METHODS))
def test_committed_text_is_never_taken_back(name):
    values = {"explicit": COUNT_A, "implicit": COUNT_A, "reward": CountSteps("reward")}
    s = get_method(name, token="none") if METHODS[name].token else get_method(name)
    longest = 0
    for seed in range(5):
        committed = ""
        for step in run(FakeEngine(), request(s.search(values, combine_values), seed, stop=("cab", "bb"), max_new_tokens=30)):
            assert step.committed.startswith(committed)
            committed = step.committed
            longest = max(longest, len(committed))
            if step.completion:
                assert step.completion.text.startswith(committed)
                assert "bb" not in step.completion.text
    assert longest or s.chunk_until  # the letters have no line breaks, so four beams are equally good to the end


def test_a_round_without_requests_does_nothing():
    engine = FakeEngine()
    assert Searcher(engine).step() == []
    assert engine.calls == []


def test_single_beam_streams_every_round():
    steps = run(FakeEngine(), request(Search(), max_new_tokens=64, ignore_eos=True))
    assert [len(s.committed) for s in steps] == [16, 32, 48, 64]


def test_stop_strings_are_held_back():
    engine = FakeEngine("ab", weights=lambda t: [1, 0, 0] if len(t) % 16 != 15 else [0, 1, 0])
    first = run(engine, request(Search(), max_new_tokens=20, stop=("bc",)))[0]
    assert first.committed == "a" * 15


def test_requests_wait_for_room():
    engine = FakeEngine()
    searcher = Searcher(engine, max_beams=8)
    for seed in range(3):
        searcher.add(request(Search(width=2, successors=2, chunk_length=2, value=COUNT_A), seed))
    searcher.step()
    assert (searcher.live_requests, searcher.waiting_requests) == (2, 1)
    while searcher.busy:
        searcher.step()
    assert engine.held == set()


def test_cancelled_requests_vanish():
    engine = FakeEngine()
    searcher = Searcher(engine, max_beams=1)
    ids = [searcher.add(request(Search(), s)) for s in range(3)]
    searcher.step()
    for i in (*ids, 99):
        searcher.cancel(i)
    assert not searcher.busy
    assert len(engine.held) <= 2  # roots of requests that never ran hold nothing in a real engine


@pytest.mark.parametrize("length", [4, 20], ids=["short chunks", "chunks longer than a round"])
def test_trace_is_a_tree(length):
    search = Search(width=2, successors=3, chunk_length=length, value=COUNT_A)
    done = run(FakeEngine(), request(search, 2, trace=True, ignore_eos=True, max_new_tokens=3 * length))[-1].completion
    known = set()
    for i, step in enumerate(done.trace):
        assert len(step.kept) + len(step.dropped) <= 6
        assert len(step.kept) == 2
        for node in (*step.kept, *step.dropped):
            assert i == 0 or node.parent in known
            assert "".join(node.tokens) == node.text
        known = {n.key for n in step.kept}
    assert done.text in {n.text for n in done.trace[-1].kept}


@pytest.mark.parametrize("settings", [
    {"width": 2, "successors": 2, "rule": "soft"}, {"width": 2, "successors": 2, "decay": 0.5},
    {"rejection": Rejection(segment_entropy=2.1, segment_min=2, tries=5)}, {"width": 6, "particles": Particles()},
], ids=["soft", "adaptive", "cards", "smc"])  # fmt: skip
def test_same_seed_same_text_whatever_the_round_length(monkeypatch, settings):
    from ivg.search import searcher as module

    search = Search(chunk_length=7, value=COUNT_A, **settings)
    for seed in range(4):
        texts = set()
        for quantum in (1, 3, 16):
            monkeypatch.setattr(module, "QUANTUM", quantum)
            engine = FakeEngine(weights=doubtful)
            texts.add(completion(engine, search, seed, max_new_tokens=30).text)
            assert engine.held == set()
        assert len(texts) == 1


def doubtful(text):
    """Flat behind a vowel (2.2 nats), else sure of b."""
    return [1] * 9 if text[-1:] in ("a", "e") else [1, 9, 1, 1, 3, 1, 1, 1, 0]


@pytest.mark.parametrize("settings", [{"width": 0}, {"successors": 0}, {"chunk_length": 0}, {"soft_scale": 0}])
def test_impossible_settings_are_errors(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        get_method("ivg", **settings)
    if "soft_scale" not in settings:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Searcher(FakeEngine()).add(request(Search(**settings)))


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match=r"(?s)unknown method 'ivgg'.*cbs-implicit"):
        get_method("ivgg")
    with pytest.raises(ConfigError, match="unknown setting widht"):
        get_method("ivg", widht=3)
    with pytest.raises(ConfigError, match="needs the value explicit and implicit"):
        get_method("ivg").search({})
    with pytest.raises(ConfigError, match="no value to select by"):
        get_method("custom", width=2)


def test_a_request_ends_where_its_logprobs_are_refused():
    """An engine that gives them late, and refuses: this request has the error, and the others go on."""

    class Late(FakeEngine):
        logprobs_after_generation = True

        def logprobs(self, requests):
            raise ConfigError("at most 20")

    engine = Late()
    searcher = Searcher(engine)
    asked = Request(Prompt("x"), Search(), SamplingParams(max_new_tokens=3), alternatives=30)
    found = dict(searcher.run([asked, replace(asked, alternatives=None)]))
    assert found[0].finish_reason == "error" and found[0].error == "at most 20" and found[0].token_ids
    assert found[1].error is None and not searcher.busy and not engine.held
